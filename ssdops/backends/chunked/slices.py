"""Parts that are whole sequences of a few heads: heads are independent, and so are rows, so memory is that of a slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ...ir.problem import Problem
from ..structured import Values
from .parts import Slices

Compute = Callable[["Slice", Slices], Tensor]


@dataclass(frozen=True)
class Slice:
    """Some batch rows and heads of a term, over all tokens in local time.

    Attributes:
        rows, heads: [first, stop) of batch rows and of the problem's heads.
        causal: whether local time runs from the left.
        compute: Y of a slice, `(rows, seqlen, heads, headdim)` in local time.
    """

    problem: Problem
    rows: tuple[int, int]
    heads: tuple[int, int]
    causal: bool
    compute: Compute

    @property
    def count(self) -> int:
        """Heads of the slice."""
        return self.heads[1] - self.heads[0]

    def read(self, name: str, x: Tensor) -> Tensor:
        """The rows and heads of x, in local time; sizes of 1 stay so."""
        part = self._of(name, x)
        return part if self.causal or name == "coeffs" else part.flip(1)

    def add(self, name: str, total: Tensor, piece: Tensor) -> None:
        """Add to the slice of a total."""
        self._of(name, total).add_(piece if self.causal or name == "coeffs" else piece.flip(1))

    def output(self, x: Slices) -> Tensor:
        """Y of the slice."""
        return self.compute(self, x)

    def _of(self, name: str, x: Tensor) -> Tensor:
        axis = 0 if name == "coeffs" else 2
        each = self.problem.nheads // x.shape[axis]  # how many of the problem's heads share one of x
        first, stop = self.heads[0] // each, -(-self.heads[1] // each)
        part = x.narrow(axis, first, stop - first)
        if name == "coeffs" or x.shape[0] == 1:
            return part
        return part[self.rows[0] : self.rows[1]]


def slices(values: Values, causal: bool, fits: int, compute: Compute) -> Iterator[Slice]:
    """A term's slices, each of at most `fits` (row, head) pairs if that can be.

    Every operand's heads are either inside a slice or around it: heads that share q and k stay together where they fit.
    """
    p = values.scan.problem
    shared = {p.nheads // x.shape[0 if name == "coeffs" else 2] for name, x in values.tensors.items()}

    def splits(size: int) -> bool:
        return p.nheads % size == 0 and all(size % each == 0 or each % size == 0 for each in shared)

    heads = max((size for size in range(1, min(p.nheads, max(fits, 1)) + 1) if splits(size)), default=1)
    rows = max(fits // heads, 1)
    for first in range(0, p.batch, rows):
        for head in range(0, p.nheads, heads):
            yield Slice(p, (first, min(first + rows, p.batch)), (head, head + heads), causal, compute)
