"""The transposes of operand expressions that are linear and move nothing but tokens: gradients without autograd."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import operands as ops
from .operands import Operand
from .resolve import canonical, moved, reduce_to


def transposed(x: Operand, grad: Tensor, tensors: Mapping[str, Tensor], axes: str) -> dict[str, Tensor] | None:
    """The gradient of an expression's value → those of its names, no two in the same memory; None if it is not linear.

    Args:
        x: a name or an expression over names.
        grad: of its value in canonical axes, all tokens of it.
        tensors: name → tensor.
        axes: the axes of the slot that x stands in.
    """
    match x:
        case str():
            whole = canonical(tensors[x], axes)
            return {x: reduce_to(grad, whole.shape, 2).reshape(tensors[x].shape)} if whole.ndim == grad.ndim else None
        case ops.Add(a, b):
            left = transposed(a, grad, tensors, axes)
            right = transposed(b, grad, tensors, axes)
            return None if left is None or right is None else sums(left, right)
        case ops.Scaled(a, factor):
            return transposed(a, grad * factor, tensors, axes)
        case ops.Flip(a):
            return transposed(a, grad.flip(1), tensors, axes)
        case ops.Advance(a):
            return transposed(a, moved(grad, grad.shape[1], 1), tensors, axes)
        case ops.Delay(a):
            return transposed(a, moved(grad, grad.shape[1], -1), tensors, axes)
        case _:
            return None


def sums(left: dict[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both, summed where they have a name in common."""
    out, seen = dict(left), {x.data_ptr() for x in left.values()}
    for name, x in right.items():
        if name in out:
            out[name] = out[name] + x
        else:
            out[name] = x.clone() if x.data_ptr() in seen else x
    return out
