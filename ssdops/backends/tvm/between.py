"""The tensor program between two walks of segments on a GPU: the states that enter, from those that each leaves alone."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .parts import exp, number, sizes
from .tile import Tile

AT_ONCE = 2048
"""Numbers of a state that a program has."""


def between(tile: Tile) -> Any:
    """S ← exp(E) S + left, along the segments of every row and head, where E is the sum of a segment's log decays.

    Parameters, in order: left `[segments of all rows, count, inner, outer]`, what segments leave if nothing enters them; E of
    `lines`; entering `[rows, count, inner, outer]`, or another tensor if nothing enters; out, shaped as left; and the numbers
    segments (of a row), chunks (of a segment), head0, enters, causal.
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
                state = T.sblock_alloc_buffer((AT_ONCE,), acc)
                after = T.sblock_alloc_buffer((AT_ONCE,), acc)
                number_of = T.meta_var(lambda i: T.min(part * AT_ONCE + i, size - 1))
                for i in range(AT_ONCE):
                    with T.sblock("begin"):
                        vi = T.axis.spatial(AT_ONCE, i)
                        state[vi] = T.if_then_else(enters == 1, entering[row, h, number_of(vi)], number(0, acc))
                for step in range(segments):
                    with T.sblock("chunk"):
                        at = T.axis.spatial(1 << 40, step)
                        logs = T.sblock_alloc_buffer((1,), "float64")
                        passed = T.sblock_alloc_buffer((1,), acc)  # exp(E)
                        segment = T.meta_var(row * segments + T.Select(causal == 1, at, segments - 1 - at))
                        for i, t in T.grid(1, chunks):
                            with T.sblock("passing"):
                                vi, vt = T.axis.remap("SR", [i, t])
                                with T.init():
                                    logs[vi] = T.float64(0)
                                logs[vi] = logs[vi] + total[segment * chunks + vt, head0 + h]
                        for i in range(1):
                            with T.sblock("pass"):
                                vi = T.axis.spatial(1, i)
                                passed[vi] = exp(logs[vi], acc, exact)
                        for i in range(AT_ONCE):
                            with T.sblock("entering"):
                                vi = T.axis.spatial(AT_ONCE, i)
                                T.where(part * AT_ONCE + i < size)
                                out[segment, h, part * AT_ONCE + vi] = state[vi]
                        for i in range(AT_ONCE):
                            with T.sblock("passed"):
                                vi = T.axis.spatial(AT_ONCE, i)
                                after[vi] = passed[0] * state[vi] + left[segment, h, number_of(vi)]
                    for i in range(AT_ONCE):
                        with T.sblock("turned"):
                            vi = T.axis.spatial(AT_ONCE, i)
                            state[vi] = after[vi]

    return main
