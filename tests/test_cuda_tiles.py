"""Quadratic terms by tiles on a GPU: sizes of several tiles, every dtype, all gradients, the same bits every time."""

from __future__ import annotations

import pytest
import torch
from traced_masks import MASKS as TRACED
from traced_masks import PAIRS

from ssdops import masks as m
from ssdops import ssd
from ssdops.backends.triton import tiles
from ssdops.ir.terms import Quadratic
from ssdops.plan import terms_of
from ssdops.testing import isolation, laws
from ssdops.testing.case import Case
from ssdops.testing.laws import Runner
from ssdops.testing.structures import Make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_triton_tiles.py interprets the kernels"),
]
RUN = Runner("triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def toeplitz(s: Make) -> m.Mask:
    return m.toeplitz(s.normal(s.nheads, 2 * s.seqlen - 1))


def dense(s: Make) -> m.Mask:
    return m.dense(s.normal(1, s.nheads, s.seqlen, s.seqlen))


MASKS = {
    "window": lambda s: m.window(100, 20),
    "window strict": lambda s: m.window(70, 70).strict(),
    "toeplitz": toeplitz,
    "dense": dense,
    "dense over heads": lambda s: m.dense(s.normal(s.seqlen, s.seqlen)),
    "decay * window": lambda s: m.decay(s.log()) * m.window(90),
    "retention * window": lambda s: m.retention(-s.normal(s.nheads).abs() / 30) * m.window(128),
    "decay * documents * toeplitz": lambda s: m.decay(s.log()) * s.cu * toeplitz(s),
    "documents * window": lambda s: s.ids * m.window(64, 64),
    "reverse": lambda s: (m.decay(s.log()) * dense(s)).reverse(),
    "T": lambda s: (m.decay(s.log(1)) * m.window(65)).T,
    "scale": lambda s: m.window(99, 33).scale(rows=s.factor(), cols=s.factor(1), log_cols=s.log()),
    "shift": lambda s: (dense(s).scale(rows=s.factor()) * m.window(130, 1)).shift(3).T,
}


def case_of(name: str, dtype: torch.dtype, seqlen: int = 200, dims: tuple[int, int] = (64, 32)) -> Case:
    """A call of a batch of one, q and k sharing a head."""
    make = Make(seqlen=seqlen, dtype=dtype, dstate=dims[0], headdim=dims[1], device="cuda")
    mask = MASKS[name](make)
    assert all(isinstance(term, Quadratic) for term in terms_of(mask.tree))
    return make.case(mask, scale=dims[0] ** -0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_equals_oracle(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, dtype)
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRACED)
def test_traced_formulas_equal_oracle(name: str, dtype: torch.dtype) -> None:
    make = Make(seqlen=130, dtype=dtype, dstate=64, headdim=32, device="cuda")
    laws.equals_oracle(RUN, make.case(TRACED[name](make), scale=1 / 8))


@pytest.mark.parametrize("name", [name for name in TRACED if "matrix" not in name])  # as many derivatives as entries
def test_gradients_of_traced_formulas_equal_oracle(name: str) -> None:
    make = Make(seqlen=70, dtype=torch.float32, dstate=16, headdim=16, device="cuda")
    laws.gradients_equal_oracle(RUN, make.case(TRACED[name](make)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_formulas_that_are_no_products(name: str, dtype: torch.dtype) -> None:
    make = Make(seqlen=130, dtype=dtype, dstate=64, headdim=32, device="cuda")
    case = make.case(PAIRS[name](make), scale=1 / 8)
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@pytest.mark.parametrize("seqlen", [1, 15, 63, 64, 65, 257])
def test_lengths_around_tiles(seqlen: int) -> None:
    case = case_of("decay * window", torch.float32, seqlen)
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (16, 16), (64, 16), (16, 128), (128, 64), (200, 100), (256, 256)], ids=str)
@pytest.mark.parametrize("name", ["decay * window", "decay * documents * toeplitz", "dense"])
def test_dims(name: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    case = case_of(name, dtype, seqlen=130, dims=dims)
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["decay * window", "decay * documents * toeplitz", "reverse"])
def test_deterministic(name: str, dtype: torch.dtype) -> None:
    laws.deterministic(RUN, case_of(name, dtype, seqlen=700))


@pytest.mark.parametrize("heads", [(4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 4)], ids=str)
def test_heads_and_batch(heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared heads, several batch rows, any strides."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).cuda()

    q, k, v = (normal(3, count, 150, dim).transpose(1, 2) for count, dim in zip(heads, (32, 32, 24), strict=True))
    mask = m.decay(-normal(3, 150, 2).abs()) * m.window(70) * m.dense(normal(3, 1, 150, 150))
    case = Case(q, k, v, mask, 0.2)
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)
    laws.batch_order_does_not_matter(RUN, case, bits=True)
    laws.strides_do_not_matter(RUN, case)
    monkeypatch.setattr(tiles, "ENOUGH", 1)  # heads that share a gradient share a program
    laws.gradients_equal_oracle(RUN, case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poison_stays_in_its_document(value: float) -> None:
    make = Make(seqlen=150, dtype=torch.float32, dstate=32, headdim=32, device="cuda")
    isolation.poison_stays_in_its_document(RUN, make.case(m.decay(make.log()) * m.window(100)), make.cu, value)
    isolation.documents_equal_separate_runs(RUN, make.case(m.decay(make.log()) * m.window(100)), make.cu)


def test_blocks_outside_the_band_are_not_visited() -> None:
    make = Make(seqlen=1000, dtype=torch.bfloat16, dstate=64, headdim=64, device="cuda")
    case = make.case(m.window(10))
    poisoned = case.map(lambda name, x: x.index_fill(1, torch.arange(20, device="cuda"), torch.nan))
    whole, part = RUN(case)["y"], RUN(poisoned)["y"]
    assert torch.equal(whole[:, 64:], part[:, 64:])
    assert part[:, 20].isnan().all()


def test_no_t_by_t_memory() -> None:
    """Forward and backward of a long window hold no more than a few tensors of the sizes of the inputs."""
    q, k, v = (torch.randn(1, 32768, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    log_a = -torch.rand(1, 32768, 4, device="cuda")
    log_a.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ssd(q, k, v, m.decay(log_a) * m.window(512), backend="triton").float().square().mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 40 * q.numel() * q.element_size()  # one T × T is 128 times q
    assert q.grad is not None and q.grad.isfinite().all()


def test_offsets_beyond_32_bits() -> None:
    """A sequence of more than 2³¹ elements: its last rows are those of the same window alone."""
    seqlen, part, dim = 2**17 + 128, 320, 128  # apart by whole tiles, so that sums run in one order
    x = torch.randn(1, seqlen, 128, dim, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31 and (seqlen - part) % 64 == 0
    y, alone = (ssd(t, t, t, m.window(63), backend="triton") for t in (x, x[:, -part:]))
    assert torch.equal(y[:, -part + 64 :], alone[:, 64:])
