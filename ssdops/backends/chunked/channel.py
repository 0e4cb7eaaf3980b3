"""Decay per channel, forward: a scan whose tiles hold q̃, k̃ and scores as `tree.py` makes them, every head by itself."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ...ir.problem import Problem, common_heads
from ...ir.resolve import repeat_heads
from ..base import Work
from .forward import SPAN, Scan, Tile, exp_
from .tree import Leaves, Level, climb

CHANNEL_SIZES = (64, 32, 16, 128, 256)
"""Chunk sizes to consider, the default first: with headdim 1, what a chunk's pairs cost counts more than what states do."""
ELEMENTS = 2**18
"""Elements of q̃, over all rows and heads, that a span aims at: they stay in cache, and the cost of calls is hidden."""


@dataclass(frozen=True)
class ChannelTile(Tile):
    """A span of chunks, whose q and k are q̃ and k̃ of whole chunks [M, R, H, C, N], and which has no ρ, κ or factors of them.

    C' is the least power of two that is no less than C, and Z = M·R·H.
    """

    given: tuple[Tensor, Tensor]  # q and k as they were given, [M, R, heads, C, N]
    columns: Tensor | None  # what is in v, cols · exp(log_cols), [M, R, C, H]
    scores: Tensor  # L ∘ QKᵀ, [Z, C', C']
    decays: Tensor  # exp of log decays, [M, R, H, C', N]
    passing: Tensor  # exp(E), [M, R, H, N]
    levels: list[Level]  # of the tree, if they were asked for


def span_tokens(p: Problem) -> int:
    """Tokens, over all rows, that a span aims at: fewer where heads and channels are many."""
    return min(SPAN, ELEMENTS // max(p.nheads * p.dstate, 1))


def channel_work(p: Problem, size: int) -> Work:
    """What a forward pass in chunks of `size` costs: the triangle of scores once per head, and passes over q̃ and k̃."""
    tokens, levels = float(p.batch * p.seqlen), (size - 1).bit_length()
    per_head = size * p.dstate + 2 * size * p.headdim + 4 * p.dstate * p.headdim
    touched = p.dstate * (12 + 2 * levels) + 2 * size + 4 * p.headdim + 3 * p.dstate * p.headdim / size
    chunks = ceil(p.seqlen / size)
    spans = min(chunks, ceil(tokens / max(span_tokens(p), 1)))
    return Work(
        tokens * p.nheads * per_head,
        tokens * p.nheads * touched,
        4 * tokens * p.nheads * (4 * p.dstate + 2 * p.headdim),
        10.0 + 8.0 * chunks + (60.0 + 12.0 * levels) * spans,
    )


class ChannelScan(Scan):
    """A linear term with a decay per channel over its rows, in spans of chunks."""

    @staticmethod
    def score_heads(problem: Problem) -> int:
        """Every head: its scores have its decays in them."""
        return problem.nheads

    def read_slots(self) -> dict[str, Tensor | None]:
        """What there is per token; of a decay per channel heads are repeated in tiles only, as it is large."""
        p = self.x.problem
        slots = {name: self.x.per_head(name) for name in self.x.values if name not in ("channel", "A")}
        if (channel := self.x.values.get("channel")) is not None:
            slots["channel"] = channel.expand(p.batch, p.seqlen, *channel.shape[2:])
        return slots

    @property
    def scaled_columns(self) -> bool:
        """Whether a tile's v is not the one given, but scaled."""
        return "cols" in self.slots or "log_cols" in self.slots

    def span_tokens(self) -> int:
        """Tokens, over all rows, that a span aims at."""
        return span_tokens(self.x.problem)

    @property
    def short_logs(self) -> bool:
        """Whether log decays per channel are given as numbers of the accumulation dtype, or of a narrower one."""
        channel = self.x.values.get("channel")
        return channel is not None and channel.dtype.itemsize <= self.acc.itemsize

    @property
    def big_a(self) -> Tensor:
        """A of a decay in factors, [H, 1, N], in the dtype of exponents."""
        return repeat_heads(self.x.values["A"].to(self.exact), self.x.problem.nheads, 0)[:, None]

    # --- reading ----------------------------------------------------------------------------------------------------

    def tile(self, t0: int, chunks: int, keep: bool = False) -> ChannelTile:
        """A span of chunks; with `keep`, and with the levels of its tree."""
        x, term = self.x, self.term
        factors = ("rows", "cols", *(["channel"] if self.short_logs else []))  # the rest are logs, to be summed exactly
        given = {name: slot for name, slot in self.slots.items() if slot is not None}
        slots = {name: self.read(slot, t0, chunks, None if name in factors else self.exact) for name, slot in given.items()}
        columns = self._columns(slots)
        v = repeat_heads(self.read(x.v, t0, chunks), x.problem.nheads, 3)
        q, k = (self.read(t, t0, chunks).transpose(2, 3) for t in (x.q, x.k))  # [M, R, heads, C, N]
        logs, decays = self._logs(slots, v.shape[2])
        scores = self._own_scores(q, k, logs.shape[3])
        rows = self._leaves("rows", q, decays, weigh=term.row_inclusive)
        cols = self._leaves("cols", k, decays, weigh=not term.col_inclusive)
        leaves = Leaves(*(t.flatten(0, 2) for t in (rows, cols, logs, decays)))
        passing, levels = climb(leaves, scores, lambda x: exp_(x, self.acc), self.room, keep)
        rows, cols = (t[..., : v.shape[2], :] for t in (rows, cols))
        v = v if columns is None else v * columns[..., None]
        return ChannelTile(
            t0, v.shape[1], rows, cols, v, slots.get("rows"), None, None, None, None, None,
            (q, k), columns, scores, decays, passing.view(*logs.shape[:3], -1), levels,
        )  # fmt: skip

    def _columns(self, slots: dict[str, Tensor]) -> Tensor | None:
        """cols · exp(log_cols), [M, R, C, H]."""
        weights = [
            *([slots["cols"]] if "cols" in slots else []),
            *([slots["log_cols"].exp().to(self.acc)] if "log_cols" in slots else []),
        ]
        return None if not weights else weights[0] if len(weights) == 1 else weights[0] * weights[1]

    def _logs(self, slots: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """Log decays in the dtype of exponents, zero behind `count` tokens of a chunk, and their exp, [M, R, H, C', N]."""
        p = self.x.problem
        m, rows = next(iter(slots.values())).shape[:2]
        logs = self._padded("logs", m, rows, count, self.exact)
        part = logs[..., :count, :]
        scalar = slots["log_a"].transpose(2, 3)[..., None] if "log_a" in slots else None  # [M, R, H, C, 1]
        if "channel" in slots:
            part.copy_(repeat_heads(slots["channel"], p.nheads, 3).transpose(2, 3))
        else:
            torch.mul(slots["dt"].transpose(2, 3)[..., None], self.big_a, out=part)
        room = self.room("tree decays", *logs.shape)
        if self.short_logs:
            decays = exp_(room.copy_(logs))  # nothing is lost, and exp is quick there
            if scalar is not None:
                decays[..., :count, :] *= exp_(scalar.clone(), self.acc)
                part += scalar
            return logs, decays
        if scalar is not None:
            part += scalar
        return logs, room.copy_(exp_(logs.clone(), self.acc))

    def _leaves(self, name: str, x: Tensor, decays: Tensor, weigh: bool) -> Tensor:
        """q̃ or k̃ of single tokens, [M, R, H, C', N], from q or k as given [M, R, heads, C, N]."""
        m, rows, _, c, _ = x.shape
        out, each = self._padded(name, m, rows, c), repeat_heads(x, self.x.problem.nheads, 2)
        part = out[..., :c, :]
        if weigh:
            torch.mul(each, decays[..., :c, :], out=part)
        else:
            part.copy_(each)
        return out

    def _padded(self, name: str, m: int, rows: int, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for [M, R, H, C', N] with zeros behind the first `count` tokens of a chunk."""
        p = self.x.problem
        out = self.room(name, m, rows, p.nheads, 1 << (count - 1).bit_length(), p.dstate, dtype=dtype)
        out[..., count:, :].zero_()
        return out

    def _own_scores(self, q: Tensor, k: Tensor, width: int) -> Tensor:
        """Room for scores, [Z, C', C']: what tokens give themselves on the diagonal, and zeros."""
        p = self.x.problem
        m, rows, _, c, _ = q.shape
        scores = self.room("tree scores", m * rows * p.nheads, width, width).zero_()
        if not self.term.strict:
            own = (repeat_heads(t, common_heads(p), 2) for t in (q, k))
            scores.diagonal(0, 1, 2)[:, :c] = repeat_heads(torch.linalg.vecdot(*own), p.nheads, 2).reshape(-1, c)
        return scores

    # --- what differs from scalar decay ---------------------------------------------------------------------------------

    def masked_scores(self, tile: Tile, decays: Tensor | None, out: Tensor | None) -> Tensor:
        """L ∘ QKᵀ of each chunk, [M·R·H, C, C]: the tile has it."""
        assert isinstance(tile, ChannelTile)  # self.tile() made it
        c = tile.v.shape[2]
        return tile.scores[:, :c, :c]

    def factors(self, tile: Tile) -> tuple[Tensor, ...] | None:
        """exp(E) of each chunk, shaped for `heads_of`."""
        assert isinstance(tile, ChannelTile)  # self.tile() made it
        m, rows, heads, n = tile.passing.shape
        return tile.passing.view(m, rows * heads, n, 1, 1).unbind(0)

    def passed(self, product: Tensor) -> Tensor:
        """The parts of ⟨dS, exp(E) S⟩ [R·H, N, P], summed to what exp(E) has: [R·H, N]."""
        return product.sum(2)
