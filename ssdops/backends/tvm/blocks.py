"""Blocks of tensor programs by name, for programs of many: what a block reads is given as functions of its indices."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .parts import bound, first_segment, first_slot, fits, number


def fill(name: str, *shape: int) -> Any:
    """`fill(name, I, J)(tile, value)`: tile[i, j] = value(i, j). Of one, two or three axes.

    Each has a function of its own, as TVM reads the text of every macro that a function defines.
    """
    return (_line, _matrix, _stack)[len(shape) - 1](name, *shape)


def _line(name: str, size: int) -> Any:
    @T.macro
    def line(tile, value):
        for i in range(size):
            with T.sblock(name):
                vi = T.axis.spatial(size, i)
                tile[vi] = value(vi)

    return line


def _matrix(name: str, rows: int, cols: int) -> Any:
    @T.macro
    def matrix(tile, value):
        for i, j in T.grid(rows, cols):
            with T.sblock(name):
                vi, vj = T.axis.remap("SS", [i, j])
                tile[vi, vj] = value(vi, vj)

    return matrix


def _stack(name: str, count: int, rows: int, cols: int) -> Any:
    @T.macro
    def stack(tile, value):
        for h, i, j in T.grid(count, rows, cols):
            with T.sblock(name):
                vh, vi, vj = T.axis.remap("SSS", [h, i, j])
                tile[vh, vi, vj] = value(vh, vi, vj)

    return stack


def update(name: str, count: int, rows: int, cols: int) -> Any:
    """`update(name, H, I, J)(stack, h, value)`: stack[h, i, j] = value(h, i, j) of one h, which may be of what is there.

    No rule has it: a block that reads what it writes is none that TVM would move, and LLVM makes vectors of it by itself.
    """

    @T.macro
    def block(stack, h, value):
        for i, j in T.grid(rows, cols):
            with T.sblock(name):
                vh = T.axis.spatial(count, h)
                vi, vj = T.axis.remap("SS", [i, j])
                stack[vh, vi, vj] = value(vh, vi, vj)

    return block


def add_up(name: str, count: int, rows: int, cols: int, dtype: str) -> Any:
    """`add_up(name, H, I, J, dtype)(tile, h, term)`: tile[i, j] = Σ_h term(i, j), one h at a time. No rule has it either."""

    @T.macro
    def block(tile, h, term):
        for i, j in T.grid(rows, cols):
            with T.sblock(name):
                vh = T.axis.spatial(count, h)
                vi, vj = T.axis.remap("SS", [i, j])
                tile[vi, vj] = T.if_then_else(vh > 0, tile[vi, vj], number(0, dtype)) + term(vi, vj)

    return block


def product(name: str, rows: int, cols: int, depth: int, dtype: str) -> Any:
    """`product(name, I, J, M, dtype)(tile, a, b)`: tile[i, j] = Σ_m a(i, m) b(m, j)."""

    @T.macro
    def block(tile, a, b):
        for i, j, m in T.grid(rows, cols, depth):
            with T.sblock(name):
                vi, vj, vm = T.axis.remap("SSR", [i, j, m])
                with T.init():
                    tile[vi, vj] = number(0, dtype)
                tile[vi, vj] = tile[vi, vj] + a(vi, vm) * b(vm, vj)

    return block


def sums(name: str, rows: int, lanes: int, steps: int, dtype: str) -> Any:
    """`sums(name, I, L, S, dtype)(tile, value)`: tile[i, l] = Σ_s value(i, s · L + l)."""

    @T.macro
    def block(tile, value):
        for i, lane, step in T.grid(rows, lanes, steps):
            with T.sblock(name):
                vi, vl, vs = T.axis.remap("SSR", [i, lane, step])
                with T.init():
                    tile[vi, vl] = number(0, dtype)
                tile[vi, vl] = tile[vi, vl] + value(vi, vs * lanes + vl)

    return block


def store(name: str, rows: int, cols: int, whole: bool) -> Any:
    """`store(name, I, J, whole)(out, head, first, end, size, value)`: tokens before the end of a row, and what sizes have."""

    @T.macro
    def block(out, head, first, end, size, value):
        for i, j in T.grid(rows, cols):
            with T.sblock(name):
                vi, vj = T.axis.remap("SS", [i, j])
                T.where(first + i < end and fits(whole, j, size))
                out[first + vi, head, vj] = value(vi, vj)

    return block


@T.macro
def locate(place, begin, row, seqlen, chunk):
    """place = the first token of a row, its end, its first slot, and its first segment."""
    for i in range(1):
        with T.sblock("place"):
            vi = T.axis.spatial(1, i)
            place[vi] = bound(begin, row, seqlen)
            place[vi + 1] = bound(begin, row + 1, seqlen)
            place[vi + 2] = first_slot(begin, row, seqlen, chunk)
            place[vi + 3] = first_segment(begin, row, seqlen, chunk)
