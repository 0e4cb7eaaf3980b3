"""Log-linear attention on Triton: what runs, in chunks of how many tokens, and what it costs. Its time grows as T log T."""

from __future__ import annotations

import torch

from ...ir.passes.structure import Structure, structure_of
from ...ir.problem import Problem, fenwick_levels
from ...ir.terms import Quadratic, Term
from .. import transposed
from ..base import BOTH, Config, Cotangents, Gradients, Inputs, Output, Support, Work
from .sizes import MAX_DIM, fenwick_chunks


def structure(term: Term) -> Structure | None:
    """The structure of a Fenwick term, or None if it is another."""
    found = structure_of(term.mask) if isinstance(term, Quadratic) else None
    return None if found is None or found.levels is None else found


def supports(found: Structure, problem: Problem) -> Support:
    """Of one document a row, in 16 and 32 bits."""
    p = problem
    if p.target.capability is not None and p.target.capability < (8, 0):
        return Support.no("the kernels of fenwick() need compute capability 8.0 or newer; 'chunked' does not")
    if p.accumulate == torch.float64:
        return Support.no("'triton' computes in float32 and an input is float64; 'chunked' computes in float64")
    if found.scan.documents is not None:
        return Support.no("'triton' runs fenwick() without documents; 'chunked' runs it with them")
    for name, size in (("headdim", p.headdim), ("dstate", p.dstate)):
        if isinstance(size, int) and not 1 <= size <= MAX_DIM:  # while tracing sizes may be symbolic, and are not compared
            return Support.no(f"'triton' takes {name} from 1 to {MAX_DIM}, got {size}; 'chunked' has no such limit")
    return Support.yes()


def configs(problem: Problem, chunk_size: int | None) -> tuple[Config, ...] | Support:
    """One size of chunks, the backend's or the one asked for."""
    sizes = fenwick_chunks(problem)
    if chunk_size is not None and chunk_size not in sizes:
        known = ", ".join(map(str, sorted(sizes)))
        return Support.no(f"'triton' runs fenwick() in chunks of {known} tokens, and chunk_size={chunk_size} was asked for")
    return (Config(chunk_size or sizes[0]),)


def work(found: Structure, problem: Problem, config: Config, direction: str) -> Work:
    """What a pass costs."""
    forward = _work(problem, config)
    if found.transposed:
        return transposed.work(forward, direction)
    return forward.times(BOTH) if direction == "backward" else forward


def _work(problem: Problem, config: Config) -> Work:
    """States written and, of half of the levels above a chunk, read by each chunk, most of that from the L2 cache."""
    p, size = problem, config.chunk_size or fenwick_chunks(problem)[0]
    tokens, above = float(p.batch * p.seqlen * p.nheads), max(fenwick_levels(p.seqlen) - fenwick_levels(size), 0)
    state, kept = p.dstate * p.headdim, 2.0 if p.dtype == torch.bfloat16 else 4.0
    flops = tokens * (2 * size * (p.dstate + p.headdim) + (2 + above) * state)
    touched = tokens * (3 * p.headdim * p.dtype.itemsize + 4 * fenwick_levels(p.seqlen) + (2 + above / 8) * state / size * kept)
    interpreted = 1e6 if p.target.device == "cpu" else 0.0  # a program takes Triton's interpreter milliseconds
    return Work(flops, 0.0, touched, 12.0 + interpreted)


def forward(found: Structure, x: Inputs, config: Config) -> Output:
    """Y."""
    if not (x.problem.batch and x.problem.seqlen):
        return Output(x.empty_output())
    from . import fenwick_scan  # imports triton, which need not be there

    if found.transposed:
        return Output(transposed.forward(x, lambda x, dy: fenwick_scan.backward(found, x, config, dy, learnt=False)))
    return fenwick_scan.forward(found, x, config)


def backward(found: Structure, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
    """Gradients of q, k, v and the operands."""
    if not (x.problem.batch and x.problem.seqlen):
        floats = {name: torch.zeros_like(t) for name, t in x.operands.items() if t.is_floating_point()}
        q, k, v = (torch.zeros_like(t, dtype=x.problem.accumulate) for t in (x.q, x.k, x.v))
        return Gradients(q, k, v, operands=floats)
    from . import fenwick_scan

    if found.transposed:
        return transposed.backward(
            x, cotangents.y, lambda x: fenwick_scan.forward(found, x, config).y,
            lambda x, dy: fenwick_scan.backward(found, x, config, dy),
        )  # fmt: skip
    return fenwick_scan.backward(found, x, config, cotangents.y)
