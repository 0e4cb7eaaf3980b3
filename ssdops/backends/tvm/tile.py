"""What tensor programs are compiled for. No TVM is needed to say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LANES = 16
"""Partial sums of a dot product side by side; tiles are padded to multiples of it."""
KEPT, EVERY, STATES, STARTS, EXCHANGE, ADDED, WIDE = "kept", "every", "states", "starts", "exchange", "added", "wide"
"""What a program does beside y, or beside gradients.

A walk on a GPU keeps the states that enter chunks as products multiply them, or in full precision; or it has no y, and works
out the state that leaves alone, or keeps those between too. A walk on a CPU keeps the states that enter chunks, or segments,
or segments alone. A group's program says what tokens exchange. What collects its sums adds them to what is there, in the dtype
of sums, or leaves them in that."""


RHO, RHO_LOW, KAPPA, KAPPA_LOW, OUT_OF, U, INTO, W = range(8)
"""What there is per token and head, as `lower.lines` writes it: ρ and κ, exp(ρ) and u, exp(E − κ) and w."""
ROWS, LAGS, ENTRIES = "rows", "lags", "entries"
"""What programs of pairs sum along instead of giving an output."""
LOGS, SCALES = "logs", "scales"
"""Factors of a mask by tiles, beside `LAGS` and `ENTRIES`: exponents and scales of rows and columns."""
LINES = 8
SUMS = 4
"""Of pairs by token, as `group.py` writes them: of rows, then columns, of those that are far enough apart, then others."""
PAIR_LANES = 4
"""Partial sums of a row of pairs."""
ABREAST, STRETCH = 8, 8
"""Heads whose tokens are summed up together, as theirs lie side by side in memory, and tokens whose sums are made first."""
MOST = 8
"""Heads that are walked together on a CPU at most."""
SEGMENTS = 16
"""Into how many a row is cut on a GPU at most, which are walked side by side."""
SEGMENT = 8
"""Chunks of a segment: a backward pass on a CPU goes from the states that enter segments."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program is compiled for.

    Attributes:
        target: "cpu", or a CUDA architecture such as "sm_90".
        data: dtype of q, k, v and y, and of what products multiply.
        acc: dtype of sums, states and scales. Sums of log decays are float64.
        chunk: tokens of a chunk.
        inner, outer: the size of q and k, padded, and that of v, or how much of it one program of a walk on a GPU has, and one
            without y of k; scores have only inner. Of a group's program, the size of v, and how much of q and k it has.
        logs: of lines, dtype of log decays, and of what is added to them.
        scaled: of lines, whether rows and columns have scales, or logs of such.
        whole: whether sizes are those of the tile: then none of it is filled up.
        flipped: whether a walk reads G transposed.
        mode: of a walk, outputs, a group's program, or what collects its sums, what they do beside; of pairs, what they sum
            along.
        ahead: whether a walk, or a program of pairs on a GPU, loads the next chunk's tiles while it multiplies one's, or a
            group's program the next head's.
        late: of a walk that loads ahead, whether q and k come once the ones before have been multiplied, into their place.
        shared: of a walk without y, how many programs share k.
        factors: of programs of pairs, what the mask is a product of, and a formula that is one more factor.
    """

    target: str
    data: str
    acc: str
    chunk: int
    inner: int = 0
    outer: int = 0
    logs: str = "float64"
    scaled: bool = False
    whole: bool = False
    flipped: bool = False
    mode: str = ""
    ahead: bool = False
    late: bool = False
    shared: int = 1
    factors: tuple[str, ...] = ()
    formula: Any = None

    @property
    def exact(self) -> bool:
        """Whether products are no less exact than sums."""
        return self.data == self.acc

    @property
    def line(self) -> str:
        """Dtype of what there is per token: of sums that are less exact in float32, or of those in two parts of it."""
        return "float64" if self.exact else self.acc
