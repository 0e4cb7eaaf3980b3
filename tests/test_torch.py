"""A citizen of torch: compile, export, opcheck, autocast, func transforms, and an import that touches little."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ssdops
from ssdops import masks, ssd, ssd_step
from ssdops.errors import SsdopsError, UnsupportedError
from ssdops.ir.contraction import Contraction
from ssdops.masks import Mask

B, T, H, N, P = 1, 9, 4, 3, 2


def inputs(seqlen: int = T, batch: int = B, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "q": r(batch, seqlen, 2, N), "k": r(batch, seqlen, 1, N), "v": r(batch, seqlen, H, P),
        "a": -r(batch, seqlen, H).abs(), "b": -r(batch, seqlen, 1).abs(), "d": r(H), "u": r(batch, seqlen, 2),
        "c": -r(batch, seqlen, H, N).abs(), "levels": r(batch, seqlen, H, 1 + max(seqlen - 1, 0).bit_length()),
        "cu": torch.tensor([0, seqlen // 3, seqlen]), "ids": (torch.arange(seqlen) // 4).expand(batch, -1),
    }  # fmt: skip


MASKS: dict[str, Callable[[dict[str, Tensor]], Mask]] = {
    "causal": lambda x: masks.causal(),
    "decay": lambda x: masks.decay(x["a"]),
    "quasiseparable": lambda x: (
        masks.decay(x["a"]).strict() + masks.decay(x["b"]).strict().T + masks.diagonal(x["d"])
    ),
    "packed": lambda x: masks.decay(x["a"]) * masks.documents(x["cu"]),
    "ids": lambda x: masks.decay(x["a"]) * masks.documents(segment_ids=x["ids"], n_segments=40),
    "scaled": lambda x: masks.decay(x["a"]).scale(rows=x["u"], cols=x["d"], log_cols=x["b"]) - masks.causal(),
    "retention": lambda x: masks.retention(-x["d"].abs()),
    "trapezoidal": lambda x: masks.trapezoidal(x["a"], x["u"], x["d"]),
    "reversed": lambda x: masks.decay(x["a"]).reverse().strict() + masks.decay(x["b"]).shift(1),
    "band": lambda x: masks.window(3) * masks.decay(x["a"]),
    "channel": lambda x: masks.channel_decay(x["c"]) * masks.decay(x["b"]),
    "fenwick": lambda x: masks.fenwick(x["a"], x["levels"]),
}  # fmt: skip
LEARNT = ("q", "k", "v", "a", "b", "d", "u", "c", "levels")


def attend(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    """Y of a mask built inside the function."""
    return lambda x: ssd(x["q"], x["k"], x["v"], MASKS[name](x), scale=0.5)


def with_gradients(f: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> list[Tensor | None]:
    """Y and the gradients of everything that may have one."""
    x = {name: t.detach().clone().requires_grad_(name in LEARNT) for name, t in x.items()}
    y = f(x)
    (y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum().backward()
    return [y.detach(), *(x[name].grad for name in LEARNT)]


def assert_alike(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


# --- compile --------------------------------------------------------------------------------------------------------


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


# --- the operators --------------------------------------------------------------------------------------------------


def arguments(name: str, return_state: bool = False, learnt: bool = True) -> tuple:
    x = inputs(batch=1)
    x = {key: t.requires_grad_(learnt and key in LEARNT) for key, t in x.items()}
    mask = MASKS[name](x)
    states = [torch.randn(B, H, P, N, dtype=torch.float64).requires_grad_(learnt)] if return_state else []
    operands = [t.detach().requires_grad_(t.is_floating_point() and learnt) for t in mask.operands.values()]
    return (x["q"], x["k"], x["v"], operands, states, str(Contraction(mask.tree, return_state)), 0.5)


@pytest.mark.parametrize(
    ("name", "state"),
    [("decay", True), ("quasiseparable", False), ("packed", False), ("band", False), ("scaled", False)],
)  # fmt: skip
def test_opcheck_forward(name, state):
    torch.library.opcheck(torch.ops.ssdops.forward.default, arguments(name, state))


def test_opcheck_states_between():
    *tensors, _, scale = arguments("scaled")
    program = str(Contraction(MASKS["scaled"](inputs(batch=1)).tree, return_state=True, state_every=2))
    torch.library.opcheck(torch.ops.ssdops.forward.default, (*tensors, program, scale))


@pytest.mark.parametrize(("name", "state"), [("decay", True), ("quasiseparable", False), ("packed", False)])
def test_opcheck_backward(name, state):
    given = arguments(name, state, learnt=False)
    out = torch.ops.ssdops.forward(*given)
    torch.library.opcheck(torch.ops.ssdops.backward.default, ([torch.randn_like(y) for y in out], [], *given))


@pytest.mark.parametrize("name", MASKS)
def test_gradients_flow_under_a_dispatch_mode(name):
    """Counters, checkpointing and checkers run operators below autograd, where a kernel's own autograd is off."""

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    want = with_gradients(attend(name), inputs())
    with Passing():
        got = with_gradients(attend(name), inputs())
    assert_alike(got, want)


def test_opcheck_write_slots():
    given = (torch.zeros(5, H, P, N), torch.randn(3, H, P, N, dtype=torch.float64), torch.tensor([4, -1, 0]))
    torch.library.opcheck(torch.ops.ssdops.write_slots_.default, given)


def test_strides_do_not_matter():
    x = inputs(batch=2)
    turned = {key: t.transpose(0, -1).contiguous().transpose(0, -1) for key, t in x.items()}
    assert any(not t.is_contiguous() for t in turned.values())
    assert_alike(with_gradients(attend("quasiseparable"), turned), with_gradients(attend("quasiseparable"), x))


# --- autocast -------------------------------------------------------------------------------------------------------


def test_autocast_casts_q_k_and_v_only():
    x, seen = inputs(dtype=torch.float32), []
    s = torch.randn(B, H, P, N)
    original = torch.ops.ssdops.forward.default

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is original:
                seen.append([t.dtype for t in (*args[:3], *args[3], *args[4])])
            return func(*args, **(kwargs or {}))

    with Spy(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = ssd(x["q"], x["k"], x["v"], masks.decay(x["a"]), initial_state=s, return_state=True)
    assert seen == [[torch.bfloat16] * 3 + [torch.float32] * 2]
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    low = (x[name].bfloat16() for name in "qkv")
    assert torch.equal(y, ssd(*low, masks.decay(x["a"]), initial_state=s))
    assert ssd(x["q"], x["k"], x["v"]).dtype == torch.float32


def test_autocast_gradients_have_the_dtype_of_their_inputs():
    x = {name: t.requires_grad_() for name, t in inputs(dtype=torch.float32).items() if name in LEARNT}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attend("decay")(x).float().sum().backward()
    assert {x[name].grad.dtype for name in ("q", "k", "v", "a")} == {torch.float32}


# --- export ---------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A module whose mask has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.d = torch.nn.Parameter(torch.randn(H, dtype=torch.float64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return ssd(q, k, v, masks.decay(a) + masks.diagonal(self.d))


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic, tmp_path):
    block, x = Block(), inputs()
    args = tuple(x[name] for name in ("q", "k", "v", "a"))
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    program = torch.export.export(block, args, dynamic_shapes=({1: seqlen},) * 4 if dynamic else None)
    torch.export.save(program, tmp_path / "block.pt2")
    again = torch.export.load(tmp_path / "block.pt2").module()
    for length in (T, 23, 64) if dynamic else (T,):
        x = inputs(length)
        args = tuple(x[name] for name in ("q", "k", "v", "a"))
        torch.testing.assert_close(again(*args), block(*args))


# --- func transforms ------------------------------------------------------------------------------------------------


def loss(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return ssd(q, k, v, masks.decay(a) + masks.diagonal(a)).square().sum()


def test_func_grad():
    args = [inputs()[name].requires_grad_() for name in ("q", "k", "v", "a")]
    want = torch.autograd.grad(loss(*args), args)
    got = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(t.detach() for t in args))
    torch.testing.assert_close(got, want)


def test_func_grad_of_grad():
    q, k, v, a = (inputs(5)[name] for name in ("q", "k", "v", "a"))
    got = torch.func.grad(lambda x: torch.func.grad(loss)(x, k, v, a).square().sum())(q)
    q.requires_grad_()
    (first,) = torch.autograd.grad(loss(q, k, v, a), q, create_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(first.square().sum(), q)[0])


MAPPED = ("decay", "quasiseparable", "scaled", "ids", "trapezoidal", "band", "channel", "fenwick")
SUBSETS = {
    "all": set(inputs()) - {"cu"}, "v": {"v"}, "a": {"a"}, "q, k": {"q", "k"}, "a, ids": {"a", "ids"},
    "others": {"d", "b", "levels", "c"},
}  # fmt: skip
M = 3


def _stacked(batch: int) -> dict[str, Tensor]:
    """M problems; a mapped axis at another place in each tensor."""
    each = [inputs(7, batch, seed=seed) for seed in range(M)]
    return {name: torch.stack([x[name] for x in each], _at(t)) for name, t in each[0].items()}


def _at(x: Tensor) -> int:
    return x.ndim % 2


def _picked(x: dict[str, Tensor], mapped: set[str], m: int) -> dict[str, Tensor]:
    return {name: t.select(_axis(t), m if name in mapped else 0) for name, t in x.items()}


def _axis(stacked: Tensor) -> int:
    return (stacked.ndim - 1) % 2


def _mapped(f: Callable, x: dict[str, Tensor], mapped: set[str]) -> Tensor:
    given = {name: t if name in mapped else t.select(_axis(t), 0) for name, t in x.items()}
    return torch.func.vmap(f, in_dims=({name: _axis(t) if name in mapped else None for name, t in x.items()},))(given)


@pytest.mark.parametrize("mapped", SUBSETS)
@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("batch", [1, 2])
def test_vmap_is_the_loop(name, mapped, batch):
    x, mapped = _stacked(batch), SUBSETS[mapped]
    want = torch.stack([attend(name)(_picked(x, mapped, m)) for m in range(M)])
    torch.testing.assert_close(_mapped(attend(name), x, mapped), want)


@pytest.mark.parametrize("mapped", ["all", "v", "a"])
@pytest.mark.parametrize("name", ["quasiseparable", "scaled"])
@pytest.mark.parametrize("batch", [1, 2])
def test_vmap_of_grad_and_grad_of_vmap_are_the_loop(name, mapped, batch):
    x, mapped = _stacked(batch), SUBSETS[mapped]
    of = ("q", "k", "v", "a", "d", "b")

    def gradients(one: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = {key: t for key, t in one.items() if key not in of}
        return torch.func.grad(lambda y: attend(name)({**y, **rest}).square().sum())({key: one[key] for key in of})

    each = [gradients(_picked(x, mapped, m)) for m in range(M)]
    got = _mapped(gradients, x, mapped)
    for key in of:
        torch.testing.assert_close(got[key], torch.stack([grads[key] for grads in each]))
    whole = torch.func.grad(lambda a: _mapped(attend(name), {**x, "a": a}, mapped).square().sum())(x["a"])
    for m in range(M if "a" in mapped else 1):
        want = each[m]["a"] if "a" in mapped else sum(grads["a"] for grads in each)
        torch.testing.assert_close(whole.select(_axis(x["a"]), m), want)


def test_vmap_of_states_is_the_loop():
    x, s = _stacked(2), torch.randn(M, 2, H, P, N, dtype=torch.float64)
    others = {name: _axis(t) for name, t in x.items()}

    def run(one: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(one["q"], one["k"], one["v"], masks.decay(one["a"]), initial_state=state, return_state=True)

    for dim, states in ((0, s), (None, s[0])):
        got = torch.func.vmap(run, in_dims=(others, dim))(x, states)
        want = [run(_picked(x, set(x), m), s[m] if dim == 0 else s[0]) for m in range(M)]
        torch.testing.assert_close(got, tuple(torch.stack(part) for part in zip(*want, strict=True)))


def test_vmap_of_states_between_is_the_loop():
    x = _stacked(2)

    def run(one: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return ssd(one["q"], one["k"], one["v"], masks.decay(one["a"]), state_every=4)

    got = torch.func.vmap(run, in_dims=({name: _axis(t) for name, t in x.items()},))(x)
    want = [run(_picked(x, set(x), m)) for m in range(M)]
    torch.testing.assert_close(got, tuple(torch.stack(part) for part in zip(*want, strict=True)))


def test_jacrev_is_the_gradient_of_each_output():
    q, k, v, a = (inputs(3)[name] for name in ("q", "k", "v", "a"))
    f = lambda a: ssd(q, k, v, masks.decay(a))  # noqa: E731
    jacobian = torch.func.jacrev(f)(a)
    a.requires_grad_()
    want = [torch.autograd.grad(y, a, retain_graph=True)[0] for y in f(a).flatten()]
    torch.testing.assert_close(jacobian.flatten(0, 3), torch.stack(want))


def test_what_vmap_cannot_fold_is_refused_with_a_reason():
    x = _stacked(1)
    with pytest.raises(UnsupportedError, match=r"documents\(cu_seqlens\) takes a batch of one; use segment_ids"):
        _mapped(attend("packed"), x, set(x) - {"cu"})
    with pytest.raises(UnsupportedError, match=r"log_gamma \(nheads\) has no batch axis"):
        _mapped(attend("retention"), x, {"d"})
    torch.testing.assert_close(  # but shared by all calls it is fine
        _mapped(attend("retention"), x, {"v"}),
        torch.stack([attend("retention")(_picked(x, {"v"}, m)) for m in range(M)]),
    )


@pytest.mark.parametrize("of", ["v", "a"])
def test_forward_mode_is_refused_rather_than_zero(of):
    x = inputs()
    f = lambda t: attend("decay")({**x, of: t})  # noqa: E731
    with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
        torch.func.jvp(f, (x[of],), (x[of],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(UnsupportedError, match="no forward-mode derivative"):
        f(torch.autograd.forward_ad.make_dual(x[of], x[of]))


def sent(x: Any) -> Any:
    """x as another process would get it."""
    return pickle.loads(pickle.dumps(x))  # noqa: S301


# --- the rest -------------------------------------------------------------------------------------------------------


def test_a_tensor_used_twice_has_the_sum_of_both_gradients():
    x = inputs()["v"].requires_grad_()
    d = torch.randn(H, dtype=torch.float64).requires_grad_()
    mask = masks.diagonal(d) + masks.causal().scale(rows=d, cols=d)
    assert torch.autograd.gradcheck(lambda x, d: ssd(x, x, x, masks.diagonal(d) + masks.causal().scale(rows=d, cols=d)), (x, d))
    assert len(mask.operands) == 1


def test_inputs_are_never_written_to():
    x = inputs()
    before = copy.deepcopy(x)
    for name in MASKS:
        with_gradients(attend(name), x)
    assert all(torch.equal(t, before[key]) and t._version == 0 for key, t in x.items())


@pytest.mark.parametrize("through", [copy.deepcopy, sent], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_was_sent_gives_the_same_output(name, through):
    x = inputs()
    mask = MASKS[name](x)
    given = (x["q"], x["k"], x["v"])
    assert torch.equal(ssd(*given, through(mask)), ssd(*given, mask))


def test_errors_can_be_sent():
    """Between processes, as data loaders and pytest-xdist do."""
    with pytest.raises(SsdopsError) as error:
        masks.decay(0.5)
    assert str(sent(error.value)) == str(error.value)


PROGRAM = """
import sys, torch
before = set(sys.modules)
import ssdops
x = torch.randn(1, 6, 2, 3)
ssdops.ssd(x.requires_grad_(), x, x, ssdops.masks.decay(-torch.ones(1, 6, 2))).sum().backward()
print(torch.cuda.is_initialized())
print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))
"""


def test_importing_and_running_on_the_cpu_touches_neither_cuda_nor_compilers():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    initialised, new = done.stdout.splitlines()
    assert initialised == "False"
    assert "ssdops" in new.split()
    assert not {"triton", "tvm", "tvm_ffi", "numpy", "typer", "rich", "platformdirs", "hypothesis", "pytest"} & set(new.split())


def test_the_version_is_that_of_the_package():
    assert importlib.metadata.version("ssdops") == ssdops.__version__
