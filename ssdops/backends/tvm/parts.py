"""What tensor programs share: exp, which pairs of tokens meet, sums of logs, and reading what there is per token."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .tile import LANES


def exp(x: Any, dtype: str) -> Any:
    """exp(x) of a float64, in dtype: in float32 by a polynomial, as the C library's takes one number at a time.

    What is less than the least normal number is 0; beyond the greatest it stays there.
    """
    if dtype == "float64":
        return T.exp(T.min(x, T.float64(709.0)))
    x = T.max(T.min(x, T.float64(88.0)), T.float64(-104.0))
    power = T.floor(x * T.float64(1.4426950408889634) + T.float64(0.5))
    # in float64, as x in float32 would be off by as much as it is large
    rest = T.Cast("float32", x - power * T.float64(0.6931471805599453))
    value = T.float32(1.0 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):  # Taylor's polynomial of degree 7: off by 1e-8 within half of log 2
        value = value * rest + T.float32(1.0 / factorial)
    scaled = value * T.reinterpret("float32", (T.Cast("int32", power) + 127) << 23)
    return T.Select(x < T.float64(-87.0), T.float32(0.0), scaled)


def meets(i: Any, j: Any, causal: Any, distance: Any) -> Any:
    """Whether row i comes so far after column j in walking order, or further."""
    return T.Select(causal == 1, i - j, j - i) >= distance


def sizes(count: int) -> tuple[Any, ...]:
    """Symbolic sizes: one program serves them all."""
    return tuple(T.int64() for _ in range(count))


def fits(whole: bool, index: Any, size: Any) -> Any:
    """Whether an index of a tile is one of the tensor's."""
    return T.bool(True) if whole else index < size


def all_of(lanes: Any, row: Any) -> Any:
    """The sum of a row of partial sums."""
    return sum((lanes[row, lane] for lane in range(1, LANES)), lanes[row, 0])


@T.macro
def sum_logs(logs, sums, begin, row, head, first, C, causal, row_inclusive, col_inclusive):  # type: ignore[no-untyped-def]
    """ρ + r, κ − c and E of the chunk whose first token is given."""
    d, r, c = T.meta_var(logs)
    rho, kappa, total = T.meta_var(sums)
    total[0] = T.float64(0)
    for s in range(C):
        i = T.meta_var(T.Select(causal == 1, s, C - 1 - s))
        rho[i] = total[0]
        kappa[i] = total[0]
        if first + i < begin[row + 1]:
            total[0] = total[0] + d[first + i, head]
        if row_inclusive == 1:
            rho[i] = total[0]
        if col_inclusive == 1:
            kappa[i] = total[0]
        if first + i < begin[row + 1]:
            rho[i] = rho[i] + r[first + i, head]
            kappa[i] = kappa[i] - c[first + i, head]


@T.macro
def read_line(line, values, begin, row, head, first, C):  # type: ignore[no-untyped-def]
    """What there is per token and head, of a chunk's tokens: 0 past the row's end."""
    for i in range(C):
        line[i] = T.if_then_else(first + i < begin[row + 1], values[first + i, head], T.Cast(values.dtype, 0))
