"""The Triton backend: what it can run, and in how many segments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ... import config as environment
from ...ir.problem import Problem
from ...ir.terms import Diagonal, Linear, Quadratic, Term
from ..base import Config, Cotangents, Gradients, Inputs, Output, Support, Work, reject_scan
from ..scan import diagonal_backward, diagonal_forward
from . import tiles

SIZES = (32, 16, 64)
"""Chunk sizes, the default first."""
RESIDENT = 3
"""Programs of the scan that a multiprocessor holds at once."""
MAX_DIM = 256


class Triton:
    """Triton kernels: one pass over memory, forward and backward."""

    name = "triton"

    def supports(self, term: Term, problem: Problem) -> Support:
        """Scans with scalar decay, and diagonals, on a GPU."""
        p = problem
        if p.target.device != "cuda" and not (p.target.device == "cpu" and environment.triton_interpreted()):
            return Support.no(f"'triton' runs on CUDA GPUs, and the tensors are on {p.target.device}")
        if isinstance(term, Diagonal):
            return Support.yes()
        if isinstance(term, Quadratic):
            return tiles.supports(term, p)
        if (refusal := reject_scan(term, self.name)) is not None:
            return refusal
        assert isinstance(term, Linear)  # reject_scan() refuses the rest
        if term.channel is not None:
            return Support.no("'triton' runs scans whose decay is one number per token and head; 'recurrent' runs per-channel decay")
        if p.accumulate == torch.float64:
            return Support.no("'triton' computes in float32 and an input is float64; 'chunked' computes in float64")
        for name, size in (("headdim", p.headdim), ("dstate", p.dstate)):
            if size > MAX_DIM or size < 1:
                return Support.no(f"'triton' takes {name} from 1 to {MAX_DIM}, got {size}; 'chunked' has no such limit")
        if term.documents is not None and term.documents.cu_seqlens is None and term.documents.n_segments is None:
            return Support.no("'triton' needs to know how many documents there are without reading them: give n_segments")
        return Support.yes()

    def configs(self, term: Term, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """One pass, and splits of the sequence in powers of two that the device has room for."""
        if isinstance(term, Diagonal | Quadratic):
            return (Config(),)
        if chunk_size is not None and chunk_size not in SIZES:
            return Support.no(f"'triton' has chunks of {', '.join(map(str, sorted(SIZES)))} tokens, and chunk_size={chunk_size} was asked for")
        return self._splits(problem, chunk_size or SIZES[0])

    def _splits(self, problem: Problem, size: int) -> Iterator[Config]:
        yield Config(size)
        segments, chunks = 2, -(-problem.seqlen // size)
        while segments * 4 <= chunks and self._programs(problem) * segments <= 2 * RESIDENT * problem.target.multiprocessors:
            yield Config(size, segments)
            segments *= 2

    def _programs(self, problem: Problem) -> int:
        """Of one segment. Packed documents count as one row: how many there are does not say how long they are."""
        return max(problem.batch * problem.nheads * -(-problem.headdim // 64), 1)

    def work(self, term: Term, problem: Problem, config: Config) -> Work:
        """A scan is a chain of chunks: as many rounds of them as the device cannot hold at once."""
        p = problem
        if isinstance(term, Quadratic):
            return tiles.work(term, p)
        tokens = float(p.batch * p.seqlen)
        touched = tokens * (2 * p.nheads * p.headdim + (p.q_heads + p.k_heads) * p.dstate) * p.dtype.itemsize
        interpreted = 1e6 if p.target.device == "cpu" else 0.0  # a program takes Triton's interpreter milliseconds
        if isinstance(term, Diagonal):
            return Work(0.0, 3 * tokens * p.nheads * p.headdim, 3 * touched, 6.0 + interpreted)
        size = config.chunk_size or SIZES[0]
        programs = self._programs(p) * config.segments
        waves = max(-(-programs // (RESIDENT * p.target.multiprocessors)), 1)
        chunks = -(-p.seqlen // (size * config.segments))
        passes = 1.0 if config.segments == 1 else 1.6
        touched *= passes
        launches = (2.0 if config.segments == 1 else 3.0) + interpreted
        return Work(0.0, 0.0, touched, launches, steps=waves * chunks * passes * max(p.dstate / 128, 0.5))

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """Two launches, or three in segments."""
        if isinstance(term, Diagonal):
            return Output(diagonal_forward(term, x))
        if isinstance(term, Quadratic):
            return tiles.forward(term, x)
        from .launch import Scan  # importing Triton takes time, and planning does not need it

        assert isinstance(term, Linear)  # supports() refuses the rest
        return Scan(term, x, config).forward()

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """States forward, cotangents of states backward, and what is left by blocks."""
        if isinstance(term, Diagonal):
            return diagonal_backward(term, x, cotangents.y)
        if isinstance(term, Quadratic):
            return tiles.backward(term, x, cotangents)
        from .launch import Scan

        assert isinstance(term, Linear)  # supports() refuses the rest
        return Scan(term, x, config).backward(cotangents)
