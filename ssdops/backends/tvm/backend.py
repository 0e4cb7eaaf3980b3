"""The backend: what it can run, and why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from ...ir.problem import Problem, common_heads
from ...ir.terms import Diagonal, Linear, Term
from ..base import Config, Cotangents, Gradients, Inputs, Output, Support, Work, reject_scan
from ..scan import diagonal_backward, diagonal_forward, diagonal_work

CHUNKS = (32, 16, 64)
"""Chunk sizes, the default first."""
MAX_DIM = 256
"""The greatest headdim and dstate that tiles are made for."""
PACKAGES = {"apache-tvm": "0.27.", "apache-tvm-ffi": "0.1.14."}
"""Versions that work together: later FFIs end in a segmentation fault where TVM looks for intrinsics."""


class Tvm:
    """Tensor programs for CPUs, compiled by TVM through LLVM."""

    name = "tvm"

    def supports(self, term: Term, problem: Problem) -> Support:
        """Scans with scalar decay, and diagonals, on a CPU."""
        p = problem
        if isinstance(term, Linear) and term.channel is not None:
            return Support.no("'tvm' has scalar decays only, and this one is per channel; 'recurrent' and 'naive' run it")
        if p.target.device != "cpu":
            return Support.no(
                f"'tvm' runs on CPUs so far, and the tensors are on {p.target.device}; 'triton' runs on CUDA GPUs"
            )
        for name, size in (("headdim", p.headdim), ("dstate", p.dstate)):
            if isinstance(size, int) and not 1 <= size <= MAX_DIM:  # while tracing sizes may be symbolic, and are not compared
                return Support.no(f"'tvm' takes {name} from 1 to {MAX_DIM}, got {size}; 'chunked' has no such limit")
        if p.state_every is not None and p.state_every % min(CHUNKS):
            return _between_chunks(p.state_every)
        return reject_scan(term, self.name) or _installed()

    def configs(self, term: Term, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """Chunk sizes at whose ends states are wanted, or the one asked for."""
        if isinstance(term, Diagonal):
            return (Config(),)
        if chunk_size is not None and chunk_size not in CHUNKS:
            known = ", ".join(map(str, sorted(CHUNKS)))
            return Support.no(f"'tvm' has chunks of {known} tokens, and chunk_size={chunk_size} was asked for")
        every = problem.state_every
        sizes = CHUNKS if chunk_size is None else (chunk_size,)
        fitting = tuple(Config(size) for size in sizes if every is None or every % size == 0)
        return fitting or _between_chunks(every or 0)

    def work(self, term: Term, problem: Problem, config: Config) -> Work:
        """Linear in seqlen; the scores of a chunk once per group, everything else once per head."""
        p, size = problem, config.chunk_size or CHUNKS[0]
        tokens = float(p.batch * p.seqlen)
        if isinstance(term, Diagonal):
            return diagonal_work(p)
        scores, per_head = 2 * size * p.dstate * common_heads(p), 2 * size * p.headdim + 4 * p.dstate * p.headdim
        touched = 4 * tokens * ((p.q_heads + p.k_heads) * p.dstate + 2 * p.nheads * p.headdim)
        return Work(tokens * (scores + p.nheads * per_head), tokens * p.nheads * 4 * size, touched, 20.0)

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """Scores, then a walk."""
        if isinstance(term, Diagonal):
            return Output(diagonal_forward(term, x))
        assert isinstance(term, Linear)  # supports() refuses the rest
        return _passes()[0](term, x, config)

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """Scores of both sides, a walk for each of dQ, dK and dV, and what tokens exchange."""
        if isinstance(term, Diagonal):
            return diagonal_backward(term, x, cotangents.y)
        assert isinstance(term, Linear)  # supports() refuses the rest
        return _passes()[1](term, x, config, cotangents)


@cache
def _passes() -> tuple[Callable[[Linear, Inputs, Config], Output], Callable[[Linear, Inputs, Config, Cotangents], Gradients]]:
    """Forward and backward, imported once they are needed: importing TVM takes seconds, and planning does not need it."""
    from .scan import backward, forward

    return forward, backward


def _between_chunks(every: int) -> Support:
    """States are wanted where no chunk ends."""
    return Support.no(
        f"'tvm' has states where its chunks end, of {min(CHUNKS)} tokens or more, and state_every={every} is between them; "
        "'chunked' has no such limit"
    )


@cache
def _installed() -> Support:
    """Whether TVM and its FFI are here, of versions that work together. They are not imported."""
    for package, known in PACKAGES.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            return Support.no(
                f"'tvm' needs {package}, which is not installed: pip install 'ssdops[tvm]'; 'chunked' runs without"
            )
        if not found.startswith(known):
            return Support.no(f"'tvm' works with {package} {known}*, and {found} is installed: pip install 'ssdops[tvm]'")
    return Support.yes()
