"""Decay per channel on a GPU: what compilers make of its kernels, against float64 (`test_cuda_triton.py` has the laws).

Without a GPU these are skipped; `test_triton_channel.py` and `test_conformance_triton.py` run the same kernels interpreted.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssdops import masks, ssd
from ssdops.masks import Mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; the same kernels run in Triton's interpreter"),
]
RELATIVE = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 2e-6}
"""Greatest ‖error‖ / ‖result‖ allowed, as in `test_cuda_triton.py`."""
NAMES = ("y", "state", "dq", "dk", "dv", "dlog_a", "dinitial")


def call(sizes: tuple[int, ...], dtype: torch.dtype, strength: float = 0.1) -> list[Tensor]:
    """q, k, v, log_a and an initial state as leaves; log_a uniform in (−strength, 0)."""
    batch, seqlen, nheads, headdim, ngroups, dstate = sizes
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(batch, seqlen, ngroups, dstate, device="cuda", generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(batch, seqlen, nheads, headdim, device="cuda", generator=generator).to(dtype)
    log_a = -strength * torch.rand(batch, seqlen, nheads, dstate, device="cuda", generator=generator)
    initial = torch.randn(batch, nheads, headdim, dstate, device="cuda", generator=generator)
    return [x.requires_grad_() for x in (q, k, v, log_a, initial)]


def results(inputs: list[Tensor], make: Callable[[Tensor], Mask], backend: str, size: int | None = None) -> list[Tensor]:
    """Y, the state that leaves, and the gradients of everything; in float64 where the backend is the reference."""
    if backend == "chunked":
        inputs = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, log_a, initial = inputs
    y, state = ssd(q, k, v, make(log_a), initial_state=initial, return_state=True, backend=backend, chunk_size=size)
    generator = torch.Generator("cuda").manual_seed(1)
    dy, dstate = (torch.randn(x.shape, device="cuda", generator=generator) for x in (y, state))
    return [y, state, *torch.autograd.grad((y, state), inputs, (dy.to(inputs[2].dtype).to(y.dtype), dstate.to(state.dtype)))]


def assert_near(inputs: list[Tensor], make: Callable[[Tensor], Mask] = masks.channel_decay, size: int | None = None) -> None:
    found, wanted = results(inputs, make, "triton", size), results(inputs, make, "chunked")
    for name, x, y in zip(NAMES, found, wanted, strict=True):
        error, norm = (x.double() - y).norm().item(), y.norm().item()
        assert error <= RELATIVE[inputs[0].dtype] * norm, f"{name}: off by {error:.2e} of {norm:.2e}"


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("seqlen", [1, 15, 64, 65, 1025])
def test_lengths(seqlen: int, dtype: torch.dtype) -> None:
    assert_near(call((2, seqlen, 4, 64, 4, 64), dtype))


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("dims", [(1, 1), (1, 16), (16, 16), (33, 7), (80, 96), (128, 128), (64, 256), (256, 64), (130, 200)])
def test_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    """headdim and dstate, powers of two or not."""
    assert_near(call((1, 200, 4, dims[0], 2, dims[1]), dtype))


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("heads", [(4, 4), (6, 1), (6, 2)])
def test_chunks_and_groups(heads: tuple[int, int], size: int) -> None:
    """Every chunk size, and heads that share q and k."""
    assert_near(call((2, 300, heads[0], 64, heads[1], 64), torch.bfloat16), size=size)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(
    "make",
    [lambda a: masks.channel_decay(a).T, lambda a: masks.channel_decay(a).shift(1), lambda a: masks.channel_decay(a).strict(),
     lambda a: masks.channel_decay(a).reverse(), lambda a: masks.channel_decay(a) * masks.decay(a[..., 0])],
    ids=["T", "shift", "strict", "reverse", "product"],
)  # fmt: skip
def test_turns(make: Callable[[Tensor], Mask], dtype: torch.dtype) -> None:
    assert_near(call((2, 200, 4, 64, 4, 64), dtype), make)


@pytest.mark.parametrize("strength", [0.0, 1e-4, 5.0, 50.0, 1e4])
def test_strong_and_slow_decays(strength: float) -> None:
    assert_near(call((1, 700, 4, 64, 4, 64), torch.bfloat16, strength))


def test_packed_documents_with_empty_ones() -> None:
    cu = torch.tensor([0, 0, 5, 133, 133, 700, 1000], device="cuda")
    q, k, v, log_a, _ = call((1, 1000, 4, 64, 4, 64), torch.bfloat16)
    initial = torch.randn(6, 4, 64, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(2)).requires_grad_()
    assert_near([q, k, v, log_a, initial], lambda log_a: masks.channel_decay(log_a) * masks.documents(cu))


@pytest.mark.parametrize("dtype", RELATIVE)
def test_factors_and_scales(dtype: torch.dtype) -> None:
    """dt · A with a scale of rows and of columns: gradients of all of them."""
    q, k, v = (x.detach() for x in call((2, 300, 6, 16, 2, 16), dtype)[:3])
    generator = torch.Generator("cuda").manual_seed(2)
    dt, rows, cols, logs = (torch.rand(2, 300, 6, device="cuda", generator=generator) for _ in range(4))
    a = -torch.rand(6, 16, device="cuda", generator=generator)
    dy = torch.randn(2, 300, 6, 16, device="cuda", generator=generator).to(dtype)

    def gradients(backend: str, *x: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.requires_grad_() for t in x]
        mask = masks.channel_decay(dt=inputs[3], A=inputs[4]).scale(*inputs[5:])
        y = ssd(*inputs[:3], mask, backend=backend)
        return torch.autograd.grad(y, inputs, dy.to(y.dtype))

    inputs = (q, k, v, dt, a, rows, cols, logs)
    found = gradients("triton", *(x.clone() for x in inputs))
    wanted = gradients("chunked", *(x.double() for x in inputs))
    for name, x, y in zip(("q", "k", "v", "dt", "A", "rows", "cols", "log_cols"), found, wanted, strict=True):
        assert (x.double() - y).norm() <= RELATIVE[dtype] * y.norm(), name


@pytest.mark.parametrize("every", [16, 192])
def test_states_between(every: int) -> None:
    q, k, v, log_a, initial = (x.detach() for x in call((2, 576, 4, 64, 4, 64), torch.bfloat16))
    options = {"initial_state": initial, "state_every": every}
    found = ssd(q, k, v, masks.channel_decay(log_a), backend="triton", **options)
    wanted = ssd(*(x.double() for x in (q, k, v)), masks.channel_decay(log_a), backend="chunked", **options)
    for name, x, y in zip(("y", "state", "states"), found, wanted, strict=True):
        assert x.shape == y.shape and (x.double() - y).norm() <= 5e-3 * y.norm(), name


@pytest.mark.parametrize("dtype", RELATIVE)
def test_same_bits(dtype: torch.dtype) -> None:
    """Twice the same bits, forward and backward, and a row's bits whatever else is in the batch."""
    inputs = call((3, 513, 8, 64, 8, 64), dtype)
    first, second = (results(inputs, masks.channel_decay, "triton") for _ in range(2))
    alone = results([x.detach()[1:2].requires_grad_() for x in inputs], masks.channel_decay, "triton")
    for name, x, y, z in zip(NAMES, first, second, alone, strict=True):
        assert torch.equal(x, y), name
        assert name not in ("y", "state") or torch.equal(x[1:2], z), name


def test_more_than_two_to_the_31_elements() -> None:
    """The last row and head of large tensors are what they are by themselves."""
    shape = (2, 16400, 1024, 64)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, log_a = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4))
    log_a = log_a.abs_().neg_()
    assert q.numel() > 2**31
    y = ssd(q, k, v, masks.channel_decay(log_a), backend="triton")
    last = [x[1:, :, -1:] for x in (q, k, v, log_a)]
    assert torch.equal(y[1:, :, -1:], ssd(*last[:3], masks.channel_decay(last[3]), backend="triton"))
