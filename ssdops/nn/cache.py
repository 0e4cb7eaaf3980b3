"""What a Mamba-2 block carries from token to token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DeviceError, DtypeError, ShapeError
from ..ir.problem import count_states
from ..masks import Mask
from .packing import documents_node


@dataclass(frozen=True)
class Mamba2Cache:
    """The whole past of some sequences, in the eyes of one block: a row for each. Nothing ever writes to it.

    Attributes:
        window: the last d_conv − 1 inputs of the convolution, oldest first, `(rows, channels, d_conv − 1)`, in the
            dtype of activations.
        state: the state of the scan, `(rows, nheads, headdim, d_state)`, float32 or float64.
    """

    window: Tensor
    state: Tensor


def cache_rows(u: Tensor, documents: Mask | None) -> tuple[int, str]:
    """How many rows the cache of these sequences has, and why."""
    if documents is None:
        return u.shape[0], "the batch of u"
    rows = count_states(documents_node(documents, u), documents.operands, u.shape[0])
    if rows is None:
        raise ShapeError("a cache of packed documents has a row for each, and segment_ids do not say how many: give n_segments")
    return rows, "one per document"


def check_cache(
    cache: Mamba2Cache, sizes: tuple[tuple[int, ...], tuple[int, ...]], expected: tuple[int, str], device: torch.device
) -> None:
    """Whether a cache is of a block of these sizes, and has the rows expected."""
    rows, why = expected
    if not isinstance(cache, Mamba2Cache):
        raise DtypeError(f"cache must be a Mamba2Cache, from forward(…, return_cache=True), got {type(cache).__name__}")
    for name, x, size in (("window", cache.window, sizes[0]), ("state", cache.state, sizes[1])):
        if tuple(x.shape[1:]) != size:
            raise ShapeError(
                f"cache.{name} must be (rows, {', '.join(map(str, size))}) in this block, got {tuple(x.shape)}; "
                "it is of a block of other sizes"
            )
        if x.shape[0] != rows:
            raise ShapeError(f"cache.{name} has {x.shape[0]} rows, expected {rows}, {why}; give each sequence its own row")
        if x.device != device:
            raise DeviceError(f"cache.{name} is on {x.device}, but u is on {device}; move the cache to u's device")
