"""Transposes of operand expressions are what autograd makes of their values."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ssdops.ir import nodes as n
from ssdops.ir import operands as ops
from ssdops.ir.operands import Operand
from ssdops.ir.resolve import resolve
from ssdops.ir.transposed import through, transposed

SHAPES = {"whole": (2, 5, 4), "other": (2, 5, 4), "token": (1, 5, 1), "head": (4,), "shared": (2, 5, 2), "one": (2, 1, 4)}
LEAVES = st.sampled_from(sorted(SHAPES))
LINEAR: st.SearchStrategy[Operand] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(ops.Add, inner, inner),
        st.builds(ops.Scaled, inner, st.sampled_from([-1.0, 0.5, 3.0])),
        *(st.builds(kind, inner) for kind in (ops.Flip, ops.Advance, ops.Delay)),
    ),
    max_leaves=5,
)


@given(LINEAR, st.integers(0, 3))
@example(ops.Add("whole", "other"), 0)
@example(ops.Add("whole", ops.Advance("other")), 0)
def test_it_is_what_autograd_gives(x: Operand, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    value = resolve(x, leaves, n.TOKEN, 5)
    grad = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    used = sorted(set(ops.names(x)))
    torch.testing.assert_close(resolve(x, tensors, n.TOKEN, 5), value.detach(), rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(value, [leaves[name] for name in used], grad)
    found = transposed(x, grad, tensors, n.TOKEN)
    assert found is not None and sorted(found) == used
    for name, expected in zip(used, wanted, strict=True):
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)
    places = [t.data_ptr() for t in found.values()]
    assert len(set(places)) == len(places)  # as they are outputs of an operator


def test_what_is_not_linear_is_left_to_autograd() -> None:
    """Beside a slot that is not: gradients of both are summed."""
    tensors = {"a": torch.full((1, 5, 1), 3.0)}
    ones = torch.ones(1, 5, 1)
    for x, wanted in ((ops.Mul("a", "a"), 6.0), (ops.Add("a", ops.Mul("a", "a")), 7.0), (ops.Flip(ops.Mul("a", "a")), 6.0)):
        assert transposed(x, ones, tensors, n.TOKEN) is None
        found = through({"rows": ("a", n.TOKEN), "cols": (x, n.TOKEN)}, {"rows": ones, "cols": ones}, tensors, 5)
        assert torch.equal(found["a"], (1.0 + wanted) * ones)
