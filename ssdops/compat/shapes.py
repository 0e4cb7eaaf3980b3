"""What callers pass, by the names of its axes."""

from __future__ import annotations

from torch import Tensor

from ..errors import DtypeError, ShapeError


def sizes_of(**given: tuple[Tensor | None, str]) -> dict[str, int]:
    """The size of every axis named, the same wherever its name stands: `sizes_of(q=(q, "B T H K"), v=(v, "B T H V"))`.

    Args:
        given: a tensor, or None for one that is left out, and the names of its axes; the first to name an axis says its size,
            and an axis of a fixed size is a number.

    Raises:
        DtypeError: something other than a tensor.
        ShapeError: another rank, or a size that disagrees with an earlier tensor's.
    """
    sizes: dict[str, int] = {}
    for name, (x, text) in given.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        axes = text.split()
        known = [int(axis) if axis.isdecimal() else sizes.get(axis) for axis in axes]
        fits = x.ndim == len(axes) and all(n in (None, size) for n, size in zip(known, x.shape, strict=True))
        if not fits:
            wanted = ", ".join(
                axis if n is None or axis.isdecimal() else f"{axis}={n}" for axis, n in zip(axes, known, strict=True)
            )
            raise ShapeError(f"{name} must be ({wanted}), got {tuple(x.shape)}; reshape it, or look at what it is called with")
        sizes.update(zip(axes, x.shape, strict=True))
    return sizes


def check_shared(few: int, many: int, few_name: str, many_name: str) -> None:
    """Heads are shared by contiguous groups of others.

    Raises:
        ShapeError: their number does not divide that of the others.
    """
    if few < 1 or many % few:
        raise ShapeError(f"{few_name}={few} must divide {many_name}={many}; expand those heads, or change their number")
