"""The torch.library operators `ssdops::conv`, `conv_backward`, `conv_windows` and `conv_step`: the convolution on Triton.

Their arguments are those of `causal_conv1d` once they are checked: `window` in the dtype of x, or None; `packed` empty, or
`Packing.tensors`. Shapes while tracing and derivatives are here; `conv_triton.py`, imported when an
operator first runs, launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .conv_torch import convolve, spread
from .launching import is_learnt, is_plain
from .packing import Packing

LIBRARY = torch.library.Library("ssdops", "FRAGMENT")
_ARGS = "Tensor x, Tensor weight, Tensor? bias, Tensor? window"
_CALL = f"{_ARGS}, Tensor[] packed, bool silu"
LIBRARY.define(f"conv({_CALL}) -> Tensor")
LIBRARY.define(f"conv_backward(Tensor dy, {_CALL}, bool of_window) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define("conv_windows(Tensor x, Tensor? window, Tensor[] packed, SymInt count) -> Tensor")
LIBRARY.define(f"conv_step({_ARGS.replace('Tensor? window', 'Tensor window')}, bool silu) -> (Tensor, Tensor)")


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, packed: list[Tensor], silu: bool) -> Tensor:
    """`ssdops::conv`, in the shortest way in."""
    given = (x, weight, bias, window)
    if not is_plain(given):
        y: Tensor = torch.ops.ssdops.conv(*given, packed, silu)
    elif is_learnt(given):
        y = _Eager.apply(*given, silu, *packed)  # type: ignore[no-untyped-call]  # as torch has it
    else:
        y = _conv(*given, packed, silu)
    return y


def windows(x: Tensor, window: Tensor | None, packed: list[Tensor], count: int) -> Tensor:
    """`ssdops::conv_windows`: the windows that leave packed documents."""
    plain = is_plain((x, window)) and not is_learnt((x, window))
    run = _conv_windows if plain else torch.ops.ssdops.conv_windows
    after: Tensor = run(x, window, packed, count)
    return after


def step(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """`ssdops::conv_step`, likewise; it has no derivative."""
    run = _conv_step if is_plain((x, weight, bias, window)) else torch.ops.ssdops.conv_step
    y, after = run(x, weight, bias, window, silu)
    return y, after


def _conv(*args: Any) -> Tensor:
    from .conv_triton import Convolution  # which imports triton

    return Convolution(*args).forward()


def _conv_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .conv_triton import Convolution

    x, weight, bias, _, _, _, of_window = args
    c = Convolution(*args[:6])
    dx, sums = c.backward(dy)
    dweight = sums[:-1].mT.to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    dbias = x.new_empty(0) if bias is None else sums[-1].to(bias.dtype, copy=True)
    return dx, dweight, dbias, c.backward_window(dy) if of_window else x.new_empty(0)


def _conv_windows(x: Tensor, window: Tensor | None, packed: list[Tensor], count: int) -> Tensor:
    from .conv_triton import windows_after

    _, _, starts, stops = packed
    return windows_after(x, window, starts, stops, count)


def _conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    from .conv_triton import Convolution

    return Convolution(x, weight, bias, window, (), silu).step()


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _conv_backward_fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, weight, bias, window, _, _, of_window = args
    given = (x, weight, bias, window if of_window else None)
    return tuple(x.new_empty(0) if t is None else _contiguous(t) for t in given)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, window, packed, silu = inputs
    ctx.silu, ctx.given = silu, (bias is not None, window is not None)
    ctx.save_for_backward(x, weight, *(t for t in (bias, window) if t is not None), *packed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    kept = ctx.saved_tensors  # once: activation checkpointing gives them up when they are asked for
    x, weight, *rest = kept
    bias, window = (rest.pop(0) if given else None for given in ctx.given)
    learnt = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():  # the gradient is itself differentiated: by autograd, of plain torch
        with torch.enable_grad():
            y = convolve(x, weight, bias, window, Packing.of(rest), ctx.silu)
        wanted = [t for t, needed in zip((x, weight, bias, window), learnt, strict=True) if needed and t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
        grads = [next(found) if needed else None for needed in learnt]
    else:
        run = _conv_backward if is_plain((dy, *kept)) else torch.ops.ssdops.conv_backward
        out = run(dy, x, weight, bias, window, rest, ctx.silu, learnt[3])
        grads = [grad if needed else None for grad, needed in zip(out, learnt, strict=True)]
    return (*grads, [None] * len(rest), None)


def _keep_windows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, window, packed, ctx.count = inputs
    ctx.shape, ctx.given = x.shape, window is not None
    ctx.save_for_backward(*packed)


def _differentiate_windows(ctx: Any, dafter: Tensor) -> tuple[Any, ...]:
    position, row, starts, stops = ctx.saved_tensors
    dx, dwindow = spread(dafter, ctx.shape, Packing(position, row, starts, stops, len(starts)))
    return dx, dwindow if ctx.given else None, [None] * 4, None


class _Eager(torch.autograd.Function):
    """The same without torch.library, whose wrapping takes longer than a short kernel."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *given, silu = args[:5]
        inputs = (*given, list(args[5:]), silu)
        _keep(ctx, inputs, given[0])
        return _conv(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        *grads, of_packed, _ = _differentiate(ctx, dy)
        return (*grads, None, *of_packed)


LIBRARY.impl("conv", _conv, "CompositeExplicitAutograd")
LIBRARY.impl("conv_backward", _conv_backward, "CompositeExplicitAutograd")
LIBRARY.impl("conv_windows", _conv_windows, "CompositeExplicitAutograd")
LIBRARY.impl("conv_step", _conv_step, "CompositeExplicitAutograd")
torch.library.register_fake("ssdops::conv", lambda x, *args: _contiguous(x), lib=LIBRARY)
torch.library.register_fake("ssdops::conv_backward", _conv_backward_fake, lib=LIBRARY)
torch.library.register_fake(
    "ssdops::conv_windows", lambda x, window, packed, count: x.new_empty(len(packed[2]), x.shape[2], count), lib=LIBRARY
)
torch.library.register_fake("ssdops::conv_step", lambda x, w, b, window, s: (_contiguous(x), _contiguous(window)), lib=LIBRARY)
torch.library.register_autograd("ssdops::conv", _differentiate, setup_context=_keep, lib=LIBRARY)
torch.library.register_autograd("ssdops::conv_windows", _differentiate_windows, setup_context=_keep_windows, lib=LIBRARY)
