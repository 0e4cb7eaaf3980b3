"""What launchers of this room's kernels share: whether to launch, on which device, and how tensors are laid out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import config
from ..backends.base import Support
from ..errors import UnsupportedError

BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = find_spec("triton") is not None


def on_triton(x: Tensor, backend: str, limits: Support) -> bool:
    """Whether to launch a kernel on x, whose own limits are given; a backend that is named runs or raises."""
    if backend not in BACKENDS:
        raise UnsupportedError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "torch":
        return False
    found = _supports(x, interpreted=backend == "triton")
    found = limits if found.ok else found
    if backend == "triton" and not found.ok:
        raise UnsupportedError(f"'triton' does not take this: {found.reason}; backend='torch' does")
    return found.ok


def _supports(x: Tensor, interpreted: bool) -> Support:
    if not HAS_TRITON:
        return Support.no("triton is not installed")
    if x.device.type != "cuda" and not (interpreted and config.triton_interpreted()):
        return Support.no(f"its kernels run on GPUs, and the tensors are on {x.device}")
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return Support.no("its kernels have no rules for torch.func and forward-mode derivatives")
    return Support.yes()


def is_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the dispatcher would only lead to the launcher, so that its time can be saved: nothing traces or wraps."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all([x is None or (type(x) in _PLAIN and x.device.type in ("cpu", "cuda")) for x in tensors])  # noqa: C419  # quicker


def is_learnt(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient of one of them is wanted."""
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])  # noqa: C419  # likewise


_PLAIN = {Tensor, torch.nn.Parameter}


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Its multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def by_rows(x: Tensor) -> tuple[Tensor, int]:
    """x, or a copy, whose rows of neighbouring elements are all as far apart; and how far."""
    sizes, strides = x.shape, x.stride()
    row, step = 0, None  # the last axis but one that has several, and how far all after it reach
    if strides and (strides[-1] == 1 or sizes[-1] == 1):
        for size, stride in zip(sizes[-2::-1], strides[-2::-1], strict=True):
            if size == 1:
                continue
            if step is None:
                row, step = stride, stride * size
            elif stride != step:
                break
            else:
                step *= size
        else:
            return x, row
    return x.contiguous(), sizes[-1]


def even_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """`by_rows`, with the elements that the distance is counted in, and the distance in units of them (`aligned`)."""
    x, row = by_rows(x)
    align = aligned((row,))
    return x, align, row // align


def dense_last(x: Tensor) -> tuple[Tensor, int, tuple[int, ...]]:
    """x with unit stride along its last axis, itself wherever it can be; and its other strides in units of so many elements."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    strides = [stride if size > 1 else 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    align = aligned(strides)
    return x, align, tuple(stride // align for stride in strides)


def aligned(strides: Sequence[int]) -> int:
    """The most elements, up to 16, in units of which strides can be given.

    A kernel that multiplies them again knows how its rows are aligned, and so how wide it may load.
    """
    align = 16
    while any([stride % align for stride in strides]):  # noqa: C419  # quicker
        align //= 2
    return align
