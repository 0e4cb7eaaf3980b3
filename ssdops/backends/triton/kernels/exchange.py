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
from .tensors import heads_of, load_head, load_state, tile_of

ROW, COL, ADD, ACROSS, ROW_ALL, COL_ALL, ACROSS_ALL = (tl.constexpr(index) for index in range(7))
"""The rows of `sums`: what tokens gather from their half of a block and from the state, what they give to their half, what they
give to the state, and either across the halves; then gathered, given and across, pairs that do not decay among them, before
the token's own scale."""


@triton.jit
def exchange(
    q, k, v, dy, u, w, cu, rho, kappa, block_total, states, dstates, sums, through,
    n_rows, seqlen, tokens, nheads, groups, q_share, k_share, v_share, scale, per_split,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, u_b, u_t, u_h, w_b, w_t, w_h,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, SKIP: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SCALES: tl.constexpr, PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """What tokens exchange, head by head. Grid: (blocks · 3, groups, splits of a group's heads).

    Parts 0 and 1 of a block are its halves, with themselves and with the states; part 2 is what passes between the halves.

    Args:
        sums: float32 `[7, blocks, nheads, BLOCK]`, the last three if SCALES.
        through: float32 `[blocks, nheads]`.
        SKIP: how far apart tokens have no decay between them.
    """
    slot, part = tl.program_id(0) // 3, tl.program_id(0) % 3
    g, split = tl.program_id(1), tl.program_id(2)
    row, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    batch, t = first // seqlen, first % seqlen
    base = slot.to(tl.int64) * nheads
    nheads64, share = nheads.to(tl.int64), nheads // groups
    q += batch * q_b + t * q_t + (g * share // q_share) * q_h
    k += batch * k_b + t * k_t + (g * share // k_share) * k_h
    v += batch * v_b + t * v_t
    dy += batch * dy_b + t * dy_t
    u += batch * u_b + t * u_t
    w += batch * w_b + t * w_t
    half: tl.constexpr = BLOCK // 2
    t0 = t.to(tl.int32)
    dy_tile = heads_of(dy - t * dy_t, seqlen, nheads, P, dy_t, dy_h, half, BP, TILED)
    v_tile = heads_of(v - t * v_t, seqlen, nheads // v_share, P, v_t, v_h, half, BP, TILED)
    rows = (tl.num_programs(0) // 3) * nheads * P
    s_tile, ds_tile = tile_of(states, rows, N, N, BP, BN, TILED), tile_of(dstates, rows, N, N, BP, BN, TILED)
    late_half: tl.constexpr = half if CAUSAL else 0  # the half that comes later in local time
    apart = part == 2
    i0 = late_half if apart else part * half
    j0 = half - late_half if apart else part * half
    i, j = i0 + tl.arange(0, half), j0 + tl.arange(0, half)
    here, there = i < stop - first, j < stop - first
    scores = tl.zeros([half, half], tl.float32)
    for n0 in tl.static_range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        inside_n = (n < N)[None, :]
        qt = tl.load(q + i[:, None] * q_t + n[None, :], mask=here[:, None] & inside_n, other=0.0).to(DOT)
        kt = tl.load(k + j[:, None] * k_t + n[None, :], mask=there[:, None] & inside_n, other=0.0).to(DOT)
        scores = tl.dot(qt, tl.trans(kt), acc=scores, input_precision=PRECISION)
    scores = (scores * scale).to(DOT)
    area = (tl.num_programs(0) // 3).to(tl.int64) * nheads64 * BLOCK
    ones = tl.full([half], 1.0, tl.float32)
    for hh in tl.range(split * per_split, tl.minimum((split + 1) * per_split, share), num_stages=STAGES):
        h = g * share + hh
        unmoved = tl.minimum(hh, 0)  # 0, as no compiler knows: hoisted comparisons of tiles would take every register
        r, r_low, c, c_low, end = ones, ones, ones, ones, 0.0
        if DECAY:
            r, r_low = log_sums(rho, base + h, i, here, BLOCK, EXACT)
            c, c_low = log_sums(kappa, base + h, j, there, BLOCK, EXACT)
            end = tl.load(block_total + base + h)
        ut = tl.load(u + i * u_t + h * u_h, mask=here, other=0.0).to(tl.float32) if ROWS else ones
        wt = tl.load(w + j * w_t + h * w_h, mask=there, other=0.0).to(tl.float32) if COLS else ones
        pairs = tl.zeros([half, half], tl.float32)
        read, added, passed = tl.zeros([half], tl.float32), tl.zeros([half], tl.float32), 0.0
        for p0 in tl.static_range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            inside_p = (p < P)[None, :]
            dyt = load_head(dy_tile, dy, t0 + i0, h, p0, i, p, dy_t, dy_h, here, inside_p, TILED).to(DOT)
            vt = load_head(v_tile, v, t0 + j0, h // v_share, p0, j, p, v_t, v_h, there, inside_p, TILED).to(DOT)
            pairs = tl.dot(dyt, tl.trans(vt), acc=pairs, input_precision=PRECISION)
            y = tl.zeros([half, BP], tl.float32)  # what rows read of S, and what columns get of dS
            dv = tl.zeros([half, BP], tl.float32)
            both = tl.zeros([BP, BP], tl.float32)
            for n0 in tl.static_range(0, N, BN):
                n = n0 + tl.arange(0, BN)
                inside_n = (n < N)[None, :]
                inside = (p < P)[:, None] & inside_n & (part < 2)
                st = load_state(s_tile, states, base + h, p0, n0, p, n, P, N, inside, TILED)
                dst = load_state(ds_tile, dstates, base + h, p0, n0, p, n, P, N, inside, TILED)
                if N > BN:
                    qt = tl.load(q + i[:, None] * q_t + n[None, :], mask=here[:, None] & inside_n, other=0.0).to(DOT)
                    kt = tl.load(k + j[:, None] * k_t + n[None, :], mask=there[:, None] & inside_n, other=0.0).to(DOT)
                if NORMALIZE:  # float16 holds nothing above 65504
                    size, dsize = tl.max(tl.abs(st)) + 1e-30, tl.max(tl.abs(dst)) + 1e-30
                    y += tl.dot(qt, tl.trans((st / size).to(DOT)), input_precision=PRECISION) * size
                    dv += tl.dot(kt, tl.trans((dst / dsize).to(DOT)), input_precision=PRECISION) * dsize
                    both = tl.dot(st, tl.trans(dst), acc=both, input_precision=PRECISION)
                else:
                    y = tl.dot(qt, tl.trans(st), acc=y, input_precision=PRECISION)
                    dv = tl.dot(kt, tl.trans(dst), acc=dv, input_precision=PRECISION)
                    both = tl.dot(st, tl.trans(dst), acc=both, input_precision=PRECISION)
            if DECAY:  # ⟨dS, S⟩ is a trace: on tensor cores neither takes registers
                passed += tl.sum(tl.where(p[:, None] + unmoved == p[None, :], both, 0.0))
            read += tl.sum(y * dyt.to(tl.float32), 1)
            added += tl.sum(dv * vt.to(tl.float32), 1)
        pairs *= weights(i + unmoved, j, r, r_low, c, c_low, True, CAUSAL, STRICT, DECAY, EXACT)
        pairs *= scores.to(tl.float32)
        place = sums + (base + h) * BLOCK
        ahead = i[:, None] + unmoved - j[None, :] if CAUSAL else j[None, :] + unmoved - i[:, None]
        moved = tl.where(ahead > SKIP, pairs, 0.0)
        gathers, gives = tl.sum(moved * wt[None, :], 1) * ut, tl.sum(moved * ut[:, None], 0) * wt
        if part < 2:
            if DECAY:
                read *= tl.exp2(r + r_low if EXACT else r)
                added *= tl.exp2((end - c) - c_low if EXACT else end - c)
                if part == 0:
                    tl.store(through + base + h, passed * tl.exp2(end))
            read *= scale
            tl.store(place + ROW * area + i, gathers + read * ut)
            tl.store(place + COL * area + j, gives)
            tl.store(place + ADD * area + j, added * wt)
        else:
            tl.store(place + ACROSS * area + i, gathers)
            tl.store(place + ACROSS * area + j, gives)
        if SCALES:
            gathers, gives = tl.sum(pairs * wt[None, :], 1), tl.sum(pairs * ut[:, None], 0)
            if part < 2:
                tl.store(place + ROW_ALL * area + i, gathers + read)
                tl.store(place + COL_ALL * area + j, gives + added)
            else:
                tl.store(place + ACROSS_ALL * area + i, gathers)
                tl.store(place + ACROSS_ALL * area + j, gives)


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
        late += _across(place + ACROSS * area, later, length, real, BLOCK, CAUSAL, True, True)
        real = mask & ((earlier >= 0) & (earlier < length))[:, None]
        early = tl.load(place + ADD * area + earlier[:, None], mask=real, other=0.0)
        total = tl.cumsum(late, 0, reverse=CAUSAL) + tl.cumsum(early, 0, reverse=not CAUSAL)
        total += tl.load(through + slot * nheads64 + h, mask=h < nheads, other=0.0)[None, :]
        if COL_INCLUSIVE and not ROW_INCLUSIVE:
            total -= tl.load(place + COL * area + i[:, None], mask=mask, other=0.0)
            total += _across(place + ACROSS * area, i, length, mask, BLOCK, CAUSAL, False, True)
        tl.store(dlog_a + out, total, mask=mask)
    if DU:
        rows = tl.load(place + ROW_ALL * area + i[:, None], mask=mask, other=0.0)
        tl.store(du + out, rows + _across(place + ACROSS_ALL * area, i, length, mask, BLOCK, CAUSAL, True, False), mask=mask)
    if DW:
        cols = tl.load(place + COL_ALL * area + i[:, None], mask=mask, other=0.0)
        tl.store(dw + out, cols - _across(place + ACROSS_ALL * area, i, length, mask, BLOCK, CAUSAL, False, True), mask=mask)


@triton.jit
def _across(
    place, i, length, mask, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, GATHERED: tl.constexpr, GIVEN: tl.constexpr
):  # fmt: skip
    """What tokens of the later half gather from the earlier one, less what those of the earlier half give."""
    x = tl.load(place + i[:, None], mask=mask & (length > BLOCK // 2), other=0.0)
    late = ((i >= BLOCK // 2) if CAUSAL else (i < BLOCK // 2))[:, None]
    return tl.where(late, x if GATHERED else 0.0, -x if GIVEN else 0.0)
