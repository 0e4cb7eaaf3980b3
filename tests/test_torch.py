"""A citizen of torch: opcheck, autocast, export, what can be sent, and an import that touches little."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch_cases import LEARNT, MASKS, B, H, N, P, T, assert_alike, attend, inputs, with_gradients

import ssdops
from ssdops import masks, ssd
from ssdops.errors import SsdopsError
from ssdops.ir.contraction import Contraction

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


# --- the rest -------------------------------------------------------------------------------------------------------


def sent(x: Any) -> Any:
    """x as another process would get it."""
    return pickle.loads(pickle.dumps(x))  # noqa: S301


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


def test_importing_and_running_on_the_cpu_touches_neither_cuda_nor_compilers(tmp_path):
    env = os.environ | {"SSDOPS_CACHE_DIR": str(tmp_path)}  # in which nothing has been compiled
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=env)
    initialised, new = done.stdout.splitlines()
    assert initialised == "False"
    assert "ssdops" in new.split()
    assert not {"triton", "tvm", "tvm_ffi", "numpy", "typer", "rich", "platformdirs", "hypothesis", "pytest"} & set(new.split())


def test_the_version_is_that_of_the_package():
    assert importlib.metadata.version("ssdops") == ssdops.__version__


@pytest.mark.parametrize("name", ["decay", "packed"])
def test_activation_checkpointing_computes_again_what_it_dropped(name):
    def gradients(run):
        x = {key: t.requires_grad_(key in LEARNT) for key, t in inputs(batch=1).items()}
        y = run(lambda q, k, v: ssd(q, k, v, MASKS[name](x)), x["q"], x["k"], x["v"])
        return torch.autograd.grad(y.square().sum(), (x["q"], x["k"], x["v"]))

    checkpointed = gradients(lambda f, *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False))
    assert_alike(checkpointed, gradients(lambda f, *args: f(*args)))
