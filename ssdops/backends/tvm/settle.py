"""The tensor programs that end a backward pass on a GPU, of what `group.py` has written by chunks."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .blocks import fill
from .parts import barrier, chunk_begin, chunk_end, meets, number, one_if, sizes, summed
from .tile import ABREAST, ADDED, LANES, STRETCH, SUMS, WIDE, Tile, U, W

ROWS, COLUMNS = 16, 32
"""Tokens that a program has, and numbers of each."""


def settle(tile: Tile) -> Any:
    """Gradients by token and head: of log decays, and of u and w. `exchange.py` says which token weighs on what.

    Parameters, in order: sums, met, through as `group` writes them, of count heads from head0 on; lines; chunks; dlog, du, dw
    `[tokens, nheads]`; and the numbers by which rows are multiplied, seqlen, head0, causal, row_inclusive, col_inclusive.
    """
    C, acc, line = tile.chunk, tile.acc, tile.line
    wide = "float64" if tile.exact else acc  # differences of what is exact to 7 digits keep them

    @T.prim_func(s_tir=True)
    def main(
        sums_: T.handle, met_: T.handle, through_: T.handle, lines_: T.handle, chunks_: T.handle, dlog_: T.handle,
        du_: T.handle, dw_: T.handle, scale: T.float64, seqlen: T.int64, head0: T.int64, causal: T.int64,
        row_inclusive: T.int64, col_inclusive: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, table, nheads, count, parts = sizes(6)
        sums = T.match_buffer(sums_, (slots, count, SUMS, C), acc)
        met = T.match_buffer(met_, (slots, count, parts, 2, C), acc)
        through = T.match_buffer(through_, (slots, count, parts, LANES), acc)
        lines = T.match_buffer(lines_, (slots, nheads, 8, C), line)
        chunks = T.match_buffer(chunks_, (table, 2), "int64")
        dlog = T.match_buffer(dlog_, (tokens, nheads), acc)
        du = T.match_buffer(du_, (tokens, nheads), acc)
        dw = T.match_buffer(dw_, (tokens, nheads), acc)
        for slot_, some_ in T.grid(slots, (count + ABREAST - 1) // ABREAST):
            with T.sblock("program"):
                slot, some = T.axis.remap("SS", [slot_, some_])
                place = T.sblock_alloc_buffer((2,), "int64")
                entered = T.sblock_alloc_buffer((ABREAST, C), acc)
                left = T.sblock_alloc_buffer((ABREAST, C), acc)
                crossed = T.sblock_alloc_buffer((ABREAST, LANES), acc)
                row_totals = T.sblock_alloc_buffer((ABREAST, C), acc)
                col_totals = T.sblock_alloc_buffer((ABREAST, C), acc)
                gained = T.sblock_alloc_buffer((ABREAST, C), wide)
                given = T.sblock_alloc_buffer((ABREAST, C), wide)
                passed_on = T.sblock_alloc_buffer((ABREAST, C), wide)
                taken = T.sblock_alloc_buffer((ABREAST, C // STRETCH), wide)
                carried = T.sblock_alloc_buffer((ABREAST, C // STRETCH), wide)
                beside = T.sblock_alloc_buffer((ABREAST, C), wide)
                apart = T.sblock_alloc_buffer((ABREAST, C), wide)
                first = T.meta_var(place[0])
                end = T.meta_var(place[1])
                for i in range(1):
                    with T.sblock("place"):
                        vi = T.axis.spatial(1, i)
                        place[vi] = chunk_begin(chunks, slot, seqlen, C)
                        place[vi + 1] = chunk_end(chunks, slot, seqlen, C)
                head = T.meta_var(lambda h: T.min(some * ABREAST + h, count - 1))
                as_sum = T.meta_var(lambda value: T.Cast(acc, value))
                exact = T.meta_var(lambda value: T.Cast(wide, value))
                for h, i, part in T.grid(ABREAST, C, parts):
                    with T.sblock("entered"):
                        vh, vi, vp = T.axis.remap("SSR", [h, i, part])
                        with T.init():
                            entered[vh, vi] = number(0, acc)
                        entered[vh, vi] = entered[vh, vi] + met[slot, head(vh), vp, 0, vi]
                for h, i, part in T.grid(ABREAST, C, parts):
                    with T.sblock("left"):
                        vh, vi, vp = T.axis.remap("SSR", [h, i, part])
                        with T.init():
                            left[vh, vi] = number(0, acc)
                        left[vh, vi] = left[vh, vi] + met[slot, head(vh), vp, 1, vi]
                for h, lane, part in T.grid(ABREAST, LANES, parts):
                    with T.sblock("crossed"):
                        vh, vl, vp = T.axis.remap("SSR", [h, lane, part])
                        with T.init():
                            crossed[vh, vl] = number(0, acc)
                        crossed[vh, vl] = crossed[vh, vl] + through[slot, head(vh), vp, vl]
                barrier(tile)
                inside = T.meta_var(lambda i, value: T.if_then_else(first + i < end, value, number(0, acc)))
                of_pairs = T.meta_var(lambda which, h, i: sums[slot, head(h), which, i])
                fill("row_totals", ABREAST, C)(row_totals, lambda h, i: of_pairs(0, h, i) + of_pairs(1, h, i) + entered[h, i])
                fill("col_totals", ABREAST, C)(col_totals, lambda h, i: of_pairs(2, h, i) + of_pairs(3, h, i) + left[h, i])
                fill("gained", ABREAST, C)(
                    gained,
                    lambda h, i: exact(
                        inside(i, as_sum(lines[slot, head0 + head(h), U, i]) * (of_pairs(0, h, i) + entered[h, i]))
                    ),
                )
                fill("given", ABREAST, C)(
                    given,
                    lambda h, i: exact(inside(i, as_sum(lines[slot, head0 + head(h), W, i]) * of_pairs(2, h, i))),
                )
                fill("passed_on", ABREAST, C)(
                    passed_on, lambda h, i: exact(inside(i, as_sum(lines[slot, head0 + head(h), W, i]) * left[h, i]))
                )
                barrier(tile)
                for h, s, t in T.grid(ABREAST, C // STRETCH, STRETCH):
                    with T.sblock("taken"):
                        vh, vs, vt = T.axis.remap("SSR", [h, s, t])
                        with T.init():
                            taken[vh, vs] = number(0, wide)
                        taken[vh, vs] = taken[vh, vs] + (gained[vh, vs * STRETCH + vt] - given[vh, vs * STRETCH + vt])
                for h, s, t in T.grid(ABREAST, C // STRETCH, STRETCH):
                    with T.sblock("carried"):
                        vh, vs, vt = T.axis.remap("SSR", [h, s, t])
                        with T.init():
                            carried[vh, vs] = number(0, wide)
                        carried[vh, vs] = carried[vh, vs] + passed_on[vh, vs * STRETCH + vt]
                for h, i, t in T.grid(ABREAST, C, STRETCH):
                    with T.sblock("beside"):  # of tokens in the same stretch
                        vh, vi, vt = T.axis.remap("SSR", [h, i, t])
                        at = T.meta_var(vi // STRETCH * STRETCH + vt)
                        with T.init():
                            beside[vh, vi] = number(0, wide)
                        beside[vh, vi] = (
                            beside[vh, vi]
                            + gained[vh, at] * one_if(meets(at, vi, causal, 1 - row_inclusive), wide)
                            - given[vh, at] * one_if(meets(at, vi, causal, 1 - col_inclusive), wide)
                            + passed_on[vh, at] * one_if(meets(vi, at, causal, col_inclusive), wide)
                        )
                barrier(tile)
                for h, i, t in T.grid(ABREAST, C, C // STRETCH):
                    with T.sblock("apart"):  # of whole stretches after and before it
                        vh, vi, vt = T.axis.remap("SSR", [h, i, t])
                        with T.init():
                            apart[vh, vi] = number(0, wide)
                        apart[vh, vi] = (
                            apart[vh, vi]
                            + taken[vh, vt] * one_if(meets(vt, vi // STRETCH, causal, 1), wide)
                            + carried[vh, vt] * one_if(meets(vi // STRETCH, vt, causal, 1), wide)
                        )
                barrier(tile)
                for i, h in T.grid(C, ABREAST):
                    with T.sblock("store_settled"):
                        vi, vh = T.axis.remap("SS", [i, h])
                        T.where(first + i < end and some * ABREAST + h < count)
                        dlog[first + vi, head0 + head(vh)] = as_sum(
                            beside[vh, vi] + apart[vh, vi] + exact(summed(LANES, lambda lane: crossed[vh, lane]))
                        )
                        du[first + vi, head0 + head(vh)] = as_sum(scale) * row_totals[vh, vi]
                        dw[first + vi, head0 + head(vh)] = col_totals[vh, vi]

    return main


def collect(tile: Tile) -> Any:
    """out[t, h] = Σ_r room[slot of t, h · each + r, t] of the tokens of every chunk; with `ADDED`, onto what is there.

    Parameters, in order: room `[slots, runs, C, padded size]`; chunks; what is there, and out, `[tokens, heads, size]` from
    head0 on, in the dtype of sums with `ADDED`, where they are one tensor, or `WIDE`; and the numbers each (how many are
    summed), seqlen, head0.
    """
    C, acc, ADDS = tile.chunk, tile.acc, tile.mode == ADDED
    out_dtype = acc if tile.mode in (ADDED, WIDE) else tile.data

    @T.prim_func(s_tir=True)
    def main(
        room_: T.handle, chunks_: T.handle, there_: T.handle, out_: T.handle, each: T.int64, seqlen: T.int64, head0: T.int64
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        slots, runs, padded, table, tokens, heads, size = sizes(7)
        room = T.match_buffer(room_, (slots, runs, C, padded), acc)
        chunks = T.match_buffer(chunks_, (table, 2), "int64")
        there = T.match_buffer(there_, (tokens, heads, size), out_dtype)
        out = T.match_buffer(out_, (tokens, heads, size), out_dtype)
        for slot_, head_, part_ in T.grid(slots, T.truncdiv(runs, each), C // ROWS * ((size + COLUMNS - 1) // COLUMNS)):
            with T.sblock("program"):
                slot, h, part = T.axis.remap("SSS", [slot_, head_, part_])
                row = T.meta_var(part % (C // ROWS) * ROWS)
                column = T.meta_var(part // (C // ROWS) * COLUMNS)
                place = T.sblock_alloc_buffer((2,), "int64")
                total = T.sblock_alloc_buffer((ROWS, COLUMNS), acc)
                for i in range(1):
                    with T.sblock("place"):
                        vi = T.axis.spatial(1, i)
                        place[vi] = chunk_begin(chunks, slot, seqlen, C) + row
                        place[vi + 1] = chunk_end(chunks, slot, seqlen, C)
                for i, m, r in T.grid(ROWS, COLUMNS, each):
                    with T.sblock("total"):
                        vi, vm, vr = T.axis.remap("SSR", [i, m, r])
                        with T.init():
                            total[vi, vm] = number(0, acc)
                        total[vi, vm] = total[vi, vm] + room[slot, h * each + vr, row + vi, T.min(column + vm, size - 1)]
                barrier(tile)
                for i, m in T.grid(ROWS, COLUMNS):
                    with T.sblock("store_total"):
                        vi, vm = T.axis.remap("SS", [i, m])
                        T.where(place[0] + i < place[1] and column + m < size)
                        out[place[0] + vi, head0 + h, column + vm] = T.Cast(
                            out_dtype, there[place[0] + vi, head0 + h, column + vm] + total[vi, vm] if ADDS else total[vi, vm]
                        )

    return main
