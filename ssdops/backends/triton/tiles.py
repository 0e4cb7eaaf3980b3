"""Quadratic terms by tiles: what they run on, what they cost, and the launches of a forward and a backward pass.

Y and the gradients of q, k and v are one kernel, `contract`, as each is a contraction of the same form (`kernels/tiles.py`).
Gradients of the mask's operands are those of its factors, pulled back through `tile_form.values`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ... import config
from ...ir.problem import Problem
from ...ir.resolve import reduce_to
from ...ir.terms import Quadratic
from ..base import Cotangents, Gradients, Inputs, Output, Support, Work, share_heads
from .tile_form import Form, Refused, Values, read, spans, tile_count, tile_table, values

LOG2E = 1.4426950408889634
WIDEST = 256
"""The greatest headdim and dstate that a tile holds."""
ROWS, COLS = 64, 32
"""Tokens along the sides of a tile: 64 × 64 in 16 bits, 64 × 32 in 32 bits, where a dot is three and registers are short."""
ENOUGH = 264
"""Programs that keep a GPU busy: heads that share a gradient share a program only where as many are left."""


def supports(term: Quadratic, problem: Problem) -> Support:
    """Masks of one `tile_form`, in 16 and 32 bits, on a GPU or in Triton's interpreter."""
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
    pairs = float(_pairs(form, p.seqlen) * p.batch * p.nheads)
    tokens = float(p.batch * p.seqlen * p.nheads)
    size = 2.0 if p.dtype.itemsize == 2 else 4.0
    reread = pairs / 64 * (p.dstate + p.headdim) * size  # every tile of 64 rows reads its keys; much of it from L2
    launches = 2.0 + 14 * len(form.decays) + 4 * (len(form.logs) + len(form.scales)) + 24 * len(form.documents)
    return Work(2 * pairs * (p.dstate + p.headdim), 8 * pairs, tokens * (p.dstate + 3 * p.headdim) * size + reread / 4, launches)


def _pairs(form: Form, seqlen: int) -> int:
    """How many pairs of tokens are in the band: Σ over its lags of seqlen − |lag|."""

    def up_to(lag: int) -> int:  # lags 0 to that
        return (lag + 1) * seqlen - lag * (lag + 1) // 2 if lag >= 0 else 0

    if form.low > form.high:
        return 0
    both = up_to(form.high) + up_to(-form.low)
    return both - up_to(form.low - 1) - up_to(-form.high - 1) - (seqlen if form.low <= 0 <= form.high else 0)


def forward(term: Quadratic, x: Inputs) -> Output:
    """Y."""
    if not (x.problem.batch and x.problem.seqlen):
        return Output(x.empty_output())
    mask = Mask.of(term, x, values(read(term.mask, x.problem.seqlen), x.operands, x.problem))
    return Output(_contract(mask, x.out, x.q, x.k, x.v, x.problem.nheads))


def backward(term: Quadratic, x: Inputs, cotangents: Cotangents) -> Gradients:
    """Gradients of q, k, v, and of the operands through the mask's factors."""
    p, dy = x.problem, cotangents.y
    floats = {name: t.detach().requires_grad_() for name, t in x.operands.items() if t.is_floating_point()}
    if not (p.batch and p.seqlen):
        q, k, v = (torch.zeros_like(t, dtype=p.accumulate) for t in (x.q, x.k, x.v))
        return Gradients(q, k, v, operands={name: torch.zeros_like(t) for name, t in floats.items()})
    with torch.enable_grad():
        factors = values(read(term.mask, p.seqlen), {**x.operands, **floats}, p)
    mask = Mask.of(term, x, factors)
    grads = Gradients(
        _contract(mask, x.out, dy, x.v, x.k, p.q_heads),
        _contract(mask.transposed(), x.out, x.v, dy, x.q, p.k_heads),
        _contract(mask.transposed(), x.out, x.k, x.q, dy, p.v_heads),
    )
    if floats:
        found = _pull_back(factors, _factor_gradients(mask, factors, x, dy), list(floats.values()))
        grads.operands = dict(zip(floats, found, strict=True))
    return grads


def _pull_back(factors: Values, grads: Values, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the factors → gradients of the operands."""
    slots = [(getattr(factors, f.name), getattr(grads, f.name)) for f in fields(Values)]
    kept = [(value, grad) for value, grad in slots if grad is not None and value.requires_grad]
    if not kept:
        return tuple(torch.zeros_like(t) for t in inputs)
    outputs, given = [value for value, _ in kept], [reduce_to(grad, value.shape, 1).to(value.dtype) for value, grad in kept]
    return torch.autograd.grad(outputs, inputs, given, allow_unused=True, materialize_grads=True)


# --- a mask as arguments of kernels ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """The factors as the kernels read them, for L or for its transpose.

    Attributes:
        support: (low, high, hole, first row, row to stop at, first column, column to stop at).
        u, w: exponents of rows and of columns, packed.
        documents: for rows and for columns, what they share a document with; the tiles follow them.
        count: of tiles, given their size.
    """

    problem: Problem
    scale: float
    support: tuple[int | None, ...]
    zero: int
    u: Tensor | None
    w: Tensor | None
    rows: Tensor | None
    cols: Tensor | None
    lags: Tensor | None
    entries: Tensor | None
    documents: tuple[Tensor, Tensor] | None
    count: Callable[[int], int]

    @staticmethod
    def of(term: Quadratic, x: Inputs, factors: Values) -> Mask:
        """The mask of a term, from its factors."""
        p, form = x.problem, read(term.mask, x.problem.seqlen)
        f = Values(**{s.name: None if (t := getattr(factors, s.name)) is None else t.detach() for s in fields(Values)})
        exponents = [f.decay_rows, f.decay_cols, f.log_rows, f.log_cols]
        some = any(t is not None for t in exponents)
        return Mask(
            p, x.scale * form.sign, (form.low, form.high, form.hole, *form.rows, *form.cols),
            p.seqlen if form.zero is None else form.zero,  # a lag that no pair has
            _packed(f.decay_rows, f.log_rows, f.odd_rows, x) if some else None,
            _packed(f.decay_cols, f.log_cols, f.odd_cols, x) if some else None,
            *(None if t is None else t.contiguous() for t in (f.rows, f.cols, f.lags)), f.entries,
            spans(form, x.operands, p.seqlen), lambda size: tile_count(form, x.operands, p.seqlen, size),
        )  # fmt: skip

    def transposed(self) -> Mask:
        """The transpose."""
        low, high, hole, *ranges = self.support
        assert low is not None and high is not None
        return replace(
            self,
            support=(-high, -low, None if hole is None else -hole, *ranges[2:], *ranges[:2]),
            zero=self.problem.seqlen if self.zero == self.problem.seqlen else -self.zero,
            u=self.w, w=self.u, rows=self.cols, cols=self.rows,
            lags=None if self.lags is None else self.lags.flip(1),
            entries=None if self.entries is None else self.entries.transpose(2, 3),
            documents=None if self.documents is None else (self.documents[1], self.documents[0]),
        )  # fmt: skip

    def arguments(self) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """(factors, strides, support) of every kernel."""
        e, tokens = self.entries, (self.u, self.w, self.rows, self.cols)
        of_entries = (0, 0, 0, 0, 1) if e is None else (*_strides(e), self.problem.nheads // e.shape[1])
        return (*tokens, self.lags, e), (*[0 if t is None else _strides(t)[0] for t in tokens], *of_entries), self.support

    def table(self, size: int) -> tuple[Tensor | None, int, int]:
        """(table, its stride over batch, tiles) of rows in tiles of a size."""
        if self.documents is None:
            return None, 0, -(-self.problem.seqlen // size)
        table = tile_table(self.documents[0], size, self.count(size))
        return table, _strides(table)[0], table.shape[1]


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 along the batch if there is one for all rows."""
    return (x.stride(0) if x.shape[0] > 1 else 0, *x.stride()[1:])


def _packed(decay: Tensor | None, log: Tensor | None, odd: Tensor | None, x: Inputs) -> Tensor:
    """Exponents for base 2, as a float32, what is left of the float64 beyond it, and odd logs: [B | 1, H, 3, T]."""
    parts = [t for t in (decay, log) if t is not None]
    p = x.problem
    total = sum(parts[1:], parts[0]) if parts else torch.zeros(1, p.nheads, p.seqlen, dtype=torch.float64, device=x.q.device)
    total = total * LOG2E
    high = total.float()
    none = torch.zeros_like(high) if odd is None else odd.float().expand_as(high)
    return torch.stack([high, (total - high.double()).float(), none], 2)


# --- launches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """The sizes of a launch: rows and columns of a tile, how the two dims are cut into steps, how the dots are done."""

    rows: int
    cols: int
    d: tuple[int, int]
    e: tuple[int, int]
    dtype: torch.dtype
    warps: int
    stages: int

    @staticmethod
    def fitting(problem: Problem, d: int, e: int, weighs: bool) -> Tile:
        """A tile for products over d dims, which weigh vectors of e dims or are multiplied by products over e dims."""
        p = problem
        exact = p.dtype.itemsize > 2 or (config.triton_interpreted() and p.dtype == torch.bfloat16)  # which has no such dot
        if exact:  # a dot is three, and takes registers accordingly
            most = (32, 128 if weighs else 32)
        else:
            most = (WIDEST, WIDEST) if weighs and shared_memory(p.target.capability) > 160 * 1024 else (128, 128)
        d_width, e_width = (min(max(16, _power(x)), width) for x, width in zip((d, e), most, strict=True))
        size = max(16, _power(p.seqlen))
        return Tile(
            min(ROWS, size), min(COLS if exact else ROWS, size), (d_width, -(-d // d_width)), (e_width, -(-e // e_width)),
            torch.float32 if exact else p.dtype, 8 if max(d_width, e_width) > 128 else 4, 2,
        )  # fmt: skip

    @property
    def constants(self) -> dict[str, Any]:
        """Of every kernel."""
        import triton.language as tl

        types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        return {
            "D_WIDTH": self.d[0], "D_STEPS": self.d[1], "E_WIDTH": self.e[0], "E_STEPS": self.e[1], "DTYPE": types[self.dtype],
            "PRECISION": "ieee" if self.dtype.itemsize == 2 else "tf32x3", "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


def shared_memory(capability: tuple[int, int] | None) -> int:
    """Bytes of it that a program may have; a GPU that is not known has what every one since 8.0 has."""
    return {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227}.get(capability or (9, 0), 99) * 1024


def _power(x: int) -> int:
    """The least power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


def _argument(x: Tensor, nheads: int) -> tuple[Any, ...]:
    """A tensor (batch, seqlen, heads, dim) as kernels take it."""
    return x, *x.stride(), nheads // x.shape[2]


def _launch(kernel: str, grid: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel of `kernels/tiles.py` on the device of its first argument."""
    from .kernels import tiles

    with torch.cuda.device_of(arguments[0]):
        getattr(tiles, kernel)[(grid,)](*arguments, **constants)


def _contract(mask: Mask, dtype: torch.dtype, x: Tensor, y: Tensor, z: Tensor, heads: int) -> Tensor:
    """scale · Σ_j L_ij ⟨x_i, y_j⟩ z_j summed over the heads that share one of `heads`: (batch, seqlen, heads, dim of z), in dtype or wider."""
    p, d, e = mask.problem, x.shape[3], z.shape[3]
    tile = Tile.fitting(p, d, e, True)
    table, stride, tiles = mask.table(tile.rows)
    share = _shared(p.nheads // heads, tiles * p.nheads)
    groups = p.nheads // share
    out = torch.empty(p.batch, p.seqlen, groups, e, dtype=dtype if groups == heads else torch.float32, device=x.device)
    arguments = (*(_argument(t, p.nheads) for t in (x, y, z)), *mask.arguments(), table, stride)
    sizes = (p.seqlen, tiles, groups, share, mask.scale, d, e)
    grid = tile.e[1] * tiles * groups * p.batch
    _launch("contract", grid, out, *arguments, *sizes, ROWS=tile.rows, COLS=tile.cols, **tile.constants)
    return share_heads(out, heads)


def _shared(sharing: int, programs: int) -> int:
    """How many of the heads that share a gradient one program sums: as many as leave enough programs of a batch row."""
    return max(s for s in range(1, sharing + 1) if sharing % s == 0 and (s == 1 or programs // s >= ENOUGH))


def _factor_gradients(mask: Mask, factors: Values, x: Inputs, dy: Tensor) -> Values:
    """Gradients of the factors that need one, each from dL = dY Vᵀ ∘ QKᵀ without forming it (entries apart)."""
    p, wanted = x.problem, {f.name for f in fields(Values) if getattr(t := getattr(factors, f.name), "requires_grad", False)}
    out = Values()
    sides = (("rows", mask, (x.q, x.k, dy, x.v)), ("cols", mask.transposed(), (x.k, x.q, x.v, dy)))
    for side, m, tensors in sides:
        if not wanted & {f"decay_{side}", f"log_{side}", side}:
            continue
        apart, at_zero = _row_sums(replace(m, rows=None), *tensors).unbind(2)  # [B, H, T]
        own = 1.0 if m.rows is None else m.rows
        setattr(out, side, apart + at_zero)
        setattr(out, f"decay_{side}", apart * own)
        setattr(out, f"log_{side}", (apart + at_zero) * own)
    if "lags" in wanted:
        out.lags = _lag_sums(replace(mask, lags=None), x.q, x.k, dy, x.v)
    if "entries" in wanted:
        out.entries = _entry_sums(replace(mask, entries=None), factors.entries, x.q, x.k, dy, x.v)
    return Values(**{name: getattr(out, name) for name in wanted})


def _row_sums(mask: Mask, *tensors: Tensor) -> Tensor:
    """Σ_j G_ij per row, without and at the lag where nothing decays: [B, H, 2, T]."""
    p, d, e = mask.problem, tensors[0].shape[3], tensors[2].shape[3]
    tile = Tile.fitting(p, d, e, False)
    table, stride, tiles = mask.table(tile.rows)
    out = torch.empty(p.batch, p.nheads, 2, p.seqlen, dtype=torch.float32, device=tensors[0].device)
    arguments = (*(_argument(t, p.nheads) for t in tensors), *mask.arguments(), table, stride, mask.zero)
    sizes = (p.seqlen, tiles, p.nheads, mask.scale, d, e)
    _launch("row_sums", tiles * p.nheads * p.batch, out, *arguments, *sizes, ROWS=tile.rows, COLS=tile.cols, **tile.constants)
    return out


def _lag_sums(mask: Mask, *tensors: Tensor) -> Tensor:
    """Σ G along each diagonal: [1, H, 2 T − 1]."""
    p, (low, high) = mask.problem, mask.support[:2]
    tile = Tile.fitting(p, p.dstate, p.headdim, False)
    size = tile.cols
    assert low is not None and high is not None
    first, last = (low - size + 1) // size, -(-(high + size - 1) // size)  # block diagonals that meet the band
    first, last = max(first, -((p.seqlen - 1) // size)), min(last, (p.seqlen - 1) // size)
    count = max(last - first + 1, 0)
    found = torch.zeros(p.nheads, (count + 1) * size, dtype=torch.float32, device=tensors[0].device)
    if count:
        out = found.new_empty(p.batch, p.nheads, count, 2, size)
        arguments = (*(_argument(t, p.nheads) for t in tensors), *mask.arguments(), *_spans(mask))
        sizes = (p.seqlen, first, count, p.nheads, mask.scale, p.dstate, p.headdim)
        _launch("lag_sums", count * p.nheads * p.batch, out, *arguments, *sizes, SIZE=size, **tile.constants)
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
    tile = Tile.fitting(p, p.dstate, p.headdim, False)
    size = tile.cols
    rows, heads = entries.shape[:2]
    out = torch.empty(rows, heads, p.seqlen, p.seqlen, dtype=torch.float32, device=tensors[0].device)
    tiles = -(-p.seqlen // size)
    arguments = (*(_argument(t, p.nheads) for t in tensors), *mask.arguments(), *_spans(mask))
    sizes = (p.seqlen, tiles, heads, p.batch // rows, p.nheads // heads, mask.scale, p.dstate, p.headdim)
    tile = replace(tile, warps=8) if tile.dtype.itemsize == 2 else tile
    _launch("entry_sums", tiles * tiles * heads * rows, out, *arguments, *sizes, SIZE=size, **tile.constants)
    return out


def _spans(mask: Mask) -> tuple[Tensor | None, int]:
    """The documents of rows, and their stride over batch."""
    return (None, 0) if mask.documents is None else (mask.documents[0], _strides(mask.documents[0])[0])
