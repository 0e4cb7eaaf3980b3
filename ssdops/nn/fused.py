"""What torch does in several launches and a kernel in one, for autograd: no operator of torch.library, as where something
traces plain torch is as good, and compilers fuse it with what stands around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .launching import is_learnt, is_plain


class Launcher(Protocol):
    """A call of kernels, made from its arguments."""

    def forward(self) -> Any:
        """What plain torch gives."""

    def backward(self, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each tensor among the arguments, for a cotangent of each output."""


@dataclass(frozen=True)
class Fused:
    """A function of some tensors, or None, and then options.

    Attributes:
        tensors: how many of its arguments are tensors, or None: the first.
        plain: it in plain torch.
        launcher: what launches its kernels, made of the same arguments; it may import triton.
    """

    tensors: int
    plain: Callable[..., Any]
    launcher: Callable[..., Launcher]

    def __call__(self, *args: Any) -> Any:
        """By its kernels, forward and backward; a gradient that is itself differentiated, or traced, by plain torch."""
        learnt = is_learnt(args[: self.tensors])
        return _Function.apply(self, *args) if learnt else self.launcher(*args).forward()  # type: ignore[no-untyped-call]  # as torch has it


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Fused, *args: Any) -> Any:
        tensors = args[: fused.tensors]
        ctx.fused, ctx.options, ctx.given = fused, args[fused.tensors :], [x is not None for x in tensors]
        ctx.save_for_backward(*(x for x in tensors if x is not None))
        return fused.launcher(*args).forward()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)  # asked for once, as activation checkpointing has it
        tensors = [next(saved) if given else None for given in ctx.given]
        fused, again = ctx.fused, torch.is_grad_enabled()
        grads: tuple[Tensor | None, ...]
        if again or not is_plain(cotangents):
            learnt = [x is not None and needed for x, needed in zip(tensors, ctx.needs_input_grad[1:], strict=False)]
            with torch.enable_grad():
                out = fused.plain(*tensors, *ctx.options)
            wanted = [x for x, needed in zip(tensors, learnt, strict=True) if x is not None and needed]
            found = iter(torch.autograd.grad(out, wanted, cotangents, create_graph=again, allow_unused=True))
            grads = tuple(next(found) if needed else None for needed in learnt)
        else:
            grads = fused.launcher(*tensors, *ctx.options).backward(*cotangents)
        return (None, *grads, *[None] * len(ctx.options))
