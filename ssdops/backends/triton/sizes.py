"""Tile sizes: what fits the registers and the shared memory of a program, from the sizes of the problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ir.problem import Problem
from .tile_mask import shared_memory

CHUNKS = (32, 16, 64)
"""Chunk sizes, the default first: 32 tokens leave the registers of a multiprocessor room for three programs of 64 rows."""
RESIDENT = 3
"""Programs of the scan that a multiprocessor holds at once."""
MAX_DIM = 256
"""The greatest headdim and dstate: a state [64, 256] in float32 takes half of a program's registers."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one call.

    Attributes:
        chunk: tokens of a chunk of the scan.
        block: tokens between the states that the backward pass keeps.
        portion: tokens that a walk of states takes at once.
        rows: rows of the state, of headdim, that a program of the scan owns.
        rows_back: rows of headdim that the backward pass takes at once.
        tile: tokens of a block that a program of the backward pass owns, where it keeps sums of all of dstate.
        state: columns of the state, of dstate, in its first part; the rest, if any, is a second part.
        stages: how many chunks are in flight.
        stages_back: how many heads are, in the backward pass's parts through states, of values and of pairs.
        registers: the most that a thread of the forward scan may take, so that RESIDENT fit; None is no limit.
    """

    chunk: int
    block: int
    portion: int
    rows: int
    rows_back: int
    tile: int
    state: int
    stages: int
    stages_back: tuple[int, int, int]
    registers: int | None


def sizes(problem: Problem, chunk: int | None) -> Sizes:
    """The tiles of a problem; float32 products are three of tf32 and take thrice the registers."""
    p, n, major = padded(problem.headdim), padded(problem.dstate), _major(problem)
    if problem.dtype == torch.float32:
        chunk = chunk or (32 if n <= 128 else 16)
        block = max(32 if _crowded(problem) else 64, chunk)
        return Sizes(
            chunk=chunk, block=block, portion=32, rows=16, rows_back=min(p, 64), tile=32, state=min(n, 128),
            stages=2, stages_back=(1, 1, 1), registers=None,
        )  # fmt: skip
    # 8.x has its operands in registers, and 10.x its sums in tensor memory, where each turn of an unrolled loop over headdim
    # has its own; 9.x has room for blocks of 128 tokens up to where shared memory ends (tests/triton_resources.txt).
    block = 32 if _crowded(problem) else 128 if major == 9 and p <= 128 else 64
    tile = min(block, 128 if n <= 128 else 64)
    # bytes of a state, of a token of v or dy, of what stays of q or k, and of what passes from one layout to another
    state, token = n * p * (2 if problem.dtype == torch.bfloat16 else 4), 2 * p
    stays, passes, room = 2 * n * tile, 2 * tile * min(p, 64), shared_memory(problem.target.capability)
    back = (
        _stages(tile * token + 2 * state, room - stays),
        _stages(block * token + state, room - stays - passes),
        _stages(2 * block * token, room),
    )
    return Sizes(
        chunk=chunk or CHUNKS[0], block=block, portion=min(block, 64), rows=min(p, 64), rows_back=min(p, 64),
        tile=tile, state=min(n, 128), stages=3, stages_back=back, registers=168 if 32 < n <= 128 else None,
    )  # fmt: skip


def _stages(head: int, room: int) -> int:
    """How many heads of that many bytes to have in shared memory: with two Triton loads one when it is done with the other."""
    return next((stages for stages in (3, 2) if stages * head <= room), 1)


def hopper_stages(problem: Problem, dot: torch.dtype, lines: int) -> int:
    """How many heads `kernels/hopper.py` has in shared memory at once, 0 where its tiles or registers do not suffice.

    Args:
        lines: how many of ρ, κ, u, w and the values of a diagonal there are.
    """
    p, n = padded(problem.headdim), padded(problem.dstate)
    block, room = sizes(problem, None).block, shared_memory(problem.target.capability)
    if dot != torch.bfloat16 or _major(problem) != 9 or problem.target.capability is None or block < 128 or p > 64:
        return 0
    token, state, line, stays = 2 * p * block, 2 * p * n, 4 * block, 2 * n * block + 8 * p
    if n > 128:  # dQ, dK and pairs by a program each: that of dQ has no V, no κ and no w
        return 2 if stays + 2 * (token + 2 * state + 2 * line) <= room else 0
    return next((count for count in (3, 2) if stays + count * (2 * token + 2 * state + line * lines) <= room), 0)


def rounds(programs: int, multiprocessors: int) -> float:
    """How long so many programs of the scan take, where RESIDENT on each multiprocessor take 1: fewer of them are faster."""
    full, rest = divmod(programs, RESIDENT * multiprocessors)
    return full + (0.0, 0.67, 0.75, 1.0)[-(-rest // multiprocessors)]


def relay_of(problem: Problem, programs: int) -> int:
    """In how many segments to walk rows that have so many programs, by as many programs that hand the state on.

    It costs a tenth of a round, and pays where the last round would be a small one. With a small state it does anyway: the
    programs of neighbouring heads, which read neighbouring lines, are not let run apart.
    """
    p, n, chunks = problem, padded(problem.dstate), -(-problem.seqlen // CHUNKS[0])
    multiprocessors = p.target.multiprocessors
    if n > 128 or chunks < 96 or programs < RESIDENT * multiprocessors:
        return 1
    if n <= 32:
        return 3
    return 2 if rounds(2 * programs, multiprocessors) / 2 + 0.1 < rounds(programs, multiprocessors) else 1


def chunks(problem: Problem) -> tuple[int, ...]:
    """The chunk sizes that a problem can have, the default first."""
    return tuple(size for size in CHUNKS if size <= 32 or not _crowded(problem))


def channel_chunks(problem: Problem) -> tuple[int, ...]:
    """The same where decays are per channel: a chunk's factors, one a token and channel, are in registers."""
    n = padded(problem.dstate) * (1 if problem.dtype == torch.bfloat16 else 2)
    most = 64 if n <= 64 else 32 if n <= 128 else 16
    return (most, *(size for size in CHUNKS if size < most))


def fenwick_chunks(problem: Problem) -> tuple[int, ...]:
    """Of a Fenwick term, powers of two, and not less than `tile_mask.LEAST`."""
    wide = padded(problem.dstate) > (128 if problem.dtype == torch.bfloat16 else 64)
    sizes = (32,) if wide else (64, 32) if problem.dtype == torch.bfloat16 else (32, 64)
    return (*sizes, 16) if problem.dtype == torch.bfloat16 else sizes


def _crowded(problem: Problem) -> bool:
    """Whether blocks of 64 tokens would need more tensor memory than there is: then they have 32, which need less."""
    p, n = problem.headdim, problem.dstate
    most = {torch.float32: (64, 0), torch.float16: (128, 64), torch.bfloat16: (128, 128)}
    return _major(problem) == 10 and p > most[problem.dtype][0] and n > most[problem.dtype][1]


def _major(problem: Problem) -> int:
    """Of the compute capability; a device that has none runs what 9.0 does."""
    return (problem.target.capability or (9, 0))[0]


def padded(dim: int) -> int:
    """The power of two that holds a dimension; tensor cores take 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())
