"""The Triton backend: what it can run, and in how many segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec
from math import log

import torch
from torch import Tensor

from ... import config as environment
from ...ir.problem import Problem
from ...ir.terms import Diagonal, Linear, Quadratic, Term
from .. import banded
from ..base import BOTH, Begun, Config, Cotangents, Gradients, Inputs, Output, StepInputs, Support, Work
from ..scan import diagonal_backward, diagonal_forward
from . import fenwick, tiles
from .sizes import CHUNKS, MAX_DIM, RESIDENT, channel_chunks, chunks, rounds, sizes

START = 6
"""Chunks that a program of the scan could take in the time that it takes to begin."""
LONGEST = 2.0
"""How many times as long the longest document is reckoned as it would be if they ended by chance, anywhere alike."""
MAX_UNCOUNTED = 2048
"""Tokens up to which every token may be a document of its own, as far as anyone knows without reading them."""


class Triton:
    """Triton kernels: one pass over memory, forward and backward."""

    name = "triton"
    factored = True
    compiles = True

    def supports(self, term: Term, problem: Problem) -> Support:
        """Scans, diagonals, and what has a tile form, on a GPU."""
        p = problem
        if (absent := _no_device(p)) is not None:
            return absent
        if isinstance(term, Diagonal):
            return Support.yes()
        if (band := banded.band_of(term)) is not None:
            return self.supports(banded.sides(band)[0].scan, p)
        if isinstance(term, Quadratic):
            found = fenwick.structure(term)
            return tiles.supports(term, p) if found is None else fenwick.supports(found, p)
        if p.state_every is not None and p.state_every % min(CHUNKS):
            return _between_chunks(p.state_every, min(CHUNKS))
        if p.accumulate == torch.float64:
            return Support.no("'triton' computes in float32 and an input is float64; 'chunked' computes in float64")
        for name, size in (("headdim", p.headdim), ("dstate", p.dstate)):
            if isinstance(size, int) and not 1 <= size <= MAX_DIM:  # while tracing sizes may be symbolic, and are not compared
                return Support.no(f"'triton' takes {name} from 1 to {MAX_DIM}, got {size}; 'chunked' has no such limit")
        documents = term.documents
        uncounted = documents is not None and documents.cu_seqlens is None and documents.n_segments is None
        tokens = p.batch * p.seqlen
        if uncounted and isinstance(tokens, int) and tokens > MAX_UNCOUNTED:
            return Support.no(
                "'triton' does not read how many documents there are, and makes room for one per token, up to "
                f"{MAX_UNCOUNTED} tokens; give n_segments, or let 'chunked' count them"
            )
        return Support.yes()

    def has_chunks(self, term: Term) -> bool:
        """Whether a chunk size means something to a term that is no scan."""
        return banded.band_of(term) is not None or fenwick.structure(term) is not None

    def growth(self, term: Term) -> str | None:
        """How the cost of a term that is no scan grows with seqlen, where it is not the usual way."""
        return "T" if banded.band_of(term) is not None else "T log T" if fenwick.structure(term) is not None else None

    def configs(self, term: Term, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """One pass, and splits of the sequence in powers of two that the device has room for."""
        if fenwick.structure(term) is not None:
            return fenwick.configs(problem, chunk_size)
        band = banded.band_of(term)
        if isinstance(term, Diagonal) or (isinstance(term, Quadratic) and band is None):
            return (Config(),)
        scan = term if band is None else banded.sides(band)[0].scan
        channel = isinstance(scan, Linear) and scan.channel is not None
        sizes_of = channel_chunks if channel else chunks
        if chunk_size is not None and chunk_size not in sizes_of(problem):
            known = ", ".join(map(str, sorted(sizes_of(problem))))
            where = f" on {problem.target.name or problem.target.device}" if chunk_size in CHUNKS else ""
            return Support.no(f"'triton' has chunks of {known} tokens{where}, and chunk_size={chunk_size} was asked for")
        if chunk_size is not None and problem.state_every is not None and problem.state_every % chunk_size:
            return _between_chunks(problem.state_every, chunk_size)
        if band is not None:
            return (Config(chunk_size or (channel_chunks(problem)[0] if channel else self._chunk(problem, None))),)
        return self._whole(problem, chunk_size) if channel else self._splits(problem, chunk_size)

    def _whole(self, problem: Problem, chunk_size: int | None) -> Iterator[Config]:
        """One pass, where decays are per channel; no split, as all chunks are side by side but for the walk over states."""
        every = problem.state_every
        fitting = (size for size in channel_chunks(problem) if every is None or every % size == 0)
        yield Config(chunk_size or next(fitting))

    def _splits(self, problem: Problem, chunk_size: int | None) -> Iterator[Config]:
        size = self._chunk(problem, chunk_size)
        yield Config(size)
        segments, chunks = 2, -(-problem.seqlen // size)
        while segments * 4 <= chunks and self._programs(problem) * segments <= 2 * RESIDENT * problem.target.multiprocessors:
            yield Config(size, segments)
            segments *= 2

    def _chunk(self, problem: Problem, chunk_size: int | None) -> int:
        """The chunk size asked for, or the first that ends wherever a state is wanted."""
        size, every = sizes(problem, chunk_size).chunk, problem.state_every
        return size if every is None or every % size == 0 else next(size for size in chunks(problem) if every % size == 0)

    def _programs(self, problem: Problem) -> int:
        """Of one segment. Packed documents count as one row: how many there are does not say how long they are."""
        return max(problem.batch * problem.nheads * -(-problem.headdim // 64), 1)

    def work(self, term: Term, problem: Problem, config: Config, direction: str = "forward") -> Work:
        """A scan is a chain of chunks: as many rounds of them as the device cannot hold at once."""
        if (band := banded.band_of(term)) is not None:
            return banded.work(self, band, problem, config, direction)
        if (levels := fenwick.structure(term)) is not None:
            return fenwick.work(levels, problem, config, direction)
        forward = self._forward_work(term, problem, config)
        if direction != "backward":
            return forward
        p, both = problem, forward.times(BOTH)
        if not isinstance(term, Linear) or term.diagonal is None:
            return both
        touched = p.batch * p.seqlen * p.nheads * p.headdim * (3 * p.dtype.itemsize + 8)  # of V, dY and dV, once more
        return replace(both, bytes=both.bytes + touched, launches=both.launches + 0.5)

    def _forward_work(self, term: Term, problem: Problem, config: Config) -> Work:
        p = problem
        if isinstance(term, Quadratic):
            return tiles.work(term, p)
        tokens = float(p.batch * p.seqlen)
        touched = tokens * (2 * p.nheads * p.headdim + (p.q_heads + p.k_heads) * p.dstate) * p.dtype.itemsize
        interpreted = 1e6 if p.target.device == "cpu" else 0.0  # a program takes Triton's interpreter milliseconds
        if isinstance(term, Diagonal):
            return Work(0.0, 3 * tokens * p.nheads * p.headdim, 3 * touched, 6.0 + interpreted)
        if term.channel is not None:
            return _channel_work(p, config)
        size = sizes(p, config.chunk_size).chunk
        launches = (1.0 if config.segments == 1 else 1.5) + interpreted  # two or three, each half of what one of torch takes
        beside = 0.0 if term.diagonal is None else tokens * p.nheads
        walk = self._documents_walk if term.documents is not None and (p.n_states or 0) > p.batch else self._walk
        steps = walk(p, size, config.segments) * max(p.dstate / 128, 0.5)
        return Work(0.0, 2 * beside * p.headdim, touched + 8 * beside, launches, steps)

    def _walk(self, p: Problem, size: int, segments: int) -> float:
        """How many chunks of that size a device that is full takes as long for, one after the other."""
        passes = 1.0 if segments == 1 else 1.4  # the first reads what is remembered: the usual decays forget most
        in_turn = rounds(self._programs(p) * segments, p.target.multiprocessors)
        return in_turn * (-(-p.seqlen // (size * segments)) + START) * passes

    def _documents_walk(self, p: Problem, size: int, segments: int) -> float:
        """The same of packed documents: all of them in turn, or the longest alone, if that is longer.

        How long they are only the device knows; how many there are and how many tokens, the host.
        """
        assert p.n_states is not None  # the caller has looked
        tokens, runners = p.batch * p.seqlen, p.nheads * -(-p.headdim // 64)
        longest = min(LONGEST * (1 + log(p.n_states)) * tokens / p.n_states, p.seqlen) / size
        segment = p.seqlen / (size * segments)
        passes = 1.0 if segments == 1 else 1.4 if longest > segment else 1.1
        begun = p.n_states + segments - 1
        in_turn = runners * (tokens / size + START * begun) / (RESIDENT * p.target.multiprocessors)
        return max(in_turn, rounds(1, p.target.multiprocessors) * (min(longest, segment) + START)) * passes

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """Two launches, or three in segments."""
        if isinstance(term, Diagonal):
            return Output(diagonal_forward(term, x))
        if (band := banded.band_of(term)) is not None:
            return Output(banded.forward(self, band, x, config))
        if isinstance(term, Quadratic):
            found = fenwick.structure(term)
            return tiles.forward(term, x) if found is None else fenwick.forward(found, x, config)
        return _passes(term.channel is not None)[0](term, x, config)

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """States forward, cotangents of states backward, and what is left by blocks."""
        if isinstance(term, Diagonal):
            return diagonal_backward(term, x, cotangents.y)
        if (band := banded.band_of(term)) is not None:
            return banded.backward(self, band, x, config, cotangents.y)
        if isinstance(term, Quadratic):
            found = fenwick.structure(term)
            return tiles.backward(term, x, cotangents) if found is None else fenwick.backward(found, x, config, cotangents)
        if term.channel is not None and cotangents.arrive is not None:
            cotangents.arrive()
        return _passes(term.channel is not None)[1](term, x, config, cotangents)

    def adds(self, term: Term, problem: Problem, direction: str) -> bool:
        """Scans whose decays are per head do; backward, where no heads share V, whose gradient is summed after the launches."""
        scan = isinstance(term, Linear) and term.channel is None
        return scan and (direction == "forward" or problem.v_heads == problem.nheads)

    def takes_diagonal(self, term: Linear, problem: Problem) -> bool:
        """Scans whose decays are per head do."""
        return term.channel is None

    def final_state(self, term: Linear, x: Inputs, config: Config) -> Tensor:
        """Two launches, in as many segments as fill the device: none waits for another."""
        if term.channel is not None or not self._rows(x):
            state = _passes(term.channel is not None)[0](term, replace(x, wants_state=True), config).state
            assert state is not None  # a linear term has one
            return state
        from .replay import final_state  # imports triton, which need not be there

        return final_state(term, x, _filling(x.problem, self._rows(x), config.chunk_size))

    def begin(self, term: Linear, x: Inputs, config: Config) -> Begun | None:
        """What `final_state` launches; the scan goes on from it if it has segments, which are then its own."""
        if term.channel is not None or not self._rows(x):
            return None
        from .replay import begin  # imports triton, which need not be there

        return begin(term, x, config if config.segments > 1 else _filling(x.problem, self._rows(x), config.chunk_size), config)

    def takes_band(self, scan: Linear, problem: Problem, width: int) -> bool:
        """On Hopper."""
        if problem.target.device != "cuda":
            return False
        from .band import takes  # imports triton, which need not be there

        return takes(scan, problem, width)

    def band_work(self, problem: Problem, width: int) -> Work:
        """Of both launches."""
        from .band import work  # imports triton, which need not be there

        return work(problem, width)

    def band(self, scan: Linear, x: Inputs, width: int) -> Tensor:
        """Two launches."""
        from .band import forward  # imports triton, which need not be there

        return forward(scan, x, width)

    def block_factors(self, log: Tensor, scan: Linear, problem: Problem, exact: bool) -> tuple[Tensor, Tensor]:
        """One launch each way."""
        from .factors import block_factors  # imports triton, which need not be there

        return block_factors(log, scan, problem, exact)

    def _rows(self, x: Inputs) -> int:
        """How many rows there are to walk; 0 where there are no tokens."""
        rows = x.problem.batch if x.boundaries is None else x.boundaries.numel() - 1
        return rows if x.problem.batch * x.problem.seqlen else 0

    def supports_step(self, terms: tuple[Term, ...], problem: Problem) -> Support:
        """Causal scans, with a diagonal beside each at most, up to float32."""
        if (absent := _no_device(problem)) is not None:
            return absent
        if problem.accumulate != torch.float32:
            return Support.no("'triton' steps in float32, and an input is float64; convert it, or step with 'recurrent'")
        if isinstance(problem.dstate, int) and problem.dstate > MAX_DIM:
            return Support.no(f"dstate={problem.dstate} exceeds {MAX_DIM}; 'recurrent' has no such limit")
        scans = [term for term in terms if isinstance(term, Linear) and term.causal and term.documents is None]
        diagonals = [term for term in terms if isinstance(term, Diagonal)]
        if len(scans) + len(diagonals) < len(terms) or len(diagonals) > len(scans):
            return Support.no("'triton' steps causal scans, each with a diagonal beside it at most; 'recurrent' takes any sum")
        return Support.yes()

    def step(self, terms: tuple[Term, ...], problem: Problem, x: StepInputs) -> None:
        """One launch per scan."""
        from .step import run  # imports triton, which need not be there

        run(terms, problem, x)


@lru_cache(maxsize=4096)
def _filling(problem: Problem, rows: int, chunk_size: int | None) -> Config:
    """With as many segments as fill the device."""
    programs = rows * problem.nheads * -(-problem.headdim // 64)
    segments = 2 * RESIDENT * problem.target.multiprocessors // max(programs, 1)
    blocks = -(-problem.seqlen // sizes(problem, chunk_size).block)
    return _config(chunk_size, max(min(segments, blocks // 4), 1))


@cache
def _config(chunk_size: int | None, segments: int) -> Config:
    """One object for each, as launches are known by it (`replay.py`)."""
    return Config(chunk_size, segments)


def _between_chunks(every: int, size: int) -> Support:
    """States are wanted where no chunk of that size ends."""
    nearest = " and ".join(str(n) for n in (every // size * size, -(-every // size) * size) if n)
    return Support.no(
        f"'triton' has states where its chunks of {size} tokens end, and state_every={every} is between them: take a multiple "
        f"({nearest} are nearest); 'chunked' has no such limit"
    )


def _channel_work(p: Problem, config: Config) -> Work:
    """Three launches; arithmetic by token and channel stays in registers, next to tiles on their way."""
    size = config.chunk_size or channel_chunks(p)[0]
    tokens, levels = float(p.batch * p.seqlen * p.nheads), size.bit_length() - 1
    touched = tokens * (p.dstate * (4 * p.dtype.itemsize + 16) + p.headdim * (3 + 2 * p.dstate / size) * p.dtype.itemsize)
    flops = tokens * (2 * size * (p.dstate * levels + p.headdim) + 4 * p.dstate * p.headdim)
    interpreted = 1e6 if p.target.device == "cpu" else 0.0  # a program takes Triton's interpreter milliseconds
    return Work(flops, 0.0, touched, 2.0 + interpreted)


@cache
def _passes(
    channel: bool,
) -> tuple[Callable[[Linear, Inputs, Config], Output], Callable[[Linear, Inputs, Config, Cotangents], Gradients]]:
    """Forward and backward, imported once they are needed: importing Triton takes time, and planning does not need it."""
    if channel:
        from . import channel as scan
        from . import channel_backward

        return scan.forward, channel_backward.backward
    from .replay import backward, forward

    return forward, backward


def _no_device(problem: Problem) -> Support | None:
    """Why there is nothing to run kernels on; None if there is."""
    device = problem.target.device
    if find_spec("triton") is None:
        return Support.no("'triton' is not installed here (it comes for Linux); the torch backends run without it")
    if device == "cuda" or (device == "cpu" and environment.triton_interpreted()):
        return None
    return Support.no(f"'triton' runs on CUDA GPUs, and the tensors are on {device}; the torch backends run anywhere")
