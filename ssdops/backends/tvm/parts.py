"""What tensor programs share: exp, which pairs of tokens meet, and which tokens there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from .tile import KAPPA, KAPPA_LOW, RHO, RHO_LOW, SEGMENT, Tile


def exp(x: Any, dtype: str, exact: bool = True) -> Any:
    """exp(x) of a float64, in dtype: in float32 by a polynomial, as the C library's takes one number at a time.

    What is less than the least normal number is 0; beyond the greatest it stays there. Where it need not be exact to more
    than 16 bits, x is rounded to float32 before.
    """
    if dtype == "float64":
        return T.exp(T.min(x, T.float64(709.0)))
    if not exact:
        return T.exp(T.min(T.Cast("float32", x), T.float32(88.0)))
    x = T.max(T.min(x, T.float64(88.0)), T.float64(-104.0))
    power = T.floor(x * T.float64(1.4426950408889634) + T.float64(0.5))
    # in float64, as x in float32 would be off by as much as it is large
    rest = T.Cast("float32", x - power * T.float64(0.6931471805599453))
    value = T.float32(1.0 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):  # Taylor's polynomial of degree 7: off by 1e-8 within half of log 2
        value = value * rest + T.float32(1.0 / factorial)
    scaled = value * T.reinterpret("float32", (T.Cast("int32", power) + 127) << 23)
    return T.Select(x < T.float64(-87.0), T.float32(0.0), scaled)


def exp_if(condition: Any, x: Any) -> Any:
    """exp(x) of a float32 that is not large, or 0: by a bound of x, as what is chosen among loads becomes a branch."""
    return T.exp(T.min(x, T.Cast("float32", condition) * T.float32(288.0) - T.float32(200.0)))


def decay(tile: Tile, lines: Any, i: Any, j: Any, condition: Any) -> Any:
    """exp(ρ_i − κ_j), or 0, of lines in a tile."""
    if tile.exact:
        return T.Select(condition, exp(lines[RHO, i] - lines[KAPPA, j], tile.acc), number(0, tile.acc))
    return exp_if(condition, lines[RHO, i] - lines[KAPPA, j] + (lines[RHO_LOW, i] - lines[KAPPA_LOW, j]))


def put(buffer: Any, value: Any, *at: Any) -> Any:
    """buffer[at] = value, as a statement of the program."""
    return T.buffer_store(buffer, value, list(at))


def number(value: float, dtype: str) -> Any:
    """A constant of a dtype of sums."""
    return T.float64(value) if dtype == "float64" else T.float32(value)


def meets(i: Any, j: Any, causal: Any, distance: Any) -> Any:
    """Whether row i comes so far after column j in walking order, or further."""
    return T.Select(causal == 1, i - j, j - i) >= distance


def one_if(condition: Any, dtype: str) -> Any:
    """1 or 0: to multiply by, as what is chosen among loads becomes a branch."""
    return T.Cast(dtype, condition)


def behind(i: Any, steps: Any, causal: Any, size: int) -> Any:
    """The token so many steps before i in walking order, or the first or last of the chunk."""
    return T.Select(causal == 1, T.max(i - steps, 0), T.min(i + steps, size - 1))


def beside(i: Any, steps: Any, causal: Any, size: int) -> Any:
    """Whether there is a token so many steps before i in the chunk."""
    return T.Select(causal == 1, i >= steps, i + steps < size)


def sizes(count: int) -> tuple[Any, ...]:
    """Symbolic sizes: one program serves them all."""
    return tuple(T.int64() for _ in range(count))


def within(whole: bool, inside: Any, value: Any, dtype: str) -> Any:
    """A value inside a tensor, and 0 where the tile is larger; without a question where it is not."""
    return value if whole else T.if_then_else(inside, value, T.Cast(dtype, 0))


def fits(whole: bool, index: Any, size: Any) -> Any:
    """Whether an index of a tile is one of the tensor's."""
    return T.bool(True) if whole else under(index, size)


def under(index: Any, size: Any) -> Any:
    """Whether an index is less than a size."""
    return T.Cast("int64", index) < T.Cast("int64", size)


def near(token: Any, end: Any) -> Any:
    """The token, or past the end of its row the last one: a load that asks nothing can be a vector."""
    return T.max(T.min(token, end - 1), 0)


def summed(count: int, term: Callable[[int], Any]) -> Any:
    """The sum of so many terms."""
    return sum((term(index) for index in range(1, count)), term(0))


def shared(head: Any, nheads: Any, heads: Any) -> Any:
    """The head of an operand with so many that a head out of nheads has: divided as numbers that are not negative can be."""
    return T.truncdiv(head, T.truncdiv(nheads, heads))


def barrier(tile: Tile) -> None:
    """Threads of a GPU wait for one another here, before they read what others wrote, or write over what they read."""
    if tile.target != "cpu":
        with T.sblock("barrier"):
            T.evaluate(T.tvm_storage_sync("shared.dyn"))


# Rows are seqlen tokens each, or, with a negative seqlen, documents that `begin` bounds, whose chunks are in a table.


def bound(begin: Any, row: Any, seqlen: Any) -> Any:
    """The first token of a row, or the end of the one before."""
    return T.if_then_else(seqlen >= 0, row * seqlen, begin[row])


def per_row_of(seqlen: Any, size: Any) -> Any:
    """Chunks of a row, or any number but 0 for documents, as what is not taken is worked out too."""
    return T.max((seqlen + size - 1) // size, 1)


def first_slot(begin: Any, row: Any, seqlen: Any, size: Any) -> Any:
    """The slot of a row's first chunk; the row's chunks follow one another, and no two rows share one."""
    return T.if_then_else(seqlen >= 0, row * per_row_of(seqlen, size), begin[row] // size + row)


def first_segment(begin: Any, row: Any, seqlen: Any, size: Any) -> Any:
    """The first of a row's segments, among those of all rows: none belongs to two."""
    slots = per_row_of(seqlen, size)
    return T.if_then_else(seqlen >= 0, row * ((slots + SEGMENT - 1) // SEGMENT), (begin[row] // size + row) // SEGMENT + row)


def chunk_begin(chunks: Any, slot: Any, seqlen: Any, size: Any) -> Any:
    """The first token of the chunk in a slot."""
    per_row = per_row_of(seqlen, size)
    return T.if_then_else(seqlen >= 0, T.truncdiv(slot, per_row) * seqlen + T.truncmod(slot, per_row) * size, chunks[slot, 0])


def chunk_end(chunks: Any, slot: Any, seqlen: Any, size: Any) -> Any:
    """Where the row of the chunk in a slot ends; not behind its beginning, where there is no chunk."""
    return T.if_then_else(seqlen >= 0, (T.truncdiv(slot, per_row_of(seqlen, size)) + 1) * seqlen, chunks[slot, 1])
