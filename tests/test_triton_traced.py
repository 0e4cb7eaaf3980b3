"""Masks of users as Triton runs them from their traced formula: as factors, as a program, and what is said of the rest."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from traced_masks import ALIBI, MASKS, PAIRS, POWERS, TOKEN, kind

import ssdops.register
from ssdops import explain, ssd
from ssdops.backends.quadratic.form import Refused, read
from ssdops.backends.quadratic.formula import Leaf
from ssdops.backends.triton.kernels import formula as kernel
from ssdops.backends.triton.tile_mask import program
from ssdops.errors import UnsupportedError
from ssdops.ir import nodes as n
from ssdops.ir.text import parse
from ssdops.ir.trace import NAMES, Call
from ssdops.testing import laws
from ssdops.testing.laws import Runner
from ssdops.testing.structures import Make

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is asked for only where there is no GPU"),
    pytest.mark.filterwarnings(*(f"ignore:{what}:RuntimeWarning" for what in ("overflow", "invalid value", "divide by zero"))),
    pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning"),
]
RUN = Runner("triton")


@pytest.mark.parametrize(("name", "seqlen"), [*((name, 20) for name in MASKS), *((name, 1) for name in ("where", "gates"))])
def test_equals_oracle(name: str, seqlen: int) -> None:
    """Y and all gradients, in float32, inside the one tolerance."""
    make = Make(seqlen=seqlen, dtype=torch.float32)
    case = make.case(MASKS[name](make))
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@pytest.mark.parametrize("name", PAIRS)
def test_a_formula_that_is_no_product(name: str) -> None:
    """It is a program of the kernels, with the gradients of all that it reads, also under combinators."""
    make = Make(seqlen=40 if name == "tanh" else 18, dtype=torch.float32)
    case = make.case(PAIRS[name](make))
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@triton.jit
def evaluated(out, x, y, PROGRAM: tl.constexpr):
    """A formula of one leaf at rows and one at columns, 16 of each."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    tl.store(out + i * 16 + j, tl.broadcast_to(kernel.value(PROGRAM, (tl.load(x + i),), (tl.load(y + j),), ()), (16, 16)))


@pytest.mark.parametrize(
    ("name", "whole"),
    [*((name, False) for name in sorted(NAMES - {"double"})),  # which leaves are anyway
     *((name, True) for name in sorted(NAMES) if name.startswith("bitwise"))],
)  # fmt: skip
def test_every_operation_that_can_be_traced_is_torchs(name: str, whole: bool) -> None:
    """Of numbers on both sides of 0 and 1, whole ones and 0 among them; of bits, or as conditions where they combine those."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, generator=generator, dtype=torch.float64) for _ in range(2))
    x[:6], y[:5] = torch.tensor([0.0, 1.0, -2.0, 0.3, 1e-7, -3e-6]), torch.tensor([0.0, 1.0, 2.0, -3.0, 0.3])
    rows, cols = Leaf("row", 0), Leaf("col", 0)
    row, col = x[:, None], y[None, :]
    if name == "where":
        formula, expected = Call(name, (Call("lt", (rows, cols)), rows, 2.0)), torch.where(row < col, row, 2.0)
    elif whole:
        x, y = torch.arange(16.0).double(), torch.arange(-5.0, 11.0).double()
        row, col = x.long()[:, None], y.long()[None, :]
        formula = Call(name, (rows,) if name.endswith("not") else (rows, cols))
        expected = getattr(torch, name)(*((row,) if name.endswith("not") else (row, col)))
    elif name.startswith(("logical", "bitwise")):
        conditions, wanted = (Call("lt", (rows, 0.3)), Call("ge", (cols, 0.0))), (row < 0.3, col >= 0.0)
        taken = 1 if name.endswith("not") else 2
        formula, expected = Call(name, conditions[:taken]), getattr(torch, name)(*wanted[:taken])
    else:
        found = getattr(torch, {"clamp_min": "maximum", "clamp_max": "minimum"}.get(name, name))
        try:
            formula, expected = Call(name, (rows, cols)), found(row, col)
        except TypeError:  # it is of one
            formula, expected = Call(name, (rows,)), found(row)
    out = torch.empty(16, 16, dtype=torch.float64)
    evaluated[1,](out, x, y, program(formula))
    torch.testing.assert_close(out, expected.double().expand(16, 16), rtol=1e-11, atol=0, equal_nan=True)


def test_over_several_tiles_and_batch_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 3), (1, 3), (2, 4), (2,))
    q, k, v, w = (torch.randn(2, 70, *shape, generator=generator) for shape in shapes)
    mask = POWERS(w, 1) * ALIBI(torch.tensor([0.1, 0.3]))
    expected = ssd(*(x.double() for x in (q, k, v)), mask, backend="naive")
    assert torch.allclose(ssd(q, k, v, mask, backend="triton").double(), expected, rtol=1e-4, atol=1e-5)


def test_a_traced_decay_is_the_built_in_one() -> None:
    """It is read as a decay, and not as two exponents whose gradients cancel; and so it costs the same."""
    mine, theirs = (read(parse(f"{name} * window(left=3, right=0)"), 16) for name in ("traced_decay(log_a)", "decay(log_a)"))
    assert mine == theirs


def test_no_factor_is_a_matrix_unless_the_formula_reads_one() -> None:
    for name, make in MASKS.items():
        form = read(make(Make(dtype=torch.float32)).tree, 6)
        assert bool(form.entries) == ("matrix" in name)


# --- what cannot be traced ------------------------------------------------------------------------------------------

UNTRACEABLE = {
    "cumprod": (lambda s, i, j: s.u[i].cumprod(0), "operation cumprod"),
    "python": (lambda s, i, j: s.u[i] if i > j else 0.0, "operation bool: Python decides"),
    "shape": (lambda s, i, j: s.u[i] * i.shape[0], "operation shape"),
    "long": (lambda s, i, j: s.u[(i / 2).long()], "operation long"),
    "keyword": (lambda s, i, j: torch.div(i - j, 2, rounding_mode="floor"), "operation div with rounding_mode"),
    "tensor": (lambda s, i, j: s.u[i] * torch.ones(6), "a Tensor that is neither an operand nor a number"),
    "far token": (lambda s, i, j: s.u[i - j], "reading u of what depends on both tokens"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_cannot_be_traced_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries, words = UNTRACEABLE[name]
    monkeypatch.setattr(n, "REGISTERED", dict(n.REGISTERED))
    monkeypatch.setattr("ssdops.register._KNOWN", dict(ssdops.register._KNOWN))
    mask = kind(f"bad_{name.replace(' ', '_')}", entries, u=TOKEN)(torch.ones(1, 6, 1))
    with pytest.raises(Refused, match=f"cannot be traced: {words}"):
        read(mask.tree, 6)
    q = torch.ones(1, 6, 1, 2)
    with pytest.raises(UnsupportedError, match=f"cannot be traced: {words}(.|\n)*'naive' runs any mask"):
        ssd(q, q, q, mask, backend="triton")


def test_explain_says_so() -> None:
    x = torch.ones(1, 6, 1, 2)
    (step,) = explain(x, x, x, POWERS(torch.ones(1, 6, 1), 1), backend="triton").plan.steps
    assert step.backend == "triton"
