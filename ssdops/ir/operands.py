"""Operand expressions: what stands in a mask node where an operand's name is expected.

A mask as users write it names its operands (`decay(log_a)`); rewriting makes small expressions over those names
(`decay(log_a + log_a_1)`), which are evaluated on the tensors, differentiably, before a backend sees them. An expression
is a plain name (`str`) or one of the frozen nodes below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

Operand: TypeAlias = "str | Add | Mul | Scaled | Exp | Flip | Advance | Delay | Select | Centre | Main | Mirror | ChannelLog"


@dataclass(frozen=True, slots=True)
class Add:
    """left + right, broadcast."""

    left: Operand
    right: Operand


@dataclass(frozen=True, slots=True)
class Mul:
    """left · right, broadcast."""

    left: Operand
    right: Operand


@dataclass(frozen=True, slots=True)
class Scaled:
    """x · factor, a finite number."""

    x: Operand
    factor: float


@dataclass(frozen=True, slots=True)
class Exp:
    """exp(x)."""

    x: Operand


@dataclass(frozen=True, slots=True)
class Flip:
    """x read from the last token to the first."""

    x: Operand


@dataclass(frozen=True, slots=True)
class Advance:
    """x[i + 1], and 0 at the last token."""

    x: Operand


@dataclass(frozen=True, slots=True)
class Delay:
    """x[i − 1], and 0 at the first token."""

    x: Operand


@dataclass(frozen=True, slots=True)
class Select:
    """x[..., index]: one rank of a low-rank operand."""

    x: Operand
    index: int


@dataclass(frozen=True, slots=True)
class Centre:
    """Per head, the coefficient of lag 0: what a Toeplitz mask has on its diagonal."""

    x: Operand


@dataclass(frozen=True, slots=True)
class Main:
    """Per token, what a matrix has on its main diagonal."""

    x: Operand


@dataclass(frozen=True, slots=True)
class Mirror:
    """The same documents seen from the last token to the first: of `cu_seqlens`, or of segment ids, `count` possible ones.

    Without a count, ids are mirrored about the last that occurs, which keeps their order and not their numbers.
    """

    x: Operand
    count: int | None = None


@dataclass(frozen=True, slots=True)
class ChannelLog:
    """dt[..., None] · A: the per-channel log decay of Mamba-1 in its factored form."""

    dt: Operand
    A: Operand


CALLS = ("exp", "flip", "advance", "delay", "select", "centre", "main", "mirror", "channel_log")
"""What operand expressions are called in text."""
EXPRESSIONS = (Add, Mul, Scaled, Exp, Flip, Advance, Delay, Select, Centre, Main, Mirror, ChannelLog)


def parts(x: Operand) -> tuple[Operand, ...]:
    """The expressions directly inside x (none for a name)."""
    match x:
        case str():
            return ()
        case Add(a, b) | Mul(a, b) | ChannelLog(a, b):
            return (a, b)
        case _:
            return (x.x,)


def names(x: Operand) -> Iterator[str]:
    """The operand names in x, in order, repeats included."""
    if isinstance(x, str):
        yield x
    else:
        for part in parts(x):
            yield from names(part)


def rename(x: Operand, table: Mapping[str, Operand]) -> Operand:
    """x with its names replaced by the table's, which may be expressions."""
    if isinstance(x, str):
        return table.get(x, x)
    inner = [rename(part, table) for part in parts(x)]
    return replace(x, x=inner[0]) if isinstance(x, Scaled | Select | Mirror) else type(x)(*inner)


def add(a: Operand | None, b: Operand | None) -> Operand | None:
    """a + b where None is 0."""
    return Add(a, b) if a is not None and b is not None else (b if a is None else a)


def mul(a: Operand | None, b: Operand | None) -> Operand | None:
    """a · b where None is 1."""
    return Mul(a, b) if a is not None and b is not None else (b if a is None else a)


def flip(x: Operand | None) -> Operand | None:
    """x reversed along seqlen; flipping twice is the identity."""
    match x:
        case None:
            return None
        case Flip(inner):
            return inner
        case _:
            return Flip(x)
