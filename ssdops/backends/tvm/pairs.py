"""Tensor programs of masks that are no scans, on a CPU: tiles of pairs of tokens, of which only those in the band are visited.

    contract   out_i = scale · Σ_j L_ij ⟨x_i, y_j⟩ z_j
    rows       Σ_j G_ij,  G = scale · L ∘ (XYᵀ) ∘ (ZWᵀ): apart from the lag at which nothing decays, and there
    lags       the same along each diagonal
    entries    the same by entries, over the batch rows and heads that share one

`contract` is Y, and each gradient of q, k and v with roles turned and L transposed; the others are gradients of the factors

    L_ij = rows_i · exp(u_i + w_j) · lags[i − j] · entries_ij · cols_j    for low ≤ i − j ≤ high, other than a hole

of which a program has those that its `Tile` names. Where rows and columns begin and end, bounds on lags, and how many batch
rows, heads and tiles one program sums over, are numbers that it is called with. No T × T tensor is made but that of `entries`.

Behind the program is what that of GPUs, too, has of its operands and of a tile's factors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from ..quadratic.formula import counts
from .blocks import fill, store, sums, update
from .formula import expression
from .parts import exp, near, number, shared, summed, under, within
from .products import product
from .tile import ENTRIES, LAGS, LANES, LOGS, ROWS, SCALES, Tile

INF = 1 << 20
"""A lag or token that no tile has: local coordinates are 32 bits wide, as a vector has more of those."""


def pairs(tile: Tile) -> Any:
    """What the mode says, of tiles of C × C pairs.

    Parameters, in order: x, y `[tokens, heads of their own, D]`; z, w `[tokens, heads of their own, E]`, w not read by
    `contract`; u_rows, u_cols `[batch | 1, nheads, 2, seqlen]` float64, exponents and how many logs are not finite; rows, cols
    `[batch | 1, nheads, seqlen]`; lags `[nheads, 2 seqlen − 1]`, at j − i; entries `[batch | 1, heads, seqlen, seqlen]`; the
    leaves of a formula at rows and columns, float64 `[batch | 1, nheads, leaves, seqlen]`, and at lags, likewise at j − i;
    table `[batch | 1, tiles, 4]`, the rows and columns of each tile; out; out again, where sums are added to what is there;
    bounds `[8]`: low, high, hole, zero, and the ranges of rows and columns; and the numbers scale, seqlen, nheads, of what
    there are programs for (batch rows, heads, tiles), and over how many of each one sums.
    """
    C, D, E, acc, whole, mode = tile.chunk, tile.inner, tile.outer, tile.acc, tile.whole, tile.mode
    CONTRACT = mode == ""
    LOCAL = mode in ("", ROWS)
    GENERAL, held = tile.formula is not None, counts(tile.formula)
    OF_ROW, OF_COL, OF_LAG = held["row"], held["col"], held["lag"]

    @T.prim_func(s_tir=True)
    def main(
        x_: T.handle, y_: T.handle, z_: T.handle, w_: T.handle, u_rows_: T.handle, u_cols_: T.handle, rows_: T.handle,
        cols_: T.handle, lags_: T.handle, entries_: T.handle, leaf_rows_: T.handle, leaf_cols_: T.handle,
        leaf_lags_: T.handle, table_: T.handle, out_: T.handle, there_: T.handle, bounds_: T.handle, scale: T.float64,
        seqlen: T.int64, nheads: T.int64, of_rows: T.int64, of_heads: T.int64, of_tiles: T.int64, in_rows: T.int64,
        in_heads: T.int64, in_tiles: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": LOCAL})
        given = T.meta_var(
            Operands(
                tile, acc, x_, y_, z_, w_, u_rows_, u_cols_, rows_, cols_, lags_, entries_, leaf_rows_, leaf_cols_, leaf_lags_,
                table_, out_, there_, bounds_,
            )
        )  # fmt: skip
        values = T.meta_var(given.z if CONTRACT else given.w)
        for of_row, of_head, of_tile in T.grid(of_rows, of_heads, of_tiles):
            with T.sblock("program"):
                ob, oh, ot = T.axis.remap("SSS", [of_row, of_head, of_tile])
                place = T.sblock_alloc_buffer((4,), "int64")
                at = T.sblock_alloc_buffer((1,), "int64")
                edge = T.sblock_alloc_buffer((8,), "int32")
                total = T.sblock_alloc_buffer((1, C, E), acc)
                lanes = T.sblock_alloc_buffer((2, C, LANES), acc)
                if CONTRACT:
                    fill("clear", 1, C, E)(total, lambda h, i, o: number(0, acc))
                if mode == ROWS:
                    fill("clear", 2, C, LANES)(lanes, lambda h, i, o: number(0, acc))
                for in_row, in_head, in_tile in T.grid(in_rows, in_heads, in_tiles):
                    with T.sblock("part"):
                        vb = T.axis.spatial(1 << 40, in_row)
                        vh = T.axis.spatial(1 << 40, in_head)
                        vt = T.axis.spatial(1 << 40, in_tile)
                        b = T.meta_var(ob * in_rows + vb)
                        h = T.meta_var(oh * in_heads + vh)
                        t = T.meta_var(ot * in_tiles + vt)
                        xt = T.sblock_alloc_buffer((C, D), acc)
                        zt = T.sblock_alloc_buffer((C, E), acc)
                        ut = T.sblock_alloc_buffer((2, C), "float64")
                        rt = T.sblock_alloc_buffer((C,), acc)
                        at_rows = T.sblock_alloc_buffer((OF_ROW, C), "float64")
                        i0 = T.meta_var(place[0])
                        i1 = T.meta_var(place[1])
                        first, stop = T.meta_var(given.columns(b, t))
                        row = T.meta_var(lambda i: near(i0 + i, i1))
                        for i in range(1):
                            with T.sblock("place"):
                                vi = T.axis.spatial(1, i)
                                place[vi] = of_batch(given.table, b, t, 0)
                                place[vi + 1] = of_batch(given.table, b, t, 1)
                                place[vi + 2] = first
                                place[vi + 3] = stop
                        fill("load_q", C, D)(
                            xt, lambda i, m: given.read(given.x, b * seqlen + row(i), own(given.x, h, nheads), m)
                        )
                        if not CONTRACT:
                            fill("load_dy", C, E)(
                                zt, lambda i, o: given.read(given.z, b * seqlen + row(i), own(given.z, h, nheads), o)
                            )
                        if LOGS in tile.factors:
                            fill("load_u", 2, C)(ut, lambda which, i: of_batch(given.u_rows, b, h, which, row(i)))
                        if SCALES in tile.factors:
                            fill("load_rows", C)(rt, lambda i: of_batch(given.rows, b, h, row(i)))
                        if GENERAL:
                            fill("load_leaf_rows", OF_ROW, C)(
                                at_rows, lambda leaf, i: nearest(given.leaf_rows, b, h, T.Cast("int64", leaf), row(i))
                            )
                        for step in range((T.max(stop - first, 0) + C - 1) // C):
                            with T.sblock("chunk"):
                                vs = T.axis.spatial(1 << 40, step)
                                yt = T.sblock_alloc_buffer((C, D), acc)
                                y_turned = T.sblock_alloc_buffer((D, C), acc)
                                wt = T.sblock_alloc_buffer((C, E), acc)
                                w_turned = T.sblock_alloc_buffer((E, C), acc)
                                ct = T.sblock_alloc_buffer((2, C), "float64")
                                st = T.sblock_alloc_buffer((C,), acc)
                                line = T.sblock_alloc_buffer((2 * C,), acc)
                                et = T.sblock_alloc_buffer((C, C), acc)
                                at_cols = T.sblock_alloc_buffer((OF_COL, C), "float64")
                                at_lags = T.sblock_alloc_buffer((OF_LAG, 2 * C), "float64")
                                scores = T.sblock_alloc_buffer((C, C), acc)
                                others = T.sblock_alloc_buffer((C, C), acc)
                                weights = T.sblock_alloc_buffer((C, C), acc)
                                inside = T.sblock_alloc_buffer((C, E), acc)
                                row_lanes = T.sblock_alloc_buffer((C, LANES), acc)
                                zero_lanes = T.sblock_alloc_buffer((C, LANES), acc)
                                diagonals = T.sblock_alloc_buffer((1, 2 * C), acc)
                                factors = T.meta_var(Factors(ut, ct, rt, st, line, at_rows, at_cols, at_lags))
                                j0 = T.meta_var(at[0])
                                end = T.meta_var(place[3])
                                col = T.meta_var(lambda j: near(j0 + j, end))
                                lag_at = T.meta_var(lambda lag: near(j0 - i0 + lag - C + seqlen, 2 * seqlen - 1))
                                for i in range(1):
                                    with T.sblock("here"):
                                        vi = T.axis.spatial(1, i)
                                        at[vi] = place[2] + vs * C
                                        bounded(edge, vi, given.bounds, i0, i1, at[0], end)
                                fill("load_k", C, D)(
                                    yt, lambda j, m: given.read(given.y, b * seqlen + col(j), own(given.y, h, nheads), m)
                                )
                                fill("turn_k", D, C)(y_turned, lambda m, j: yt[j, m])
                                fill("load_v", C, E)(
                                    wt, lambda j, o: given.read(values, b * seqlen + col(j), own(values, h, nheads), o)
                                )
                                if not CONTRACT:
                                    fill("turn_v", E, C)(w_turned, lambda o, j: wt[j, o])
                                if LOGS in tile.factors:
                                    fill("load_w", 2, C)(ct, lambda which, j: of_batch(given.u_cols, b, h, which, col(j)))
                                if SCALES in tile.factors:
                                    fill("load_cols", C)(st, lambda j: of_batch(given.cols, b, h, col(j)))
                                if LAGS in tile.factors:  # at j − i of the tile, from 1 − C on
                                    fill("load_lags", 2 * C)(line, lambda lag: given.lags[h, lag_at(lag)])
                                if GENERAL:
                                    fill("load_leaf_cols", OF_COL, C)(
                                        at_cols, lambda leaf, j: nearest(given.leaf_cols, b, h, T.Cast("int64", leaf), col(j))
                                    )
                                    fill("load_leaf_lags", OF_LAG, 2 * C)(
                                        at_lags,
                                        lambda leaf, lag: nearest(given.leaf_lags, h, T.Cast("int64", leaf), lag_at(lag)),
                                    )
                                if ENTRIES in tile.factors:
                                    fill("load_entries", C, C)(
                                        et,
                                        lambda i, j: of_batch(given.entries, b, own(given.entries, h, nheads), row(i), col(j)),
                                    )
                                product("scores", C, C, D, acc)(scores, lambda i, m: xt[i, m], lambda m, j: y_turned[m, j])
                                if not CONTRACT:
                                    product("gives", C, C, E, acc)(others, lambda i, o: zt[i, o], lambda o, j: w_turned[o, j])
                                fill("pairs", C, C)(
                                    weights,
                                    lambda i, j: T.Select(
                                        has(edge, i, j),
                                        weighed(
                                            tile,
                                            scores[i, j] if CONTRACT else scores[i, j] * others[i, j],
                                            i,
                                            j,
                                            factors,
                                            lambda: et[i, j],
                                        ),
                                        number(0, acc),
                                    ),
                                )
                                if CONTRACT:
                                    product("values", C, E, C, acc)(inside, lambda i, j: weights[i, j], lambda j, o: wt[j, o])
                                    for zero in range(1):
                                        update("advance", 1, C, E)(total, zero, lambda h, i, o: total[h, i, o] + inside[i, o])
                                elif mode == ROWS:
                                    sums("row_lanes", C, LANES, C // LANES, acc)(
                                        row_lanes,
                                        lambda i, j: T.Select(i - j != edge[3], weights[i, j], number(0, acc)),
                                    )
                                    sums("col_lanes", C, LANES, C // LANES, acc)(
                                        zero_lanes,
                                        lambda i, j: T.Select(i - j == edge[3], weights[i, j], number(0, acc)),
                                    )
                                    for which in range(2):
                                        update("advance", 2, C, LANES)(
                                            lanes, which,
                                            lambda which, i, o: lanes[which, i, o]
                                            + T.if_then_else(which == 0, row_lanes[i, o], zero_lanes[i, o]),
                                        )  # fmt: skip
                                elif mode == LAGS:
                                    fill("clear", 1, 2 * C)(diagonals, lambda h, lag: number(0, acc))
                                    for i, j in T.grid(C, C):
                                        with T.sblock("add_lags"):
                                            vi, vj = T.axis.remap("SS", [i, j])
                                            diagonals[0, C - 1 + vj - vi] = diagonals[0, C - 1 + vj - vi] + weights[vi, vj]
                                    for lag in range(2 * C - 1):
                                        with T.sblock("give_lags"):
                                            vl = T.axis.spatial(2 * C - 1, lag)
                                            where = T.meta_var(lambda lag: j0 - i0 + lag - C + seqlen)
                                            T.where(where(lag) >= 0 and where(lag) < 2 * seqlen - 1)
                                            given.out[ob, oh, 0, where(vl)] = (
                                                given.there[ob, oh, 0, where(vl)] + T.Cast(acc, scale) * diagonals[0, vl]
                                            )
                                else:
                                    for i, j in T.grid(C, C):
                                        with T.sblock("give_entries"):
                                            vi, vj = T.axis.remap("SS", [i, j])
                                            T.where(i0 + i < i1 and j0 + j < end)
                                            given.out[ob, oh, i0 + vi, j0 + vj] = (
                                                given.there[ob, oh, i0 + vi, j0 + vj] + T.Cast(acc, scale) * weights[vi, vj]
                                            )
                if LOCAL:
                    start = T.meta_var(of_batch(given.table, ob, ot, 0))
                    over = T.meta_var(of_batch(given.table, ob, ot, 1))
                    if CONTRACT:
                        store("store", C, E, whole)(
                            given.out, oh, ob * seqlen + start, ob * seqlen + over, given.e,
                            lambda i, o: T.Cast(acc, scale) * total[0, i, o],
                        )  # fmt: skip
                    else:
                        for which, i in T.grid(2, C):
                            with T.sblock("dots"):
                                vw, vi = T.axis.remap("SS", [which, i])
                                T.where(start + i < over)
                                given.out[ob, oh, vw, start + vi] = T.Cast(acc, scale) * summed(
                                    LANES, lambda r: lanes[vw, vi, r]
                                )

    return main


class Operands:
    """What a program of pairs is called with, in the order of `pairs`; x, y, z and w of a dtype; sizes are symbols."""

    def __init__(self, tile: Tile, dtype: str, *handles: Any) -> None:
        (x, y, z, w, u_rows, u_cols, rows, cols, lags, entries, leaf_rows, leaf_cols, leaf_lags, table, out, there, bounds) = (
            handles
        )
        self.d: Any = tile.inner if tile.whole else size("d")
        self.e: Any = tile.outer if tile.whole else size("e")
        self.whole, tokens, side = tile.whole, size("tokens"), size("side")
        self.x, self.y = matched("x", x, (tokens, None, self.d), dtype), matched("y", y, (tokens, None, self.d), dtype)
        self.z, self.w = matched("z", z, (tokens, None, self.e), dtype), matched("w", w, (None, None, self.e), dtype)
        self.u_rows = matched("u_rows", u_rows, (None, None, 2, None), "float64")
        self.u_cols = matched("u_cols", u_cols, (None, None, 2, None), "float64")
        self.rows = matched("rows", rows, (None, None, None), tile.acc)
        self.cols = matched("cols", cols, (None, None, None), tile.acc)
        self.lags = matched("lags", lags, (None, None), tile.acc)
        self.entries = matched("entries", entries, (None, None, side, side), tile.acc)
        self.leaf_rows = matched("leaf_rows", leaf_rows, (None, None, None, None), "float64")
        self.leaf_cols = matched("leaf_cols", leaf_cols, (None, None, None, None), "float64")
        self.leaf_lags = matched("leaf_lags", leaf_lags, (None, None, None), "float64")
        self.table = matched("table", table, (None, None, 4), "int64")
        sums = (tokens, None, self.e) if tile.mode == "" else tuple(size(f"out_{axis}") for axis in range(4))
        self.out = matched("out", out, sums, tile.acc)
        self.there = matched("there", there, sums if tile.mode in (LAGS, ENTRIES) else (None,), tile.acc)
        self.bounds = matched("bounds", bounds, (8,), "int64")

    def read(self, x: Any, token: Any, head: Any, at: Any) -> Any:
        """x[token, head, at], and 0 where the tile is larger than heads are."""
        return within(self.whole, under(at, x.shape[2]), x[token, head, at], x.dtype)

    def columns(self, b: Any, t: Any) -> tuple[Any, Any]:
        """The columns [first, stop) that the rows of tile t may meet."""
        row, end, first, stop = (of_batch(self.table, b, t, which) for which in range(4))
        first = T.max(T.max(first, self.bounds[6]), row - self.bounds[1])
        return first, T.min(T.min(stop, self.bounds[7]), end - self.bounds[0])


def matched(name: str, handle: Any, shape: tuple[Any, ...], dtype: str) -> Any:
    """A parameter as a buffer; where its shape has None, any size."""
    whole = [size(f"{name}_{axis}") if given is None else given for axis, given in enumerate(shape)]
    return IRBuilder.name(name, T.match_buffer(handle, whole, dtype))


def size(name: str) -> Any:
    """A symbolic size."""
    return IRBuilder.name(name, T.int64())


def of_batch(x: Any, b: Any, *index: Any) -> Any:
    """x[b, …], or x[0, …] where all rows of the batch share it."""
    at = (T.min(b, x.shape[0] - 1), *index)
    return x[at]


def own(x: Any, head: Any, nheads: Any) -> Any:
    """The head of x, its second axis, that a head out of nheads has."""
    return shared(head, nheads, x.shape[1])


def nearest(x: Any, *index: Any) -> Any:
    """x at an index, each part of it no further than there are numbers: of what is shared, or not there, there is one."""
    return x[tuple(T.min(at, most - 1) for at, most in zip(index, x.shape, strict=True))]


class Factors(NamedTuple):
    """A mask's factors at the rows and columns of a tile of pairs."""

    u_rows: Any
    u_cols: Any
    rows: Any
    cols: Any
    lags: Any
    leaf_rows: Any
    leaf_cols: Any
    leaf_lags: Any

    def leaf(self, kind: str, index: int, i: Any, j: Any, lag: Any) -> Any:
        """A leaf of the formula at a pair."""
        x, at = {"row": (self.leaf_rows, i), "col": (self.leaf_cols, j), "lag": (self.leaf_lags, lag)}[kind]
        return x[index, at]


def narrow(x: Any) -> Any:
    """A coordinate in a tile, of 32 bits: what lies far outside stays outside."""
    return T.Cast("int32", T.max(T.min(x, INF), -INF))


@T.macro
def bounded(edge, first, bounds, i0, i1, j0, end):
    """What `has` asks of, from `first` on: bounds on lags, rows and columns in coordinates of the tile at (i0, j0)."""
    local = T.meta_var(lambda lag: narrow(lag + j0 - i0))
    edge[first] = local(bounds[0])
    edge[first + 1] = local(bounds[1])
    edge[first + 2] = local(bounds[2])
    edge[first + 3] = local(bounds[3])
    edge[first + 4] = narrow(bounds[4] - i0)
    edge[first + 5] = narrow(T.min(bounds[5], i1) - i0)
    edge[first + 6] = narrow(end - j0)


def has(edge: Any, i: Any, j: Any) -> Any:
    """Whether the mask has a pair of a tile, by bounds in its own coordinates."""
    lag = i - j
    lags = T.And(T.And(lag >= edge[0], lag <= edge[1]), lag != edge[2])
    return T.And(T.And(lags, T.And(i >= edge[4], i < edge[5])), j < edge[6])


def weighed(tile: Tile, value: Any, i: Any, j: Any, factors: Factors, entry: Callable[[], Any]) -> Any:
    """A value at a pair of a tile, times the factors that there are; entries are read where they are."""
    lag = tile.chunk - 1 + j - i  # what has lags, or leaves of them, begins at 1 − chunk
    if LOGS in tile.factors:
        exponent, odd = (factors.u_rows[part, i] + factors.u_cols[part, j] for part in (0, 1))
        factor = exp(exponent, tile.acc, tile.exact)
        value = value * T.Select(odd == T.float64(0), factor, number(float("nan"), tile.acc))
    if SCALES in tile.factors:
        value = value * (factors.rows[i] * factors.cols[j])
    if LAGS in tile.factors:
        value = value * factors.lags[lag]
    if ENTRIES in tile.factors:
        value = value * entry()
    if tile.formula is not None:
        leaf = partial(factors.leaf, i=i, j=j, lag=lag)
        value = value * T.Cast(tile.acc, expression(tile.formula, leaf))
    return value
