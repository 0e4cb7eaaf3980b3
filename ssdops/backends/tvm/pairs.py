"""Tensor programs of masks that are no scans, on a CPU: tiles of pairs of tokens, of which only those in the band are visited.

    contract   out_i = scale · Σ_j L_ij ⟨x_i, y_j⟩ z_j
    rows       Σ_j G_ij,  G = scale · L ∘ (XYᵀ) ∘ (ZWᵀ): apart from the lag at which nothing decays, and there
    lags       the same along each diagonal
    entries    the same by entries, over the batch rows and heads that share one

`contract` is Y, and each gradient of q, k and v with roles turned and L transposed; the others are gradients of the factors

    L_ij = rows_i · exp(u_i + w_j) · lags[i − j] · entries_ij · cols_j    for low ≤ i − j ≤ high, other than a hole

of which a program has those that its `Tile` names. Where rows and columns begin and end, bounds on lags, and how many batch
rows, heads and tiles one program sums over, are numbers that it is called with. No T × T tensor is made but that of `entries`.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from ..quadratic.formula import counts
from .blocks import fill, store, sums, update
from .formula import expression
from .parts import exp, near, number, shared, sizes, summed, under, within
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
        tokens, x_heads, y_heads, z_heads, w_heads, w_tokens, unread, d_filled, e_filled = sizes(9)
        u_batch, u_heads, u_size, c_batch, c_heads, c_size, v_batch, v_heads, v_size, s_batch, s_heads, s_size = sizes(12)
        l_heads, l_size, e_batch, e_heads, e_size, t_batch, tiles, out_0, out_1, out_2, out_3 = sizes(11)
        a_batch, a_heads, a_count, a_size, g_batch, g_heads, g_count, g_size, k_heads, k_count, k_size = sizes(11)
        d = T.meta_var(D if whole else d_filled)
        e = T.meta_var(E if whole else e_filled)
        x = T.match_buffer(x_, (tokens, x_heads, d), acc)
        y = T.match_buffer(y_, (tokens, y_heads, d), acc)
        z = T.match_buffer(z_, (tokens, z_heads, e), acc)
        w = T.match_buffer(w_, (w_tokens, w_heads, e), acc)
        u_rows = T.match_buffer(u_rows_, (u_batch, u_heads, 2, u_size), "float64")
        u_cols = T.match_buffer(u_cols_, (c_batch, c_heads, 2, c_size), "float64")
        rows = T.match_buffer(rows_, (v_batch, v_heads, v_size), acc)
        cols = T.match_buffer(cols_, (s_batch, s_heads, s_size), acc)
        lags = T.match_buffer(lags_, (l_heads, l_size), acc)
        entries = T.match_buffer(entries_, (e_batch, e_heads, e_size, e_size), acc)
        leaf_rows = T.match_buffer(leaf_rows_, (a_batch, a_heads, a_count, a_size), "float64")
        leaf_cols = T.match_buffer(leaf_cols_, (g_batch, g_heads, g_count, g_size), "float64")
        leaf_lags = T.match_buffer(leaf_lags_, (k_heads, k_count, k_size), "float64")
        table = T.match_buffer(table_, (t_batch, tiles, 4), "int64")
        out = T.match_buffer(out_, (tokens, out_1, e) if CONTRACT else (out_0, out_1, out_2, out_3), acc)
        there = T.match_buffer(there_, (unread,) if LOCAL else (out_0, out_1, out_2, out_3), acc)
        bounds = T.match_buffer(bounds_, (8,), "int64")
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
                        first = T.meta_var(lambda: T.max(T.max(table[T.min(b, t_batch - 1), t, 2], bounds[6]),
                                                         table[T.min(b, t_batch - 1), t, 0] - bounds[1]))  # fmt: skip
                        stop = T.meta_var(lambda: T.min(T.min(table[T.min(b, t_batch - 1), t, 3], bounds[7]),
                                                        table[T.min(b, t_batch - 1), t, 1] - bounds[0]))  # fmt: skip
                        for i in range(1):
                            with T.sblock("place"):
                                vi = T.axis.spatial(1, i)
                                place[vi] = table[T.min(b, t_batch - 1), t, 0]
                                place[vi + 1] = table[T.min(b, t_batch - 1), t, 1]
                                place[vi + 2] = first()
                                place[vi + 3] = stop()
                        fill("load_q", C, D)(
                            xt,
                            lambda i, m: within(
                                whole, under(m, d),
                                x[b * seqlen + near(i0 + i, i1), shared(h, nheads, x_heads), m], acc,
                            ),
                        )  # fmt: skip
                        if not CONTRACT:
                            fill("load_dy", C, E)(
                                zt,
                                lambda i, o: within(
                                    whole, under(o, e),
                                    z[b * seqlen + near(i0 + i, i1), shared(h, nheads, z_heads), o], acc,
                                ),
                            )  # fmt: skip
                        if LOGS in tile.factors:
                            fill("load_u", 2, C)(ut, lambda which, i: u_rows[T.min(b, u_batch - 1), h, which, near(i0 + i, i1)])
                        if SCALES in tile.factors:
                            fill("load_rows", C)(rt, lambda i: rows[T.min(b, v_batch - 1), h, near(i0 + i, i1)])
                        if GENERAL:
                            fill("load_leaf_rows", OF_ROW, C)(
                                at_rows,
                                lambda leaf, i: leaf_rows[
                                    T.min(b, a_batch - 1), T.min(h, a_heads - 1), T.min(T.Cast("int64", leaf), a_count - 1),
                                    T.min(near(i0 + i, i1), a_size - 1),
                                ],
                            )  # fmt: skip
                        for step in range((T.max(stop() - first(), 0) + C - 1) // C):
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
                                j0 = T.meta_var(at[0])
                                end = T.meta_var(place[3])
                                for i in range(1):
                                    with T.sblock("here"):
                                        vi = T.axis.spatial(1, i)
                                        at[vi] = place[2] + vs * C
                                        local = T.meta_var(lambda lag: narrow(lag + at[0] - i0))
                                        edge[vi] = local(bounds[0])
                                        edge[vi + 1] = local(bounds[1])
                                        edge[vi + 2] = local(bounds[2])
                                        edge[vi + 3] = local(bounds[3])
                                        edge[vi + 4] = narrow(bounds[4] - i0)
                                        edge[vi + 5] = narrow(T.min(bounds[5], i1) - i0)
                                        edge[vi + 6] = narrow(end - at[0])
                                fill("load_k", C, D)(
                                    yt,
                                    lambda j, m: within(
                                        whole, under(m, d),
                                        y[b * seqlen + near(j0 + j, end), shared(h, nheads, y_heads), m], acc,
                                    ),
                                )  # fmt: skip
                                fill("turn_k", D, C)(y_turned, lambda m, j: yt[j, m])
                                if CONTRACT:
                                    fill("load_v", C, E)(
                                        wt,
                                        lambda j, o: within(
                                            whole, under(o, e),
                                            z[b * seqlen + near(j0 + j, end), shared(h, nheads, z_heads), o], acc,
                                        ),
                                    )  # fmt: skip
                                else:
                                    fill("load_v", C, E)(
                                        wt,
                                        lambda j, o: within(
                                            whole, under(o, e),
                                            w[b * seqlen + near(j0 + j, end), shared(h, nheads, w_heads), o], acc,
                                        ),
                                    )  # fmt: skip
                                    fill("turn_v", E, C)(w_turned, lambda o, j: wt[j, o])
                                if LOGS in tile.factors:
                                    fill("load_w", 2, C)(
                                        ct, lambda which, j: u_cols[T.min(b, c_batch - 1), h, which, near(j0 + j, end)]
                                    )
                                if SCALES in tile.factors:
                                    fill("load_cols", C)(st, lambda j: cols[T.min(b, s_batch - 1), h, near(j0 + j, end)])
                                if LAGS in tile.factors:  # at j − i of the tile, from 1 − C on
                                    fill("load_lags", 2 * C)(
                                        line, lambda lag: lags[h, near(j0 - i0 + lag - C + seqlen, 2 * seqlen - 1)]
                                    )
                                if GENERAL:
                                    fill("load_leaf_cols", OF_COL, C)(
                                        at_cols,
                                        lambda leaf, j: leaf_cols[
                                            T.min(b, g_batch - 1), T.min(h, g_heads - 1),
                                            T.min(T.Cast("int64", leaf), g_count - 1), T.min(near(j0 + j, end), g_size - 1),
                                        ],
                                    )  # fmt: skip
                                    fill("load_leaf_lags", OF_LAG, 2 * C)(
                                        at_lags,
                                        lambda leaf, lag: leaf_lags[
                                            T.min(h, k_heads - 1), T.min(T.Cast("int64", leaf), k_count - 1),
                                            T.min(near(j0 - i0 + lag - C + seqlen, 2 * seqlen - 1), k_size - 1),
                                        ],
                                    )  # fmt: skip
                                if ENTRIES in tile.factors:
                                    fill("load_entries", C, C)(
                                        et,
                                        lambda i, j: entries[
                                            T.min(b, e_batch - 1), shared(h, nheads, e_heads), near(i0 + i, i1),
                                            near(j0 + j, end),
                                        ],
                                    )  # fmt: skip
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
                                            {
                                                LOGS: lambda: (ut[0, i] + ct[0, j], ut[1, i] + ct[1, j]),
                                                SCALES: lambda: rt[i] * st[j],
                                                LAGS: lambda: line[C - 1 + j - i],
                                                ENTRIES: lambda: et[i, j],
                                                "leaves": lambda kind, leaf: (
                                                    at_rows[leaf, i]
                                                    if kind == "row"
                                                    else at_cols[leaf, j]
                                                    if kind == "col"
                                                    else at_lags[leaf, C - 1 + j - i]
                                                ),
                                            },
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
                                            out[ob, oh, 0, where(vl)] = (
                                                there[ob, oh, 0, where(vl)] + T.Cast(acc, scale) * diagonals[0, vl]
                                            )
                                else:
                                    for i, j in T.grid(C, C):
                                        with T.sblock("give_entries"):
                                            vi, vj = T.axis.remap("SS", [i, j])
                                            T.where(i0 + i < i1 and j0 + j < end)
                                            out[ob, oh, i0 + vi, j0 + vj] = (
                                                there[ob, oh, i0 + vi, j0 + vj] + T.Cast(acc, scale) * weights[vi, vj]
                                            )
                if LOCAL:
                    start = T.meta_var(table[T.min(ob, t_batch - 1), ot, 0])
                    over = T.meta_var(table[T.min(ob, t_batch - 1), ot, 1])
                    if CONTRACT:
                        store("store", C, E, whole)(
                            out, oh, ob * seqlen + start, ob * seqlen + over, e,
                            lambda i, o: T.Cast(acc, scale) * total[0, i, o],
                        )  # fmt: skip
                    else:
                        for which, i in T.grid(2, C):
                            with T.sblock("dots"):
                                vw, vi = T.axis.remap("SS", [which, i])
                                T.where(start + i < over)
                                out[ob, oh, vw, start + vi] = T.Cast(acc, scale) * summed(LANES, lambda r: lanes[vw, vi, r])

    return main


def narrow(x: Any) -> Any:
    """A coordinate in a tile, of 32 bits: what lies far outside stays outside."""
    return T.Cast("int32", T.max(T.min(x, INF), -INF))


def has(edge: Any, i: Any, j: Any) -> Any:
    """Whether the mask has a pair of a tile, by bounds in its own coordinates."""
    lag = i - j
    lags = T.And(T.And(lag >= edge[0], lag <= edge[1]), lag != edge[2])
    return T.And(T.And(lags, T.And(i >= edge[4], i < edge[5])), j < edge[6])


def weighed(tile: Tile, value: Any, factors: Any) -> Any:
    """A value times the factors that there are."""
    if LOGS in tile.factors:
        exponent, odd = factors[LOGS]()
        factor = exp(exponent, tile.acc, tile.exact)
        value = value * T.Select(odd == T.float64(0), factor, number(float("nan"), tile.acc))
    for name in (SCALES, LAGS, ENTRIES):
        value = value * factors[name]() if name in tile.factors else value
    if tile.formula is not None:
        value = value * T.Cast(tile.acc, expression(tile.formula, factors["leaves"]))
    return value
