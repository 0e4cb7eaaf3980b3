"""Gradients of log decays and of scales, from what tokens exchange.

R_ij = (dY Vᵀ) ∘ W ∘ G is what row i gets from column j. log_a[t] weighs on the pairs that it lies between, so with
r_i = Σ_j R_ij and c_j = Σ_i R_ij, for a block that ends at e (an anticausal term has everything the other way round):

    dlog_a[t] = A_e + Σ_{t ≤ i ≤ e} r_i − Σ_{t ≤ j ≤ e} c_j        A_e = ⟨dS, S⟩ between the tokens e and e + 1

(t < i if ρ is exclusive, t < j if κ is). Neither r nor c has pairs in it that do not decay (`exchange.py`), as the rest would
drown in what is left of their difference. A is read off the states at every SPAN-th block, so that errors do not add up over a
long row; elsewhere it is that of the next such block, and what the blocks between exchange.
"""

import triton
import triton.language as tl

from .rows import slot_bounds

SPAN = tl.constexpr(4)
"""How many blocks share one look at the states."""


@triton.jit
def _last(idx, count, CAUSAL: tl.constexpr):
    """The last block, in the order of the scan, of the span that a row's block idx is in."""
    if CAUSAL:
        last = tl.minimum(idx // SPAN * SPAN + SPAN - 1, count - 1)
    else:
        last = idx // SPAN * SPAN
    return last


@triton.jit
def passing(
    states, dstates, final, cu, through, n_rows, seqlen, tokens, nheads,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """⟨dS, S⟩ where the last block of each span ends, `[blocks, nheads]`. Grid: (blocks, nheads).

    Args:
        states, dstates: S and dS as they enter each block, from opposite sides.
        final: S after the last block of each row, if anything wants it (FINAL); dS is 0 there otherwise.
    """
    slot, h = tl.program_id(0), tl.program_id(1)
    row, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    idx, count = (first - start) // BLOCK, (stop - start + BLOCK - 1) // BLOCK
    if _last(idx, count, CAUSAL) != idx:
        return
    head, step = slot.to(tl.int64) * nheads + h, 1 if CAUSAL else -1
    ends = (idx == count - 1) if CAUSAL else (idx == 0)
    both = tl.zeros([BP, BN], tl.float32)
    for p0 in tl.static_range(0, P, BP):
        for n0 in tl.static_range(0, N, BN):
            p, n = p0 + tl.arange(0, BP), n0 + tl.arange(0, BN)
            place, inside = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
            ds = tl.load(dstates + head * P * N + place, mask=inside, other=0.0).to(tl.float32)
            at = states + (head + step * nheads) * P * N + place
            both += ds * tl.load(at, mask=inside & (ends == 0), other=0.0).to(tl.float32)
            if FINAL:
                at = final + (row.to(tl.int64) * nheads + h) * P * N + place
                both += ds * tl.load(at, mask=inside & ends, other=0.0).to(tl.float32)
    tl.store(through + head, tl.sum(both))


@triton.jit
def token_gradients(
    reads, gives, all_reads, all_gives, through, cu, dlog_a, du, dw,
    n_rows, seqlen, tokens, nheads,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ROW_INCLUSIVE: tl.constexpr,
    COL_INCLUSIVE: tl.constexpr, DLOG_A: tl.constexpr, DU: tl.constexpr, DW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of log_a, u and w, `[tokens, nheads]`. Grid: (blocks, nheads / HEADS).

    Args:
        reads, gives: r and c, `[blocks, nheads, BLOCK]`; all_reads, all_gives: with pairs that do not decay, without u or w.
    """
    slot = tl.program_id(0)
    _, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    i, h = tl.arange(0, BLOCK), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    length = tl.minimum(stop - first, BLOCK).to(tl.int32)
    real, mask = h < nheads, (i < length)[:, None] & (h < nheads)[None, :]
    out = (first + i)[:, None] * nheads + h[None, :]
    step: tl.constexpr = 1 if CAUSAL else -1
    if DLOG_A:
        idx, count = (first - start) // BLOCK, (stop - start + BLOCK - 1) // BLOCK
        last = _last(idx, count, CAUSAL)
        ends = tl.load(through + (slot + last - idx).to(tl.int64) * nheads + h, mask=real, other=0.0)
        for other in range(1, SPAN):  # what the blocks up to the end of the span exchange
            beyond = idx + step * other
            there = (beyond <= last) if CAUSAL else (beyond >= last)
            present = there & (i < tl.minimum(stop - (start + beyond * BLOCK), BLOCK))
            net = _sums(reads, slot + step * other, i, h, present, nheads, BLOCK)
            ends += tl.sum(net - _sums(gives, slot + step * other, i, h, present, nheads, BLOCK), 0)
        late = i + (0 if ROW_INCLUSIVE else step)  # the tokens from which the two sums run
        net = _sums(reads, slot, late, h, (late >= 0) & (late < length), nheads, BLOCK)
        late = i + (0 if COL_INCLUSIVE else step)
        net -= _sums(gives, slot, late, h, (late >= 0) & (late < length), nheads, BLOCK)
        tl.store(dlog_a + out, tl.cumsum(net, 0, reverse=CAUSAL) + ends[None, :], mask=mask)
    if DU:
        tl.store(du + out, _sums(all_reads, slot, i, h, i < length, nheads, BLOCK), mask=mask)
    if DW:
        tl.store(dw + out, _sums(all_gives, slot, i, h, i < length, nheads, BLOCK), mask=mask)


@triton.jit
def _sums(sums, slot, i, h, inside, nheads, BLOCK: tl.constexpr):
    """Sums of the tokens i of a block, `[i, h]`."""
    place = (slot.to(tl.int64) * nheads + h)[None, :] * BLOCK + i[:, None]
    return tl.load(sums + place, mask=inside[:, None] & (h < nheads)[None, :], other=0.0)
