"""Which bands run as scans, the scans that they are, and the sizes and chunks of those."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...ir import nodes as n
from ...ir.passes.structure import Structure, structure_of
from ...ir.problem import Problem
from ...ir.terms import Linear, Quadratic, Term
from ..base import Config, Cotangents, Gradients, Inputs, Output, Support, Work

LEAST = 128
"""Tokens of the narrowest side of a window that scans are quicker for than pairs."""
SLOTS = ("log_a", "channel", "rows", "cols", "log_cols")
"""Operands that a scan may have."""
ALL = slice(None)
"""All blocks."""


class Scans(Protocol):
    """What runs scans: a backend, as `Backend` says."""

    def __hash__(self) -> int:
        """By identity."""
        ...

    def configs(self, term: Linear, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """What it can be run with."""
        ...

    def work(self, term: Linear, problem: Problem, config: Config, direction: str) -> Work:
        """What a scan costs."""
        ...

    def forward(self, term: Linear, x: Inputs, config: Config) -> Output:
        """Its Y."""
        ...

    def backward(self, term: Linear, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """Its gradients."""
        ...


@runtime_checkable
class Bands(Protocol):
    """A backend that also has windows in one pass over their pairs, which are no scans."""

    def takes_band(self, scan: Linear, problem: Problem, width: int) -> bool:
        """Whether it has a window of so many tokens times this scan, and sooner so than by scans."""
        ...

    def band_work(self, problem: Problem, width: int) -> Work:
        """What a forward pass costs."""
        ...

    def band(self, scan: Linear, x: Inputs, width: int) -> Tensor:
        """Its Y, in the dtype of the inputs."""
        ...


@runtime_checkable
class Factoring(Protocol):
    """A backend with a kernel of its own for the factors of scans from block to block."""

    def block_factors(self, log: Tensor, scan: Linear, problem: Problem, exact: bool) -> tuple[Tensor, Tensor]:
        """exp of sums of logs `(batch, blocks, size, heads)` from where a scan enters a block, and to where it leaves, of pairs
        of blocks, `(batch, blocks − 1, size, heads)`; differentiable. `exact` asks for sums of float64."""
        ...


@dataclass(frozen=True, slots=True)
class Side:
    """The part of a band on one side of the diagonal.

    Attributes:
        scan: inside a block, its operands named by their slots; across: of the block before.
        width: W, how many tokens a row sees, itself among them (which a strict scan leaves out).
    """

    scan: Linear
    across: Linear
    width: int

    @staticmethod
    def of(scan: Linear, width: int) -> Side:
        """Of a scan in its direction."""
        rows = "rows" if scan.log_a or scan.rows else None
        cols = "cols" if scan.log_a or scan.cols or scan.log_cols else None
        return Side(scan, Linear(not scan.causal, strict=True, rows=rows, cols=cols, sign=scan.sign), width)

    def blocks(self, seqlen: int) -> tuple[int, int]:
        """B and n."""
        size = max(min(self.width, seqlen), 1)
        return size, -(-seqlen // size)


@lru_cache(maxsize=1024)  # one object for each scan, as passes are known by it
def sides(found: Structure) -> tuple[Side, ...]:
    """The sides of a band that runs as scans; none if it is empty, apart from the diagonal, in documents that nobody counted,
    or narrow, where decays are scalar: per channel there is nothing else."""
    low, high, scan, packing = found.low, found.high, found.scan, found.scan.documents
    if low is None or high is None or found.coeffs is not None:
        return ()
    if packing is not None and packing.cu_seqlens is None and packing.n_segments is None:
        return ()
    if low > high or high < 0 or low > int(found.directed):
        return ()
    slots = {name: name for name in SLOTS if getattr(scan, name) is not None}
    documents = None if packing is None else n.Documents(cu_seqlens="documents")
    scan = replace(scan, strict=scan.strict or low == 1, documents=documents, **slots)  # type: ignore[arg-type]  # of operands
    parts = [Side.of(scan, high + 1)]
    if low < 0:
        parts.append(Side.of(replace(scan, causal=False, strict=True), 1 - low))
    wide = scan.channel is not None or min(side.width for side in parts) >= LEAST
    return tuple(parts) if wide else ()


def band_of(term: Term) -> Structure | None:
    """The structure of a term that is a band and runs as scans; None if it is another."""
    found = structure_of(term.mask) if isinstance(term, Quadratic) else None
    return found if found is not None and sides(found) else None


@lru_cache(maxsize=4096)  # likewise
def _problem(p: Problem, rows: int, size: int, q_heads: int, k_heads: int, dtype: torch.dtype) -> Problem:
    return replace(p, batch=rows, seqlen=size, n_states=rows, has_state=False, q_heads=q_heads, k_heads=k_heads, dtype=dtype)


def inside_of(p: Problem, rows: int, size: int) -> Problem:
    """Of a scan of so many blocks."""
    return _problem(p, rows, size, p.q_heads, p.k_heads, p.dtype)


@lru_cache(maxsize=4096)  # likewise
def packed_of(p: Problem, segments: int) -> Problem:
    """Of a scan of blocks that are one packed row."""
    return replace(p, batch=1, seqlen=p.batch * p.seqlen, n_states=segments)


def across_of(side: Side, p: Problem, rows: int, size: int) -> Problem:
    """Of a scan across: with a decay per channel q and k are what it makes of them, in the dtype of sums."""
    return inside_of(p, rows, size) if side.scan.channel is None else _problem(p, rows, size, p.nheads, p.nheads, p.accumulate)


@lru_cache(maxsize=4096)  # likewise
def across_config(backend: Scans, side: Side, p: Problem, config: Config) -> Config:
    """Of the scan across, which need not have the chunks of a decay per channel: those if it has, or else its own."""
    if side.scan.channel is None:
        return config
    size, count = side.blocks(p.seqlen)
    of_scan = across_of(side, p, p.batch * (count - 1), size)
    same = backend.configs(side.across, of_scan, config.chunk_size)
    found = backend.configs(side.across, of_scan) if isinstance(same, Support) else same
    assert not isinstance(found, Support)  # supports() has looked
    return next(iter(found))
