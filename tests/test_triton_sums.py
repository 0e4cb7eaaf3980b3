"""Sums of terms on Triton: each term adds to what those before it have made, and a diagonal goes along with a scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssdops import explain, masks, ssd
from ssdops.backends.base import Config
from ssdops.backends.triton import backend
from ssdops.backends.triton.calls import Kernel
from ssdops.masks import Mask
from ssdops.testing import laws
from ssdops.testing.case import Case
from ssdops.testing.laws import Runner
from ssdops.testing.structures import Make

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here; test_cuda_triton.py has these sums")
BOTH = (torch.float32, torch.bfloat16)


def both_ways(s: Make) -> Mask:
    return masks.decay(s.log()) + masks.decay(s.log(1)).strict().T


def quasiseparable(s: Make) -> Mask:
    return masks.decay(s.log()).strict() + masks.decay(s.log(1)).strict().T - masks.diagonal(s.factor())


def trapezoidal(s: Make) -> Mask:
    return masks.trapezoidal(s.log(), gamma=s.factor(), beta_over_a=s.factor().flip(1))


def identity(s: Make) -> Mask:
    """A diagonal without values, and a scan that counts negatively."""
    return masks.causal() * masks.causal().T - masks.decay(s.log())


def other_kinds(s: Make) -> Mask:
    """Terms that add to nothing before and after those that do, and one diagonal more than there are scans."""
    return (
        masks.diagonal(s.factor()) + masks.window(2, 1) - masks.decay(s.log()).T
        + masks.channel_decay(s.ranked(s.dstate).abs().neg()) + masks.diagonal(s.factor(1))
    )  # fmt: skip


SUMS = (both_ways, quasiseparable, trapezoidal, identity, other_kinds)


class Launched:
    """A launch: its kernel's name, its tensors by the names of parameters, its constants."""

    def __init__(self, kernel: Kernel, tensors: Sequence[Tensor], constants: dict[str, Any]) -> None:
        fn: Any = kernel._fn
        self.name, self.constants = fn.fn.__name__, constants
        self.tensors = dict(zip(fn.arg_names, tensors, strict=False))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What is launched."""
    found, call = list[Launched](), Kernel.__call__

    def noted(kernel: Any, grid: Any, tensors: Sequence[Tensor], numbers: Any, **constants: Any) -> Any:
        found.append(Launched(kernel, tensors, constants))
        return call(kernel, grid, tensors, numbers, **constants)

    monkeypatch.setattr(Kernel, "__call__", noted)
    return found


def case_of(make: Callable[[Make], Mask], dtype: torch.dtype, **sizes: int) -> Case:
    """A case with an odd length, whose operands are of the dtype too."""
    made = Make(**{"seqlen": 41, "nheads": 2, "dstate": 16, "headdim": 16, **sizes}, dtype=dtype)  # type: ignore[arg-type]  # of integers
    return replace(made.case(make(made)), operands=dtype)


@pytest.mark.parametrize("dtype", (*BOTH, torch.float16))
@pytest.mark.parametrize("make", SUMS)
def test_sums_keep_to_the_oracle(make: Callable[[Make], Mask], dtype: torch.dtype) -> None:
    """Y and all gradients."""
    laws.equals_oracle(Runner("triton", 16), case_of(make, dtype))
    laws.gradients_equal_oracle(Runner("triton", 16), case_of(make, dtype))


@pytest.mark.parametrize("make", (both_ways, quasiseparable, trapezoidal))
def test_sums_of_packed_rows_keep_to_the_oracle(make: Callable[[Make], Mask]) -> None:
    case = case_of(lambda s: make(s) * s.cu, torch.bfloat16)
    laws.equals_oracle(Runner("triton"), case)
    laws.gradients_equal_oracle(Runner("triton"), case)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("make", (quasiseparable, trapezoidal))
def test_sums_in_segments_keep_to_the_oracle(
    make: Callable[[Make], Mask], packed: bool, monkeypatch: pytest.MonkeyPatch, launched: list[Launched]
) -> None:
    monkeypatch.setattr(backend.Triton, "_splits", lambda *args: [Config(16, 2)])
    case = case_of(lambda s: make(s) * s.cu if packed else make(s), torch.bfloat16, seqlen=140, nheads=1)
    laws.equals_oracle(Runner("triton"), case)
    assert all(x.constants["SEGMENTS"] for x in launched if x.name == "scan")
    laws.gradients_equal_oracle(Runner("triton"), case)


def test_a_relay_adds_too(monkeypatch: pytest.MonkeyPatch, launched: list[Launched]) -> None:
    monkeypatch.setattr("ssdops.backends.triton.launch.relay_of", lambda problem, programs: 3)
    laws.equals_oracle(Runner("triton"), case_of(quasiseparable, torch.bfloat16, seqlen=200))
    assert all(x.constants["RELAY"] for x in launched if x.name == "scan")


@pytest.mark.parametrize("strength", (1.0, 100.0))
def test_a_diagonal_beside_decays_in_factors_and_by_pairs(strength: float) -> None:
    """The diagonal does not go through the scores, which decays that span much take in another way."""
    laws.equals_oracle(
        Runner("triton", 32),
        case_of(lambda s: masks.decay(strength * s.log()) + masks.diagonal(s.factor()), torch.bfloat16, seqlen=70),
    )


@pytest.mark.parametrize("dims", ((5, 7), (70, 130)))
def test_sizes_that_align_with_nothing(dims: tuple[int, int]) -> None:
    """Filled up for the backward pass, in several tiles of headdim, in two parts of dstate."""
    case = case_of(quasiseparable, torch.float32, headdim=dims[0], dstate=dims[1], seqlen=20)
    laws.equals_oracle(Runner("triton"), case)
    laws.gradients_equal_oracle(Runner("triton"), case)


@pytest.mark.parametrize("v_heads", (1, 2))
def test_every_term_writes_what_the_next_adds_to(v_heads: int, launched: list[Launched]) -> None:
    """In float32, and the last one the rounded sum: forward, and dV backward unless heads share V."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 16), (1, 16), (v_heads, 16), (2,))
    q, k, v, x = (torch.randn(1, 20, *shape, generator=generator).bfloat16().requires_grad_() for shape in shapes)
    mask = masks.decay(-x.abs()) + masks.decay(-x.abs()).strict().T + masks.decay(-x.abs()).strict()
    y = ssd(q, k, v, mask, backend="triton")
    y.sum().backward()
    written = [(z.constants["ONTO"], z.tensors["y"].dtype) for z in launched if z.name == "scan"]
    assert written == [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
    onto = [z.tensors["onto"].data_ptr() for z in launched if z.name == "scan"][1:]
    assert onto == [z.tensors["y"].data_ptr() for z in launched if z.name == "scan"][:-1]
    back = [(z.constants["ONTO"], z.tensors["dv"].dtype) for z in launched if z.name == "gradients"]
    shared = [(False, torch.float32)] * 3
    assert back == (shared if v_heads == 1 else [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])


def test_a_scan_takes_one_diagonal_along(launched: list[Launched]) -> None:
    """The first that there is goes with the first scan, without a launch of its own but for its gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20, 2, generator=generator)
    q = torch.randn(1, 20, 1, 16, generator=generator).requires_grad_()
    v = torch.randn(1, 20, 2, 16, generator=generator)
    mask = masks.diagonal(x) + masks.decay(-x.abs()) + masks.diagonal(x.cos())
    plan = explain(q, q, v, mask, backend="triton").plan
    assert [step.along for step in plan.steps] == [1, None, None]
    assert f"along with {plan.steps[1].term.node()}" in str(plan).splitlines()[0]
    ssd(q, q, v, masks.decay(-x.abs()) + masks.diagonal(x), backend="triton").sum().backward()
    names = [z.name for z in launched]
    assert names[:2] == ["prepare", "scan"] and names.count("scan") == 1 and names.count("diagonal_gradients") == 1
    assert launched[1].constants["DIAGONAL"] and not launched[1].constants["ONTO"]
    assert [step.along for step in explain(q, q, v, mask, backend="chunked").plan.steps] == [None] * 3


def test_states_keep_the_order_of_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs first: here the second scan, as only the first one adds to what is there."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 30, 2, 16, generator=generator) for _ in range(3))
    a, b = (-torch.rand(1, 30, 2, generator=generator) for _ in range(2))
    mask = masks.decay(a) + masks.decay(b).strict() + masks.diagonal(a)
    wanted = ssd(q, k, v, mask, backend="naive", return_state=True)
    monkeypatch.setattr(backend.Triton, "adds", lambda self, term, problem, direction: not term.strict)
    found = ssd(q, k, v, mask, backend="triton", return_state=True)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_backward_pass_goes_as_its_forward_pass_did(monkeypatch: pytest.MonkeyPatch, launched: list[Launched]) -> None:
    """Where what a forward pass has saved says which steps there were, a diagonal goes along, or by itself, as then."""
    generator = torch.Generator().manual_seed(0)
    q, v, x = (torch.randn(1, 20, 1, *last, generator=generator).requires_grad_() for last in ((16,), (16,), ()))
    for took, takes in ((True, False), (False, True)):
        monkeypatch.setattr("ssdops.run._prepared", {})
        monkeypatch.setattr(backend.Triton, "takes_diagonal", lambda *args, took=took: took)
        y = ssd(q, q, v, masks.decay(-x.abs()) + masks.diagonal(x), backend="triton")
        monkeypatch.setattr("ssdops.run._prepared", {})
        monkeypatch.setattr(backend.Triton, "takes_diagonal", lambda *args, takes=takes: takes)
        launched.clear()
        found = torch.autograd.grad(y.square().sum(), (q, v, x))
        assert ("diagonal_gradients" in [z.name for z in launched]) == took
        exact = [t.detach().double().requires_grad_() for t in (q, v, x)]
        z = ssd(exact[0], exact[0], exact[1], masks.decay(-exact[2].abs()) + masks.diagonal(exact[2]), backend="naive")
        for got, wanted in zip(found, torch.autograd.grad(z.square().sum(), exact), strict=True):
            assert (got - wanted).norm() <= 1e-5 * wanted.norm()
