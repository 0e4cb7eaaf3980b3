"""What tensor programs are compiled for. No TVM is needed to say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LANES = 16
"""Partial sums of a dot product side by side; tiles are padded to multiples of it."""
PADDING = 16
"""Numbers beyond the end of a long row on a CPU: columns of rows that are powers of two apart would share a few cache lines."""
KEPT, EVERY, MET, STATES, STARTS = "kept", "every", "met", "states", "starts"
"""What a walk does beside y. On GPUs: keep the states that enter chunks for another walk, or in full precision, or meet those
kept; or it only works out the state that leaves. On CPUs: keep the states that enter chunks, or segments, or segments alone."""


RHO, RHO_LOW, KAPPA, KAPPA_LOW, OUT_OF, U, INTO, W = range(8)
"""What there is per token and head, as `lower.lines` writes it: ρ and κ, exp(ρ) and u, exp(E − κ) and w."""
ROWS, LAGS, ENTRIES = "rows", "lags", "entries"
"""What programs of pairs sum along instead of giving an output."""
LOGS, SCALES = "logs", "scales"
"""Factors of a mask by tiles, beside `LAGS` and `ENTRIES`: exponents and scales of rows and columns."""
LINES = 8
MOST = 8
"""Heads that are walked together on a CPU at most."""
SEGMENT = 8
"""Chunks of a segment: a backward pass on a CPU goes from the states that enter segments."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program is compiled for.

    Attributes:
        target: "cpu", or a CUDA architecture such as "sm_90".
        data: dtype of q, k, v and y, and of what products multiply.
        acc: dtype of sums, states and scales. Log decays are float64.
        chunk: tokens of a chunk.
        inner, outer: the size of q and k, padded, and that of v, or how much of it one program of a walk on a GPU has; scores
            have only inner.
        scaled: of lines, whether rows and columns have scales, or logs of such.
        whole: whether sizes are those of the tile: then none of it is filled up.
        flipped: whether a walk reads G transposed.
        mode: of a walk, or outputs, what they do beside y; of pairs, what they sum along.
        factors: of programs of pairs, what the mask is a product of, and a formula that is one more factor.
        resident: programs that a multiprocessor is to hold at once: registers are kept for so many.
    """

    target: str
    data: str
    acc: str
    chunk: int
    inner: int = 0
    outer: int = 0
    scaled: bool = False
    whole: bool = False
    flipped: bool = False
    mode: str = ""
    factors: tuple[str, ...] = ()
    formula: Any = None
    resident: int = 1

    @property
    def exact(self) -> bool:
        """Whether products are no less exact than sums."""
        return self.data == self.acc

    @property
    def line(self) -> str:
        """Dtype of what there is per token: of sums that are less exact in float32, or of those in two parts of it."""
        return "float64" if self.exact else self.acc
