"""Packed documents, of rows that are cut into blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...ir import nodes as n
from ..base import Inputs
from .side import ALL, packed_of


class Packing:
    """Documents among blocks.

    The scan inside blocks runs as one packed row, whose documents end where blocks do, too. For the scan across only those
    tokens count that are of the document that goes on from one of its two blocks to the other. What is read of the rest is 0,
    and so is what comes out for it: 0 times what is not finite is not 0, and it is to stay in its own document.

    Shapes: n blocks of B tokens in each of batch rows; the rows' own tokens come first if the scan is causal, else last.

    Attributes:
        starts: where documents begin in tokens of all blocks, and where the last ends, `(documents + 1,)`.
        blocks: where those begin.
        counts: by what is read or made, whether a token of a block counts across, `(batch, n, B)`.
    """

    def __init__(self, boundaries: Tensor, batch: int, seqlen: int, size: int, count: int, causal: bool) -> None:
        row = size * count
        early = 0 if causal else row - seqlen
        found = boundaries.long()
        self.starts = (found + found // max(seqlen, 1) * (row - seqlen) + early).clamp(max=batch * row)
        tokens = torch.arange(batch * row, device=boundaries.device).unflatten(0, (batch, count, size))
        self.blocks = tokens[..., 0].flatten()
        right = tokens < self._document_around(tokens[..., 0])[1]
        left = tokens >= self._document_around(tokens[..., -1] + 1)[0]
        rows, cols = (right, left) if causal else (left, right)
        self.counts = {"rows": rows, "q": rows, "y": rows, "cols": cols, "k": cols, "v": cols}

    def _document_around(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Where the document of the token behind a block's end begins and ends: at that end, if none goes on across it."""
        later = torch.searchsorted(self.starts, ends.contiguous(), right=True)
        begin, stop = self.starts[(later - 1).clamp(min=0)], self.starts[later.clamp(max=self.starts.numel() - 1)]
        return begin[..., None], stop[..., None]

    def kept(self, name: str, x: Tensor, blocks: slice = ALL) -> Tensor:
        """`(batch, blocks, B, …)` of those blocks, 0 where a token does not count across."""
        on = self.counts[name][:, blocks]
        return torch.where(on.reshape(*on.shape, *[1] * (x.ndim - 3)), x, 0)

    def in_one_row(self, x: Inputs, documents: n.Documents) -> Inputs:
        """The scan inside blocks, `(batch · n, B, …)`, as one packed row; `documents` reads "documents" among operands."""
        blocks = torch.minimum(torch.maximum(self.blocks, self.starts[0]), self.starts[-1])
        cu = torch.cat([self.starts, blocks]).sort().values
        q, k, v = (t.flatten(0, 1)[None] for t in (x.q, x.k, x.v))
        values = {name: t.flatten(0, 1)[None] for name, t in x.values.items()}
        problem = packed_of(x.problem, cu.numel() - 1)
        return replace(x, problem=problem, q=q, k=k, v=v, values=values, operands={"documents": cu}, documents=documents)
