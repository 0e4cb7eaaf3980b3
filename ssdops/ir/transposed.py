"""The transposes of operand expressions: gradients of their values become those of the operands that they are made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import operands as ops
from .operands import Operand
from .resolve import canonical, moved, reduce_to, resolve


def through(
    slots: Mapping[str, tuple[Operand, str]], grads: Mapping[str, Tensor], tensors: Mapping[str, Tensor], seqlen: int
) -> dict[str, Tensor]:
    """The gradients of slots' values → those of the operands by name, no two in the same memory.

    Args:
        slots: name of a slot → what stands in it, and its axes.
        grads: name of a slot → the gradient of its value, in canonical axes; others may be among them.
        tensors: name of an operand → tensor.
    """
    out, others = dict[str, Tensor](), dict[str, tuple[Operand, str]]()
    for slot, (x, axes) in slots.items():
        if isinstance(x, str) and x not in out:
            out[x] = grads[slot].reshape(tensors[x].shape)
        elif (found := transposed(x, grads[slot], tensors, axes)) is not None:
            out = _sums(out, found)
        else:
            others[slot] = x, axes
    return _sums(out, _by_autograd(others, grads, tensors, seqlen)) if others else out


def transposed(x: Operand, grad: Tensor, tensors: Mapping[str, Tensor], axes: str) -> dict[str, Tensor] | None:
    """`through` one expression that is linear and moves nothing but tokens, without autograd; None if it is another."""
    match x:
        case str():
            whole = canonical(tensors[x], axes)
            return {x: reduce_to(grad, whole.shape, 2).reshape(tensors[x].shape)} if whole.ndim == grad.ndim else None
        case ops.Add(a, b):
            left = transposed(a, grad, tensors, axes)
            right = transposed(b, grad, tensors, axes)
            return None if left is None or right is None else _sums(left, right)
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


def _by_autograd(
    slots: Mapping[str, tuple[Operand, str]], grads: Mapping[str, Tensor], tensors: Mapping[str, Tensor], seqlen: int
) -> dict[str, Tensor]:
    """`through` any expressions."""
    with torch.enable_grad():
        fresh = {name: t.detach().requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
        values = {slot: resolve(x, {**tensors, **fresh}, axes, seqlen) for slot, (x, axes) in slots.items()}
    found = torch.autograd.grad(
        list(values.values()),
        list(fresh.values()),
        [grads[slot].to(value.dtype) for slot, value in values.items()],
        allow_unused=True,
    )
    return {name: grad for name, grad in zip(fresh, found, strict=True) if grad is not None}


def _sums(left: dict[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both, summed where they have a name in common."""
    out, seen = dict(left), {x.data_ptr() for x in left.values()}
    for name, x in right.items():
        if name in out:
            out[name] = out[name] + x
        else:
            out[name] = x.clone() if x.data_ptr() in seen else x
    return out
