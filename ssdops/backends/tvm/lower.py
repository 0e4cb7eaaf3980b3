"""Tensor programs of a linear term, in TVM's TensorIR: scores and walks.

A row is a document, or a batch row: tokens begin[row] to begin[row + 1] of all, cut into chunks of C tokens. ρ and κ are sums
of a chunk's log decays in walking order (`ir/terms.py`), r and c logs that are added to them, E the sum of the whole chunk:

    scores     G_ij = ⟨q_i, k_j⟩
    walk       y_i  = u_i [ Σ_j exp(ρ_i + r_i − κ_j + c_j) w_j G_ij v_j + exp(ρ_i + r_i) Sᵀ q_i ]
               S    ← exp(E) S + Σ_j exp(E − κ_j + c_j) w_j k_j v_jᵀ

`scan.py` makes Y and every gradient of these, and of what tokens exchange (`exchange.py`). Numbers of rows, tokens and heads
are symbolic, and so are sizes of a head, which tiles hold padded: what is compiled in is `Tile`. The slots of a row's chunks
are ⌊begin / C⌋ + row and on, which no two rows share. Rows read their last token again where a chunk is longer than they are,
with a weight of 0.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .parts import all_of, exp, fits, meets, read_line, sizes, sum_logs
from .tile import KEPT, LANES, MET, Tile


def scores(tile: Tile) -> Any:
    """G of every chunk, of heads from head0 on, out of nheads; q and k have as many or fewer, shared in groups."""
    C, D, dtype, whole = T.int64(tile.chunk), T.int64(tile.inner), tile.dtype, tile.whole

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(q_: T.handle, k_: T.handle, begin_: T.handle, g_: T.handle, head0: T.int64, nheads: T.int64) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, ends, heads, q_heads, k_heads, size = sizes(7)
        q = T.match_buffer(q_, (tokens, q_heads, size), dtype)
        k = T.match_buffer(k_, (tokens, k_heads, size), dtype)
        begin = T.match_buffer(begin_, (ends,), "int64")
        g = T.match_buffer(g_, (slots, heads, C, C), dtype)
        for row, head in T.grid(ends - 1, heads):
            with T.sblock("row"):
                r, h = T.axis.remap("SS", [row, head])
                for step in range((begin[r + 1] - begin[r] + C - 1) // C):
                    with T.sblock("chunk"):
                        c = T.axis.spatial(1 << 40, step)
                        qt = T.sblock_alloc_buffer((C, D), dtype)
                        kt = T.sblock_alloc_buffer((D, C), dtype)
                        out = T.sblock_alloc_buffer((C, C), dtype)
                        for i, m in T.grid(C, D):
                            with T.sblock("load_q"):
                                vi, vm = T.axis.remap("SS", [i, m])
                                qt[vi, vm] = T.if_then_else(
                                    fits(whole, vm, size),
                                    q[T.min(begin[r] + c * C + vi, begin[r + 1] - 1), (head0 + h) // (nheads // q_heads), vm],
                                    T.Cast(dtype, 0),
                                )
                        for m, i in T.grid(D, C):
                            with T.sblock("load_k"):
                                vm, vi = T.axis.remap("SS", [m, i])
                                kt[vm, vi] = T.if_then_else(
                                    fits(whole, vm, size),
                                    k[T.min(begin[r] + c * C + vi, begin[r + 1] - 1), (head0 + h) // (nheads // k_heads), vm],
                                    T.Cast(dtype, 0),
                                )
                        for i, j, m in T.grid(C, C, D):
                            with T.sblock("product"):
                                vi, vj, vm = T.axis.remap("SSR", [i, j, m])
                                with T.init():
                                    out[vi, vj] = T.Cast(dtype, 0)
                                out[vi, vj] = out[vi, vj] + qt[vi, vm] * kt[vm, vj]
                        for i, j in T.grid(C, C):
                            with T.sblock("store"):
                                vi, vj = T.axis.remap("SS", [i, j])
                                g[begin[r] // C + r + c, h, vi, vj] = out[vi, vj]

    return main


def walk(tile: Tile) -> Any:
    """y and the state that leaves, of every row and head, from the state that enters.

    Parameters, in order: q, k, v `[tokens, heads of their own, size]`; g `[slots, heads of its own, C, C]`; d `[tokens,
    nheads]` float64, u, w and r, c the same, r and c float64; begin `[rows + 1]`; of the `count` heads from head0 on that are
    walked, entering `[rows, count, inner, outer]`, y `[tokens, y_heads, outer]` from head y0 on, leaving; then, as the mode
    says, own `[tokens, heads of its own, outer]`, dots `[tokens, count]` = ⟨own_i, exp(ρ_i + r_i) Sᵀ q_i⟩, kept `[slots,
    count, inner, outer]`, met, which another walk has kept, and through `[slots, count]` = ⟨met, exp(E) S⟩; and the numbers
    head0, y0, g0 and g_share (head h has the scores of head (h − g0) / g_share), causal, row_inclusive, col_inclusive,
    strict.
    """
    C, D1, D2, dtype = T.int64(tile.chunk), T.int64(tile.inner), T.int64(tile.outer), tile.dtype
    FLIPPED, KEEP, MEET, whole = tile.flipped, tile.mode == KEPT, tile.mode == MET, tile.whole

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(
        q_: T.handle, k_: T.handle, v_: T.handle, g_: T.handle, d_: T.handle, u_: T.handle, w_: T.handle, r_: T.handle,
        c_: T.handle, begin_: T.handle, entering_: T.handle, y_: T.handle, leaving_: T.handle, own_: T.handle, dots_: T.handle,
        kept_: T.handle, met_: T.handle, through_: T.handle, head0: T.int64, y0: T.int64, g0: T.int64, g_share: T.int64,
        causal: T.int64, row_inclusive: T.int64, col_inclusive: T.int64, strict: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, kept_slots, met_slots, ends, nheads, count = sizes(7)
        q_heads, k_heads, v_heads, g_heads, own_heads, y_heads, inner, outer = sizes(8)
        q = T.match_buffer(q_, (tokens, q_heads, inner), dtype)
        k = T.match_buffer(k_, (tokens, k_heads, inner), dtype)
        v = T.match_buffer(v_, (tokens, v_heads, outer), dtype)
        g = T.match_buffer(g_, (slots, g_heads, C, C), dtype)
        d = T.match_buffer(d_, (tokens, nheads), "float64")
        u = T.match_buffer(u_, (tokens, nheads), dtype)
        w = T.match_buffer(w_, (tokens, nheads), dtype)
        r = T.match_buffer(r_, (tokens, nheads), "float64")
        c = T.match_buffer(c_, (tokens, nheads), "float64")
        begin = T.match_buffer(begin_, (ends,), "int64")
        entering = T.match_buffer(entering_, (ends - 1, count, inner, outer), dtype)
        y = T.match_buffer(y_, (tokens, y_heads, outer), dtype)
        leaving = T.match_buffer(leaving_, (ends - 1, count, inner, outer), dtype)
        own = T.match_buffer(own_, (tokens, own_heads, outer), dtype)
        dots = T.match_buffer(dots_, (tokens, count), dtype)
        kept = T.match_buffer(kept_, (kept_slots, count, inner, outer), dtype)
        met = T.match_buffer(met_, (met_slots, count, inner, outer), dtype)
        through = T.match_buffer(through_, (met_slots, count), dtype)
        for row_, head_ in T.grid(ends - 1, count):
            with T.sblock("row"):
                row, h = T.axis.remap("SS", [row_, head_])
                state = T.sblock_alloc_buffer((D1, D2), dtype)
                after = T.sblock_alloc_buffer((D1, D2), dtype)  # a chunk that wrote what it reads could not be scheduled
                for m, p in T.grid(D1, D2):
                    with T.sblock("enter"):
                        vm, vp = T.axis.remap("SS", [m, p])
                        state[vm, vp] = T.if_then_else(
                            fits(whole, vm, inner) and fits(whole, vp, outer), entering[row, h, vm, vp], T.Cast(dtype, 0)
                        )
                for step in range((begin[row + 1] - begin[row] + C - 1) // C):
                    with T.sblock("chunk"):
                        at = T.axis.spatial(1 << 40, step)
                        rho = T.sblock_alloc_buffer((C,), "float64")
                        kappa = T.sblock_alloc_buffer((C,), "float64")
                        total = T.sblock_alloc_buffer((1,), "float64")
                        passed = T.sblock_alloc_buffer((1,), dtype)  # exp(E)
                        wt = T.sblock_alloc_buffer((C,), dtype)
                        into = T.sblock_alloc_buffer((C,), dtype)
                        out_of = T.sblock_alloc_buffer((C,), dtype)
                        qt = T.sblock_alloc_buffer((C, D1), dtype)
                        kt = T.sblock_alloc_buffer((D1, C), dtype)
                        vt = T.sblock_alloc_buffer((C, D2), dtype)
                        weights = T.sblock_alloc_buffer((C, C), dtype)
                        read = T.sblock_alloc_buffer((C, D2), dtype)
                        inside = T.sblock_alloc_buffer((C, D2), dtype)
                        added = T.sblock_alloc_buffer((D1, D2), dtype)
                        lanes = T.sblock_alloc_buffer((C, LANES), dtype)
                        passing = T.sblock_alloc_buffer((D2,), dtype)
                        crossed = T.sblock_alloc_buffer((1,), dtype)
                        chunk = T.meta_var(T.Select(causal == 1, at, (begin[row + 1] - begin[row] + C - 1) // C - 1 - at))
                        first = T.meta_var(begin[row] + chunk * C)
                        slot = T.meta_var(begin[row] // C + row + chunk)
                        with T.sblock("sums"):
                            sum_logs(
                                (d, r, c), (rho, kappa, total), begin, row, head0 + h, first, C,
                                causal, row_inclusive, col_inclusive,
                            )  # fmt: skip
                            read_line(wt, w, begin, row, head0 + h, first, C)
                            passed[0] = exp(total[0], dtype)
                        for i in range(C):
                            with T.sblock("factors_in"):
                                vi = T.axis.spatial(C, i)
                                into[vi] = exp(total[0] - kappa[vi], dtype) * wt[vi]
                        for i in range(C):
                            with T.sblock("factors_out"):
                                vi = T.axis.spatial(C, i)
                                out_of[vi] = exp(rho[vi], dtype)
                        for i, m in T.grid(C, D1):
                            with T.sblock("load_q"):
                                vi, vm = T.axis.remap("SS", [i, m])
                                qt[vi, vm] = out_of[vi] * T.if_then_else(
                                    fits(whole, vm, inner),
                                    q[T.min(first + vi, begin[row + 1] - 1), (head0 + h) // (nheads // q_heads), vm],
                                    T.Cast(dtype, 0),
                                )
                        for m, i in T.grid(D1, C):
                            with T.sblock("load_k"):
                                vm, vi = T.axis.remap("SS", [m, i])
                                kt[vm, vi] = into[vi] * T.if_then_else(
                                    fits(whole, vm, inner),
                                    k[T.min(first + vi, begin[row + 1] - 1), (head0 + h) // (nheads // k_heads), vm],
                                    T.Cast(dtype, 0),
                                )
                        for i, p in T.grid(C, D2):
                            with T.sblock("load_v"):
                                vi, vp = T.axis.remap("SS", [i, p])
                                vt[vi, vp] = T.if_then_else(
                                    fits(whole, vp, outer),
                                    v[T.min(first + vi, begin[row + 1] - 1), (head0 + h) // (nheads // v_heads), vp],
                                    T.Cast(dtype, 0),
                                )
                        for i, j in T.grid(C, C):
                            with T.sblock("weigh"):
                                vi, vj = T.axis.remap("SS", [i, j])
                                weights[vi, vj] = T.Select(
                                    meets(vi, vj, causal, strict),
                                    g[slot, (head0 + h - g0) // g_share, vj if FLIPPED else vi, vi if FLIPPED else vj]
                                    * exp(rho[vi] - kappa[vj], dtype)
                                    * wt[vj],
                                    T.Cast(dtype, 0),
                                )
                        for i, p, m in T.grid(C, D2, D1):
                            with T.sblock("reads"):
                                vi, vp, vm = T.axis.remap("SSR", [i, p, m])
                                with T.init():
                                    read[vi, vp] = T.Cast(dtype, 0)
                                read[vi, vp] = read[vi, vp] + qt[vi, vm] * state[vm, vp]
                        for i, p, j in T.grid(C, D2, C):
                            with T.sblock("values"):
                                vi, vp, vj = T.axis.remap("SSR", [i, p, j])
                                with T.init():
                                    inside[vi, vp] = T.Cast(dtype, 0)
                                inside[vi, vp] = inside[vi, vp] + weights[vi, vj] * vt[vj, vp]
                        for m, p, j in T.grid(D1, D2, C):
                            with T.sblock("update"):
                                vm, vp, vj = T.axis.remap("SSR", [m, p, j])
                                with T.init():
                                    added[vm, vp] = T.Cast(dtype, 0)
                                added[vm, vp] = added[vm, vp] + kt[vm, vj] * vt[vj, vp]
                        for i, p in T.grid(C, D2):
                            with T.sblock("store"):
                                vi, vp = T.axis.remap("SS", [i, p])
                                T.where(first + i < begin[row + 1] and fits(whole, p, outer))
                                y[first + vi, y0 + h, vp] = u[first + vi, head0 + h] * (read[vi, vp] + inside[vi, vp])
                        if KEEP or MEET:
                            for i, lane, p in T.grid(C, LANES, D2 // LANES):
                                with T.sblock("dot_lanes"):
                                    vi, vl, vp = T.axis.remap("SSR", [i, lane, p])
                                    with T.init():
                                        lanes[vi, vl] = T.Cast(dtype, 0)
                                    lanes[vi, vl] = lanes[vi, vl] + read[vi, vp * LANES + vl] * T.if_then_else(
                                        fits(whole, vp * LANES + vl, outer),
                                        own[
                                            T.min(first + vi, begin[row + 1] - 1),
                                            (head0 + h) // (nheads // own_heads),
                                            vp * LANES + vl,
                                        ],
                                        T.Cast(dtype, 0),
                                    )
                            for i in range(T.min(C, begin[row + 1] - first)):
                                with T.sblock("dot"):
                                    vi = T.axis.spatial(C, i)
                                    dots[first + vi, h] = all_of(lanes, vi)
                        if KEEP:
                            for m, p in T.grid(D1, D2):
                                with T.sblock("keep"):
                                    vm, vp = T.axis.remap("SS", [m, p])
                                    T.where(fits(whole, m, inner) and fits(whole, p, outer))
                                    kept[slot, h, vm, vp] = state[vm, vp]
                        if MEET:
                            for p, m in T.grid(D2, D1):
                                with T.sblock("passing"):
                                    vp, vm = T.axis.remap("SR", [p, m])
                                    with T.init():
                                        passing[vp] = T.Cast(dtype, 0)
                                    passing[vp] = passing[vp] + state[vm, vp] * T.if_then_else(
                                        fits(whole, vm, inner) and fits(whole, vp, outer),
                                        met[slot, h, vm, vp],
                                        T.Cast(dtype, 0),
                                    )
                            with T.sblock("passed"):
                                crossed[0] = T.Cast(dtype, 0)
                                for p in range(D2):
                                    crossed[0] = crossed[0] + passing[p]
                                through[slot, h] = crossed[0] * passed[0]
                        for m, p in T.grid(D1, D2):
                            with T.sblock("carry"):
                                vm, vp = T.axis.remap("SS", [m, p])
                                after[vm, vp] = state[vm, vp] * passed[0] + added[vm, vp]
                    for m, p in T.grid(D1, D2):
                        with T.sblock("turn"):
                            vm, vp = T.axis.remap("SS", [m, p])
                            state[vm, vp] = after[vm, vp]
                for m, p in T.grid(D1, D2):
                    with T.sblock("leave"):
                        vm, vp = T.axis.remap("SS", [m, p])
                        T.where(fits(whole, m, inner) and fits(whole, p, outer))
                        leaving[row, h, vm, vp] = state[vm, vp]

    return main
