"""Gradients of log decays and of scales, from what the tokens of a block exchange with one another and with the states.

With R = (dY Vᵀ) ∘ W ∘ G, row i gathers Σ_j R_ij within its block and r_i from the state before it; token j gives Σ_i R_ij and s_j
to the state after it; ⟨dS, exp(E) S⟩ passes the block. log_a[t] weighs on what rows i ≥ t gather (i > t if ρ is exclusive), on
what tokens j < t (j ≤ t if κ is) give to the state, and on what passes. Within the block gathering and giving cancel where
decay is slow, so they are subtracted before they are summed. A pair of tokens with no decay between them is left out: strong
decays would drown the rest in it.
"""

import triton
import triton.language as tl

from .gradients import log_sums, weights
from .rows import slot_bounds

ROW, COL, ADD, ROW_ALL, COL_ALL = (tl.constexpr(index) for index in range(5))
"""The rows of `sums`: what tokens gather from their block and the state, what they give to their block, and to the state; then
gathered and given with the pairs that do not decay, before the token's own scale."""


@triton.jit
def exchange(
    q, k, v, dy, u, w, cu, rho, kappa, block_total, states, dstates, sums, through,
    n_rows, seqlen, tokens, nheads, groups, q_share, k_share, v_share, scale, per_split,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, u_b, u_t, u_h, w_b, w_t, w_h,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, SKIP: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SCALES: tl.constexpr, PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What tokens exchange, head by head. Grid: (blocks, groups, splits of a group's heads).

    Args:
        sums: float32 `[5, blocks, nheads, BLOCK]`, the last two if SCALES.
        through: float32 `[blocks, nheads]`.
        SKIP: how far apart tokens have no decay between them.
    """
    slot, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    batch, t = first // seqlen, first % seqlen
    base = slot.to(tl.int64) * nheads
    share = nheads // groups
    q += batch * q_b + t * q_t + (g * share // q_share) * q_h
    k += batch * k_b + t * k_t + (g * share // k_share) * k_h
    v += batch * v_b + t * v_t
    dy += batch * dy_b + t * dy_t
    u += batch * u_b + t * u_t
    w += batch * w_b + t * w_t
    i, half = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    here = i < stop - first
    near = tl.zeros([BLOCK, BLOCK // 2], tl.float32)  # scores with the first half of the columns, and with the second
    far = tl.zeros([BLOCK, BLOCK // 2], tl.float32)
    for n0 in tl.static_range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        inside_n = (n < N)[None, :]
        qt = tl.load(q + i[:, None] * q_t + n[None, :], mask=here[:, None] & inside_n, other=0.0).to(DOT)
        k_near = _columns(k, half, n, k_t, stop - first, inside_n).to(DOT)
        near = tl.dot(qt, tl.trans(k_near), acc=near, input_precision=PRECISION)
        k_far = _columns(k, BLOCK // 2 + half, n, k_t, stop - first, inside_n).to(DOT)
        far = tl.dot(qt, tl.trans(k_far), acc=far, input_precision=PRECISION)
    near, far = (near * scale).to(DOT), (far * scale).to(DOT)
    area = tl.num_programs(0).to(tl.int64) * nheads * BLOCK
    ones = tl.full([BLOCK], 1.0, tl.float32)
    half_ones = tl.full([BLOCK // 2], 1.0, tl.float32)
    for hh in tl.range(split * per_split, tl.minimum((split + 1) * per_split, share), num_stages=STAGES):
        h = g * share + hh
        unmoved = tl.minimum(hh, 0)  # 0, as no compiler knows: what is hoisted out of the loop would take every register
        r, r_low, end = ones, ones, 0.0
        if DECAY:
            r, r_low = log_sums(rho, base + h, i, here, BLOCK, EXACT)
            end = tl.load(block_total + base + h)
        ut = tl.load(u + i * u_t + h * u_h, mask=here, other=0.0).to(tl.float32) if ROWS else ones
        vh, dyh = v + (h // v_share) * v_h, dy + h * dy_h
        place = sums + (base + h) * BLOCK
        read, passed = tl.zeros([BLOCK], tl.float32), 0.0
        for p0 in tl.static_range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            dyt = tl.load(dyh + i[:, None] * dy_t + p[None, :], mask=here[:, None] & (p < P)[None, :], other=0.0).to(DOT)
            y = tl.zeros([BLOCK, BP], tl.float32)  # what rows read of S
            both = tl.zeros([BP, BP], tl.float32)
            for n0 in tl.static_range(0, N, BN):
                n = n0 + tl.arange(0, BN)
                inside = (p < P)[:, None] & (n < N)[None, :]
                at_state = (base + h) * P * N + p[:, None] * N + n[None, :]
                st = tl.load(states + at_state, mask=inside, other=0.0)
                dst = tl.load(dstates + at_state, mask=inside, other=0.0)
                if N > BN:
                    qt = tl.load(q + i[:, None] * q_t + n[None, :], mask=here[:, None] & (n < N)[None, :], other=0.0).to(DOT)
                both = tl.dot(st, tl.trans(dst), acc=both, input_precision=PRECISION)
                if NORMALIZE:  # float16 holds nothing above 65504
                    size = tl.max(tl.abs(st)) + 1e-30
                    y += tl.dot(qt, tl.trans((st / size).to(DOT)), input_precision=PRECISION) * size
                else:
                    y = tl.dot(qt, tl.trans(st), acc=y, input_precision=PRECISION)
            read += tl.sum(y * dyt.to(tl.float32), 1)
            if DECAY:  # ⟨dS, S⟩ is a trace: on tensor cores neither takes registers
                passed += tl.sum(tl.where(p[:, None] + unmoved == p[None, :], both, 0.0))
        if DECAY:
            read *= tl.exp2(r + r_low if EXACT else r)
            tl.store(through + base + h, passed * tl.exp2(end))
        read *= scale
        gathers, gathers_all = read, read
        for part in tl.static_range(2):
            j = part * (BLOCK // 2) + half
            there = j < stop - first
            c, c_low = half_ones, half_ones
            if DECAY:
                c, c_low = log_sums(kappa, base + h, j, there, BLOCK, EXACT)
            wt = tl.load(w + j * w_t + h * w_h, mask=there, other=0.0).to(tl.float32) if COLS else half_ones
            pairs = tl.zeros([BLOCK, BLOCK // 2], tl.float32)
            added = tl.zeros([BLOCK // 2], tl.float32)
            for p0 in tl.static_range(0, P, BP):
                p = p0 + tl.arange(0, BP)
                vt = _columns(vh, j, p, v_t, stop - first, (p < P)[None, :]).to(DOT)
                if P > BP:
                    dyt = tl.load(dyh + i[:, None] * dy_t + p[None, :], mask=here[:, None] & (p < P)[None, :], other=0.0).to(DOT)
                pairs = tl.dot(dyt, tl.trans(vt), acc=pairs, input_precision=PRECISION)
                dv = tl.zeros([BLOCK // 2, BP], tl.float32)  # what columns get of dS
                for n0 in tl.static_range(0, N, BN):
                    n = n0 + tl.arange(0, BN)
                    kt = k_near if part == 0 else k_far
                    if N > BN:
                        kt = _columns(k, j, n, k_t, stop - first, (n < N)[None, :]).to(DOT)
                    if P > BP or N > BN:
                        inside = (p < P)[:, None] & (n < N)[None, :]
                        at_state = (base + h) * P * N + p[:, None] * N + n[None, :]
                        dst = tl.load(dstates + at_state, mask=inside, other=0.0)
                    if NORMALIZE:
                        size = tl.max(tl.abs(dst)) + 1e-30
                        dv += tl.dot(kt, tl.trans((dst / size).to(DOT)), input_precision=PRECISION) * size
                    else:
                        dv = tl.dot(kt, tl.trans(dst), acc=dv, input_precision=PRECISION)
                added += tl.sum(dv * vt.to(tl.float32), 1)
            if DECAY:
                added *= tl.exp2((end - c) - c_low if EXACT else end - c)
            pairs *= weights(i + unmoved, j, r, r_low, c, c_low, True, CAUSAL, STRICT, DECAY, EXACT)
            pairs *= tl.where(unmoved == 0, near if part == 0 else far, 0.0).to(tl.float32)
            tl.store(place + ADD * area + j, added * wt)
            if SCALES:
                gathers_all += tl.sum(pairs * wt[None, :], 1)
                tl.store(place + COL_ALL * area + j, tl.sum(pairs * ut[:, None], 0) + added)
            if CAUSAL:
                pairs = tl.where(i[:, None] + unmoved > j[None, :] + SKIP, pairs, 0.0)
            else:
                pairs = tl.where(j[None, :] + unmoved > i[:, None] + SKIP, pairs, 0.0)
            gathers += tl.sum(pairs * wt[None, :], 1)
            tl.store(place + COL * area + j, tl.sum(pairs * ut[:, None], 0) * wt)
        tl.store(place + ROW * area + i, gathers * ut)
        if SCALES:
            tl.store(place + ROW_ALL * area + i, gathers_all)


@triton.jit
def _columns(x, j, dims, stride, length, inside):
    """x[j, dims], zero outside."""
    return tl.load(x + j[:, None] * stride + dims[None, :], mask=(j < length)[:, None] & inside, other=0.0)


@triton.jit
def token_gradients(
    sums, through, cu, dlog_a, du, dw,
    n_rows, seqlen, tokens, nheads,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ROW_INCLUSIVE: tl.constexpr,
    COL_INCLUSIVE: tl.constexpr, DLOG_A: tl.constexpr, DU: tl.constexpr, DW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of log_a, u and w, `[tokens, nheads]`, from what `exchange` leaves. Grid: (blocks, nheads / HEADS)."""
    slot = tl.program_id(0)
    row, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    i = tl.arange(0, BLOCK)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    blocks, nheads64 = tl.num_programs(0).to(tl.int64), nheads.to(tl.int64)
    length = tl.minimum(stop - first, BLOCK).to(tl.int32)
    mask = (i < length)[:, None] & (h < nheads)[None, :]
    area = blocks * nheads64 * BLOCK
    place = sums + (slot * nheads64 + h)[None, :] * BLOCK
    out = (first + i)[:, None] * nheads64 + h[None, :]
    if DLOG_A:
        step: tl.constexpr = 1 if CAUSAL else -1
        later = i + (0 if ROW_INCLUSIVE else step)  # the tokens from which the two sums run, in local time
        earlier = i - (step if COL_INCLUSIVE else 0)
        real = mask & ((later >= 0) & (later < length))[:, None]
        late = tl.load(place + ROW * area + later[:, None], mask=real, other=0.0)
        late -= tl.load(place + COL * area + later[:, None], mask=real, other=0.0)
        real = mask & ((earlier >= 0) & (earlier < length))[:, None]
        early = tl.load(place + ADD * area + earlier[:, None], mask=real, other=0.0)
        total = tl.cumsum(late, 0, reverse=CAUSAL) + tl.cumsum(early, 0, reverse=not CAUSAL)
        total += tl.load(through + slot * nheads64 + h, mask=h < nheads, other=0.0)[None, :]
        if COL_INCLUSIVE and not ROW_INCLUSIVE:
            total -= tl.load(place + COL * area + i[:, None], mask=mask, other=0.0)
        tl.store(dlog_a + out, total, mask=mask)
    if DU:
        tl.store(du + out, tl.load(place + ROW_ALL * area + i[:, None], mask=mask, other=0.0), mask=mask)
    if DW:
        tl.store(dw + out, tl.load(place + COL_ALL * area + i[:, None], mask=mask, other=0.0), mask=mask)
