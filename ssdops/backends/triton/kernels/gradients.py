"""Gradients of q, k and of log decays and scales, summed over the heads of a group inside one program.

For a block of tokens, with the state S that enters it from one side and the cotangent dS that enters from the other, and the
scores' weights W_ij = exp(ρ_i − κ_j) u_i w_j of a head:

    dG  = Σ_h (dY Vᵀ) ∘ W            dQ = dG K + Σ_h exp(ρ_i) u_i dY S
                                     dK = dGᵀ Q + Σ_h exp(E − κ_j) w_j V dS
    R   = (dY Vᵀ) ∘ W ∘ G            whose row and column sums are the gradients of ρ, κ and of the scales

A pair of tokens with no decay between them is left out of what goes to ρ and κ: under strong decays it would drown the rest.
dK is computed transposed, as a transposed product of tensor cores must not be an operand of another (DESIGN.md, decision 4).
"""

import triton
import triton.language as tl

from .rows import first_slot, slot_bounds


@triton.jit
def gradients(
    q, k, v, dy, u, w, cu, rho, kappa, total, states, dstates, dq, dk, sums, through,
    n_rows, seqlen, tokens, nheads, groups, q_share, k_share, v_share, scale, per_split,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, u_b, u_t, u_h, w_b, w_t, w_h,
    L: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, SKIP: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SUMS: tl.constexpr, PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks, groups · tiles of N, splits of a group's heads).

    Args:
        dq, dk: `[splits, tokens, groups, N]`.
        sums: float32 `[5, splits of N, blocks, nheads, BLOCK]`: what goes to ρ and κ together, what left the block, what goes
            to κ alone, row sums and column sums; written if SUMS.
        through: float32 `[splits of N, blocks, nheads]`: ⟨dS, exp(E) S⟩.
        SKIP: how far from the diagonal pairs have no decay between them.
    """
    tiles: tl.constexpr = (N + BN - 1) // BN
    slot, g, split = tl.program_id(0), tl.program_id(1) // tiles, tl.program_id(2)
    tile = tl.program_id(1) % tiles
    row, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    b, t = first // seqlen, first % seqlen
    chunk0 = first_slot(start, row, seqlen, L, PACKED) + (first - start) // L
    i = tl.arange(0, BLOCK)
    inside = first + i < stop
    slot, nheads64 = slot.to(tl.int64), nheads.to(tl.int64)
    share = nheads // groups
    n = tile * BN + tl.arange(0, BN)
    inside_n = n < N
    q += b * q_b + t * q_t + (g * share // q_share) * q_h
    k += b * k_b + t * k_t + (g * share // k_share) * k_h
    v += b * v_b + t * v_t
    dy += b * dy_b + t * dy_t
    scores = tl.zeros([BLOCK, BLOCK], tl.float32)  # [L_i, L_j]
    for n0 in tl.static_range(0, N, BN):
        m = n0 + tl.arange(0, BN)
        mask = inside[:, None] & (m < N)[None, :]
        qn = tl.load(q + i[:, None] * q_t + m[None, :], mask=mask, other=0.0).to(DOT)
        kn = tl.load(k + i[:, None] * k_t + m[None, :], mask=mask, other=0.0).to(DOT)
        scores = tl.dot(qn, tl.trans(kn), acc=scores, input_precision=PRECISION)
    mask = inside[:, None] & inside_n[None, :]
    qt = tl.load(q + i[:, None] * q_t + n[None, :], mask=mask, other=0.0).to(DOT)
    kt = tl.trans(tl.load(k + i[:, None] * k_t + n[None, :], mask=mask, other=0.0).to(DOT))  # [N, L]
    late, early = (i[:, None], i[None, :]) if CAUSAL else (i[None, :], i[:, None])
    allowed = late > early if STRICT else late >= early
    decayed = late > early + SKIP
    dscores = tl.zeros([BLOCK, BLOCK], tl.float32)
    dqt = tl.zeros([BLOCK, BN], tl.float32)
    dkt = tl.zeros([BN, BLOCK], tl.float32)
    chunk, mine = i // L, tl.arange(0, BLOCK // L)
    for hh in tl.range(split * per_split, tl.minimum((split + 1) * per_split, share), num_stages=STAGES):
        h = g * share + hh
        weight = tl.full([BLOCK, BLOCK], 1.0, tl.float32) * scale
        read, add = tl.full([BLOCK], 1.0, tl.float32) * scale, tl.full([BLOCK], 1.0, tl.float32)
        e = 0.0
        if DECAY:
            base = chunk0 * nheads64 + h
            exists = first + mine * L < stop
            ends = tl.load(total + base + mine * nheads64, mask=exists, other=0.0)
            before = (mine[None, :] < chunk[:, None]) if CAUSAL else (mine[None, :] > chunk[:, None])
            offset = tl.sum(tl.where(before, ends[None, :], 0.0), 1)
            e = tl.sum(ends, 0)
            width: tl.constexpr = 2 * L if EXACT else L
            place = (base + chunk * nheads64) * width + i % L
            r = tl.load(rho + place, mask=inside, other=0.0)
            kap = tl.load(kappa + place, mask=inside, other=0.0) if APART else r
            gap = (r[:, None] - kap[None, :]) + (offset[:, None] - offset[None, :])
            r_all, kap_all = r + offset, kap + offset
            if EXACT:
                r_low = tl.load(rho + place + L, mask=inside, other=0.0)
                kap_low = tl.load(kappa + place + L, mask=inside, other=0.0) if APART else r_low
                gap += r_low[:, None] - kap_low[None, :]
                r_all += r_low
                kap_all += kap_low
            weight *= tl.exp2(tl.where(late >= early, gap, 0.0))
            read *= tl.exp2(r_all)
            add *= tl.exp2(e - kap_all)
        ut, wt = tl.full([BLOCK], 1.0, tl.float32), tl.full([BLOCK], 1.0, tl.float32)
        if ROWS:
            ut = tl.load(u + b * u_b + (t + i) * u_t + h * u_h, mask=inside, other=0.0).to(tl.float32)
        if COLS:
            wt = tl.load(w + b * w_b + (t + i) * w_t + h * w_h, mask=inside, other=0.0).to(tl.float32)
        products = tl.zeros([BLOCK, BLOCK], tl.float32)
        entered = tl.zeros([BLOCK], tl.float32)
        left = tl.zeros([BLOCK], tl.float32)
        passed = 0.0
        for p0 in tl.static_range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            inside_p = p < P
            here = inside[:, None] & inside_p[None, :]
            vt = tl.load(v + (h // v_share) * v_h + i[:, None] * v_t + p[None, :], mask=here, other=0.0).to(DOT)
            dyt = tl.load(dy + h * dy_h + i[:, None] * dy_t + p[None, :], mask=here, other=0.0).to(DOT)
            place = (slot * nheads64 + h) * P * N + p[:, None] * N + n[None, :]
            st = tl.load(states + place, mask=inside_p[:, None] & inside_n[None, :], other=0.0)
            dst = tl.load(dstates + place, mask=inside_p[:, None] & inside_n[None, :], other=0.0)
            size, dsize = 1.0, 1.0
            if NORMALIZE:  # float16 holds nothing above 65504
                size, dsize = tl.max(tl.abs(st)) + 1e-30, tl.max(tl.abs(dst)) + 1e-30
                passed += tl.sum(st * dst)
                st, dst = st / size, dst / dsize
            elif DECAY:
                passed += tl.sum(st.to(tl.float32) * dst.to(tl.float32))
            products = tl.dot(dyt, tl.trans(vt), acc=products, input_precision=PRECISION)  # [L_i, L_j]
            out = tl.dot(dyt, st.to(DOT), input_precision=PRECISION) * (read * size)[:, None]  # [L, N]
            entered += tl.sum(out * qt.to(tl.float32), 1)
            dqt += out * ut[:, None]
            into = tl.dot(tl.trans(dst.to(DOT)), tl.trans(vt), input_precision=PRECISION) * (add * dsize)[None, :]  # [N, L]
            left += tl.sum(into * kt.to(tl.float32), 0)
            dkt += into * wt[None, :]
        products = tl.where(allowed, products * weight, 0.0)
        dscores += products * (ut[:, None] * wt[None, :])
        if SUMS:
            moved = products * scores
            area = tl.num_programs(0).to(tl.int64) * nheads64 * BLOCK * tiles
            place = sums + (tile * tl.num_programs(0) + slot) * nheads64 * BLOCK + h * BLOCK + i
            if tiles > 1:
                moved = tl.where(tile == 0, moved, 0.0)
            drho = tl.sum(tl.where(decayed, moved, 0.0) * wt[None, :], 1) * ut
            dkappa = tl.sum(tl.where(decayed, moved, 0.0) * ut[:, None], 0) * wt
            tl.store(place, drho - dkappa + entered * ut)
            tl.store(place + area, left * wt)
            tl.store(place + 2 * area, -dkappa)
            if ROWS:
                tl.store(place + 3 * area, tl.sum(moved * wt[None, :], 1) + entered)
            tl.store(place + 4 * area, tl.sum(moved * ut[:, None], 0) + left)
            if DECAY:
                tl.store(through + (tile * tl.num_programs(0) + slot) * nheads64 + h, passed * tl.exp2(e))
    low = dscores.to(DOT)
    dqt = tl.dot(low, tl.trans(kt), acc=dqt, input_precision=PRECISION)
    dkt = tl.dot(tl.trans(qt), low, acc=dkt, input_precision=PRECISION)
    area = (split * tokens + first) * groups + g
    place = (area + i.to(tl.int64) * groups) * N
    tl.store(dq + place[:, None] + n[None, :], dqt.to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + place[None, :] + n[:, None], dkt.to(dk.dtype.element_ty), mask=inside[None, :] & inside_n[:, None])


@triton.jit
def token_gradients(
    sums, through, cu, dlog_a, drows, dcols,
    n_rows, seqlen, tokens, nheads, tiles,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ROW_INCLUSIVE: tl.constexpr,
    COL_INCLUSIVE: tl.constexpr, DECAY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of log_a, u and w, `[tokens, nheads]`, from the sums that `gradients` leaves. Grid: (blocks, nheads / HEADS).

    d_t = log_a[t] weighs on what row i ≥ t reads (i > t if ρ is exclusive), on what token j < t adds (j ≤ t if κ is), and on what passes.
    """
    slot = tl.program_id(0)
    row, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    i = tl.arange(0, BLOCK)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    blocks, nheads64 = tl.num_programs(0).to(tl.int64), nheads.to(tl.int64)
    length = tl.minimum(stop - first, BLOCK).to(tl.int32)
    mask = (i < length)[:, None] & (h < nheads)[None, :]
    area = blocks * nheads64 * BLOCK * tiles
    late_by: tl.constexpr = 0 if ROW_INCLUSIVE else 1
    early_by: tl.constexpr = 1 if COL_INCLUSIVE else 0
    step: tl.constexpr = 1 if CAUSAL else -1
    later, earlier = i + late_by * step, i - early_by * step  # the neighbours from which sums run, in local time
    total = tl.zeros([BLOCK, HEADS], tl.float32)
    rows = tl.zeros([BLOCK, HEADS], tl.float32)
    cols = tl.zeros([BLOCK, HEADS], tl.float32)
    for tile in range(0, tiles):
        base = (tile * blocks + slot) * nheads64 + h
        here = sums + base[None, :] * BLOCK
        if DECAY:
            inside = mask & ((later >= 0) & (later < length))[:, None]
            late = tl.load(here + later[:, None], mask=inside, other=0.0)
            inside = mask & ((earlier >= 0) & (earlier < length))[:, None]
            early = tl.load(here + area + earlier[:, None], mask=inside, other=0.0)
            total += tl.cumsum(late, 0, reverse=CAUSAL) + tl.cumsum(early, 0, reverse=not CAUSAL)
            total += tl.load(through + base, mask=h < nheads, other=0.0)[None, :]
            if COL_INCLUSIVE and not ROW_INCLUSIVE:
                total += tl.load(here + 2 * area + i[:, None], mask=mask, other=0.0)
        if ROWS:
            rows += tl.load(here + 3 * area + i[:, None], mask=mask, other=0.0)
        if COLS:
            cols += tl.load(here + 4 * area + i[:, None], mask=mask, other=0.0)
    place = (first + i)[:, None] * nheads64 + h[None, :]
    if DECAY:
        tl.store(dlog_a + place, total, mask=mask)
    if ROWS:
        tl.store(drows + place, rows, mask=mask)
    if COLS:
        tl.store(dcols + place, cols, mask=mask)
