"""Log-linear attention (Guo et al. 2025) in O(T log T): quadratic inside chunks, then a tree of states over them.

Tokens i > j whose highest bit to differ is b lie in the right and the left half of one aligned block of 2^(b+1) tokens. Where
that is inside a chunk, it is an entry of the chunk's matrix. Above, all rows of a right half read one state of the left half,

    y_i += levels[i, b + 1] · exp(Σ log decays from the middle to i) · q_i S_left,

and states of halves make that of the whole: S = exp(E_right) S_left + S_right. Sums of logs only span what lies between two
tokens, and none is subtracted from another. Documents are selected: of a half, the state has only the document that its last
token is in, as only that one can go on to the right; and who reads it must be in that document too.

Shapes: Z rows · groups of heads that share scores, n chunks, C tokens of a chunk (a power of two), r heads of a group,
N dstate, P headdim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, lcm

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ir.passes.structure import Structure
from ...ir.problem import Problem, common_heads, fenwick_levels
from ...ir.resolve import repeat_heads, segment_ids
from ..base import Work, exponent_dtype
from ..structured import Values
from .parts import Slices
from .slices import Slice, slices

ELEMENTS = 2**22
"""Entries of chunks' matrices that a slice aims at."""


def fenwick_work(p: Problem, size: int) -> Work:
    """What a forward pass costs: a chunk's pairs, its state, and for each level above half of the tokens reading one."""
    tokens, above = float(p.batch * p.seqlen), max(fenwick_levels(p.seqlen) - fenwick_levels(size), 0)
    state, inside = p.dstate * p.headdim, size.bit_length()
    flops = tokens * (
        2 * size * p.dstate * common_heads(p) + p.nheads * (2 * size * (p.headdim + inside) + (2 + above) * state)
    )
    elements = tokens * p.nheads * (14 * size + (8 + 3 * above) * p.headdim + 4 * state / size)
    count = max(tokens * p.nheads * size / ELEMENTS, 1.0)
    return Work(flops, elements, 8 * tokens * p.nheads * (p.headdim + p.dstate), 20 + (60.0 + 25 * above) * count)


def parts(structure: Structure, values: Values, size: int) -> Iterator[Slice]:
    """Slices of a Fenwick term in chunks of `size`."""
    p = values.scan.problem
    size = min(size, 1 << max(p.seqlen - 1, 0).bit_length())  # no longer than a power of two that holds them all
    fenwick = Fenwick(structure, values, size)
    fits = ELEMENTS // max(p.seqlen * size, 1)
    if p.seqlen:
        yield from slices(values, structure.scan.causal, fits, fenwick.output)


def level_table(size: int, device: torch.device) -> Tensor:
    """1[level(c, s) = l and s ≤ c] inside a chunk, [C, levels, C]."""
    at = torch.arange(size, device=device)
    differ = at[:, None] ^ at
    level = sum((differ >> bit > 0).long() for bit in range(size.bit_length()))
    table = torch.arange(size.bit_length(), device=device)[None, :, None] == torch.as_tensor(level, device=device)[:, None]
    return table & (at[:, None] >= at)[:, None]


@dataclass(frozen=True)
class Tile:
    """A slice in chunks, in the accumulation dtype."""

    q: Tensor  # [Z, n, C, N]
    k: Tensor  # [Z, n, C, N]
    v: Tensor  # [Z, n, C, r, P], column scales in it
    logs: Tensor  # cumulative sums of log decays inside a chunk, in the dtype of exponents, [Z, n, C, r]
    late: Tensor | None  # log_cols, [Z, n, C, r]
    levels: Tensor  # [Z, n, C, r, levels]
    ids: Tensor | None  # of documents, [Z, n, C]


class Fenwick:
    """A Fenwick term; `output` is Y of a slice."""

    def __init__(self, structure: Structure, values: Values, size: int) -> None:
        p = values.scan.problem
        self.term, self.size, self.acc, self.exact = structure.scan, size, p.accumulate, exponent_dtype(p)
        self.scale = structure.scan.sign * values.scan.scale
        self.count = ceil(p.seqlen / size)
        self.table = level_table(size, values.scan.q.device)
        self.ids: Tensor | None = None
        if structure.scan.documents is not None:
            self.ids = segment_ids(structure.scan.documents, values.scan.operands, p.seqlen)

    def output(self, part: Slice, x: Slices) -> Tensor:
        """Y of a slice, document by document where a value that is not finite would cross."""
        ids = None if self.ids is None else part.read("ids", self.ids[:, :, None])[..., 0]
        if ids is None or bool(x["v"].isfinite().all()):
            return self._output(part, x, ids)
        y = x["v"].new_zeros(1)
        for one in ids.unique():
            own = ids == one
            y = torch.where(own[..., None, None], self._output(part, x | {"v": _only(x["v"], own)}, ids), y)
        return y

    def _output(self, part: Slice, x: Slices, ids: Tensor | None) -> Tensor:
        tile, groups = self._tile(part, x, ids)
        y = self._inside(tile) if self.count == 1 else self._across(tile, self._inside(tile))
        y = y.unflatten(0, (-1, groups)).permute(0, 2, 3, 1, 4, 5)  # [R, n, C, G, r, P]
        y = y.flatten(3, 4).flatten(1, 2)[:, : part.problem.seqlen]
        if (u := x.get("rows")) is not None:
            y = y * repeat_heads(u.to(self.acc), part.count, 2)[..., None]
        return y if self.scale == 1.0 else y * self.scale

    # --- reading ----------------------------------------------------------------------------------------------------

    def _tile(self, part: Slice, x: Slices, ids: Tensor | None) -> tuple[Tile, int]:
        """A slice in chunks, and how many groups of heads it has."""
        rows, heads = part.rows[1] - part.rows[0], part.count
        groups = lcm(x["q"].shape[2], x["k"].shape[2])

        def chunks(t: Tensor, of: int, dtype: torch.dtype) -> Tensor:  # [R | 1, T | 1, h, …] → [Z, n, C, of / G, …]
            t = t.to(dtype).expand(rows, part.problem.seqlen, *t.shape[2:])
            t = pad(t, (0, 0) * (t.ndim - 2) + (0, self.count * self.size - t.shape[1]))
            t = repeat_heads(t, of, 2).unflatten(2, (groups, -1)).unflatten(1, (self.count, self.size))
            return t.movedim(3, 1).flatten(0, 1)

        def per_head(name: str, dtype: torch.dtype) -> Tensor:
            return chunks(x[name], heads, dtype)

        v = per_head("v", self.acc)
        v = v * per_head("cols", self.acc)[..., None] if "cols" in x else v
        q, k = (chunks(x[name], groups, self.acc).squeeze(3) for name in ("q", "k"))
        late = per_head("log_cols", self.exact) if "log_cols" in x else None
        if ids is not None:
            ids = torch.cat([ids, ids[:, -1:].expand(-1, self.count * self.size - ids.shape[1])], 1)
            ids = ids.expand(rows, -1).repeat_interleave(groups, 0).unflatten(1, (self.count, self.size))
        logs = per_head("log_a", self.exact).cumsum(2)
        return Tile(q, k, v, logs, late, per_head("levels", self.acc), ids), groups

    # --- inside chunks ----------------------------------------------------------------------------------------------

    def _inside(self, tile: Tile) -> Tensor:
        """What tokens of a chunk give one another, [Z, n, C, r, P]."""
        size, logs = self.size, tile.logs.transpose(2, 3)  # [Z, n, r, C]
        below = torch.ones(size, size, dtype=torch.bool, device=logs.device).tril(-1)
        exponent = torch.where(below, self._differences(logs), 0.0)
        lower = below if self.term.strict else below | torch.eye(size, dtype=torch.bool, device=logs.device)
        if tile.late is not None:
            exponent = torch.where(lower, exponent + tile.late.to(self.acc).transpose(2, 3)[..., None, :], 0.0)
        weights = torch.einsum("znirl,ilj->znrij", tile.levels[..., : self.table.shape[1]], self.table.to(self.acc))
        scores = (tile.q @ tile.k.transpose(2, 3))[:, :, None] * exponent.exp() * weights
        if tile.ids is not None:
            lower = lower & (tile.ids[..., None] == tile.ids[..., None, :])[:, :, None]
        return (torch.where(lower, scores, 0.0) @ tile.v.transpose(2, 3)).transpose(2, 3)

    def _differences(self, logs: Tensor) -> Tensor:
        """x_i − x_j, [Z, n, r, C, C], in the accumulation dtype: x as a sum of two there keeps the digits."""
        high = logs.to(self.acc)  # the gradient goes through this one alone
        out = high[..., None] - high[..., None, :]
        if logs.dtype == self.acc:
            return out
        rest = (logs.detach() - high.detach()).to(self.acc)
        return out + (rest[..., None] - rest[..., None, :])

    # --- between chunks -----------------------------------------------------------------------------------------------

    def _across(self, tile: Tile, y: Tensor) -> Tensor:
        """Y with what right halves read of left ones at every level above a chunk."""
        q, ids, (_, n, size, shared, dim) = tile.q, tile.ids, tile.v.shape
        total = tile.logs[:, :, -1]  # the sum of logs of each segment, [Z, segments, r]
        states, before = self._states(tile, total), torch.zeros_like(total)  # [Z, segments, N, r·P]; Σ before each chunk
        half, level = 1, size.bit_length()
        while half < n:
            read = [c for c in range(n) if c // half % 2]  # chunks of right halves
            chosen = torch.tensor(read, device=q.device)
            seen = _read(q, states, half).unflatten(3, (shared, dim))  # [Z, chunks, C, r, P]
            weight = (before[:, read, None] + tile.logs[:, read]).exp().to(self.acc) * tile.levels[:, read, :, :, level]
            seen = seen * weight[..., None]
            if ids is not None:
                last = [c // half * half - 1 for c in read]
                seen = torch.where((ids[:, read] == ids[:, last, -1:])[..., None, None], seen, 0.0)
            y = y.index_add(1, chosen, seen)
            before = before.index_add(1, chosen, total[:, [c // half - 1 for c in read]])
            states, total = self._merged(states, total, None if ids is None else ids[:, half - 1 :: half, -1])
            half, level = 2 * half, level + 1
        return y

    def _states(self, tile: Tile, total: Tensor) -> Tensor:
        """What each chunk leaves behind it, of the document of its last token, [Z, n, N, r·P]."""
        exponent = total[:, :, None] - tile.logs
        exponent = exponent if tile.late is None else exponent + tile.late
        k, v = tile.k, tile.v * exponent.exp().to(self.acc)[..., None]
        if tile.ids is not None:
            same = tile.ids == tile.ids[..., -1:]
            k, v = torch.where(same[..., None], k, 0.0), torch.where(same[..., None, None], v, 0.0)
        return k.transpose(2, 3) @ v.flatten(3)

    def _merged(self, states: Tensor, total: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
        """States and sums of logs of segments twice as long; a last one without a partner stays."""
        pairs = states.shape[1] // 2
        left, right = states[:, 0 : 2 * pairs : 2], states[:, 1 : 2 * pairs : 2]
        passing = total[:, 1 : 2 * pairs : 2].exp().to(self.acc)  # [Z, pairs, r]
        kept = (left.unflatten(3, (passing.shape[2], -1)) * passing[:, :, None, :, None]).flatten(3)
        if ends is not None:
            same = ends[:, 0 : 2 * pairs : 2] == pad(ends, (0, 1))[:, 1 : 2 * pairs : 2]
            kept = torch.where(same[..., None, None], kept, 0.0)
        states = torch.cat([kept + right, states[:, 2 * pairs :]], 1)
        return states, torch.cat([total[:, 0 : 2 * pairs : 2] + total[:, 1 : 2 * pairs : 2], total[:, 2 * pairs :]], 1)


def _read(q: Tensor, states: Tensor, half: int) -> Tensor:
    """q_i S of every right half's rows with its left half's state, [Z, chunks, C, r·P]: pairs, and a last, short one."""
    z, n, size, _ = q.shape
    pairs, out = n // (2 * half), []
    if pairs:
        rows = q[:, : 2 * half * pairs].reshape(z, pairs, 2, half * size, -1)[:, :, 1]
        out.append((rows @ states[:, 0 : 2 * pairs : 2]).reshape(z, pairs * half, size, -1))
    if n > (2 * pairs + 1) * half:
        rows = q[:, (2 * pairs + 1) * half :]
        out.append((rows.flatten(1, 2) @ states[:, 2 * pairs]).unflatten(1, (-1, size)))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _only(x: Tensor, own: Tensor) -> Tensor:
    return torch.where(own[..., None, None], x, 0.0)
