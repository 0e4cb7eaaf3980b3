"""The tensor program of what tokens exchange: gradients of log decays and of scales."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .parts import all_of, exp, meets, read_line, sizes, sum_logs
from .tile import LANES, Tile


def exchange(tile: Tile) -> Any:
    """Gradients by token and head: of log decays, and of u and w, from what pairs and states exchange.

    With R = exp(ρ − κ) ∘ G ∘ G', row i gathers Σ_j w_j R_ij in its chunk and entering_i from the state before it; column j
    gives Σ_i u_i R_ij, and leaving_j to the state after it. log_a[t] weighs on what rows from t on gather (from t + 1 if ρ is
    exclusive), less what columns from t on give them (t + 1 if κ is), on what columns before t (to t if κ is exclusive) give
    to the state, and on what passes the chunk. A pair without decay between its tokens, closer than `distance`, is left out
    of these sums: strong decays would drown the others in it.

    Parameters, in order: g `[slots, heads of its own, C, C]`, other `[slots, count, C, C]`, of the count heads from head0 on;
    d, u, w, r, c as of a walk; begin; entering, leaving `[tokens, count]`, without u and w; through `[slots, count]`; dlog,
    du, dw `[tokens, nheads]`; and the numbers head0, causal, row_inclusive, col_inclusive, strict, distance.
    """
    C, dtype = T.int64(tile.chunk), tile.dtype

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(
        g_: T.handle, other_: T.handle, d_: T.handle, u_: T.handle, w_: T.handle, r_: T.handle, c_: T.handle, begin_: T.handle,
        entering_: T.handle, leaving_: T.handle, through_: T.handle, dlog_: T.handle, du_: T.handle, dw_: T.handle,
        head0: T.int64, causal: T.int64, row_inclusive: T.int64, col_inclusive: T.int64, strict: T.int64, distance: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, ends, nheads, count, g_heads = sizes(6)
        g = T.match_buffer(g_, (slots, g_heads, C, C), dtype)
        other = T.match_buffer(other_, (slots, count, C, C), dtype)
        d = T.match_buffer(d_, (tokens, nheads), "float64")
        u = T.match_buffer(u_, (tokens, nheads), dtype)
        w = T.match_buffer(w_, (tokens, nheads), dtype)
        r = T.match_buffer(r_, (tokens, nheads), "float64")
        c = T.match_buffer(c_, (tokens, nheads), "float64")
        begin = T.match_buffer(begin_, (ends,), "int64")
        entering = T.match_buffer(entering_, (tokens, count), dtype)
        leaving = T.match_buffer(leaving_, (tokens, count), dtype)
        through = T.match_buffer(through_, (slots, count), dtype)
        dlog = T.match_buffer(dlog_, (tokens, nheads), dtype)
        du = T.match_buffer(du_, (tokens, nheads), dtype)
        dw = T.match_buffer(dw_, (tokens, nheads), dtype)
        for row_, head_ in T.grid(ends - 1, count):
            with T.sblock("row"):
                row, h = T.axis.remap("SS", [row_, head_])
                for at in range((begin[row + 1] - begin[row] + C - 1) // C):
                    with T.sblock("chunk"):
                        chunk = T.axis.spatial(1 << 40, at)
                        rho = T.sblock_alloc_buffer((C,), "float64")
                        kappa = T.sblock_alloc_buffer((C,), "float64")
                        total = T.sblock_alloc_buffer((1,), "float64")
                        ut = T.sblock_alloc_buffer((C,), dtype)
                        wt = T.sblock_alloc_buffer((C,), dtype)
                        pairs = T.sblock_alloc_buffer((C, C), dtype)
                        all_rows = T.sblock_alloc_buffer((C,), dtype)
                        all_cols = T.sblock_alloc_buffer((C,), dtype)
                        rows = T.sblock_alloc_buffer((C,), dtype)
                        cols = T.sblock_alloc_buffer((C,), dtype)
                        lanes = T.sblock_alloc_buffer((C, LANES), dtype)
                        all_lanes = T.sblock_alloc_buffer((C, LANES), dtype)
                        late = T.sblock_alloc_buffer((1,), "float64")
                        early = T.sblock_alloc_buffer((1,), "float64")
                        log_sums = T.sblock_alloc_buffer((C,), "float64")
                        first = T.meta_var(begin[row] + chunk * C)
                        slot = T.meta_var(begin[row] // C + row + chunk)
                        with T.sblock("sums"):
                            sum_logs(
                                (d, r, c), (rho, kappa, total), begin, row, head0 + h, first, C,
                                causal, row_inclusive, col_inclusive,
                            )  # fmt: skip
                            read_line(ut, u, begin, row, head0 + h, first, C)
                            read_line(wt, w, begin, row, head0 + h, first, C)
                        for i, j in T.grid(C, C):
                            with T.sblock("pairs"):
                                vi, vj = T.axis.remap("SS", [i, j])
                                pairs[vi, vj] = T.Select(
                                    meets(vi, vj, causal, strict),
                                    g[slot, (head0 + h) // (nheads // g_heads), vi, vj] * other[slot, h, vi, vj]
                                    * exp(rho[vi] - kappa[vj], dtype),
                                    T.Cast(dtype, 0),
                                )  # fmt: skip
                        for j, i in T.grid(C, C):
                            with T.sblock("all_cols"):
                                vj, vi = T.axis.remap("SR", [j, i])
                                with T.init():
                                    all_cols[vj] = T.Cast(dtype, 0)
                                all_cols[vj] = all_cols[vj] + pairs[vi, vj] * ut[vi]
                        for j, i in T.grid(C, C):
                            with T.sblock("cols"):
                                vj, vi = T.axis.remap("SR", [j, i])
                                with T.init():
                                    cols[vj] = T.Cast(dtype, 0)
                                cols[vj] = cols[vj] + T.Select(
                                    meets(vi, vj, causal, distance), pairs[vi, vj] * ut[vi], T.Cast(dtype, 0)
                                )
                        for i, lane, j in T.grid(C, LANES, C // LANES):
                            with T.sblock("all_row_lanes"):
                                vi, vl, vj = T.axis.remap("SSR", [i, lane, j])
                                with T.init():
                                    all_lanes[vi, vl] = T.Cast(dtype, 0)
                                all_lanes[vi, vl] = all_lanes[vi, vl] + pairs[vi, vj * LANES + vl] * wt[vj * LANES + vl]
                        for i, lane, j in T.grid(C, LANES, C // LANES):
                            with T.sblock("row_lanes"):
                                vi, vl, vj = T.axis.remap("SSR", [i, lane, j])
                                with T.init():
                                    lanes[vi, vl] = T.Cast(dtype, 0)
                                lanes[vi, vl] = lanes[vi, vl] + T.Select(
                                    meets(vi, vj * LANES + vl, causal, distance),
                                    pairs[vi, vj * LANES + vl] * wt[vj * LANES + vl],
                                    T.Cast(dtype, 0),
                                )
                        with T.sblock("rows"):
                            for i in range(C):
                                all_rows[i] = all_of(all_lanes, i)
                                rows[i] = all_of(lanes, i)
                        with T.sblock("tokens"):
                            late[0] = T.float64(0)
                            early[0] = T.float64(0)
                            for s in range(C):
                                i = T.meta_var(T.Select(causal == 1, C - 1 - s, s))
                                if first + i < begin[row + 1]:
                                    du[first + i, head0 + h] = all_rows[i] + entering[first + i, h]
                                    dw[first + i, head0 + h] = all_cols[i] + leaving[first + i, h]
                                    if row_inclusive == 1:
                                        late[0] = late[0] + T.Cast("float64", ut[i] * (rows[i] + entering[first + i, h]))
                                    if col_inclusive == 1:
                                        late[0] = late[0] - T.Cast("float64", wt[i] * cols[i])
                                    log_sums[i] = late[0] + T.Cast("float64", through[slot, h])
                                    if row_inclusive == 0:
                                        late[0] = late[0] + T.Cast("float64", ut[i] * (rows[i] + entering[first + i, h]))
                                    if col_inclusive == 0:
                                        late[0] = late[0] - T.Cast("float64", wt[i] * cols[i])
                            for s in range(C):
                                i = T.meta_var(T.Select(causal == 1, s, C - 1 - s))
                                if first + i < begin[row + 1]:
                                    if col_inclusive == 0:
                                        early[0] = early[0] + T.Cast("float64", wt[i] * leaving[first + i, h])
                                    dlog[first + i, head0 + h] = T.Cast(dtype, log_sums[i] + early[0])
                                    if col_inclusive == 1:
                                        early[0] = early[0] + T.Cast("float64", wt[i] * leaving[first + i, h])

    return main
