"""The Triton backend on a GPU: every law in every dtype, and what no interpreter can show.

Without a GPU these are skipped; `test_conformance_triton.py` holds the same kernels to the same laws in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssdops import masks, ssd
from ssdops.backends.triton.sizes import relay_of
from ssdops.masks import Mask
from ssdops.testing import Conformance
from ssdops.testing.case import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; the same laws run in Triton's interpreter"),
]
HALVES = (torch.bfloat16, torch.float16)
RELATIVE = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 2e-6}
"""Greatest ‖error‖ / ‖result‖ allowed: twice what rounding the operands of products to the dtype gives at these sizes."""


class TestTriton(Conformance):
    backend = "triton"
    kind = "scalar"
    every_multiple = 16
    rounds_operands = True
    device = "cuda"
    dtypes = (torch.float32, *HALVES)


def call(sizes: tuple[int, ...], dtype: torch.dtype, strength: float = 0.1) -> list[Tensor]:
    """q, k, v, log_a as leaves; log_a uniform in (−strength, 0)."""
    batch, seqlen, nheads, headdim, ngroups, dstate = sizes
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(batch, seqlen, ngroups, dstate, device="cuda", generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(batch, seqlen, nheads, headdim, device="cuda", generator=generator).to(dtype)
    log_a = -strength * torch.rand(batch, seqlen, nheads, device="cuda", generator=generator)
    return [x.requires_grad_() for x in (q, k, v, log_a)]


def results(inputs: list[Tensor], make: Callable[..., Mask], backend: str) -> list[Tensor]:
    """Y and the gradients of q, k, v and the operands, in float64 where the backend is the reference."""
    if backend == "naive":
        inputs = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, *operands = inputs
    y = ssd(q, k, v, make(*operands), backend=backend)
    dy = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return [y, *torch.autograd.grad(y, inputs, dy.to(inputs[2].dtype).to(y.dtype))]


def assert_near(inputs: list[Tensor], make: Callable[..., Mask]) -> None:
    wanted, found = results(inputs, make, "naive"), results(inputs, make, "triton")  # which could write to its inputs
    for name, x, y in zip(("y", "dq", "dk", "dv", "dlog_a", "dfactor")[: len(found)], found, wanted, strict=True):
        error, size = (x.double() - y).norm().item(), y.norm().item()
        assert error <= RELATIVE[inputs[0].dtype] * size, f"{name}: off by {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("seqlen", [1, 15, 63, 64, 65, 129, 1025])
def test_lengths(seqlen: int, dtype: torch.dtype) -> None:
    assert_near(call((2, seqlen, 4, 64, 1, 128), dtype), masks.decay)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(
    "dims",
    [
        (1, 1), (16, 16), (16, 64), (16, 128), (8, 256), (64, 16), (128, 16), (32, 32), (33, 7), (80, 96), (128, 128),
        (64, 256), (256, 64), (130, 200),
    ],
)  # fmt: skip
def test_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    """headdim and dstate, powers of two or not; at 16 products of float32 were once of tf32, in gradients."""
    assert_near(call((1, 200, 4, dims[0], 2, dims[1]), dtype), masks.decay)
    assert_near(call((1, 200, 8, dims[0], 1, dims[1]), dtype), masks.decay)


@pytest.mark.parametrize("nheads", [7, 80])
def test_heads_that_do_not_divide(nheads: int) -> None:
    """Few blocks: the heads of a group go to more programs, in parts that need not be of one size."""
    assert_near(call((1, 300, nheads, 64, 1, 128), torch.bfloat16), masks.decay)


SUMS: dict[str, Callable[[Tensor, Tensor], Mask]] = {
    "bidirectional": lambda a, d: masks.decay(a) + masks.decay(a).strict().T.scale(rows=d),
    "quasiseparable": lambda a, d: masks.decay(a).strict() + masks.decay(a).strict().T - masks.diagonal(d),
    "trapezoidal": lambda a, d: masks.trapezoidal(a, gamma=d, beta_over_a=d.cos()),
    "three scans": lambda a, d: masks.decay(a) - masks.decay(a).shift(1).T + masks.decay(a).scale(cols=d) + masks.diagonal(d),
    "scales, no decay": lambda a, d: masks.causal().scale(rows=d, cols=a.cos()),
    "RWKV's bonus, of 1": lambda a, d: masks.decay(a).strict().scale(rows=d, cols=d.cos()) + masks.causal() * masks.causal().T,
}
"""Terms that add to one another, diagonals that go along with scans, and factors alone."""


def with_factor(inputs: list[Tensor]) -> list[Tensor]:
    """And a factor per token and head, some of them zero."""
    factor = torch.randn(inputs[3].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    factor[:, 7:9] = 0.0
    return [*inputs, factor.requires_grad_()]


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("mask", SUMS)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 1025, 8, 64, 1, 128),
        (1, 4097, 2, 64, 1, 64),
        (2, 300, 6, 64, 2, 16),
        (2, 200, 4, 128, 2, 256),
        (1, 200, 3, 33, 1, 7),
    ],
)
def test_sums(sizes: tuple[int, ...], mask: str, dtype: torch.dtype) -> None:
    """In one pass, in segments (a long row of two heads), in two parts of dstate, of sizes that align with nothing."""
    assert_near(with_factor(call(sizes, dtype)), SUMS[mask])


@pytest.mark.parametrize("mask", SUMS)
@pytest.mark.parametrize("sizes", [(1, 1000, 4, 64, 1, 128), (1, 4097, 2, 64, 1, 128)])
def test_sums_of_packed_documents(sizes: tuple[int, ...], mask: str) -> None:
    """Some of them empty; in one pass and in segments."""
    cu = torch.tensor([0, 0, 5, 133, 133, 700, sizes[1]], device="cuda")
    assert_near(with_factor(call(sizes, torch.bfloat16)), lambda a, d: SUMS[mask](a, d) * masks.documents(cu))


@pytest.mark.parametrize("strength", [0.0, 5.0, 50.0])
@pytest.mark.parametrize("mask", SUMS)
def test_sums_of_strong_and_slow_decays(mask: str, strength: float) -> None:
    """By pairs where factors do not hold: a diagonal is as it was."""
    assert_near(with_factor(call((1, 700, 4, 64, 1, 128), torch.bfloat16, strength)), SUMS[mask])


@pytest.mark.parametrize("heads", [(1, 8, 8), (8, 1, 8), (8, 8, 1)])
def test_sums_of_shared_heads(heads: tuple[int, int, int]) -> None:
    """Heads that share q, k or v, whose gradients are summed over them, after what the terms before have made of them."""
    q, k, v, *rest = with_factor(call((2, 300, 8, 64, 8, 128), torch.bfloat16))
    shared = [x.detach()[:, :, :count].clone().requires_grad_() for x, count in zip((q, k, v), heads, strict=True)]
    assert_near([*shared, *rest], SUMS["quasiseparable"])


def test_sums_in_a_relay() -> None:
    """More programs than the device holds, of two scans and a diagonal: right, and the same bits twice."""
    inputs = with_factor(call((4, 3100, 128, 64, 8, 128), torch.bfloat16))
    q, k, v, log_a, factor = (x.detach() for x in inputs)
    mask = SUMS["quasiseparable"](log_a, factor)
    found, again = (ssd(q, k, v, mask, backend="triton") for _ in range(2))
    wanted = ssd(*(x.double() for x in (q, k, v)), mask, backend="chunked")
    assert torch.equal(found, again)
    assert (found.double() - wanted).norm() <= RELATIVE[torch.bfloat16] * wanted.norm()


@pytest.mark.parametrize("mask", SUMS)
def test_sums_launched_again(mask: str) -> None:
    """At the addresses of other tensors, while those of the call before are there still."""
    kept = []
    for strength in (0.1, 0.2, 0.3):
        inputs = with_factor(call((2, 600, 4, 64, 1, 128), torch.bfloat16, strength))
        kept.append(inputs)
        assert_near(inputs, SUMS[mask])


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("dstate", [16, 128, 256])
def test_gradients_of_scales(dstate: int, dtype: torch.dtype) -> None:
    """Of rows, columns and their logs too, some of them zero, in packed documents."""
    inputs = call((1, 300, 6, 64, 2, dstate), dtype)
    generator = torch.Generator("cuda").manual_seed(2)
    rows, cols = (torch.randn(1, 300, 6, device="cuda", generator=generator) for _ in range(2))
    rows[:, 7], cols[:, 140] = 0.0, 0.0
    inputs += [x.requires_grad_() for x in (rows, cols, torch.randn(1, 300, 6, device="cuda", generator=generator))]
    cu = torch.tensor([0, 130, 300], device="cuda")
    dy = torch.randn(1, 300, 6, 64, device="cuda", generator=generator).to(dtype)

    def gradients(backend: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, v, log_a, *scales = inputs
        y = ssd(q, k, v, masks.decay(log_a).scale(*scales) * masks.documents(cu), backend=backend)
        return torch.autograd.grad(y, inputs, dy.to(y.dtype))

    found = gradients("triton", inputs)
    wanted = gradients("naive", [x.detach().double().requires_grad_() for x in inputs])
    for name, x, y in zip(("q", "k", "v", "log_a", "rows", "cols", "log_cols"), found, wanted, strict=True):
        assert (x.double() - y).norm() <= RELATIVE[dtype] * y.norm(), name


@pytest.mark.parametrize("strength", [0.0, 1e-4, 1.0, 5.0, 50.0])
def test_strong_and_slow_decays(strength: float) -> None:
    """Chunks whose decays span more than exponents do take another way; both are right."""
    inputs = call((1, 700, 4, 64, 1, 128), torch.bfloat16, strength)
    found, wanted = results(inputs, masks.decay, "triton"), results(inputs, masks.decay, "naive")
    for name, x, y in zip(("y", "dq", "dk", "dv", "dlog_a"), found, wanted, strict=True):
        assert torch.isfinite(x).all(), name
        assert (x.double() - y).norm() <= 5e-3 * y.norm(), name


def test_long_slow_sequence_in_segments() -> None:
    """One head of a long row is split into segments, and says the same as one pass."""
    inputs = call((1, 4097, 2, 64, 1, 64), torch.bfloat16, 1e-3)
    assert_near(inputs, masks.decay)


def test_segments_that_forget() -> None:
    """Of two heads of a long row one remembers a whole segment, the other its end."""
    q, k, v, log_a = call((1, 16384, 2, 64, 1, 64), torch.bfloat16)
    log_a.detach().mul_(torch.tensor([0.05, 4.0], device="cuda"))
    inputs = [q, k, v, log_a]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = results(inputs, masks.decay, "triton"), results(exact, masks.decay, "chunked")
    for name, x, y in zip(("y", "dq", "dk", "dv", "dlog_a"), found, wanted, strict=True):
        assert (x.double() - y).norm() <= RELATIVE[torch.bfloat16] * y.norm(), name


@pytest.mark.parametrize(("sizes", "segments"), [((4, 3100, 128, 64, 8, 128), 2), ((5, 3100, 80, 64, 1, 16), 3)])
def test_a_relay(sizes: tuple[int, ...], segments: int) -> None:
    """More programs than the device holds hand states on: right, and the same bits twice, from both sides."""
    q, k, v, log_a = (x.detach() for x in call(sizes, torch.bfloat16))
    device = torch.cuda.get_device_properties(0)
    if device.multi_processor_count == 132:  # else another number may be best
        assert relay_of(Case(q, k, v, masks.decay(log_a)).problem, sizes[0] * sizes[2]) == segments
    for mask in (masks.decay(log_a), masks.decay(log_a).T):
        found, again = (ssd(q, k, v, mask, return_state=True, backend="triton") for _ in range(2))
        wanted = ssd(*(x.double() for x in (q, k, v)), mask, return_state=True, backend="chunked")
        for name, x, y, z in zip(("y", "state"), found, again, wanted, strict=True):
            assert torch.equal(x, y), name
            assert (x.double() - z).norm() <= RELATIVE[torch.bfloat16] * z.norm(), name


@pytest.mark.parametrize(
    "sizes", [(2, 1024, 8, 64, 1, 128), (3, 700, 4, 64, 2, 256), (1, 4097, 2, 64, 1, 64), (2, 100, 3, 5, 1, 3)]
)
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("every", [16, 256])
def test_states_between(sizes: tuple[int, ...], dtype: torch.dtype, every: int) -> None:
    """In one pass, in segments (a long row of two heads), in two parts of dstate, and of sizes that align with nothing."""
    q, k, v, log_a = (x.detach() for x in call(sizes, dtype, 0.02))
    found = ssd(q, k, v, masks.decay(log_a), state_every=every, backend="triton")
    exact = (x.double() for x in (q, k, v))
    wanted = ssd(*exact, masks.decay(log_a), state_every=every, backend="chunked")
    for name, x, y in zip(("y", "state", "states"), found, wanted, strict=True):
        assert x.shape == y.shape, name
        assert (x.double() - y).norm() <= RELATIVE[dtype] * y.norm(), name
    assert every > sizes[1] or sizes[1] % every or torch.equal(found[2][:, -1], found[1])


def test_packed_documents_with_empty_ones() -> None:
    cu = torch.tensor([0, 0, 5, 133, 133, 700, 1000], device="cuda")
    assert_near(call((1, 1000, 4, 64, 1, 128), torch.bfloat16), lambda log_a: masks.decay(log_a) * masks.documents(cu))


def test_same_bits() -> None:
    """Twice the same bits, forward and backward, and a row's bits whatever else is in the batch."""
    inputs = call((3, 513, 8, 64, 1, 128), torch.bfloat16)
    first, second = results(inputs, masks.decay, "triton"), results(inputs, masks.decay, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_graph_capture() -> None:
    """A captured graph replays on new values."""
    q, k, v, log_a = (x.detach() for x in call((2, 257, 4, 64, 1, 128), torch.bfloat16))
    mask = masks.decay(log_a)
    ssd(q, k, v, mask, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ssd(q, k, v, mask, backend="triton")
    v.copy_(torch.randn_like(v))
    graph.replay()
    assert torch.equal(y, ssd(q, k, v, mask, backend="triton"))


def test_two_streams() -> None:
    inputs = [[x.detach() for x in call((2, 600, 8, 64, 1, 128), torch.bfloat16, s)] for s in (0.1, 0.5)]
    alone = [ssd(*x[:3], masks.decay(x[3]), backend="triton") for x in inputs]
    torch.cuda.synchronize()
    together, streams = [], [torch.cuda.Stream() for _ in inputs]
    for stream, x in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            together.append(ssd(*x[:3], masks.decay(x[3]), backend="triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_compiles() -> None:
    inputs = call((2, 300, 4, 64, 1, 128), torch.bfloat16)

    def loss(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
        return ssd(q, k, v, masks.decay(log_a), backend="triton").float().square().mean()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-6)


def test_states_between_compile() -> None:
    """What follows them is compiled too, sizes that align with nothing included."""
    inputs = [x.detach() for x in call((2, 300, 3, 5, 1, 3), torch.bfloat16)]

    def prefixes(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
        return ssd(q, k, v, masks.decay(log_a), state_every=64, backend="triton")[2] * 2

    torch.testing.assert_close(torch.compile(prefixes, fullgraph=True)(*inputs), prefixes(*inputs))


@pytest.mark.slow
def test_past_two_to_the_31_elements() -> None:
    """Offsets are 64 bits wide where batch and sequence multiply a stride."""
    batch, seqlen, nheads, headdim = 9, 65536, 64, 64  # 2.4e9 elements of v
    q = k = torch.randn(batch, seqlen, 1, 16, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(batch, seqlen, nheads, headdim, device="cuda", dtype=torch.bfloat16)
    log_a = torch.full((nheads,), -0.1, device="cuda")
    y = ssd(q, k, v, masks.decay(log_a), backend="triton")
    last = slice(batch - 1, batch), slice(seqlen - 500, seqlen)
    tail = ssd(q[last].double(), k[last].double(), v[last].double(), masks.decay(log_a), backend="naive")[:, 250:]
    assert (y[last][:, 250:].double() - tail).norm() <= RELATIVE[torch.bfloat16] * tail.norm()
