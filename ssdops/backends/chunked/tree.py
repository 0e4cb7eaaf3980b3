"""Decay per channel inside a chunk, by halves: factors that only ever span what lies between two tokens, and no differences.

The score of tokens i > j, Σ_n q_i k_j exp(ρ_i − κ_j), has a decay for every channel inside the sum, so it is no matmul times
a mask. But cut a segment of 2s tokens in the middle: for i in its right half and j in its left one

    exp(ρ_i − κ_j) = exp(ρ_i − m) · exp(m − κ_j),   m: the sum of logs up to the cut,

so the scores of right against left are one matmul of q̃_i = q_i exp(ρ_i − m) and k̃_j = k_j exp(m − κ_j). Halves of halves
give all other pairs, down to single tokens, and each pair meets at exactly one cut. Both exponents are sums of log decays
between j and i: of decays neither is positive, so nothing overflows however strong they are, and nothing is lost however
weak, as no cumulative sum is subtracted from another. From halves of s tokens to halves of 2s, q̃ of every second segment
is multiplied by the whole decay of the segment to its left, k̃ of the others by that of the one to their right; at the top
they are what meets the states before and behind the chunk. No tensor has an axis of pairs and one of channels.

The gradient goes the same way down. At every cut a log decay in the right half gets q̃ · dq̃ of the rows from it on, and one
in the left half k̃ · dk̃ of the columns before it: every pair that it lies between, once, and nothing to be subtracted.

Shapes: Z matrices (chunks · rows · heads), C tokens of a chunk, a power of two, K = C / 2s pairs of segments, N dstate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Exp = Callable[[Tensor], Tensor]
Room = Callable[..., Tensor]
SMALL = 2
"""Segments up to this size are multiplied elementwise: a matmul of so few rows costs more than it computes."""


@dataclass(frozen=True)
class Leaves:
    """What there is of single tokens, each [Z, C, N]."""

    q: Tensor  # q̃
    k: Tensor  # k̃
    logs: Tensor  # log decays, in the dtype of exponents: in a narrower one their sums would be rounded
    decays: Tensor  # their exp


@dataclass(frozen=True)
class Level:
    """What met where segments of s tokens become segments of 2s."""

    rows: Tensor  # q̃ of right segments, [Z, K, s, N]
    cols: Tensor  # k̃ of left segments, [Z, K, s, N]
    decays: Tensor  # exp(sum of logs) of left and right segments, [Z, K, 2, N]


def climb(leaves: Leaves, scores: Tensor, exp: Exp, room: Room, keep: bool) -> tuple[Tensor, list[Level]]:
    """Fill the lower triangle of scores, and take q̃ and k̃ from single tokens to the whole chunk, in place.

    Args:
        leaves: what there is of single tokens; q and k are written to.
        scores: [Z, C, C]; the diagonal and what is above it are left as they are.
        exp: of sums of logs, in the dtype of the rest; it may write to them.
        room: memory by name and shape.
        keep: whether the levels are wanted, for `descend`.

    Returns:
        exp(sum of logs) of each chunk [Z, N], and the levels from the lowest up.
    """
    levels: list[Level] = []
    size, total, decays = 1, leaves.logs, leaves.decays  # the sum of logs of each segment, and its exp, [Z, segments, N]
    while total.shape[1] > 1:
        right, left = _halves(leaves.q, size)[1], _halves(leaves.k, size)[0]
        blocks(scores, size).copy_(_scores(right, left, room))
        longer = total[:, 0::2] + total[:, 1::2]
        if size == 2:  # spares half of the exponentials from here on; of products of more factors the roundings would add up
            decays = decays[:, 0::2] * decays[:, 1::2]
        elif size > 2:
            decays = exp(total)
        factors = decays.unflatten(1, (-1, 2))
        if keep:
            rows, cols = (room(f"{name} {size}", *x.shape).copy_(x) for name, x in (("right", right), ("left", left)))
            levels.append(Level(rows, cols, factors))
        right *= factors[:, :, :1]
        left *= factors[:, :, 1:]
        total, size = longer, 2 * size
    return exp(total[:, 0]), levels


def descend(levels: list[Level], dscores: Tensor, tops: tuple[Tensor, Tensor], dtotal: Tensor, room: Room) -> Tensor:
    """The gradients of `climb`, from the whole chunk down to single tokens.

    Args:
        levels: as `climb` gave them.
        dscores: [Z, C, C], of which the lower triangle is read.
        tops: gradients of q̃ and k̃ of the whole chunk, which become those of single tokens, in place, [Z, C, N].
        dtotal: the gradient of the sum of each chunk's logs, [Z, N].
        room: memory by name and shape.

    Returns:
        The gradient of logs, as far as they stand between tokens [Z, C, N].
    """
    dlogs = dtotal[:, None]  # of the sum of each segment, [Z, segments, N]
    for level in reversed(levels):
        size = level.rows.shape[2]
        right, left = _halves(tops[0], size)[1], _halves(tops[1], size)[0]
        right *= level.decays[:, :, :1]
        left *= level.decays[:, :, 1:]
        # the decay of a left segment weighs on the rows to its right, that of a right one on the columns to its left
        through = dlogs.new_empty(len(dlogs), dlogs.shape[1], 2, dlogs.shape[2])  # [Z, K, 2, N]
        for half, pair in enumerate(((right, level.rows), (left, level.cols))):
            torch.sum(torch.mul(*pair, out=room("product", *right.shape)), 2, out=through[:, :, half])
        dlogs = through.add_(dlogs[:, :, None]).flatten(1, 2)
        block = blocks(dscores, size)
        _add_product(right, block, level.cols, room)
        _add_product(left, block.transpose(2, 3), level.rows, room)
    return dlogs


def blocks(scores: Tensor, size: int) -> Tensor:
    """Where right segments of `size` tokens meet the left ones beside them: [Z, C, C] → a view [Z, K, size, size]."""
    z, count, _ = scores.shape
    pairs = scores.view(z, count // (2 * size), 2 * size, count // (2 * size), 2 * size)
    return pairs.diagonal(0, 1, 3)[:, size:, :size].permute(0, 3, 1, 2)


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Left and right segments of `size` tokens, views [Z, K, size, N] of x [Z, C, N]."""
    left, right = x.view(len(x), -1, 2, size, x.shape[2]).unbind(2)
    return left, right


def _scores(rows: Tensor, cols: Tensor, room: Room) -> Tensor:
    """rows · colsᵀ, [Z, K, s, s]."""
    if rows.shape[2] <= SMALL:
        return (rows[:, :, :, None] * cols[:, :, None]).sum(4)
    z, pairs, size, _ = rows.shape
    out = room("block", z * pairs, size, size)
    return torch.bmm(rows.flatten(0, 1), cols.flatten(0, 1).transpose(1, 2), out=out).view(z, pairs, size, size)


def _add_product(out: Tensor, block: Tensor, x: Tensor, room: Room) -> None:
    """out += block · x, with block [Z, K, s, s] and the others [Z, K, s, N]."""
    size = x.shape[2]
    if size <= SMALL:
        for j in range(size):
            out.addcmul_(block[:, :, :, j, None], x[:, :, j, None])
        return
    # baddbmm_ into a view is a call per matrix
    product = torch.bmm(block.flatten(0, 1), x.flatten(0, 1), out=room("product", len(x) * x.shape[1], *x.shape[2:]))
    out += product.view(out.shape)
