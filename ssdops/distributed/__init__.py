"""Sequences and heads over the ranks of torch.distributed: `ssd` on slices of a sequence, a Mamba-2 block in parts."""

from typing import TYPE_CHECKING, Any

from .scan import ssd

if TYPE_CHECKING:
    from .heads import HeadsParallel

__all__ = ["HeadsParallel", "ssd"]


def __getattr__(name: str) -> Any:
    if name != "HeadsParallel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .heads import HeadsParallel  # it imports torch's DTensor, which takes time

    return HeadsParallel
