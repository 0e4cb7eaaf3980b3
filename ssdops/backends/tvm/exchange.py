"""The tensor program of what tokens exchange, on a CPU: gradients of log decays and of scales. `settle.py` is a GPU's."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .blocks import near_sums
from .parts import chunk_begin, chunk_end, decay, meets, number, one_if, shared, sizes, summed
from .tile import LANES, LINES, Tile, U, W

CROSSING = 32
"""Partial sums of what passes a chunk."""


def exchange(tile: Tile) -> Any:
    """Gradients by token and head: of log decays, and of u and w, from what pairs and states exchange.

    With R = exp(ρ − κ) ∘ G ∘ G', row i gathers Σ_j w_j R_ij in its chunk and entering_i from the state before it; column j
    gives Σ_i u_i R_ij, and leaving_j to the state after it. log_a[t] weighs on what rows from t on gather (from t + 1 if ρ is
    exclusive), less what columns from t on give them (t + 1 if κ is), on what columns before t (to t if κ is exclusive) give
    to the state, and on what passes the chunk. A pair without decay between its tokens, closer than `distance`, is left out
    of these sums: strong decays would drown the others in it. `distance` is 1 or 2.

    Parameters, in order: g `[slots, heads of its own, C, C]`, other `[slots, count, C, C]`, of the count heads from head0 on;
    lines; chunks; entering, leaving `[tokens, count, parts of their own]`, to be summed over parts, without u and w; through
    `[slots, count, parts of its own]`, likewise; dlog, du, dw `[tokens, nheads]`; and the numbers by which rows are multiplied,
    seqlen, head0, causal, row_inclusive, col_inclusive, strict, distance.
    """
    C, data, acc, line = tile.chunk, tile.data, tile.acc, tile.line

    @T.prim_func(s_tir=True)
    def main(
        g_: T.handle, other_: T.handle, lines_: T.handle, chunks_: T.handle,
        entering_: T.handle, leaving_: T.handle, through_: T.handle, dlog_: T.handle, du_: T.handle, dw_: T.handle,
        scale: T.float64, seqlen: T.int64, head0: T.int64, causal: T.int64, row_inclusive: T.int64, col_inclusive: T.int64,
        strict: T.int64, distance: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, nheads, count, g_heads, entering_parts, leaving_parts, through_parts = sizes(8)
        table = T.int64()
        g = T.match_buffer(g_, (slots, g_heads, C, C), data)
        other = T.match_buffer(other_, (slots, count, C, C), data)
        lines = T.match_buffer(lines_, (slots, nheads, LINES, C), line)
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
                tokens_t = T.sblock_alloc_buffer((LINES, C), line)
                entered = T.sblock_alloc_buffer((C,), acc)
                left = T.sblock_alloc_buffer((C,), acc)
                crossing = T.sblock_alloc_buffer((CROSSING,), acc)
                crossed = T.sblock_alloc_buffer((1,), "float64")
                pairs = T.sblock_alloc_buffer((C, C), acc)
                row_lanes = T.sblock_alloc_buffer((C, LANES), acc)
                col_lanes = T.sblock_alloc_buffer((LANES, C), acc)
                rows = T.sblock_alloc_buffer((C,), acc)
                cols = T.sblock_alloc_buffer((C,), acc)
                near_rows = T.sblock_alloc_buffer((C,), acc)
                near_cols = T.sblock_alloc_buffer((C,), acc)
                gained = T.sblock_alloc_buffer((C,), "float64")
                given = T.sblock_alloc_buffer((C,), "float64")
                passed_on = T.sblock_alloc_buffer((C,), "float64")
                log_lanes = T.sblock_alloc_buffer((LANES, C), "float64")
                place = T.sblock_alloc_buffer((2,), "int64")
                first = T.meta_var(place[0])
                end = T.meta_var(place[1])
                for i in range(1):
                    with T.sblock("place"):
                        vi = T.axis.spatial(1, i)
                        place[vi] = chunk_begin(chunks, slot, seqlen, C)
                        place[vi + 1] = chunk_end(chunks, slot, seqlen, C)
                inside = T.meta_var(lambda i: first + i < end)
                u = T.meta_var(lambda i: T.Cast(acc, tokens_t[U, i]))
                w = T.meta_var(lambda i: T.Cast(acc, tokens_t[W, i]))
                for which, i in T.grid(LINES, C):
                    with T.sblock("load_lines"):
                        vw, vi = T.axis.remap("SS", [which, i])
                        tokens_t[vw, vi] = lines[slot, head0 + h, vw, vi]
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
                for lane, part in T.grid(CROSSING, (through_parts + CROSSING - 1) // CROSSING):
                    with T.sblock("crossing"):
                        vl, vp = T.axis.remap("SR", [lane, part])
                        with T.init():
                            crossing[vl] = number(0, acc)
                        crossing[vl] = crossing[vl] + T.if_then_else(
                            vp * CROSSING + vl < through_parts, through[slot, h, vp * CROSSING + vl], number(0, acc)
                        )
                for i, j in T.grid(C, C):
                    with T.sblock("pairs"):
                        vi, vj = T.axis.remap("SS", [i, j])
                        pairs[vi, vj] = (
                            T.Cast(acc, g[slot, shared(head0 + h, nheads, g_heads), vi, vj])
                            * T.Cast(acc, other[slot, h, vi, vj])
                            * decay(tile, tokens_t, vi, vj, meets(vi, vj, causal, strict))
                        )
                for i, lane, j in T.grid(C, LANES, C // LANES):
                    with T.sblock("row_lanes"):
                        vi, vl, vj = T.axis.remap("SSR", [i, lane, j])
                        with T.init():
                            row_lanes[vi, vl] = number(0, acc)
                        row_lanes[vi, vl] = row_lanes[vi, vl] + pairs[vi, vj * LANES + vl] * w(vj * LANES + vl) * one_if(
                            meets(vi, vj * LANES + vl, causal, distance), acc
                        )
                for lane, j, i in T.grid(LANES, C, C // LANES):
                    with T.sblock("col_lanes"):
                        vl, vj, vi = T.axis.remap("SSR", [lane, j, i])
                        with T.init():
                            col_lanes[vl, vj] = number(0, acc)
                        col_lanes[vl, vj] = col_lanes[vl, vj] + pairs[vi * LANES + vl, vj] * u(vi * LANES + vl) * one_if(
                            meets(vi * LANES + vl, vj, causal, distance), acc
                        )
                near_sums(C, acc)(pairs, near_rows, near_cols, u, w, causal, distance)
                for i in range(1):
                    with T.sblock("crossed"):
                        vi = T.axis.spatial(1, i)
                        crossed[vi] = T.Cast("float64", summed(CROSSING, lambda lane: crossing[lane]))
                for i in range(C):
                    with T.sblock("tokens"):
                        vi = T.axis.spatial(C, i)
                        rows[vi] = summed(LANES, lambda lane: row_lanes[vi, lane]) + entered[vi]
                        cols[vi] = summed(LANES, lambda lane: col_lanes[lane, vi])
                for i in range(C):
                    with T.sblock("weighed"):
                        vi = T.axis.spatial(C, i)
                        gained[vi] = T.Cast("float64", u(vi) * rows[vi])
                        given[vi] = T.Cast("float64", w(vi) * cols[vi])
                        passed_on[vi] = T.Cast("float64", w(vi) * left[vi])
                for lane, i, t in T.grid(LANES, C, C // LANES):
                    with T.sblock("log_lanes"):
                        vl, vi, vt = T.axis.remap("SSR", [lane, i, t])
                        with T.init():
                            log_lanes[vl, vi] = T.float64(0)
                        log_lanes[vl, vi] = (
                            log_lanes[vl, vi]
                            + gained[vt * LANES + vl] * one_if(meets(vt * LANES + vl, vi, causal, 1 - row_inclusive), "float64")
                            - given[vt * LANES + vl] * one_if(meets(vt * LANES + vl, vi, causal, 1 - col_inclusive), "float64")
                            + passed_on[vt * LANES + vl] * one_if(meets(vi, vt * LANES + vl, causal, col_inclusive), "float64")
                        )
                for i in range(C):
                    with T.sblock("store_lines"):
                        vi = T.axis.spatial(C, i)
                        T.where(first + i < end)
                        dlog[first + vi, head0 + h] = T.Cast(acc, crossed[0] + summed(LANES, lambda lane: log_lanes[lane, vi]))
                        du[first + vi, head0 + h] = T.Cast(acc, scale) * (rows[vi] + near_rows[vi])
                        dw[first + vi, head0 + h] = cols[vi] + near_cols[vi] + left[vi]

    return main
