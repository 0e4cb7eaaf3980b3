"""The torch.library operators `ssdops::gated_norm` and `gated_norm_backward`: the norm on Triton, for torch.

Their arguments are those of `gated_rms_norm` once they are checked, the skip connection's x and D both there or neither. Shapes
while tracing and derivatives are here; `norm_triton.py`, imported when an operator first runs, launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .launching import is_learnt, is_plain
from .norm_torch import norm

LIBRARY = torch.library.Library("ssdops", "FRAGMENT")
_CALL = "Tensor y, Tensor z, Tensor weight, Tensor? x, Tensor? D, float eps, int groups, bool before"
LIBRARY.define(f"gated_norm({_CALL}) -> Tensor")
LIBRARY.define(f"gated_norm_backward(Tensor dout, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


def gated_norm(*args: Any) -> Tensor:
    """`ssdops::gated_norm`, in the shortest way in."""
    if not is_plain(args[:5]):
        out: Tensor = torch.ops.ssdops.gated_norm(*args)
    elif is_learnt(args[:5]):
        out = _Eager.apply(*args)  # type: ignore[no-untyped-call]  # as torch has it
    else:
        out = _norm(*args)
    return out


def _norm(*args: Any) -> Tensor:
    from .norm_triton import Norm  # which imports triton

    return Norm(*args).forward()


def _norm_backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from .norm_triton import Norm

    y, _, weight, x, D = args[:5]
    dy, dz, dx, sums = Norm(*args).backward(dout)
    dweight = sums[0].to(weight.dtype, copy=True)
    if x is None:
        return dy, dz, dweight, y.new_empty(0), y.new_empty(0)
    return dy, dz, dweight, dx, sums[1].unflatten(0, (len(D), -1)).sum(1).to(D.dtype)


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _norm_backward_fake(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(args[0].new_empty(0) if x is None else _contiguous(x) for x in args[:5])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options, ctx.skips = inputs[5:], inputs[3] is not None
    ctx.save_for_backward(*(x for x in inputs[:5] if x is not None))


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    given = (*ctx.saved_tensors, *(() if ctx.skips else (None, None)))  # asked for once, as activation checkpointing has it
    learnt = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():  # the gradient is itself differentiated: by autograd, of plain torch
        wanted = [x for x, needed in zip(given, learnt, strict=True) if needed]
        found = iter(torch.autograd.grad(norm(*given, *ctx.options), wanted, dout, create_graph=True))
        grads = [next(found) if needed else None for needed in learnt]
    else:
        run = _norm_backward if is_plain((dout, *given)) else torch.ops.ssdops.gated_norm_backward
        out = run(dout, *given, *ctx.options)
        grads = [grad if needed else None for grad, needed in zip(out, learnt, strict=True)]
    return (*grads, None, None, None)


class _Eager(torch.autograd.Function):
    """The same without torch.library, whose wrapping takes longer than a short kernel."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _keep(ctx, args, args[0])
        return _norm(*args)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return _differentiate(ctx, dout)


LIBRARY.impl("gated_norm", _norm, "CompositeExplicitAutograd")
LIBRARY.impl("gated_norm_backward", _norm_backward, "CompositeExplicitAutograd")
torch.library.register_fake("ssdops::gated_norm", lambda y, *args: _contiguous(y), lib=LIBRARY)
torch.library.register_fake("ssdops::gated_norm_backward", _norm_backward_fake, lib=LIBRARY)
torch.library.register_autograd("ssdops::gated_norm", _differentiate, setup_context=_keep, lib=LIBRARY)
