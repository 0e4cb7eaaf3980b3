"""Gradients of log decays and of scales, from what the tokens of a block exchange with one another and with the states.

With R = (dY Vᵀ) ∘ W ∘ G row i gathers Σ_j R_ij within its block and r_i from the state before it; token j gives Σ_i R_ij, and
s_j to the state after it; ⟨dS, exp(E) S⟩ passes the block. log_a[t] weighs on what rows i ≥ t gather (i > t if ρ is exclusive),
on what tokens j < t (j ≤ t if κ is) give to the state, and on what passes. Within the block gathering and giving cancel where
decay is slow, so they are subtracted before they are summed. A pair of tokens with no decay between them is left out: strong
decays would drown the rest in it.
"""

import triton
import triton.language as tl

from .gradients import ALL_PAIRS, ALL_STATES, IN_PAIRS, IN_STATES
from .rows import slot_bounds


@triton.jit
def token_gradients(
    sums, through, cu, dlog_a, du, dw, n_rows, seqlen, tokens, nheads,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ROW_INCLUSIVE: tl.constexpr,
    COL_INCLUSIVE: tl.constexpr, DLOG_A: tl.constexpr, DU: tl.constexpr, DW: tl.constexpr, PACKED: tl.constexpr,
    JOINT: tl.constexpr,
):  # fmt: skip
    """Gradients of log_a, u and w, `[tokens, nheads]`, from the sums of both sides. Grid: (blocks, nheads / HEADS).

    JOINT: those for w are one sum, ALL_PAIRS.
    """
    slot = tl.program_id(0)
    _, _, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, tl.arange(0, 256), BLOCK, PACKED)
    if first >= stop:
        return
    i = tl.arange(0, BLOCK)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    blocks = tl.num_programs(0).to(tl.int64)
    length = tl.minimum(stop - first, BLOCK).to(tl.int32)
    mask = (i < length)[:, None] & (h < nheads)[None, :]
    area = blocks * nheads * BLOCK
    out = (first + i)[:, None] * nheads + h[None, :]
    step: tl.constexpr = 1 if CAUSAL else -1
    later = i + (0 if ROW_INCLUSIVE else step)  # the tokens from which the two sums run, in local time
    earlier = i - (step if COL_INCLUSIVE else 0)
    mine = slot.to(tl.int64) * nheads * BLOCK
    rows, cols = sums + mine, sums + area + mine
    if DLOG_A:
        inside = (later >= 0) & (later < length)
        late = _of(rows + 2 * IN_PAIRS * area, later, h, inside, nheads, BLOCK)
        late -= _of(cols + 2 * IN_PAIRS * area, later, h, inside, nheads, BLOCK)
        late += _of(rows + 2 * IN_STATES * area, later, h, inside, nheads, BLOCK)
        inside = (earlier >= 0) & (earlier < length)
        early = _of(cols + 2 * IN_STATES * area, earlier, h, inside, nheads, BLOCK)
        total = tl.cumsum(late, 0, reverse=CAUSAL) + tl.cumsum(early, 0, reverse=not CAUSAL)
        if COL_INCLUSIVE and not ROW_INCLUSIVE:
            total -= _of(cols + 2 * IN_PAIRS * area, i, h, i < length, nheads, BLOCK)
        total += tl.load(through + slot.to(tl.int64) * nheads + h, mask=h < nheads, other=0.0)[None, :]
        tl.store(dlog_a + out, total, mask=mask)
    if DU:
        both = _of(rows + 2 * ALL_PAIRS * area, i, h, i < length, nheads, BLOCK)
        tl.store(du + out, both + _of(rows + 2 * ALL_STATES * area, i, h, i < length, nheads, BLOCK), mask=mask)
    if DW:
        both = _of(cols + 2 * ALL_PAIRS * area, i, h, i < length, nheads, BLOCK)
        if not JOINT:
            both += _of(cols + 2 * ALL_STATES * area, i, h, i < length, nheads, BLOCK)
        tl.store(dw + out, both, mask=mask)


@triton.jit
def _of(sums, i, h, inside, nheads, BLOCK: tl.constexpr):
    """Sums of the tokens i of a block, `[i, h]`."""
    return tl.load(sums + h[None, :] * BLOCK + i[:, None], mask=inside[:, None] & (h < nheads)[None, :], other=0.0)
