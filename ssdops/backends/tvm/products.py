"""Matrix products on a CPU, written as its registers want them: no rule has anything left to do.

TVM's parser calls these functions where a program does, so that Python's loops write what they say out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as pairs
from typing import Any

import torch
from tvm.script import tirx as T

from .parts import number, put

BYTES, VECTOR, DEPTH = 64, 32, 4
"""Bytes of columns that are summed in registers, bytes of a vector, and steps of the sum that are written out."""
At = Callable[[Any, Any], Any]
"""What is at a row and a column."""
Give = Callable[[Any, Any, Any], Any]
"""What becomes of a number at a row and a column."""


def product(name: str, rows: int, cols: int, depth: int, dtype: str, lower: Any = None) -> Callable[[Any, At, At], None]:
    """`product(name, I, J, M, dtype)(tile, a, b)`: tile[i, j] = Σ_m a(i, m) b(m, j).

    With `lower`, a(i, m) is 0 for all m > i where it is 1, and for all m < i where it is 0; these are left out.
    """

    def block(tile: Any, a: At, b: At) -> None:
        def give(i: Any, j: Any, x: Any) -> None:
            put(tile, x, i, j)

        _columns(name, (rows, cols, depth), dtype, lambda i, j: number(0, dtype), a, b, give, lower)

    return block


def given(name: str, rows: int, cols: int, depth: int, dtype: str) -> Callable[[Give, At, At], None]:
    """`given(name, I, J, M, dtype)(give, a, b)`: what `give(i, j, x)` writes, of each x = Σ_m a(i, m) b(m, j)."""

    def block(give: Give, a: At, b: At) -> None:
        _columns(name, (rows, cols, depth), dtype, lambda i, j: number(0, dtype), a, b, give)

    return block


def onto(name: str, rows: int, cols: int, depth: int, dtype: str) -> Callable[[Any, Any, At, At, At], None]:
    """`onto(name, I, J, M, dtype)(stack, h, start, a, b)`: stack[h, i, j] = start(i, j) + Σ_m a(i, m) b(m, j).

    The start may be of what is there.
    """

    def block(stack: Any, h: Any, start: At, a: At, b: At) -> None:
        _columns(name, (rows, cols, depth), dtype, start, a, b, lambda i, j, x: put(stack, x, h, i, j))

    return block


def add(buffer: Any, value: Any, *at: Any) -> Any:
    """buffer[at] += value, likewise."""
    return put(buffer, buffer[at] + value, *at)


def adding(buffer: Any, value: Any, at: tuple[Any, ...], x: Any) -> Any:
    """x, where a value is added to buffer[at] on the way."""
    add(buffer, value, *at)
    return x


def _columns(
    name: str, sizes: tuple[int, int, int], dtype: str, start: At, a: At, b: At, give: Give, lower: Any = None
) -> None:
    """A product, some columns at a time: of these, rows in panels of six and then of five, whose sums are in registers.

    An addition waits five cycles for the one before, while ten others start: of two vectors, those of five rows.
    """
    rows, cols, depth = sizes
    wide = BYTES // getattr(torch, dtype).itemsize
    six = next(n for n in range(rows // 6, -1, -1) if (rows - 6 * n) % 5 == 0)
    with T.serial(0, cols // wide) as part, T.sblock(name):
        col = T.axis.spatial(cols // wide, part) * wide
        of_these = (lambda i, j: start(i, col + j)), a, (lambda m, j: b(m, col + j)), (lambda i, j, x: give(i, col + j, x))
        for before, count, high in ((0, six, 6), (6 * six, (rows - 6 * six) // 5, 5)):
            if count:
                _panels(before, count, high, depth, dtype, *of_these, lower)


def _panels(
    before: int, count: int, high: int, depth: int, dtype: str, start: At, a: At, b: At, give: Give, lower: Any
) -> None:
    """So many panels of rows."""
    lanes, wide = (size // getattr(torch, dtype).itemsize for size in (VECTOR, BYTES))
    with T.serial(0, count) as panel, T.sblock("panel"):
        first = before + T.axis.spatial(count, panel) * high
        vectors = list(pairs(range(high), range(0, wide, lanes)))
        sums = {at: T.sblock_alloc_buffer((lanes,), dtype) for at in vectors}  # LLVM keeps no longer ones in registers
        for i, j in vectors:
            with T.vectorized(0, lanes) as lane:
                put(sums[i, j], start(first + i, j + lane), lane)
        begin, end = 0, depth // DEPTH
        if lower is not None:
            begin, end = T.Select(lower == 1, 0, first // DEPTH), T.Select(lower == 1, (first + high - 1) // DEPTH + 1, end)
        # LLVM writes the inner loop out: all of TVM's passes would go over four times as much
        with T.serial(begin, end) as step, T.serial(0, DEPTH) as m:
            for i, j in vectors:
                with T.vectorized(0, lanes) as lane:
                    term = a(first + i, step * DEPTH + m) * b(step * DEPTH + m, j + lane)
                    put(sums[i, j], sums[i, j][lane] + term, lane)
        for i, j in vectors:
            with T.vectorized(0, lanes) as lane:
                give(first + i, j + lane, sums[i, j][lane])
