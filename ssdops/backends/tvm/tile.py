"""What tensor programs are compiled for. No TVM is needed to say it."""

from __future__ import annotations

from dataclasses import dataclass

LANES = 16
"""Partial sums of a dot product side by side; tiles are padded to multiples of it."""
KEPT, MET = "kept", "met"
"""What a walk does beside y: keep the states that enter chunks, or meet those that another has kept."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program is compiled for.

    Attributes:
        dtype: of everything but log decays, which are float64.
        chunk: tokens of a chunk.
        inner, outer: of a walk, the sizes of q and k, and of v, padded; of scores only inner counts.
        whole: whether sizes are those of the tile: then none of it is filled up.
        flipped: whether a walk reads G transposed.
        mode: of a walk, KEPT or MET or neither.
    """

    dtype: str
    chunk: int
    inner: int
    outer: int
    whole: bool = False
    flipped: bool = False
    mode: str = ""
