"""Gradients of log decays and of scales, from what the tokens of a block exchange with one another and with the states.

With R = (dY Vᵀ) ∘ W ∘ G row i gathers Σ_j R_ij within its block and r_i from the state before it; token j gives Σ_i R_ij, and
s_j to the state after it; ⟨dS, exp(E) S⟩ passes the block. log_a[t] weighs on what rows i ≥ t gather (i > t if ρ is exclusive),
on what tokens j < t (j ≤ t if κ is) give to the state, and on what passes. Within the block gathering and giving cancel where
decay is slow, so they are subtracted before they are summed. A pair of tokens with no decay between them is left out: strong
decays would drown the rest in it.
"""

import triton
import triton.language as tl

from .gradients import CROSSED, EVERYTHING, KEPT, SUM_KINDS
from .rows import slot_bounds


@triton.jit
def passing(
    states, dstates, cu, block_total, through, n_rows, seqlen, tokens, nheads,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """⟨dS, exp(E) S⟩ of each block and head, `[blocks, nheads]`. Grid: (blocks, nheads)."""
    slot, h = tl.program_id(0), tl.program_id(1)
    _, _, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    head = slot.to(tl.int64) * nheads + h
    both = tl.zeros([BP, BN], tl.float32)
    for p0 in tl.static_range(0, P, BP):
        for n0 in tl.static_range(0, N, BN):
            p, n = p0 + tl.arange(0, BP), n0 + tl.arange(0, BN)
            place, inside = head * P * N + p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
            s = tl.load(states + place, mask=inside, other=0.0).to(tl.float32)
            both += s * tl.load(dstates + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(through + head, tl.sum(both) * tl.exp2(tl.load(block_total + head)).to(tl.float32))


@triton.jit
def token_gradients(
    reads, adds, through, cu, dlog_a, du, dw,
    n_rows, seqlen, tokens, nheads, tiles,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ROW_INCLUSIVE: tl.constexpr,
    COL_INCLUSIVE: tl.constexpr, DLOG_A: tl.constexpr, DU: tl.constexpr, DW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of log_a, u and w, `[tokens, nheads]`, from the sums of both sides. Grid: (blocks, nheads / HEADS)."""
    slot = tl.program_id(0)
    _, _, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    i = tl.arange(0, BLOCK)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    blocks = tl.num_programs(0).to(tl.int64)
    length = tl.minimum(stop - first, BLOCK).to(tl.int32)
    mask = (i < length)[:, None] & (h < nheads)[None, :]
    area = blocks * nheads * BLOCK
    place = (slot.to(tl.int64) * nheads + h)[None, :] * BLOCK
    out = (first + i)[:, None] * nheads + h[None, :]
    step: tl.constexpr = 1 if CAUSAL else -1
    later = i + (0 if ROW_INCLUSIVE else step)  # the tokens from which the two sums run, in local time
    earlier = i - (step if COL_INCLUSIVE else 0)
    late, early = tl.zeros([BLOCK, HEADS], tl.float32), tl.zeros([BLOCK, HEADS], tl.float32)
    rows, cols = tl.zeros([BLOCK, HEADS], tl.float32), tl.zeros([BLOCK, HEADS], tl.float32)
    gives = tl.zeros([BLOCK, HEADS], tl.float32)
    for tile in range(0, tiles):
        at = place + tile * SUM_KINDS * area
        if DLOG_A:
            real = mask & ((later >= 0) & (later < length))[:, None]
            late += tl.load(reads + at + KEPT * area + later[:, None], mask=real, other=0.0)
            late -= tl.load(adds + at + KEPT * area + later[:, None], mask=real, other=0.0)
            late += tl.load(reads + at + CROSSED * area + later[:, None], mask=real, other=0.0)
            real = mask & ((earlier >= 0) & (earlier < length))[:, None]
            early += tl.load(adds + at + CROSSED * area + earlier[:, None], mask=real, other=0.0)
            if COL_INCLUSIVE and not ROW_INCLUSIVE:
                gives += tl.load(adds + at + KEPT * area + i[:, None], mask=mask, other=0.0)
        if DU:
            rows += tl.load(reads + at + EVERYTHING * area + i[:, None], mask=mask, other=0.0)
        if DW:
            cols += tl.load(adds + at + EVERYTHING * area + i[:, None], mask=mask, other=0.0)
    if DLOG_A:
        total = tl.cumsum(late, 0, reverse=CAUSAL) + tl.cumsum(early, 0, reverse=not CAUSAL) - gives
        total += tl.load(through + slot.to(tl.int64) * nheads + h, mask=h < nheads, other=0.0)[None, :]
        tl.store(dlog_a + out, total, mask=mask)
    if DU:
        tl.store(du + out, rows, mask=mask)
    if DW:
        tl.store(dw + out, cols, mask=mask)
