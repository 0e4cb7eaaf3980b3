"""The TVM backend on a GPU: every law in every dtype, and what no CPU can show. CI has no GPU and skips these.

What CI has instead: the same programs on LLVM (`test_conformance_tvm.py`), and that they are compiled for CUDA
(`test_tvm_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssdops import masks, ssd
from ssdops.backends.tvm import backend
from ssdops.masks import Mask
from ssdops.testing import Conformance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; the same programs keep the laws on LLVM"),
    pytest.mark.skipif(not backend.installed().ok, reason="TVM is not installed"),
]
RELATIVE = {torch.bfloat16: 6e-3, torch.float16: 9e-4, torch.float32: 2e-6}
"""Greatest ‖error‖ / ‖result‖ allowed: twice what rounding operands, scores and gradients of a head to the dtype gives."""


class TestTvm(Conformance):
    backend = "tvm"
    kind = "scalar"
    every_multiple = 64
    rounds_operands = True
    device = "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)


def call(sizes: tuple[int, ...], dtype: torch.dtype, strength: float = 0.1) -> list[Tensor]:
    """q, k, v, log_a as leaves; log_a uniform in (−strength, 0)."""
    batch, seqlen, nheads, headdim, ngroups, dstate = sizes
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(batch, seqlen, ngroups, dstate, device="cuda", generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(batch, seqlen, nheads, headdim, device="cuda", generator=generator).to(dtype)
    log_a = -strength * torch.rand(batch, seqlen, nheads, device="cuda", generator=generator)
    return [x.requires_grad_() for x in (q, k, v, log_a)]


def results(inputs: list[Tensor], make: Callable[[Tensor], Mask], name: str) -> list[Tensor]:
    """Y and the gradients of q, k, v and log_a, in float64 where the backend is the reference."""
    if name != "tvm":
        inputs = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, log_a = inputs
    y = ssd(q, k, v, make(log_a), backend=name)
    dy = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return [y, *torch.autograd.grad(y, inputs, dy.to(inputs[2].dtype).to(y.dtype))]


def assert_near(inputs: list[Tensor], make: Callable[[Tensor], Mask] = masks.decay, reference: str = "naive") -> None:
    found, wanted = results(inputs, make, "tvm"), results(inputs, make, reference)
    for name, x, y in zip(("y", "dq", "dk", "dv", "dlog_a"), found, wanted, strict=True):
        error, size = (x.double() - y).norm().item(), y.norm().item()
        assert error <= RELATIVE[inputs[0].dtype] * size, f"{name}: off by {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("seqlen", [1, 31, 64, 65, 1025])
def test_lengths(seqlen: int, dtype: torch.dtype) -> None:
    assert_near(call((2, seqlen, 4, 64, 1, 128), dtype))


@pytest.mark.parametrize("dims", [(1, 1), (16, 16), (33, 7), (80, 96), (256, 256)])
def test_dims(dims: tuple[int, int]) -> None:
    """headdim and dstate, of sizes that there are tiles of or not."""
    assert_near(call((1, 200, 4, dims[0], 2, dims[1]), torch.bfloat16))


@pytest.mark.parametrize("make", [masks.decay, lambda log_a: masks.decay(log_a).T], ids=["causal", "anticausal"])
def test_segments(make: Callable[[Tensor], Mask]) -> None:
    """Two heads of a long row are walked in segments, side by side, in either direction."""
    assert_near(call((1, 4096, 2, 64, 1, 64), torch.bfloat16, 1e-2), make, "chunked")


def test_a_stream_of_its_own() -> None:
    """A call runs on the current stream: another one is not waited for."""
    inputs = [x.detach() for x in call((1, 256, 4, 64, 1, 64), torch.bfloat16)]
    wanted = ssd(*inputs[:3], masks.decay(inputs[3]), backend="tvm")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        found = ssd(*inputs[:3], masks.decay(inputs[3]), backend="tvm")
        assert not stream.query() and torch.cuda.default_stream().query()
    stream.synchronize()
    assert torch.equal(found, wanted)


def test_a_graph() -> None:
    """A CUDA graph of a call and its gradients, replayed on other numbers."""
    q, k, v, log_a = call((1, 300, 4, 64, 1, 128), torch.bfloat16)
    leaves = [q, k, v, log_a]

    def run() -> list[Tensor]:
        y = ssd(q, k, v, masks.decay(log_a), backend="tvm")
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    with torch.no_grad():
        for x in leaves:
            x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(found, run(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", RELATIVE)
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    """Nothing is left of a race: programs whose tiles lie over one another give the same bits on a full device."""
    inputs = call((2, 1000, 80, 64, 1, 128), dtype)
    first = results(inputs, masks.decay, "tvm")
    for _ in range(3):
        for x, y in zip(results(inputs, masks.decay, "tvm"), first, strict=True):
            assert torch.equal(x, y)
