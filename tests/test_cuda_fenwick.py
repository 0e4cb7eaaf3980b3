"""Log-linear attention on a GPU: what compilers make of it, against float64 (`test_triton_fenwick.py` has the laws)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssdops import explain, masks, ssd
from ssdops.ir.problem import fenwick_levels
from ssdops.masks import Mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; the same kernels run in Triton's interpreter"),
]
RELATIVE = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 2e-6}
"""Greatest ‖error‖ / ‖result‖ allowed, as in `test_cuda_triton.py`."""
NAMES = ("y", "dq", "dk", "dv", "dlog_a", "dlevels", "drows", "dcols", "dlog_cols")
Turn = Callable[[Mask], Mask]


def call(sizes: tuple[int, ...], dtype: torch.dtype, strength: float = 0.1) -> list[Tensor]:
    """q, k, v, log_a, levels; log_a uniform in (−strength, 0)."""
    batch, seqlen, nheads, headdim, ngroups, dstate = sizes
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, seqlen, *shape, device="cuda", generator=generator)

    q, k, v = (normal(*shape).to(dtype) for shape in ((ngroups, dstate), (ngroups, dstate), (nheads, headdim)))
    log_a = -strength * torch.rand(batch, seqlen, nheads, device="cuda", generator=generator)
    return [q, k, v, log_a, normal(nheads, fenwick_levels(seqlen))]


def results(inputs: list[Tensor], turn: Turn, backend: str, size: int | None = None) -> list[Tensor]:
    """Y and the gradients of everything; in float64 where the backend is the reference."""
    dtype = None if backend == "triton" else torch.float64
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    q, k, v, log_a, levels, *scales = inputs
    mask = turn(masks.fenwick(log_a, levels))
    y = ssd(q, k, v, mask.scale(*scales) if scales else mask, backend=backend, chunk_size=size)
    dy = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return [y, *torch.autograd.grad(y, inputs, dy.to(torch.bfloat16).to(y.dtype))]


def assert_near(inputs: list[Tensor], turn: Turn = lambda mask: mask, size: int | None = None, oracle: str = "chunked") -> None:
    found, wanted = results(inputs, turn, "triton", size), results(inputs, turn, oracle)
    for name, x, y in zip(NAMES, found, wanted, strict=False):
        error, norm = (x.double() - y).norm().item(), y.norm().item()
        assert error <= RELATIVE[inputs[0].dtype] * norm, f"{name}: off by {error:.2e} of {norm:.2e}"


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("seqlen", [1, 31, 64, 65, 1100])
def test_lengths(seqlen: int, dtype: torch.dtype) -> None:
    """With rows enough for the error of a whole gradient to be a mean of many roundings."""
    assert_near(call((2 if seqlen > 1 else 64, seqlen, 4, 64, 1, 128), dtype))


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (16, 16), (33, 7), (80, 96), (128, 128), (64, 256), (256, 64), (130, 200)], ids=str)
def test_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    """headdim and dstate, powers of two or not."""
    assert_near(call((1, 200, 4, dims[0], 2, dims[1]), dtype))


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("heads", [(4, 4), (6, 1), (6, 2)], ids=str)
def test_chunks_and_groups(heads: tuple[int, int], size: int) -> None:
    """Every chunk size, heads that share q and k, and a tree of two passes and of one."""
    assert_near(call((2, 700, heads[0], 64, heads[1], 64), torch.bfloat16), size=size)


def test_heads_that_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients of q and k are summed in it, as they are where a sequence is long."""
    monkeypatch.setattr("ssdops.backends.triton.fenwick_scan.ENOUGH", 0)
    for dtype in RELATIVE:
        assert_near(call((2, 300, 6, 64, 2, 128), dtype))


TURNS: dict[str, Turn] = {
    "strict": Mask.strict, "reverse": Mask.reverse, "both": lambda mask: -mask.reverse().strict(),
    "transposed": lambda mask: mask.T, "transposed, strict": lambda mask: mask.strict().T,
}  # fmt: skip


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("turn", TURNS)
def test_turns(turn: str, dtype: torch.dtype) -> None:
    """Held to `naive`, as no other backend takes transposes."""
    assert_near(call((2, 200, 4, 64, 4, 64), dtype), TURNS[turn], oracle="naive")


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_scales(dtype: torch.dtype) -> None:
    inputs = call((2, 300, 6, 64, 2, 64), dtype)
    generator = torch.Generator("cuda").manual_seed(2)
    assert_near([*inputs, *(torch.rand(2, 300, 6, device="cuda", generator=generator) for _ in range(3))])


@pytest.mark.parametrize("strength", [0.0, 1e-4, 5.0, 50.0, 1e4])
def test_strong_and_slow_decays(strength: float) -> None:
    assert_near(call((1, 2500, 2, 64, 1, 128), torch.bfloat16, strength))


def test_deterministic() -> None:
    inputs = call((2, 3000, 8, 64, 1, 128), torch.bfloat16)
    first, second = (results(inputs, lambda mask: mask, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_long_and_chosen() -> None:
    """65,536 tokens, by choice of "auto": a tree of three passes."""
    inputs = call((1, 65536, 2, 64, 1, 128), torch.bfloat16, 1e-3)
    q, k, v, log_a, levels = inputs
    assert explain(q, k, v, masks.fenwick(log_a, levels)).plan.steps[0].backend == "triton"
    assert_near(inputs)
