"""The torch.library operator `ssdops::places`: where documents lie, on Triton, for torch. Of integers, it has no derivative."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .launching import is_plain

LIBRARY = torch.library.Library("ssdops", "FRAGMENT")
LIBRARY.define("places(Tensor given, SymInt batch, SymInt seqlen, SymInt per_row) -> (Tensor, Tensor, Tensor, Tensor)")


Places: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def places(given: Tensor, batch: int, seqlen: int, per_row: int) -> Places:
    """`ssdops::places`, in the shortest way in.

    Args:
        given: boundaries `(per_row + 1,)`, or ids `(batch, seqlen)` or `(1, seqlen)`.
        per_row: the documents of a row of the batch; 0 where ids do not say.

    Returns:
        position, row, starts and stops, as `Packing` has them; int64.
    """
    run = _places if is_plain((given,)) else torch.ops.ssdops.places
    position, row, starts, stops = run(given, batch, seqlen, per_row)
    return position, row, starts, stops


def _places(given: Tensor, batch: int, seqlen: int, per_row: int) -> Places:
    from .packing_triton import places as launch  # which imports triton

    return launch(given, *_empty(given, batch, seqlen, per_row))


def _empty(given: Tensor, batch: int, seqlen: int, per_row: int) -> Places:
    position, starts = (given.new_empty(size, dtype=torch.int64) for size in ((batch, seqlen), (batch * per_row,)))
    return position, torch.empty_like(position), starts, torch.empty_like(starts)


LIBRARY.impl("places", _places, "CompositeExplicitAutograd")
torch.library.register_fake("ssdops::places", _empty, lib=LIBRARY)
