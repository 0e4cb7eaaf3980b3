"""`torch.compile` around ssdops: whole graphs, sizes that stay symbolic, states, steps."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch_cases import MASKS, B, H, N, P, assert_alike, attend, inputs, with_gradients

from ssdops import masks, ssd, ssd_step


@pytest.mark.parametrize("name", MASKS)
def test_compiles_whole_forward_and_backward(name):
    torch._dynamo.reset()
    compiled = torch.compile(attend(name), fullgraph=True, backend="aot_eager")
    assert_alike(with_gradients(compiled, inputs()), with_gradients(attend(name), inputs()))


@pytest.mark.parametrize("name", ["decay", "quasiseparable", "packed", "scaled", "band", "fenwick"])
def test_a_new_seqlen_or_batch_does_not_compile_again(name):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend(name), fullgraph=True, dynamic=True, backend=counter)
    batches = [1, 1, 1] if name == "packed" else [7, 8, 6]
    for seqlen, batch in zip((12, 15, 10), batches, strict=True):  # equal sizes would be taken for one; all have 5 levels
        x = inputs(seqlen, batch)
        assert_alike(with_gradients(compiled, x), with_gradients(attend(name), x))
    assert counter.frame_count == 1


def test_dynamic_shapes_are_found_without_being_asked_for():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend("decay"), fullgraph=True, backend=counter)
    for seqlen in (8, 9, 17, 33, 12):
        torch.testing.assert_close(compiled(inputs(seqlen)), attend("decay")(inputs(seqlen)))
    assert counter.frame_count <= 2  # once static, once dynamic


@pytest.mark.parametrize("backend", ["auto", "chunked", "triton"])
def test_every_size_may_be_symbolic(backend: str):
    """Tracing compares no size, headdim and dstate included, whatever backends have limits."""

    def attend(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return ssd(q, k, v, masks.decay(a), backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen, headdim, dstate in ((20, 8, 12), (33, 9, 16)):
        q, k, v = (torch.randn(2, seqlen, heads, dim) for heads, dim in ((2, dstate), (2, dstate), (4, headdim)))
        a = -torch.rand(2, seqlen, 4)
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 3)
        torch.testing.assert_close(compiled(q, k, v, a), attend(q, k, v, a))


def test_states_and_options_compile():
    def split(x: dict[str, Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
        y, state = ssd(
            x["q"], x["k"], x["v"], masks.decay(x["a"]), initial_state=s, return_state=True,
            state_dtype=torch.float32, backend="chunked", chunk_size=4,
        )  # fmt: skip
        return y, state

    torch._dynamo.reset()
    s = torch.randn(B, H, P, N)
    got, want = torch.compile(split, fullgraph=True, backend="aot_eager")(inputs(), s), split(inputs(), s)
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got, want)


def test_states_between_compile():
    """With the rest, for any seqlen and batch, and without gradients of their own there too."""

    def prefixes(x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return ssd(x["q"], x["k"], x["v"], masks.decay(x["a"]), state_every=4)

    torch._dynamo.reset()
    compiled = torch.compile(prefixes, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen, batch, stance in ((12, 7, "default"), (15, 8, "fail_on_recompile"), (9, 6, "fail_on_recompile")):
        x = inputs(seqlen, batch)
        x["v"].requires_grad_()
        with torch.compiler.set_stance(stance):
            got, want = compiled(x), prefixes(x)
        torch.testing.assert_close(got, want)
        assert not got[2].requires_grad
        torch.testing.assert_close(*(torch.autograd.grad(out[0].sum() + out[1].sum(), x["v"]) for out in (got, want)))


def test_a_step_compiles():
    def one(q: Tensor, k: Tensor, v: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_step(q, k, v, masks.decay(a), s)  # type: ignore[return-value]

    torch._dynamo.reset()
    x = inputs()
    args = (x["q"][:, 0], x["k"][:, 0], x["v"][:, 0], x["a"][:, 0], torch.randn(B, H, P, N, dtype=torch.float64))
    torch.testing.assert_close(torch.compile(one, fullgraph=True, backend="aot_eager")(*args), one(*args))


def test_a_step_on_a_pool_compiles_and_updates_it():
    def one(x: dict[str, Tensor], pool: Tensor, slots: Tensor) -> Tensor:
        args = (x["q"][:, 0], x["k"][:, 0], x["v"][:, 0], masks.decay(x["a"][:, 0]))
        return ssd_step(*args, pool, state_indices=slots)[0]

    torch._dynamo.reset()
    x, slots = inputs(batch=2), torch.tensor([2, -1])
    ours, theirs = (torch.ones(4, H, P, N, dtype=torch.float64) for _ in range(2))
    got = torch.compile(one, fullgraph=True, backend="aot_eager")(x, ours, slots)
    torch.testing.assert_close(got, one(x, theirs, slots))
    assert torch.equal(ours, theirs)
    assert (ours != 1).flatten(1).any(1).tolist() == [False, False, True, False]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on the CPU needs a C++ compiler")
def test_inductor():
    def block(x: dict[str, Tensor]) -> Tensor:
        return attend("quasiseparable")({**x, "q": x["q"].sin(), "v": x["v"] * 2}).relu()

    torch._dynamo.reset()
    assert_alike(with_gradients(torch.compile(block, fullgraph=True), inputs()), with_gradients(block, inputs()))
