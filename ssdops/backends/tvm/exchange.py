"""The tensor program of what tokens exchange: gradients of log decays and of scales."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .parts import barrier, chunk_begin, chunk_end, exp, meets, near, number, shared, sizes, summed
from .tile import LANES, Tile


def exchange(tile: Tile) -> Any:
    """Gradients by token and head: of log decays, and of u and w, from what pairs and states exchange.

    With R = exp(ρ − κ) ∘ G ∘ G', row i gathers Σ_j w_j R_ij in its chunk and entering_i from the state before it; column j
    gives Σ_i u_i R_ij, and leaving_j to the state after it. log_a[t] weighs on what rows from t on gather (from t + 1 if ρ is
    exclusive), less what columns from t on give them (t + 1 if κ is), on what columns before t (to t if κ is exclusive) give
    to the state, and on what passes the chunk. A pair without decay between its tokens, closer than `distance`, is left out
    of these sums: strong decays would drown the others in it.

    Parameters, in order: g `[slots, heads of its own, C, C]`, other `[slots, count, C, C]`, of the count heads from head0 on;
    ρ, κ, u, w as of a walk; chunks; entering, leaving `[tokens, count, parts of their own]`, to be summed over parts, without u
    and w; through `[slots, count, parts]`; dlog, du, dw `[tokens, nheads]`; and the numbers head0, causal, row_inclusive,
    col_inclusive, strict, distance.
    """
    C, acc, exact = T.int64(tile.chunk), tile.acc, tile.data == tile.acc

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(
        g_: T.handle, other_: T.handle, rho_: T.handle, kappa_: T.handle, u_: T.handle, w_: T.handle, chunks_: T.handle,
        entering_: T.handle, leaving_: T.handle, through_: T.handle, dlog_: T.handle, du_: T.handle, dw_: T.handle,
        scale: T.float64, seqlen: T.int64, head0: T.int64, causal: T.int64, row_inclusive: T.int64, col_inclusive: T.int64, strict: T.int64, distance: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, nheads, count, g_heads, entering_parts, leaving_parts, through_parts = sizes(8)
        scale_tokens, scale_heads, table = sizes(3)
        g = T.match_buffer(g_, (slots, g_heads, C, C), acc)
        other = T.match_buffer(other_, (slots, count, C, C), acc)
        rho = T.match_buffer(rho_, (tokens, nheads), "float64")
        kappa = T.match_buffer(kappa_, (tokens, nheads), "float64")
        u = T.match_buffer(u_, (scale_tokens, scale_heads), acc)
        w = T.match_buffer(w_, (scale_tokens, scale_heads), acc)
        chunks = T.match_buffer(chunks_, (table, 2), "int64")
        entering = T.match_buffer(entering_, (tokens, count, entering_parts), acc)
        leaving = T.match_buffer(leaving_, (tokens, count, leaving_parts), acc)
        through = T.match_buffer(through_, (slots, count, through_parts), acc)
        dlog = T.match_buffer(dlog_, (tokens, nheads), acc)
        du = T.match_buffer(du_, (tokens, nheads), acc)
        dw = T.match_buffer(dw_, (tokens, nheads), acc)
        for slot_, head_ in T.grid(slots, count):
            with T.sblock("program"):
                slot, h = T.axis.remap("SS", [slot_, head_])
                rho_t = T.sblock_alloc_buffer((C,), "float64")
                kappa_t = T.sblock_alloc_buffer((C,), "float64")
                u_t = T.sblock_alloc_buffer((C,), acc)
                w_t = T.sblock_alloc_buffer((C,), acc)
                entered = T.sblock_alloc_buffer((C,), acc)
                left = T.sblock_alloc_buffer((C,), acc)
                crossed = T.sblock_alloc_buffer((1,), acc)
                pairs = T.sblock_alloc_buffer((C, C), acc)
                lanes = T.sblock_alloc_buffer((C, LANES), acc)
                all_lanes = T.sblock_alloc_buffer((C, LANES), acc)
                rows = T.sblock_alloc_buffer((C,), acc)
                all_rows = T.sblock_alloc_buffer((C,), acc)
                cols = T.sblock_alloc_buffer((C,), acc)
                all_cols = T.sblock_alloc_buffer((C,), acc)
                gained = T.sblock_alloc_buffer((C,), "float64")
                given = T.sblock_alloc_buffer((C,), "float64")
                logs = T.sblock_alloc_buffer((C,), "float64")
                first = T.meta_var(chunk_begin(chunks, slot, seqlen, C))
                end = T.meta_var(chunk_end(chunks, slot, seqlen, C))
                inside = T.meta_var(lambda i: first + i < end)
                for i in range(C):
                    with T.sblock("load_lines"):
                        vi = T.axis.spatial(C, i)
                        rho_t[vi] = rho[near(first + vi, end), head0 + h]
                        kappa_t[vi] = kappa[near(first + vi, end), head0 + h]
                        u_t[vi] = T.Cast(acc, scale) * T.if_then_else(inside(vi), u[first + vi, head0 + h] if tile.scaled else number(1, acc), number(0, acc))
                        w_t[vi] = T.if_then_else(inside(vi), w[first + vi, head0 + h] if tile.scaled else number(1, acc), number(0, acc))
                for i, part in T.grid(C, entering_parts):
                    with T.sblock("entered"):
                        vi, vp = T.axis.remap("SR", [i, part])
                        with T.init():
                            entered[vi] = number(0, acc)
                        entered[vi] = entered[vi] + T.if_then_else(inside(vi), entering[first + vi, h, vp], number(0, acc))
                for i, part in T.grid(C, leaving_parts):
                    with T.sblock("left"):
                        vi, vp = T.axis.remap("SR", [i, part])
                        with T.init():
                            left[vi] = number(0, acc)
                        left[vi] = left[vi] + T.if_then_else(inside(vi), leaving[first + vi, h, vp], number(0, acc))
                for i, part in T.grid(1, through_parts):
                    with T.sblock("crossed"):
                        vi, vp = T.axis.remap("SR", [i, part])
                        with T.init():
                            crossed[vi] = number(0, acc)
                        crossed[vi] = crossed[vi] + through[slot, h, vp]
                barrier(tile)
                for i, j in T.grid(C, C):
                    with T.sblock("pairs"):
                        vi, vj = T.axis.remap("SS", [i, j])
                        pairs[vi, vj] = T.Select(
                            meets(vi, vj, causal, strict),
                            g[slot, shared(head0 + h, nheads, g_heads), vi, vj] * other[slot, h, vi, vj]
                            * exp(rho_t[vi] - kappa_t[vj], acc, exact),
                            number(0, acc),
                        )  # fmt: skip
                barrier(tile)
                for j, i in T.grid(C, C):
                    with T.sblock("all_cols"):
                        vj, vi = T.axis.remap("SR", [j, i])
                        with T.init():
                            all_cols[vj] = number(0, acc)
                        all_cols[vj] = all_cols[vj] + pairs[vi, vj] * u_t[vi]
                for j, i in T.grid(C, C):
                    with T.sblock("cols"):
                        vj, vi = T.axis.remap("SR", [j, i])
                        with T.init():
                            cols[vj] = number(0, acc)
                        cols[vj] = cols[vj] + T.Select(meets(vi, vj, causal, distance), pairs[vi, vj] * u_t[vi], number(0, acc))
                for i, lane, j in T.grid(C, LANES, C // LANES):
                    with T.sblock("all_row_lanes"):
                        vi, vl, vj = T.axis.remap("SSR", [i, lane, j])
                        with T.init():
                            all_lanes[vi, vl] = number(0, acc)
                        all_lanes[vi, vl] = all_lanes[vi, vl] + pairs[vi, vj * LANES + vl] * w_t[vj * LANES + vl]
                for i, lane, j in T.grid(C, LANES, C // LANES):
                    with T.sblock("row_lanes"):
                        vi, vl, vj = T.axis.remap("SSR", [i, lane, j])
                        with T.init():
                            lanes[vi, vl] = number(0, acc)
                        lanes[vi, vl] = lanes[vi, vl] + T.Select(
                            meets(vi, vj * LANES + vl, causal, distance),
                            pairs[vi, vj * LANES + vl] * w_t[vj * LANES + vl],
                            number(0, acc),
                        )
                barrier(tile)
                for i in range(C):
                    with T.sblock("rows"):
                        vi = T.axis.spatial(C, i)
                        all_rows[vi] = summed(LANES, lambda lane: all_lanes[vi, lane])
                        rows[vi] = summed(LANES, lambda lane: lanes[vi, lane])
                barrier(tile)
                for i in range(C):
                    with T.sblock("tokens"):
                        vi = T.axis.spatial(C, i)
                        gained[vi] = T.Cast("float64", u_t[vi] * (rows[vi] + entered[vi]))
                        given[vi] = T.Cast("float64", w_t[vi] * cols[vi])
                barrier(tile)
                for i, t in T.grid(C, C):
                    with T.sblock("logs"):
                        vi, vt = T.axis.remap("SR", [i, t])
                        with T.init():
                            logs[vi] = T.Cast("float64", crossed[0])
                        logs[vi] = (
                            logs[vi]
                            + T.Select(meets(vt, vi, causal, 1 - row_inclusive), gained[vt], T.float64(0))
                            - T.Select(meets(vt, vi, causal, 1 - col_inclusive), given[vt], T.float64(0))
                            + T.Select(
                                meets(vi, vt, causal, col_inclusive), T.Cast("float64", w_t[vt] * left[vt]), T.float64(0)
                            )
                        )
                barrier(tile)
                for i in range(C):
                    with T.sblock("store_lines"):
                        vi = T.axis.spatial(C, i)
                        T.where(first + i < end)
                        dlog[first + vi, head0 + h] = T.Cast(acc, logs[vi])
                        du[first + vi, head0 + h] = T.Cast(acc, scale) * (all_rows[vi] + entered[vi])
                        dw[first + vi, head0 + h] = all_cols[vi] + left[vi]

    return main
