"""Log-linear attention on the Triton backend, in Triton's interpreter: the laws, and trees of several passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssdops import explain, masks, ssd
from ssdops.errors import UnsupportedError
from ssdops.ir.problem import fenwick_levels
from ssdops.masks import Mask
from ssdops.testing import Conformance, laws
from ssdops.testing.case import Case
from ssdops.testing.laws import Runner
from ssdops.testing.source import Source
from ssdops.testing.strategies import QUADRATIC, SCANS, scaled

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here; test_cuda_fenwick.py has these"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]


def fenwick(s: Source) -> Mask:
    """A Fenwick mask, alone or times a scan, strict, turned, scaled or not."""
    mask = QUADRATIC["fenwick"](s)
    mask = mask * SCANS[s.pick(list(SCANS))](s) if s.chance(3) else mask
    mask = mask.strict() if s.chance(4) else mask
    mask = mask.reverse() if s.chance(4) else mask
    if s.chance(4):
        mask = mask.T.scale(rows=s.token(), cols=s.token()) if s.chance(3) else mask.T
    elif s.chance(3):
        mask = scaled(s, mask)
    return -mask if s.chance(6) else mask


class TestFenwick(Conformance):
    backend = "triton"
    has_states = False
    make_mask = fenwick
    rounds_operands = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    chunk_sizes = (32, 64)
    share = 0.2

    def test_documents_equal_separate_runs(self) -> None:
        """There are none: see `test_what_is_refused`."""

    def test_poison_stays_in_its_document(self) -> None:
        """As above."""


STRENGTHS = {
    "mixed": (-1e4, -20.0, -1e-7, 0.0, 0.02),
    "strong": (-1e4, -300.0),
    "weak": (-1e-7, -1e-9),
    "growing": (0.1, 0.01),
}


def case_of(seqlen: int, strength: str, dims: tuple[int, int] = (3, 2), heads: tuple[int, int, int] = (1, 1, 2)) -> Case:
    """dstate and headdim; heads of q, k and v; each log decay is one of the strength's by chance."""
    generator = torch.Generator().manual_seed(seqlen)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    values = torch.tensor(STRENGTHS[strength])
    log_a = values[torch.randint(len(values), (1, seqlen, 2), generator=generator)]
    q, k, v = (normal(1, seqlen, count, dim) for count, dim in zip(heads, (dims[0], *dims), strict=True))
    return Case(q, k, v, masks.fenwick(log_a, normal(1, seqlen, 2, fenwick_levels(seqlen) + 1)), 0.5)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_every_strength_equals_oracle(strength: str) -> None:
    """Chunks of both kinds of halves, and a part of one."""
    case = case_of(150, strength)
    laws.equals_oracle(Runner("triton"), case)
    laws.gradients_equal_oracle(Runner("triton"), case)


@pytest.mark.parametrize("strength", ["mixed", "strong"])
def test_sums_in_float32_forget_what_is_strong(strength: str) -> None:
    """In bfloat16 sums of logs are float32, where one of −1e4 would round those after it."""
    case = replace(case_of(100, strength).map(lambda _, x: x.bfloat16()), operands=torch.bfloat16)
    laws.equals_oracle(Runner("triton", 64), case)
    laws.gradients_equal_oracle(Runner("triton", 64), case)


def test_a_tree_of_several_passes() -> None:
    """More chunks than one pass joins, and no power of two of them."""
    case = replace(case_of(620, "weak").map(lambda _, x: x.bfloat16()), operands=torch.bfloat16)
    laws.equals_oracle(Runner("triton", 16), case)


def test_gradients_over_a_tree_of_several_passes() -> None:
    case = replace(case_of(290, "growing").map(lambda _, x: x.bfloat16()), operands=torch.bfloat16)
    laws.gradients_equal_oracle(Runner("triton", 16), case)


@pytest.mark.parametrize("dims", [(130, 3), (3, 70)], ids=str)
@pytest.mark.parametrize("heads", [(2, 1, 1), (1, 1, 2)], ids=str)
def test_several_tiles_and_shared_heads(
    dims: tuple[int, int], heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(70, "mixed", dims, heads)
    laws.equals_oracle(Runner("triton"), case)
    laws.gradients_equal_oracle(Runner("triton"), case)
    monkeypatch.setattr("ssdops.backends.triton.fenwick_scan.ENOUGH", 0)  # heads that share q and k share a program
    laws.gradients_equal_oracle(Runner("triton"), case)


@pytest.mark.parametrize("at", [64, 70])
def test_no_difference_of_sums_in_gradients_of_logs(at: int) -> None:
    """Pairs of tokens on either side of a strong decay are large, those across it tiny: its gradient is of these alone."""
    seqlen = 160
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, seqlen, 1, 2, generator=generator) for _ in range(3))
    log_a = torch.full((1, seqlen, 1), -1e-3)
    log_a[:, at] = -16.0
    levels = torch.ones(1, seqlen, 1, fenwick_levels(seqlen))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, log_a)]
    exact = [x.double().requires_grad_() for x in (q, k, v, log_a)]
    found, wanted = (
        torch.autograd.grad(ssd(*x[:3], masks.fenwick(x[3], levels.to(x[3].dtype)), backend=backend).sum(), x)[3]
        for x, backend in ((leaves, "triton"), (exact, "naive"))
    )
    assert 1e4 * wanted[:, at].max() < wanted.max()  # so that an error of float32, of the greatest, would show
    assert ((found - wanted)[:, at].abs() <= 4e-6 * wanted[:, at].abs()).all()


def test_what_is_refused() -> None:
    x, log_a, levels = torch.zeros(1, 20, 1, 4), torch.zeros(1, 20, 1), torch.zeros(1, 20, 1, 6)
    whole = masks.fenwick(log_a, levels)
    for mask, message in (
        (whole * masks.documents(torch.tensor([0, 4, 20])), "documents; 'chunked'"),
        (whole.T.scale(log_cols=log_a), "fenwick"),
        (masks.fenwick(log_a.double(), levels), "float64"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            ssd(x, x, x, mask, backend="triton")
    with pytest.raises(UnsupportedError, match="chunks of 32, 64 tokens"):
        ssd(x, x, x, masks.fenwick(log_a, levels), backend="triton", chunk_size=16)


def test_plans_say_chunks_and_growth() -> None:
    """Wide states, and wide numbers, have shorter chunks."""

    def step(dstate: int, dtype: torch.dtype = torch.bfloat16):
        x, levels = torch.zeros(1, 200, 1, dstate, dtype=dtype), torch.zeros(1, 200, 1, 9)
        return explain(x, x, x, masks.fenwick(levels[..., 0], levels), backend="triton").plan.steps[0]

    assert [step(n).config.chunk_size for n in (3, 128, 129)] == [64, 64, 32]
    assert [step(n, torch.float32).config.chunk_size for n in (3, 128)] == [32, 32]
    assert step(3).growth == "T log T"


@pytest.mark.parametrize("seqlen", [0, 1])
@pytest.mark.parametrize("batch", [0, 2])
def test_no_tokens_and_no_rows(seqlen: int, batch: int) -> None:
    x = torch.ones(batch, seqlen, 1, 4, requires_grad=True)
    levels = torch.full((batch, seqlen, 1, 1), 2.0, requires_grad=True)
    y = ssd(x, x, x, masks.fenwick(levels[..., 0], levels), backend="triton")
    assert torch.equal(y, torch.full_like(x, 8.0))
    y.sum().backward()
    assert x.grad is not None and levels.grad is not None and torch.equal(levels.grad, torch.full_like(levels, 16.0))


def test_lengths_around_chunks_and_pairs_of_them() -> None:
    for seqlen in (31, 32, 33, 64, 65, 97):
        laws.gradients_equal_oracle(Runner("triton", 32), case_of(seqlen, "growing"))
