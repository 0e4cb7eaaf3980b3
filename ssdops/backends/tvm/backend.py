"""The backend: what it can run, and why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from ...config import tvm_programs
from ...ir.problem import Problem, common_heads
from ...ir.terms import Diagonal, Linear, Quadratic, Term
from .. import banded
from ..base import BOTH, Config, Cotangents, Gradients, Inputs, Output, Support, Work
from ..quadratic.form import Refused, read
from ..scan import diagonal_backward, diagonal_forward, diagonal_work
from .formula import lacking
from .machine import machine

CHUNKS = {"cpu": (32, 16, 64), "cuda": (64, 32)}
"""Chunk sizes, the default first, by device."""
MAX_DIM = 256
"""The greatest headdim and dstate that tiles are made for."""
NEAR = 1 << 20
"""Bytes of the caches that a core has to itself, about: tiles that do not fit meet memory in every product."""
OLDEST = (8, 0)
"""Compute capability from which tensor cores multiply bfloat16."""
PACKAGES = {"apache-tvm": "0.27.", "apache-tvm-ffi": "0.1.14."}
"""Versions that work together: later FFIs end in a segmentation fault where TVM looks for intrinsics."""


class Tvm:
    """Tensor programs, compiled by TVM through LLVM for CPUs and through CUDA for GPUs."""

    name = "tvm"
    factored = False
    compiles = True

    def supports(self, term: Term, problem: Problem) -> Support:
        """Scans with scalar decay, diagonals, and masks by tiles."""
        p = problem
        if (band := banded.band_of(term)) is not None and band.scan.channel is None:
            return self.supports(banded.sides(band)[0].scan, p)
        if isinstance(term, Linear) and term.channel is not None:
            return Support.no(
                "'tvm' has scalar decays only, and this one is per channel; 'chunked', 'recurrent' and 'naive' run it"
            )
        if p.target.device not in ("cpu", "cuda"):
            return Support.no(f"'tvm' runs on CPUs and CUDA GPUs, and the tensors are on {p.target.device}")
        if p.target.device == "cuda" and (p.target.capability or (0, 0)) < OLDEST:
            return Support.no(
                f"'tvm' needs compute capability 8.0, and this GPU has {p.target.capability}; 'chunked' runs on it"
            )
        if p.target.device == "cuda" and p.accumulate == torch.float64:
            return Support.no("'tvm' has no float64 on GPUs; 'chunked' computes in float64")
        for name, size in (("headdim", p.headdim), ("dstate", p.dstate)):
            if isinstance(size, int) and not 1 <= size <= MAX_DIM:  # while tracing sizes may be symbolic, and are not compared
                return Support.no(f"'tvm' takes {name} from 1 to {MAX_DIM}, got {size}; 'chunked' has no such limit")
        if not chunks(p, isinstance(term, Quadratic)):
            return Support.no(
                f"'tvm' has no tiles of headdim {p.headdim} and dstate {p.dstate} in {p.dtype} that fit a GPU of capability "
                f"{p.target.capability}; 'triton' and 'chunked' run them"
            )
        if p.state_every is not None and not isinstance(term, Quadratic) and p.state_every % min(chunks(p)):
            return _between_chunks(p)
        return _reject_tiles(term, p) or installed()

    def has_chunks(self, term: Term) -> bool:
        """Whether a chunk size means something to a term that is no scan."""
        return banded.band_of(term) is not None

    def growth(self, term: Term) -> str | None:
        """How the cost of a term that is no scan grows with seqlen, where it is not the usual way."""
        return "T" if banded.band_of(term) is not None else None

    def configs(self, term: Term, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """Chunk sizes at whose ends states are wanted, or the one asked for."""
        if isinstance(term, Diagonal):
            return (Config(),)
        if (band := banded.band_of(term)) is not None:
            return self.configs(banded.sides(band)[0].scan, problem, chunk_size)
        able = chunks(problem, isinstance(term, Quadratic))
        if chunk_size is not None and chunk_size not in able:
            known = ", ".join(map(str, sorted(able)))
            return Support.no(f"'tvm' has chunks of {known} tokens, and chunk_size={chunk_size} was asked for")
        every = problem.state_every
        sizes = able if chunk_size is None else (chunk_size,)
        fitting = tuple(Config(size) for size in sizes if every is None or every % size == 0)
        if chunk_size is None and problem.target.device == "cpu":
            fitting = tuple(c for at, c in enumerate(fitting) if not at or pruned(problem, c.chunk_size or 0) is None)
        if problem.target.device == "cuda":
            fitting = fitting[:1]  # larger chunks are faster than their arithmetic says
        return fitting or _between_chunks(problem)

    def work(self, term: Term, problem: Problem, config: Config, direction: str = "forward") -> Work:
        """Linear in seqlen; the scores of a chunk once per group, everything else once per head."""
        if (band := banded.band_of(term)) is not None:
            return banded.work(self, band, problem, config, direction)
        p, size = problem, config.chunk_size or chunks(problem, isinstance(term, Quadratic))[0]
        tokens = float(p.batch * p.seqlen)
        if isinstance(term, Diagonal):
            return diagonal_work(p, direction)
        if isinstance(term, Quadratic):
            return _pairs_work(term, p, size, direction)
        scores, per_head = 2 * size * p.dstate * common_heads(p), 2 * size * p.headdim + 4 * p.dstate * p.headdim
        touched = 4 * tokens * ((p.q_heads + p.k_heads) * p.dstate + 2 * p.nheads * p.headdim)
        flops, elementwise = tokens * (scores + p.nheads * per_head), tokens * p.nheads * 4 * size
        passes = BOTH if direction == "backward" else 1.0
        if p.target.device == "cpu":
            return Work(flops, elementwise, touched, 20.0).times(passes)
        return Work(flops, elementwise, touched / 2, 4.0, steps=p.seqlen / size).times(passes)

    def ready(self, term: Term, problem: Problem, config: Config, direction: str) -> Support:
        """On CPUs, where every program of the call was compiled before; no program is loaded to tell."""
        if isinstance(term, Diagonal):
            return Support.yes()
        if problem.target.device != "cpu":
            return Support.no(
                "compiles for seconds at its first call, so on GPUs it runs where it was measured to be the fastest"
            )
        if (band := banded.band_of(term)) is not None:
            ready = [
                self.ready(scan, problem, config, direction) for side in banded.sides(band) for scan in (side.scan, side.across)
            ]
            return next((found for found in ready if not found.ok), Support.yes())
        if isinstance(term, Quadratic):  # its programs are of one mask, and of whatever its operands' shapes are
            return Support.no("compiles for seconds at its first call; 'ssdops tune' measures it, and takes it if it is faster")
        from .kept import are_kept  # what it needs of this folder, planning does not

        assert isinstance(term, Linear)  # supports() refuses the rest
        if are_kept(term, problem, config, direction):
            return Support.yes()
        return Support.no("would compile for seconds at its first call; 'ssdops tune' compiles it, and then it is weighed")

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """Scores, then a walk; or tiles of pairs."""
        if isinstance(term, Diagonal):
            return Output(diagonal_forward(term, x))
        if (band := banded.band_of(term)) is not None:
            return Output(banded.forward(self, band, x, config))
        return _passes()[0](term, x, config, save)

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """One walk on a CPU; on a GPU two, for dV and for states, and what groups of heads make of them by chunks."""
        if isinstance(term, Diagonal):
            return diagonal_backward(term, x, cotangents.y)
        if (band := banded.band_of(term)) is not None:
            return banded.backward(self, band, x, config, cotangents.y)
        return _passes()[1](term, x, config, cotangents)


@cache
def _passes() -> tuple[
    Callable[[Linear | Quadratic, Inputs, Config, bool], Output],
    Callable[[Linear | Quadratic, Inputs, Config, Cotangents], Gradients],
]:
    """Forward and backward, imported once they are needed: importing TVM takes seconds, and planning does not need it."""
    from .passes import backward, forward

    return forward, backward


def chunks(problem: Problem, pairs: bool = False) -> tuple[int, ...]:
    """Chunk sizes that there are, or sizes of tiles of pairs, the default first: on a GPU, those that it has room for."""
    p = problem
    if p.target.device == "cpu":
        return CHUNKS["cpu"]
    sizes = [size for size in (p.headdim, p.dstate) if isinstance(size, int)]  # while tracing they may be symbolic
    known = CHUNKS["cuda"][1:] if p.dtype == torch.float32 else CHUNKS["cuda"]
    large = max(sizes, default=1)
    fits = machine(p).pairs_fit if pairs else machine(p).has_room
    return tuple(size for size in known if fits(large, size))


def _reject_tiles(term: Term, problem: Problem) -> Support | None:
    """Why a term that is no scan has no tiles of pairs here; None if it has, or is a scan or a diagonal."""
    if not isinstance(term, Quadratic):
        return None
    try:
        form = read(term.mask, problem.seqlen if isinstance(problem.seqlen, int) else 4096)
    except Refused as reason:
        return Support.no(f"'tvm' has no tiles for this mask: {reason}; 'naive' runs any mask")
    if (name := lacking(form.formula)) is not None:
        return Support.no(f"'tvm' has no tiles for this mask: TIR has no operation {name}; 'naive' runs any mask")
    return None


def _pairs_work(term: Quadratic, problem: Problem, size: int, direction: str) -> Work:
    """Two products for each pair of the tiles that meet the band, and what weighs them; backward, twelve."""
    p, form = problem, read(term.mask, problem.seqlen)
    tokens = float(p.batch * p.seqlen * p.nheads)
    pairs = min(form.pairs(p.seqlen) * p.batch * p.nheads + 2 * size * tokens, tokens * p.seqlen)
    forward = Work(2 * pairs * (p.dstate + p.headdim), 8 * pairs, 4 * tokens * (p.dstate + 3 * p.headdim), 20.0)
    return forward.times(6.0) if direction == "backward" else forward


def pruned(problem: Problem, size: int) -> str | None:
    """Why a tuner is not to compile programs of a chunk size for a CPU, although they would run; None if it may."""
    p, numbers = problem, (problem.seqlen, problem.headdim, problem.dstate)
    if not all(isinstance(number, int) for number in numbers):  # while tracing they may be symbolic
        return None
    if size >= 2 * max(p.seqlen, 1):
        return f"rows of {p.seqlen} tokens leave half of a chunk of {size} empty"
    tiles = (3 * p.dstate + 5 * p.headdim + 4 * size) * size * p.accumulate.itemsize
    if tiles > NEAR:
        return f"tiles of {size} tokens take {tiles >> 10} KiB, and a core's own caches have {NEAR >> 10}"
    return None


def _between_chunks(problem: Problem) -> Support:
    """States are wanted where no chunk ends."""
    return Support.no(
        f"'tvm' has states where its chunks end, of {min(chunks(problem))} tokens or more, and "
        f"state_every={problem.state_every} is between them; 'chunked' has no such limit"
    )


@cache
def installed() -> Support:
    """Whether TVM and its FFI are here, of versions that work together; the FFI alone, where programs come compiled.

    Neither is imported.
    """
    needed = {"apache-tvm-ffi"} if tvm_programs() is not None else set(PACKAGES)
    for package in (package for package in PACKAGES if package in needed):
        if not is_installed(package):
            return Support.no(
                f"'tvm' needs {package}, which is not installed: pip install 'ssdops[tvm]'; 'chunked' runs without"
            )
        if not (found := version(package)).startswith(known := PACKAGES[package]):
            return Support.no(f"'tvm' works with {package} {known}*, and {found} is installed: pip install 'ssdops[tvm]'")
    return Support.yes()


def is_installed(package: str) -> bool:
    """Whether a package is here, of any version."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
