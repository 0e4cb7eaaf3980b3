"""Masks of users as Triton runs them from their traced formula: what can be taken apart, and what is said of the rest."""

from __future__ import annotations

import pytest
import torch
from traced_masks import ALIBI, MASKS, POWERS, TOKEN, kind

import ssdops.register
from ssdops import explain, ssd
from ssdops.backends.quadratic.form import Refused, read
from ssdops.errors import UnsupportedError
from ssdops.ir import nodes as n
from ssdops.ir.text import parse
from ssdops.testing import laws
from ssdops.testing.laws import Runner
from ssdops.testing.structures import Make

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is asked for only where there is no GPU"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
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
    "sum": (lambda s, i, j: s.u[i] + s.u[j], "operation add of what depends on both tokens"),
    "tanh": (lambda s, i, j: torch.tanh(s.u[i] * s.u[j]), "operation tanh of what depends on both tokens"),
    "product in exp": (lambda s, i, j: (s.u[i] * s.u[j]).exp(), "exp of operation mul of what depends on both tokens"),
    "far token": (lambda s, i, j: s.u[i - j], "reading u of what depends on both tokens"),
    "value decides": (lambda s, i, j: torch.where(s.u[i] > s.u[j], 1.0, 0.0), "a condition on more than i - j .operation gt"),
    "two branches": (
        lambda s, i, j: torch.where(i >= j, s.u[i] * s.u[j], s.u[j]), r"a where\(\) of two branches that depend on both"
    ),
}  # fmt: skip


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
