"""Bands as scans: a window of W tokens, alone or times a scan, costs two scans over blocks of W tokens, whatever W is.

Unless a backend has them in one pass over their pairs (`Bands`), which then is what runs forward.

Cut a row into blocks of W tokens. A token at place r of its block sees, with the lags 0 to W − 1,

    its own block up to itself                     a scan that begins anew in every block
    the block before, from place r + 1 on          a scan of that block from its end back, read at the row's place

and exp(ρ_i − κ_j) is the product of what decays between the block's start and row i and of what decays between column j and
the end of its block: sums of logs between two tokens, so that nothing is subtracted, and nothing grows where decays decay.
The second scan has no decay of its own, only these factors on rows and columns; those of a decay per channel are on q and k.
A window that reaches to both sides is two. In packed rows the first scan's documents end where blocks do, too, and of the
second there is left what lies in the one document, if any, that goes on from block to block.

Shapes: n blocks of B tokens (W, or the row if that is shorter), so a scan has batch · n or batch · (n − 1) rows of B tokens.
"""

from __future__ import annotations

from torch import Tensor

from ...ir.passes.structure import Structure
from ...ir.problem import Problem
from ..base import Config, Gradients, Inputs, Work
from ..structured import Values
from .blocks import Blocks
from .side import Bands, Scans, Side, across_config, across_of, band_of, inside_of, packed_of, sides

__all__ = ["Scans", "backward", "band_of", "forward", "sides", "work"]


def work(backend: Scans, found: Structure, p: Problem, config: Config, direction: str) -> Work:
    """What its scans cost, and beside them factors and sums."""
    total, tokens = Work(0.0, 0.0, 0.0, 0.0), float(p.batch * p.seqlen * p.nheads)
    for side in sides(found):
        if direction == "forward" and isinstance(backend, Bands) and backend.takes_band(side.scan, p, side.width):
            total = total.plus(backend.band_work(p, side.width))
            continue
        size, count = side.blocks(p.seqlen)
        inside = inside_of(p, p.batch * count, size)
        if side.scan.documents is not None:
            inside = packed_of(inside, p.batch * count + (p.n_states or p.batch))
        total = total.plus(backend.work(side.scan, inside, config, direction))
        if count > 1:
            of_scan, across = across_of(side, p, p.batch * (count - 1), size), across_config(backend, side, p, config)
            total = total.plus(backend.work(side.across, of_scan, across, direction))
            total = total.plus(Work(0.0, tokens * (12 + p.headdim), 12 * tokens * p.headdim, 20.0))
    return total


def forward(backend: Scans, found: Structure, x: Inputs, config: Config) -> Tensor:
    """Y."""
    values = Values(found, x)
    first, *others = sides(found)
    y = _forward(backend, first, values, config, alone=not others)
    for side in others:
        y = y.add_(_forward(backend, side, values, config, alone=False))
    return y


def _forward(backend: Scans, side: Side, values: Values, config: Config, alone: bool) -> Tensor:
    """Y of a side, the only one or not. In one pass it is of the inputs' dtype: then a second side is added as a term of a sum
    is, and what is wanted wider (a term of more than two) is scans."""
    x = values.scan
    if x.out == x.problem.dtype and isinstance(backend, Bands) and backend.takes_band(side.scan, x.problem, side.width):
        return backend.band(side.scan, x, side.width)
    return Blocks(backend, side, values).forward(config, alone)


def backward(backend: Scans, found: Structure, x: Inputs, config: Config, dy: Tensor) -> Gradients:
    """Gradients of q, k, v and the operands."""
    values = Values(found, x, learnt=True)
    totals: dict[str, Tensor] = {}
    parts = sides(found)
    for side in parts:
        for name, grad in Blocks(backend, side, values, learnt=True).backward(config, dy, alone=len(parts) == 1).items():
            totals[name] = totals[name] + grad if name in totals else grad
    return Gradients(totals["q"], totals["k"], totals["v"], operands=values.operand_gradients(totals))
