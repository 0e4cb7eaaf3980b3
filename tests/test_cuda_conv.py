"""What stands around scans, on a GPU: the interpreter's laws, bits, CUDA graphs, long tensors.

Without a GPU these are skipped; `test_nn_conv.py`, `test_nn_rates.py`, `test_nn_norm.py` and `test_nn_skip.py` hold the same
code to the same laws in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_laws import ConvolutionLaws, PackingLaws, drawn
from norm_laws import NormLaws
from rates_laws import RatesLaws
from skip_laws import SkipLaws
from torch import Tensor

from ssdops import masks, nn
from ssdops.nn import Mamba2, causal_conv1d, gated_rms_norm
from ssdops.testing.tolerance import assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_nn_conv.py interprets the kernels"),
]
CHANNELS = 1792


class TestTorch(ConvolutionLaws):
    backend = "torch"
    device = "cuda"


class TestTriton(ConvolutionLaws):
    backend = "triton"
    device = "cuda"


class TestPacking(PackingLaws):
    device = "cuda"


class TestNormOnTorch(NormLaws):
    backend = "torch"
    device = "cuda"


class TestNormOnTriton(NormLaws):
    backend = "triton"
    device = "cuda"


class TestRatesOnTorch(RatesLaws):
    backend = "torch"
    device = "cuda"


class TestRatesOnTriton(RatesLaws):
    backend = "triton"
    device = "cuda"

    def test_auto_is_the_kernel(self) -> None:
        """To the bit, and so is its gradient, whose sums plain torch takes in another order."""
        given = [x.requires_grad_() for x in self.operands(torch.float32) if x is not None]
        found, wanted = ([*nn.discretize(*given, backend=backend)] for backend in ("auto", "triton"))
        for out in (found, wanted):
            out += torch.autograd.grad((out[0] * out[1]).sum(), given)
        for x, y in zip(found, wanted, strict=True):
            assert_same(x, y, "auto")


class TestSkipOnTorch(SkipLaws):
    backend = "torch"
    device = "cuda"


class TestSkipOnTriton(SkipLaws):
    backend = "triton"
    device = "cuda"


def inputs(*, batch: int = 2, seqlen: int = 1000, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """x as mamba2-130m has it, a slice of a projection's output."""
    x = drawn(batch, seqlen, 3352, dtype=dtype, device="cuda")[..., 1536 : 1536 + CHANNELS]
    weight, bias = (drawn(*size, dtype=torch.float32, device="cuda") for size in ((CHANNELS, 4), (CHANNELS,)))
    return {"x": x, "weight": weight, "bias": bias, "window": drawn(batch, CHANNELS, 3, dtype=dtype, device="cuda")}


def test_auto_is_the_kernel() -> None:
    given = inputs()
    for part in (given, {**given, "x": given["x"][:, :1]}):
        options = {"activation": "silu", "return_window": True}
        auto, named = (causal_conv1d(**part, **options, backend=name) for name in ("auto", "triton"))
        assert_same(auto[0], named[0], "y")
        assert_same(auto[1], named[1], "the window")
    wide = drawn(CHANNELS, 9, dtype=torch.float32, device="cuda")
    assert_same(causal_conv1d(given["x"], wide), causal_conv1d(given["x"], wide, backend="torch"), "width 9")


def test_same_inputs_same_bits() -> None:
    def run() -> tuple[Tensor, ...]:
        given = {name: t.detach().requires_grad_() for name, t in inputs().items()}
        y = causal_conv1d(**given, activation="silu")
        return (y, *torch.autograd.grad(y, list(given.values()), y.detach()))

    first = run()
    for _ in range(3):
        for again, once in zip(run(), first, strict=True):
            assert_same(again, once, "bits")


def test_a_view_is_not_copied() -> None:
    """Peak memory is that of y: x goes to the kernel as it is."""
    given = inputs(batch=4, seqlen=4096)
    causal_conv1d(**given)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = causal_conv1d(**given)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 2**20


@pytest.mark.parametrize("seqlen", [1, 300])
def test_cuda_graphs(seqlen: int) -> None:
    given = inputs(seqlen=seqlen)

    def run() -> Any:
        return causal_conv1d(**given, activation="silu", return_window=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, after = run()
    given["x"].mul_(2)
    graph.replay()
    wanted = run()
    assert_same(y, wanted[0], "y")
    assert_same(after, wanted[1], "the window")


def test_packed_needs_no_look_at_the_host() -> None:
    """Documents whose bounds are on the GPU, in a graph."""
    x, weight = inputs(batch=1)["x"], inputs()["weight"]
    cu = torch.tensor([0, 3, 3, 700, 1000], device="cuda")
    causal_conv1d(x, weight, documents=masks.documents(cu), return_window=True)
    with torch.cuda.device(x.device):
        torch.cuda.set_sync_debug_mode("error")
        try:
            y, after = causal_conv1d(x, weight, documents=masks.documents(cu), return_window=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for row, (start, stop) in enumerate([(0, 3), (3, 3), (3, 700), (700, 1000)]):
        alone, last = causal_conv1d(x[:, start:stop], weight, return_window=True)
        assert_same(y[:, start:stop], alone, f"document {row}")
        assert_same(after[row, None], last, f"the window of document {row}")


@pytest.mark.parametrize(("channels", "groups"), [(1536, 1), (5120, 1), (8192, 8), (8192, 1)])
def test_norms_of_models_sizes(channels: int, groups: int) -> None:
    """Forward and backward as in float32 by torch, with the same bits again."""
    wide = drawn(3, 700, 3 * channels, dtype=torch.bfloat16, device="cuda")
    y, z, x = (part.detach().requires_grad_() for part in wide.split(channels, -1))
    weight, D = (drawn(size, dtype=torch.float32, device="cuda").requires_grad_() for size in (channels, channels // 64))
    given, dout = (y, z, weight, D, x), drawn(*y.shape, dtype=torch.bfloat16, seed=5, device="cuda")

    def run(backend: str) -> list[Tensor]:
        out = gated_rms_norm(y, z, weight, groups=groups, skip=(D, x), backend=backend)
        return [out, *torch.autograd.grad(out, given, dout)]

    first = run("triton")
    for once, again, plain in zip(first, run("auto"), run("torch"), strict=True):
        assert_same(again, once, "bits")
        assert (once.float() - plain.float()).norm() <= 4e-3 * plain.float().norm()


@pytest.mark.parametrize("backend", ["inductor", "cudagraphs"])
def test_torch_compile(backend: str) -> None:
    """A block in bfloat16, forward and backward."""
    block, u = Mamba2(256, d_state=64, device="cuda"), drawn(2, 200, 256, dtype=torch.float32, device="cuda")

    def loss(u: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return block(u).float().square().mean()

    torch._dynamo.reset()
    ours, plain = (torch.autograd.grad(f(u), list(block.parameters())) for f in (torch.compile(loss, backend=backend), loss))
    for (name, _), a, b in zip(block.named_parameters(), ours, plain, strict=True):
        assert (a - b).norm() <= 0.03 * b.norm(), name


@pytest.mark.slow
def test_past_2_to_the_31_elements() -> None:
    """The last row of a tensor of so many is what it is alone, backward too."""
    x = torch.empty(5, 250_000, CHANNELS, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x.normal_().requires_grad_()
    weight = drawn(CHANNELS, 4, dtype=torch.float32, device="cuda")
    y = causal_conv1d(x, weight, activation="silu")
    dx = torch.autograd.grad(y, x, y.detach())[0]
    last = x.detach()[-1:].clone().requires_grad_()
    alone = causal_conv1d(last, weight, activation="silu")
    assert_same(y[-1:], alone, "y")
    assert_same(dx[-1:], torch.autograd.grad(alone, last, alone.detach())[0], "dx")
