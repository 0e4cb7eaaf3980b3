"""What rows leave behind them from no state: what each of their segments makes, decayed by those after it, and summed."""

import triton
import triton.language as tl

from .rows import FORGOTTEN, bounds


@triton.jit
def leaving(
    parts, part_totals, cu, state, decay, seqlen, tokens, nheads, segments, segment,
    SIZE: tl.constexpr, AT_ONCE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """s = Σ_g exp(Σ_{g′>g} E_g′) part_g, and the factor exp(Σ_g E_g) on a state that enters. Grid: (rows · heads, parts of s).

    Args:
        parts, part_totals: what each segment makes from zero, `[slots of segments, nheads, P, N]`, and its E (`states`).
        state, decay: s, `[rows, nheads, P, N]`, and the factor, `[rows, nheads]`.
        segments, segment: how many each row has, and their tokens; rows that are PACKED have as many as it takes.
        SIZE: P · N, of which a program has AT_ONCE.
    """
    row, h = tl.program_id(0) // nheads, tl.program_id(0) % nheads
    if PACKED:
        start, stop = bounds(cu, row, seqlen, tokens, PACKED)
        slot0, count = start // segment + row, ((stop - start + segment - 1) // segment).to(tl.int32)
    else:
        slot0, count = row.to(tl.int64) * segments, segments
    at, own = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE), tl.arange(0, 16)
    s, after = tl.zeros([AT_ONCE], tl.float32), 0.0
    for stop_at in range(count, 0, -16):
        g = stop_at - 1 - own  # the last of them first
        slot = (slot0 + g) * nheads + h
        logs = tl.load(part_totals + slot, mask=g >= 0, other=0.0)
        since = after + tl.cumsum(logs, 0) - logs
        there = (g >= 0) & (since >= FORGOTTEN)
        made = tl.load(parts + slot[:, None] * SIZE + at[None, :], mask=there[:, None] & (at < SIZE)[None, :], other=0.0)
        s += tl.sum(made * tl.exp2(since)[:, None], 0)
        after += tl.sum(logs, 0)
    tl.store(state + tl.program_id(0).to(tl.int64) * SIZE + at, s, mask=at < SIZE)
    if tl.program_id(1) == 0:
        tl.store(decay + tl.program_id(0), tl.exp2(after))
