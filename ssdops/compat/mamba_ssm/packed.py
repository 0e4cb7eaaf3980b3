"""Sequences packed into rows, as mamba_ssm writes them: an id per token, or boundaries beside."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import masks
from ...errors import ShapeError, UnsupportedError, ValueRangeError
from ...masks import Mask
from ..shapes import sizes_of


class Packed(NamedTuple):
    """Sequences in a row.

    Attributes:
        mask: 1 inside each.
        n_sequences: how many rows of states there are to a row of the batch; 0 if no states are carried.
        zero: `(batch,)`, which rows of the batch begin with a sequence that initial states enter.
        last: `(batch,)`, the row of states of the last token.
    """

    mask: Mask
    n_sequences: int
    zero: Tensor
    last: Tensor

    def enter(self, states: Tensor) -> Tensor:
        """A state per sequence: these for the first of each row, zero for the others."""
        first = torch.where(self.zero[:, None, None, None], states, 0.0)
        others = states.new_zeros(states.shape[0], self.n_sequences - 1, *states.shape[1:])
        return torch.cat([first[:, None], others], 1).flatten(0, 1)


def by_ids(seq_idx: Tensor, states: bool) -> Packed:
    """Sequences of tokens with one id; with states, they are counted on the host."""
    changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    ids = changes.cumsum(1)  # from 0, rising by 1
    count = int(ids.max()) + 1 if states and ids.numel() else None
    last = ids[:, -1] + torch.arange(len(ids), device=ids.device) * (count or 0)
    return Packed(masks.documents(segment_ids=ids, n_segments=count), count or 0, seq_idx[:, 0] == 0, last)


def by_boundaries(seq_idx: Tensor | None, cu_seqlens: Tensor | None, x: Tensor) -> Packed:
    """Sequences between boundaries, which are those of the ids."""
    if cu_seqlens is None:
        raise ValueRangeError("return_varlen_states needs cu_seqlens, which say where sequences end; got None")
    if seq_idx is None:
        raise UnsupportedError(
            "return_varlen_states without seq_idx, where mamba_ssm lets states run on from one sequence into the next; pass "
            "seq_idx, or leave both out and ask for return_final_states"
        )
    if len(x) != 1:
        raise ShapeError(
            f"return_varlen_states packs sequences into one row, and x has batch {len(x)}; flatten it into batch 1"
        )
    sizes_of(cu_seqlens=(cu_seqlens, "boundaries"))
    if cu_seqlens.device.type == seq_idx.device.type == "cpu" and not torch.compiler.is_compiling():
        found = (seq_idx[0, 1:] != seq_idx[0, :-1]).nonzero().flatten() + 1
        given = cu_seqlens.unique()[1:-1]
        if found.tolist() != given.tolist():
            raise ValueRangeError(f"seq_idx changes at {found.tolist()}, and cu_seqlens has inner boundaries {given.tolist()}")
    last = (torch.searchsorted(cu_seqlens, cu_seqlens[-1:]) - 1).clamp_min(0)  # of those with a token
    return Packed(masks.documents(cu_seqlens), len(cu_seqlens) - 1, seq_idx[:, 0] == 0, last)
