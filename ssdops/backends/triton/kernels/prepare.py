"""What all heads of a group share, and the sums of log decays: computed once per chunk, read by every scan."""

import triton
import triton.language as tl

from .rows import slot_bounds


@triton.jit
def prepare(
    q, k, log_a, log_cols, cu, scores, rho, kappa, total, center,
    n_rows, seqlen, tokens, nheads, groups, q_share, k_share,
    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, z_b, z_t, z_h,
    L: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, ROW_INCLUSIVE: tl.constexpr, COL_INCLUSIVE: tl.constexpr,
    DECAY: tl.constexpr, LOG_COLS: tl.constexpr, APART: tl.constexpr, EXACT: tl.constexpr,
    PACKED: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores K Qᵀ under the mask's triangle, [slots, groups, L_j, L_i]; ρ and κ in units of log 2, and their end E.

    A program computes either the scores of one group, or the sums of HEADS heads, of one chunk. Sums are taken in local time
    from the chunk's start. In float32 they come in two parts, high and low, as differences of rounded sums lose digits. The
    center of a chunk is what all its ρ and κ are within SPAN of, or 1e30 if there is no such number.
    """
    slot, part = tl.program_id(0), tl.program_id(1)
    row, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, L, PACKED)
    if first >= stop:
        return
    b, i = first // seqlen, tl.arange(0, L)
    t, inside = first % seqlen, first + i < stop
    slot = slot.to(tl.int64)
    if part < groups:
        q += b * q_b + t * q_t + (part // q_share) * q_h
        k += b * k_b + t * k_t + (part // k_share) * k_h
        acc = tl.zeros([L, L], tl.float32)
        for n0 in tl.static_range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            real = inside[:, None] & (n < N)[None, :]
            qt = tl.load(q + i[:, None] * q_t + n[None, :], mask=real, other=0.0).to(DOT)
            kt = tl.load(k + i[:, None] * k_t + n[None, :], mask=real, other=0.0).to(DOT)
            acc = tl.dot(kt, tl.trans(qt), acc=acc, input_precision=PRECISION)  # [L_j, L_i]
        late, early = (i[None, :], i[:, None]) if CAUSAL else (i[:, None], i[None, :])
        acc = tl.where(late > early if STRICT else late >= early, acc, 0.0)
        scores += (slot * groups + part) * L * L
        tl.store(scores + i[:, None] * L + i[None, :], acc.to(DOT))
    else:
        h = (part - groups) * HEADS + tl.arange(0, HEADS)
        mask = inside[:, None] & (h < nheads)[None, :]
        wide = tl.float64 if EXACT else tl.float32
        d = tl.zeros([L, HEADS], wide)
        if DECAY:
            log_a += b * a_b + t * a_t
            d = tl.load(log_a + i[:, None] * a_t + h[None, :] * a_h, mask=mask, other=0.0).to(wide) * 1.4426950408889634
        inclusive = tl.cumsum(d, 0, reverse=not CAUSAL)
        r = inclusive if ROW_INCLUSIVE else inclusive - d
        c = inclusive if COL_INCLUSIVE else inclusive - d
        if LOG_COLS:
            log_cols += b * z_b + t * z_t
            z = tl.load(log_cols + i[:, None] * z_t + h[None, :] * z_h, mask=mask, other=0.0)
            c -= z.to(wide) * 1.4426950408889634
        width: tl.constexpr = 2 * L if EXACT else L
        base = slot * nheads + h
        place = base[None, :] * width + i[:, None]
        mask = (h < nheads)[None, :] & (i < L)[:, None]
        _store_sums(rho, place, r, mask, L, EXACT)
        if APART:
            _store_sums(kappa, place, c, mask, L, EXACT)
        tl.store(total + base, tl.sum(d, 0).to(tl.float32), mask=h < nheads)
        high, low = tl.maximum(tl.max(r, 0), tl.max(c, 0)).to(tl.float32), tl.minimum(tl.min(r, 0), tl.min(c, 0)).to(tl.float32)
        middle = tl.where(high - low <= 2 * SPAN, 0.5 * (high + low), 1e30)
        tl.store(center + base, middle, mask=h < nheads)


@triton.jit
def _store_sums(to, place, x, mask, L: tl.constexpr, EXACT: tl.constexpr):
    high = x.to(tl.float32)
    tl.store(to + place, high, mask=mask)
    if EXACT:
        tl.store(to + place + L, (x - high.to(tl.float64)).to(tl.float32), mask=mask)
