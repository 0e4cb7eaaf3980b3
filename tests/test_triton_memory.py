"""No kernel reads or writes outside the tensors that it is given: every address is looked at, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from ssdops import masks, ssd
from ssdops.backends.triton.calls import Kernel

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compiled here; compute-sanitizer can watch test_cuda_triton.py"
)


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched; one that leaves its tensors fails."""
    launched, ranges = list[str](), list[tuple[int, int]]()
    call, load, store = Kernel.__call__, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def look(pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data).reshape(-1).astype(np.int64)
        addresses = addresses[np.broadcast_to(np.asarray(mask.data).reshape(-1).astype(bool), addresses.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = [(addresses >= start) & (addresses + size <= stop) for start, stop in ranges]
        assert np.any(inside, axis=0).all(), f"{launched[-1]} leaves its tensors"

    def watched_call(kernel: Any, grid: Any, tensors: Sequence[Tensor], numbers: Any, **constants: Any) -> Any:
        stores = [x.untyped_storage() for x in tensors]
        ranges[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in stores]
        launched.append(kernel._fn.fn.__name__)
        return call(kernel, grid, tensors, numbers, **constants)

    def watched_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        look(pointers, mask)
        return load(builder, pointers, mask, *rest)

    def watched_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        look(pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    monkeypatch.setattr(Kernel, "__call__", watched_call)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
    return launched


def plain(log_a: Tensor) -> masks.Mask:
    return masks.decay(log_a)


def later(log_a: Tensor) -> masks.Mask:
    return masks.decay(log_a).T


def everything(log_a: Tensor) -> masks.Mask:
    scale = log_a.exp()
    return masks.decay(log_a).shift(1).scale(scale, scale, log_a)


def packed(log_a: Tensor) -> masks.Mask:
    return masks.decay(log_a) * masks.documents(torch.tensor([0, 0, 3, log_a.shape[1] - 1, log_a.shape[1]]))


def summed(log_a: Tensor) -> masks.Mask:
    """A scan that adds to another, and a diagonal that goes along with one."""
    return packed(log_a).strict() + masks.decay(log_a).T + masks.diagonal(log_a)


@pytest.mark.parametrize("make", [plain, later, everything, packed, summed])
@pytest.mark.parametrize("dims", [(1, 1), (33, 7), (16, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scans_stay_in_their_tensors(
    make: Callable[[Tensor], masks.Mask], dims: tuple[int, int], dtype: torch.dtype, watched: list[str]
) -> None:
    """headdim and dstate, powers of two or not; lengths that end inside a chunk and a block."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 133, 1, dims[1], generator=generator).to(dtype).requires_grad_() for _ in range(2))
    v = torch.randn(1, 133, 2, dims[0], generator=generator).to(dtype).requires_grad_()
    log_a = (-torch.rand(1, 133, 2, generator=generator)).requires_grad_()
    y = ssd(q, k, v, make(log_a), backend="triton")
    torch.autograd.grad(y, (q, k, v, log_a), torch.randn(y.shape, generator=generator).to(y.dtype))
    assert {"prepare", "scan", "states", "gradients", "finish", "token_gradients"} <= set(watched)
    assert ("diagonal_gradients" in watched) == (make is summed)


@pytest.mark.parametrize("make", [plain, later])
def test_rows_without_tokens_stay_in_their_tensors(make: Callable[[Tensor], masks.Mask], watched: list[str]) -> None:
    """A program finds no chunk there, and leaves the state as it is: from the right, it counts chunks below 0."""
    q, v, log_a = torch.randn(2, 0, 1, 16), torch.randn(2, 0, 2, 16), torch.randn(2, 0, 2)
    initial = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    _, state = ssd(q, q, v, make(log_a), initial_state=initial, return_state=True, backend="triton")
    assert "scan" in watched and torch.equal(state, initial)


def test_a_kernel_that_leaves_them_is_found(watched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call = Kernel.__call__

    def cut(kernel: Any, grid: Any, tensors: Sequence[Tensor], numbers: Any, **constants: Any) -> Any:
        given = [x[:, :-1].clone() if x.shape == (1, 40, 2, 8) else x for x in tensors]
        return call(kernel, grid, given, numbers, **constants)

    monkeypatch.setattr(Kernel, "__call__", cut)
    q = torch.randn(1, 40, 1, 4)
    with pytest.raises(Exception, match="leaves its tensors"):
        ssd(q, q, torch.randn(1, 40, 2, 8), masks.causal(), backend="triton")
