"""The tensor program between two walks of segments on a GPU: the states that enter, from those that each leaves alone."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .parts import barrier, exp, number, sizes, summed
from .tile import SEGMENTS, Tile

AT_ONCE, LANES = 256, 2
"""Numbers of a state that a program has, one of each thread, and partial sums of a segment's log decays."""


def between(tile: Tile) -> Any:
    """S ← exp(E) S + left, along the segments of every row and head, where E is the sum of a segment's log decays.

    All that segments leave is on its way before any of it is wanted.

    Parameters, in order: left `[segments of all rows, count, inner, outer]`, what segments leave if nothing enters them; E of
    `lines`; entering `[rows, count, inner, outer]`, or another tensor if nothing enters; out, shaped as left; and the numbers
    segments (of a row, `SEGMENTS` at most), chunks (of a segment), head0, enters, causal.
    """
    acc, exact = tile.acc, tile.exact

    @T.prim_func(s_tir=True)
    def main(
        left_: T.handle, total_: T.handle, entering_: T.handle, out_: T.handle, segments: T.int64, chunks: T.int64,
        head0: T.int64, enters: T.int64, causal: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        slots, nheads, everywhere, rows, entered, count, size, entering_size = sizes(8)
        left = T.match_buffer(left_, (everywhere, count, size), acc)
        total = T.match_buffer(total_, (slots, nheads), "float64")
        entering = T.match_buffer(entering_, (rows, entered, entering_size), acc)
        out = T.match_buffer(out_, (everywhere, count, size), acc)
        for row_, head_, part_ in T.grid(T.truncdiv(everywhere, segments), count, (size + AT_ONCE - 1) // AT_ONCE):
            with T.sblock("program"):
                row, h, part = T.axis.remap("SSS", [row_, head_, part_])
                passed = T.sblock_alloc_buffer((SEGMENTS, LANES), acc)  # exp(E)
                lefts = T.sblock_alloc_buffer((SEGMENTS, AT_ONCE), acc)
                state = T.sblock_alloc_buffer((AT_ONCE,), acc)
                after = T.sblock_alloc_buffer((AT_ONCE,), acc)
                number_of = T.meta_var(lambda i: T.min(part * AT_ONCE + i, size - 1))
                near_step = T.meta_var(lambda s: T.min(s, segments - 1))  # steps after the last are worked out, and not stored
                segment = T.meta_var(
                    lambda s: row * segments + T.Select(causal == 1, near_step(s), segments - 1 - near_step(s))
                )
                for step in T.unroll(SEGMENTS):
                    with T.sblock("coming"):
                        at = T.axis.spatial(SEGMENTS, step)
                        for i in range(AT_ONCE):
                            with T.sblock("lefts"):
                                vi = T.axis.spatial(AT_ONCE, i)
                                lefts[at, vi] = left[segment(at), h, number_of(vi)]
                for i in range(AT_ONCE):
                    with T.sblock("begin"):
                        vi = T.axis.spatial(AT_ONCE, i)
                        state[vi] = T.if_then_else(enters == 1, entering[row, h, number_of(vi)], number(0, acc))
                with T.sblock("part"):
                    logs = T.sblock_alloc_buffer((SEGMENTS, LANES), "float64")
                    for s, lane, t in T.grid(SEGMENTS, LANES, (chunks + LANES - 1) // LANES):
                        with T.sblock("logs"):
                            vs, vl, vt = T.axis.remap("SSR", [s, lane, t])
                            with T.init():
                                logs[vs, vl] = T.float64(0)
                            logs[vs, vl] = logs[vs, vl] + T.if_then_else(
                                vt * LANES + vl < chunks, total[segment(vs) * chunks + vt * LANES + vl, head0 + h], T.float64(0)
                            )
                    barrier(tile)
                    for s, lane in T.grid(SEGMENTS, LANES):
                        with T.sblock("passing"):
                            vs, vl = T.axis.remap("SS", [s, lane])
                            passed[vs, vl] = exp(summed(LANES, lambda lane: logs[vs, lane]), acc, exact)
                    barrier(tile)
                for step in T.unroll(SEGMENTS):
                    with T.sblock("chunk"):
                        at = T.axis.spatial(SEGMENTS, step)
                        for i in range(AT_ONCE):
                            with T.sblock("entering"):
                                vi = T.axis.spatial(AT_ONCE, i)
                                T.where(part * AT_ONCE + i < size and T.Cast("int64", at) < segments)
                                out[segment(at), h, part * AT_ONCE + vi] = state[vi]
                        for i in range(AT_ONCE):
                            with T.sblock("passed"):
                                vi = T.axis.spatial(AT_ONCE, i)
                                after[vi] = passed[at, 0] * state[vi] + lefts[at, vi]
                    for i in range(AT_ONCE):
                        with T.sblock("turned"):
                            vi = T.axis.spatial(AT_ONCE, i)
                            state[vi] = after[vi]

    return main
