"""Cases that broke once, each by itself; the laws of `ssdops.testing` are where they belong in general."""

from itertools import pairwise

import pytest
import torch

from ssdops import masks as m
from ssdops import ssd

BACKENDS = ("naive", "recurrent", "chunked")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_documents_of_unequal_length(backend):
    """The states at a span's end are of all documents, not only of those that run on."""
    cuts = [0, 3, 8, 10, 16]
    log_a = -normal(1, 16, 2, seed=1).abs()
    x = normal(1, 16, 2, 3).requires_grad_()
    chunk = {"chunk_size": 4} if backend == "chunked" else {}
    packed = ssd(x, x, x, m.decay(log_a) * m.documents(torch.tensor(cuts)), backend=backend, **chunk)
    pieces = [ssd(x[:, i:j], x[:, i:j], x[:, i:j], m.decay(log_a[:, i:j]), backend="recurrent") for i, j in pairwise(cuts)]
    weight = normal(*packed.shape, seed=2)
    (of_packed,) = torch.autograd.grad((packed * weight).sum(), x)
    (of_pieces,) = torch.autograd.grad((torch.cat(pieces, 1) * weight).sum(), x)
    torch.testing.assert_close(of_packed, of_pieces)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shifted", [False, True])
def test_a_decay_that_nothing_passes_has_no_gradient(backend, shifted):
    """Of one token, the decay scales only the initial state; its gradient used to be what rounding left of a difference."""
    log_a = torch.tensor([[[-0.5]]], requires_grad=True)
    q, k, v = (normal(1, 1, 1, 5, seed=s) for s in range(3))
    mask = m.decay(log_a).shift(1) if shifted else m.decay(log_a)
    y, state = ssd(q, k, v, mask, backend=backend, return_state=True)
    (grad,) = torch.autograd.grad((y * normal(*y.shape)).sum() + (state * normal(*state.shape)).sum(), log_a)
    assert grad.item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turn", [lambda mask: mask, lambda mask: mask.T])
def test_a_log_that_is_not_finite_stays_in_its_document(backend, turn):
    """Sums of logs over a whole row carried NaN into the documents after it."""
    log_a = -normal(1, 70, 2).abs()
    spoilt = log_a.clone()
    spoilt[:, 30] = torch.nan
    cu = torch.tensor([0, 20, 45, 70])
    x = normal(1, 70, 2, 3)
    fine, bad = (ssd(x, x, x, turn(m.decay(a)) * m.documents(cu), backend=backend) for a in (log_a, spoilt))
    assert bad[:, 20:45].isnan().any()
    torch.testing.assert_close(bad[:, :20], fine[:, :20], rtol=0, atol=0)
    torch.testing.assert_close(bad[:, 45:], fine[:, 45:], rtol=0, atol=0)


def test_reversed_segment_ids_keep_their_numbers():
    """States are in the order of segments along the sequence, whichever of the ids occur."""
    x = normal(1, 2, 1, 2)
    ids = torch.tensor([[0, 0]])
    mask = (m.causal() * m.documents(segment_ids=ids, n_segments=3)).reverse()
    _, states = ssd(x, x, x, mask, return_state=True)
    assert [bool(s.abs().sum() > 0) for s in states] == [False, False, True]


def test_autocast_does_not_reach_inside():
    """Only q, k and v are cast: what accumulates does so in float32."""
    q, k, v, log_a = normal(1, 9, 1, 4), normal(1, 9, 1, 4, seed=1), normal(1, 9, 2, 3, seed=2), -normal(1, 9, 2).abs()
    low = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ssd(q, k, v, m.decay(log_a), backend="chunked")
    torch.testing.assert_close(cast, ssd(*low, m.decay(log_a), backend="chunked"), rtol=0, atol=0)


@pytest.mark.parametrize("shifted", [False, True])
def test_strong_decays_keep_their_gradient(shifted):
    """A pair (i, i), and when shifted (i, i − 1), has no decay between its tokens: left in, its rounding drowns the rest."""
    q, k, v = (normal(1, 64, 2, 8, seed=s) for s in range(3))
    weight, found = normal(1, 64, 2, 8, seed=3), []
    for backend in ("chunked", "recurrent"):
        log_a = torch.full((1, 64, 2), -15.0, requires_grad=True)
        mask = m.decay(log_a).shift(1) if shifted else m.decay(log_a)
        (grad,) = torch.autograd.grad((ssd(q, k, v, mask, backend=backend) * weight).sum(), log_a)
        found.append(grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5 * found[1].abs().max().item())
