"""Quadratic terms by tiles: what they run on, what they cost, and the launches of a forward and a backward pass.

Y and the gradients of q, k and v are one kernel, `contract`, as each is a contraction of the same form (`kernels/tiles.py`).
Gradients of the mask's operands are those of its factors, pulled back through `quadratic/values.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import config
from ...ir import nodes as n
from ...ir.problem import Problem
from ...ir.terms import Quadratic
from ..base import Cotangents, Gradients, Inputs, Output, Support, Work, share_heads
from ..quadratic.form import Refused, read
from ..quadratic.formula import calls
from ..quadratic.mask import Mask, factor_gradients, strides
from ..quadratic.values import pull_back, values
from .tile_mask import WIDEST, Tile, arguments, packed

OPERATION = 8
"""Elementwise operations that one of a formula, in float64, counts as."""
ENOUGH = 264
"""Programs that keep a GPU busy: heads that share a gradient share a program only where as many are left."""


def supports(term: Quadratic, problem: Problem) -> Support:
    """Masks of one `Form`, in 16 and 32 bits, on a GPU or in Triton's interpreter."""
    p = problem
    if p.target.device != "cuda" and not (p.target.device == "cpu" and config.triton_interpreted()):
        return Support.no(f"Triton's kernels run on a GPU, not on {p.target.device}; 'naive' runs everywhere")
    if p.target.capability is not None and p.target.capability < (8, 0):
        return Support.no("the tile kernels need compute capability 8.0 or newer; 'naive' does not")
    if p.accumulate == torch.float64:
        return Support.no("the tile kernels accumulate in float32, and this call in float64; 'naive' runs it")
    for name, size in (("headdim", p.headdim), ("dstate", p.dstate)):
        if isinstance(size, int) and size > WIDEST:  # while tracing sizes may be symbolic, and are not compared
            return Support.no(f"{name}={size} exceeds {WIDEST}, the widest that a tile holds; 'naive' has no such limit")
    try:
        read(term.mask, p.seqlen if isinstance(p.seqlen, int) else 4096)
    except Refused as reason:
        return Support.no(f"not a mask for the tile kernels: {reason}; 'naive' runs any mask")
    return Support.yes()


def work(term: Quadratic, problem: Problem) -> Work:
    """Two matrix products per pair of tokens in the band."""
    p, form = problem, read(term.mask, problem.seqlen)
    pairs = float(form.pairs(p.seqlen) * p.batch * p.nheads)
    tokens = float(p.batch * p.seqlen * p.nheads)
    size = 2.0 if p.dtype.itemsize == 2 else 4.0
    # every tile of 64 rows reads its keys, mostly from the L2 cache
    touched = (tokens * (p.dstate + 3 * p.headdim) + pairs / 256 * (p.dstate + p.headdim)) * size
    interpreted = 1e6 if p.target.device == "cpu" else 0.0  # a program takes Triton's interpreter milliseconds
    launches = 2.0 + interpreted + 14 * len(form.decays) + 4 * (len(form.logs) + len(form.scales)) + 24 * len(form.documents)
    weighed = 8 + OPERATION * sum(1 for _ in calls(form.formula))
    return Work(2 * pairs * (p.dstate + p.headdim), weighed * pairs, touched, launches)


def forward(term: Quadratic, x: Inputs) -> Output:
    """Y."""
    if not (x.problem.batch and x.problem.seqlen):
        return Output(x.empty_output())
    mask = Mask.of(term, x, values(read(term.mask, x.problem.seqlen), x.operands, x.problem), packed)
    return Output(_contract(mask, x.out, x.q, x.k, x.v, x.problem.nheads))


def backward(term: Quadratic, x: Inputs, cotangents: Cotangents) -> Gradients:
    """Gradients of q, k, v, and of the operands through the mask's factors."""
    p, dy = x.problem, cotangents.y
    own = {name: x.operands[name] for name in n.operand_names(term.mask)}
    floats = {name: t.detach().requires_grad_() for name, t in own.items() if t.is_floating_point()}
    if not (p.batch and p.seqlen):
        q, k, v = (torch.zeros_like(t, dtype=p.accumulate) for t in (x.q, x.k, x.v))
        return Gradients(q, k, v, operands={name: torch.zeros_like(t) for name, t in floats.items()})
    with torch.enable_grad():
        factors = values(read(term.mask, p.seqlen), {**own, **floats}, p)
    mask = Mask.of(term, x, factors, packed)
    turned = mask.transposed()
    grads = Gradients(
        _contract(mask, x.out, dy, x.v, x.k, p.q_heads),
        _contract(turned, x.out, x.v, dy, x.q, p.k_heads),
        _contract(turned, x.out, x.k, x.q, dy, p.v_heads),
    )
    if floats:
        found = pull_back(factors, factor_gradients(mask, factors, x, dy, _Sums()), list(floats.values()))
        grads.operands = dict(zip(floats, found, strict=True))
    return grads


# --- launches ---------------------------------------------------------------------------------------------------------


def _argument(x: Tensor, nheads: int) -> tuple[Any, ...]:
    """A tensor (batch, seqlen, heads, dim) as kernels take it, copied only if its dims are strided."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, *x.stride()[:3], nheads // x.shape[2]


def _launch(kernel: str, grid: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel of `kernels/tiles.py` on the device of its first argument."""
    from .kernels import tiles

    with torch.cuda.device_of(arguments[0]):
        getattr(tiles, kernel)[(grid,)](*arguments, **constants)


def _contract(mask: Mask, dtype: torch.dtype, x: Tensor, y: Tensor, z: Tensor, heads: int) -> Tensor:
    """scale · Σ_j L_ij ⟨x_i, y_j⟩ z_j, summed over the heads that share one of `heads`, in dtype or wider."""
    p, d, e = mask.problem, x.shape[3], z.shape[3]
    tile = Tile.fitting(mask, d, e, True)
    table, stride, tiles = mask.table(tile.rows)
    share = _shared(p.nheads // heads, tiles * p.nheads)
    groups = p.nheads // share
    out = mask.room(p.batch, p.seqlen, groups, e, dtype=dtype if groups == heads else torch.float32)
    given = (*(_argument(t, p.nheads) for t in (x, y, z)), *arguments(mask), table, stride)
    sizes = (p.seqlen, tiles, groups, share, mask.scale, d, e)
    grid = tile.e[1] * tiles * groups * p.batch
    _launch("contract", grid, out, *given, *sizes, ROWS=tile.rows, COLS=tile.cols, **tile.constants(mask))
    return share_heads(out, heads)


def _shared(sharing: int, programs: int) -> int:
    """How many of the heads that share a gradient one program sums: as many as leave enough programs of a batch row."""
    return max(s for s in range(1, sharing + 1) if sharing % s == 0 and (s == 1 or programs // s >= ENOUGH))


def _row_sums(mask: Mask, *tensors: Tensor) -> Tensor:
    """Σ_j G_ij per row, without and at the lag where nothing decays: [B, H, 2, T]."""
    p, d, e = mask.problem, tensors[0].shape[3], tensors[2].shape[3]
    tile = Tile.fitting(mask, d, e, False)
    table, stride, tiles = mask.table(tile.rows)
    out = mask.room(p.batch, p.nheads, 2, p.seqlen)
    given = (*(_argument(t, p.nheads) for t in tensors), *arguments(mask), table, stride, mask.zero)
    sizes = (p.seqlen, tiles, p.nheads, mask.scale, d, e)
    _launch("row_sums", tiles * p.nheads * p.batch, out, *given, *sizes, ROWS=tile.rows, COLS=tile.cols, **tile.constants(mask))
    return out


def _lag_sums(mask: Mask, *tensors: Tensor) -> Tensor:
    """Σ G along each diagonal: [1, H, 2 T − 1]."""
    p, (low, high) = mask.problem, mask.support[:2]
    tile = Tile.fitting(mask, p.dstate, p.headdim, False).wider()
    size = tile.cols
    assert low is not None and high is not None
    first, last = (low - size + 1) // size, -(-(high + size - 1) // size)  # block diagonals that meet the band
    first, last = max(first, -((p.seqlen - 1) // size)), min(last, (p.seqlen - 1) // size)
    count = max(last - first + 1, 0)
    found = torch.zeros(p.nheads, (count + 1) * size, dtype=torch.float32, device=tensors[0].device)
    if count:
        out = found.new_empty(p.batch, p.nheads, count, 2, size)
        given = (*(_argument(t, p.nheads) for t in tensors), *arguments(mask), *_spans(mask))
        sizes = (p.seqlen, first, count, p.nheads, mask.scale, p.dstate, p.headdim)
        _launch("lag_sums", count * p.nheads * p.batch, out, *given, *sizes, SIZE=size, **tile.constants(mask))
        below, above = out.sum(0).unbind(2)  # two block diagonals share each lag
        found[:, : count * size] += below.flatten(1)
        found[:, size:] += above.flatten(1)
    # place 0 is lag first · size − (size − 1); lags are to begin at 1 − T
    start = first * size - (size - 1) + p.seqlen - 1
    wide = found.new_zeros(p.nheads, 2 * p.seqlen - 1)
    a, b = max(start, 0), min(start + found.shape[1], 2 * p.seqlen - 1)
    wide[:, a:b] = found[:, a - start : b - start]
    return wide


def _entry_sums(mask: Mask, entries: Tensor, *tensors: Tensor) -> Tensor:
    """G summed over what shares an entry, shaped like entries."""
    p = mask.problem
    tile = Tile.fitting(mask, p.dstate, p.headdim, False).wider(stages=1)  # what is shared by none is one step
    size = tile.cols
    rows, heads = entries.shape[:2]
    out = torch.empty(rows, heads, p.seqlen, p.seqlen, dtype=torch.float32, device=tensors[0].device)
    tiles = -(-p.seqlen // size)
    given = (*(_argument(t, p.nheads) for t in tensors), *arguments(mask), *_spans(mask))
    sizes = (p.seqlen, tiles, heads, p.batch // rows, p.nheads // heads, mask.scale, p.dstate, p.headdim)
    _launch("entry_sums", tiles * tiles * heads * rows, out, *given, *sizes, SIZE=size, **tile.constants(mask))
    return out


def _spans(mask: Mask) -> tuple[Tensor | None, int]:
    """The documents of rows, and their stride over batch."""
    return (None, 0) if mask.documents is None else (mask.documents[0], strides(mask.documents[0])[0])


class _Sums:
    rows, lags, entries = staticmethod(_row_sums), staticmethod(_lag_sums), staticmethod(_entry_sums)
