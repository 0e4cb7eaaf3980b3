"""Passes on a CPU that are called again, at the addresses of other tensors, say what they would say the first time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from ssdops import masks, ssd
from ssdops.backends.tvm import backend, threads
from ssdops.backends.tvm.backend import Tvm

if not backend.installed().ok or not threads.of_torch():
    pytest.skip("passes are called again on torch's threads alone; conformance covers others", allow_module_level=True)

from ssdops.backends.tvm import passes, replay

pytestmark = pytest.mark.tvm
KINDS = (
    "plain", "shared", "strided", "misaligned", "half", "half logs", "double", "state", "scaled", "without decay", "anticausal",
)  # fmt: skip


def leaves(kind: str, seed: int, seqlen: int = 70) -> list[Tensor]:
    """q, k, v, log decays and initial states."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, seqlen, 2, 7, generator=draw) for _ in range(2))
    v, log_a = torch.randn(2, seqlen, 4, 5, generator=draw), -torch.rand(2, seqlen, 4, generator=draw)
    state = torch.randn(2, 4, 5, 7, generator=draw)
    if kind == "strided":
        q, v = q.transpose(2, 3).contiguous().transpose(2, 3), torch.stack((v, v), -1)[..., 0]
    if kind == "half":
        q, k, v = (x.bfloat16() for x in (q, k, v))
    if kind == "half logs":
        log_a = log_a.bfloat16()
    if kind == "double":
        q, k, v, log_a, state = (x.double() for x in (q, k, v, log_a, state))
    if kind == "misaligned":
        q, log_a = (torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) for x in (q, log_a))
    return [x.requires_grad_() for x in (q, k, v, log_a, state)]


def results(kind: str, given: list[Tensor], backend: str = "tvm") -> list[Tensor]:
    """Y, states and gradients."""
    q, k, v, log_a, state = given
    mask = masks.causal() if kind == "without decay" else masks.decay(log_a)
    if kind == "scaled":
        mask = mask.scale(rows=log_a, log_cols=log_a)
    if kind == "anticausal":
        mask = mask.T
    k = q if kind == "shared" else k
    with_states = kind == "state"
    out = ssd(q, k, v, mask, initial_state=state if with_states else None, return_state=with_states, backend=backend)
    made = list(out) if with_states else [out]
    total = sum((x.float().square().sum() for x in made), torch.zeros(()))
    return [*made, *[x for x in torch.autograd.grad(total, given, allow_unused=True) if x is not None]]


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function after which a pass that is not made again fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("this pass was made before")

    return lambda: monkeypatch.setattr(passes, "complete", refuse)


@pytest.mark.parametrize("kind", KINDS)
def test_another_call_says_what_it_would_say_first(kind: str, monkeypatch: pytest.MonkeyPatch, again: Any) -> None:
    """To the bit, and with tensors that lie elsewhere."""
    monkeypatch.setattr(replay, "_replays", {})
    wanted = results(kind, leaves(kind, 1))
    replay._replays.clear()
    results(kind, leaves(kind, 0))  # compiles, and is noted
    again()
    found = results(kind, leaves(kind, 1))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.t().contiguous(),
        lambda x: x.to(torch.float64),
        lambda x: x.add_(1),
        lambda x: x.__setitem__(0, 1.0),
        torch.sum,
    ],
    ids=["copy", "cast", "in place", "part", "sum"],
)
def test_what_torch_does_in_between_is_seen(ask: Callable[[Tensor], object]) -> None:
    """Not that a tensor is made, or looked at in another way; and what torch fills is known."""
    with replay.Watch() as watch:
        made = torch.empty(2, 3)
        made.view(3, 2).transpose(0, 1)[1:].to(made.dtype).data_ptr()
        assert watch.idle and not watch.filled
        filled = torch.zeros(2)
        assert watch.idle and watch.filled[0] is filled
        ask(made)
    assert not watch.idle


@pytest.mark.parametrize("shape", [(3,), (1, 2, 1), (5, 1, 64, 2), (2, 70, 4, 5), (64, 8, 3, 1, 7)])
def test_new_tensors_lie_in_order(shape: tuple[int, ...]) -> None:
    """Programs fill them so, whatever torch made of a tensor that has hardly any memory."""
    made = torch.empty_like(replay.like(torch.empty(shape)))
    assert made.shape == shape and made.is_contiguous() and made.untyped_storage().nbytes() == 4 * made.numel()


def test_many_logs_are_made_wide_by_all_threads(monkeypatch: pytest.MonkeyPatch, again: Any) -> None:
    """A pass that is called again does by itself what torch did the first time."""
    monkeypatch.setattr(replay, "_replays", {})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        given = leaves("plain", 4, 5001)
        assert given[3].numel() >= 32768  # as threads.c has it
        wanted = results("plain", given)
        again()
        assert all(torch.equal(x, y) for x, y in zip(results("plain", given), wanted, strict=True))
    finally:
        torch.set_num_threads(before)


def test_a_forward_pass_leaves_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the backward pass reads the parts, the first time and again: as much as states, scores, lines and E take."""
    monkeypatch.setattr(replay, "_replays", {})
    kept, backward = [], Tvm.backward

    def noted(self: Tvm, term: Any, x: Any, config: Any, cotangents: Any) -> Any:
        kept.append((config.chunk_size, cotangents.saved))
        return backward(self, term, x, config, cotangents)

    monkeypatch.setattr(Tvm, "backward", noted)
    given = leaves("plain", 5)
    for _ in range(2):
        results("plain", given)
    for chunk, (whole,) in kept:
        slots = 2 * -(-70 // chunk)  # all of a row are one segment
        starts, scores, lines, total = 2 * 4 * 7 * 5 * 4, slots * 2 * chunk**2 * 4, slots * 4 * 8 * chunk * 8, slots * 4 * 8
        assert 0 <= whole.nbytes - (starts + scores + lines + total) < 4 * replay.ALIGNED
    assert len(kept) == 2


def test_tensors_that_are_one_are_told_apart_from_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call with q for k is no call with two tensors."""
    monkeypatch.setattr(replay, "_replays", {})
    given = leaves("plain", 2)
    for kind in ("shared", "plain", "shared", "plain"):
        for x, y in zip(results(kind, given), results(kind, given, "chunked"), strict=True):
            assert (x - y).abs().max() <= 1e-4 * y.abs().max()


def test_threads_of_python_do_not_meet(again: Any) -> None:
    """Each call has addresses of its own."""
    given = [leaves("plain", seed, 300) for seed in range(8)]
    wanted = [results("plain", x) for x in given]
    again()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(lambda x: results("plain", x), given), wanted, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_program_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called by itself, where what it says is read."""
    monkeypatch.setattr(replay, "_replays", {})
    given = leaves("plain", 3)
    wanted = results("plain", given)
    (first, *_), called = replay._replays.values(), []
    monkeypatch.setattr(first, "run", lambda *_: called.append(1) or -1)
    assert all(torch.equal(x, y) for x, y in zip(results("plain", given), wanted, strict=True)) and called
    assert first not in replay._replays.values()


def test_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_replays", {})
    monkeypatch.setattr(replay, "MOST", 2)
    for seqlen in range(70, 76):
        results("plain", leaves("plain", 0, seqlen))
        assert len(replay._replays) <= 2
