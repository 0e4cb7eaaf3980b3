"""Terms that are no scan but have a structure: bands by scans or, narrow ones, by blocks; Fenwick masks by a tree of states;
Toeplitz masks by FFT."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ...ir.passes.structure import Structure, structure_of
from ...ir.problem import Problem
from ...ir.terms import Quadratic, Term
from .. import banded
from ..base import BOTH, Config, Gradients, Inputs, Support, Work
from ..structured import Values
from . import fenwick, parts, toeplitz
from .band import Band, band_work
from .parts import Part

SIZES = (64, 32, 128)
"""Tokens of a block to consider, the default first."""
GROWTH = {"fenwick": "T log T", "lags": "T log T", "scans": "T", "band": "T · band"}


def kind_of(term: Term) -> str | None:
    """Which structure a term has: "fenwick", "lags", "scans" (a band that runs as such), "band", or None."""
    found = structure_of(term.mask) if isinstance(term, Quadratic) else None
    if found is not None and found.transposed:
        return None  # it would run by gradients, autograd's here, and a forward pass runs where that keeps no record
    if found is None or found.levels is not None or found.coeffs is not None:
        return None if found is None else "lags" if found.levels is None else "fenwick"
    return "scans" if banded.sides(found) else "band" if found.scan.channel is None else None


def has_chunks(term: Term) -> bool:
    """Whether it runs in chunks."""
    kind = kind_of(term)
    return kind in ("fenwick", "scans", "band") or (
        kind == "lags" and isinstance(term, Quadratic) and toeplitz.is_causal(_structure(term))
    )


def growth(term: Term) -> str | None:
    """How its cost grows with seqlen."""
    kind = kind_of(term)
    return "T log² T" if kind == "lags" and has_chunks(term) else GROWTH.get(kind or "")


def configs(term: Quadratic, problem: Problem, chunk_size: int | None) -> Iterable[Config] | Support:
    """Sizes of blocks: of a Fenwick mask powers of two, as its levels are."""
    kind = kind_of(term)
    if not has_chunks(term):
        return (Config(),)
    if chunk_size is None:
        return tuple(Config(size) for size in SIZES)
    if kind == "fenwick" and chunk_size & (chunk_size - 1):
        return Support.no(f"'chunked' runs fenwick() in chunks of a power of two, and chunk_size={chunk_size} was asked for")
    return (Config(chunk_size),)


def work(backend: banded.Scans, term: Quadratic, p: Problem, config: Config, direction: str) -> Work:
    """What a pass costs."""
    structure, kind, size = _structure(term), kind_of(term), config.chunk_size or SIZES[0]
    if kind == "scans":
        return banded.work(backend, structure, p, config, direction)
    if kind == "fenwick":
        forward = fenwick.fenwick_work(p, size)
    else:
        forward = toeplitz.toeplitz_work(structure, p, size) if kind == "lags" else band_work(structure, p, size)
    return forward.times(BOTH) if direction == "backward" else forward


def forward(backend: banded.Scans, term: Quadratic, x: Inputs, config: Config) -> Tensor:
    """Y."""
    structure = _structure(term)
    if kind_of(term) == "scans":
        return banded.forward(backend, structure, x, config)
    values = Values(structure, x)
    return parts.forward(_parts(structure, values, config), values)


def backward(backend: banded.Scans, term: Quadratic, x: Inputs, config: Config, dy: Tensor) -> Gradients:
    """Gradients of q, k, v and the operands."""
    structure = _structure(term)
    if kind_of(term) == "scans":
        return banded.backward(backend, structure, x, config, dy)
    values = Values(structure, x, learnt=True)
    return parts.backward(_parts(structure, values, config), values, dy)


def _structure(term: Quadratic) -> Structure:
    found = structure_of(term.mask)
    assert found is not None  # supports() refuses the rest
    return found


def _parts(structure: Structure, values: Values, config: Config) -> Iterable[Part]:
    size = config.chunk_size or SIZES[0]
    if structure.levels is not None:
        return fenwick.parts(structure, values, size)
    if structure.coeffs is not None:
        return toeplitz.parts(structure, values, size)
    return Band(structure, values, size).parts()
