"""Documents as rows of their own: tiles of local time, read and written without seeing a neighbour.

A scan runs over *rows*: batch rows, or packed documents. Tile t of a row is its tokens [t0, t1) in local time, which
starts at the right for an anticausal scan. Documents of different lengths are sorted by length, so that the rows still
running at t0 are always the first ones; a tile that reaches past a document's end is padded with zeros, which is the one
value that changes no state and no other output. Nothing of another document is ever read, so not even NaN can cross.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.resolve import Span


class Rows:
    """Batch rows, or documents, as rows of local time.

    Args:
        spans: the documents, or None where every batch row is one.
        batch, seqlen: sizes of the tensors that will be read.
        causal: whether local time runs from the left.
        device: of the tensors.
    """

    def __init__(self, spans: list[Span] | None, batch: int, seqlen: int, causal: bool, device: torch.device) -> None:
        self.seqlen, self.causal, self.device, self._batch_rows = seqlen, causal, device, batch
        self.spans = None if spans is None else sorted(spans, key=lambda s: s.start - s.stop)
        if self.spans is None:
            self.count, self.length = batch, seqlen if batch else 0
            return
        self.count = len(self.spans)
        self.length = max((s.stop - s.start for s in self.spans), default=0)
        self.lengths = [s.stop - s.start for s in self.spans]
        self._batch, self._start, self._stop, self._state = (
            torch.tensor(column, dtype=torch.int64, device=device)
            for column in (
                [s.row for s in self.spans],
                [s.start for s in self.spans],
                [s.stop for s in self.spans],
                [s.state for s in self.spans],
            )
        )

    @property
    def covers(self) -> bool:
        """Whether writing every tile fills the tensor: batch rows do, documents do unless tokens lie outside them all."""
        return self.spans is None or sum(self.lengths) == self.seqlen * self._batch_rows

    def alive(self, t0: int) -> int:
        """How many rows, the first ones, have a token at local time t0."""
        if self.spans is None:
            return self.count
        return sum(length > t0 for length in self.lengths)

    def tiles(self, size: int) -> list[tuple[int, int]]:
        """[t0, t1) of each tile, in local time."""
        return [(t0, min(t0 + size, self.length)) for t0 in range(0, self.length, size)]

    def read(self, x: Tensor, t0: int, t1: int) -> Tensor:
        """Tile [rows alive at t0, t1 − t0, …] of x [batch, seqlen, …]; a view where it can be."""
        if self.spans is None:
            if self.causal:
                return x[:, t0:t1]
            return x[:, self.seqlen - t1 : self.seqlen - t0].flip(1)
        rows, tokens, inside = self._index(t0, t1)
        tile = x[rows, tokens]
        return tile.masked_fill_(~inside.view(*inside.shape, *(1,) * (tile.ndim - 2)), 0.0)

    def view(self, y: Tensor, t0: int, t1: int) -> Tensor | None:
        """The tile of y itself where it is one in local time's order, to be written in place; else None."""
        return y[:, t0:t1] if self.spans is None and self.causal else None

    def write(self, y: Tensor, tile: Tensor, t0: int, t1: int) -> None:
        """Put a tile back where `read` took it from, dropping the padding."""
        if self.spans is None:
            if self.causal:
                y[:, t0:t1] = tile
            else:
                y[:, self.seqlen - t1 : self.seqlen - t0] = tile.flip(1)
            return
        rows, tokens, inside = self._index(t0, t1)
        y[rows.expand_as(tokens)[inside], tokens[inside]] = tile[inside].to(y.dtype)

    def _index(self, t0: int, t1: int) -> tuple[Tensor, Tensor, Tensor]:
        alive = self.alive(t0)
        local = torch.arange(t0, t1, device=self.device)
        start, stop = self._start[:alive, None], self._stop[:alive, None]
        tokens = start + local if self.causal else stop - 1 - local
        inside = local < stop - start
        return self._batch[:alive, None], torch.where(inside, tokens, start), inside

    def enter(self, states: Tensor) -> Tensor:
        """States by document → states by row."""
        return states if self.spans is None else states[self._state]

    def leave(self, states: Tensor, n_states: int) -> Tensor:
        """States by row → states by document."""
        if self.spans is None:
            return states
        return states.new_zeros(n_states, *states.shape[1:]).index_copy_(0, self._state, states)
