"""Gradients of q, k and of log decays and scales, summed over the heads of a group inside one program.

For a block of tokens, with the state S that enters it from one side and the cotangent dS that enters from the other, and the
weights W_ij = exp(ρ_i − κ_j) u_i w_j of a head's scores:

    dG = Σ_h (dY Vᵀ) ∘ W        dQ = dG K  + Σ_h exp(ρ_i) u_i dY S
                                dK = dGᵀ Q + Σ_h exp(E − κ_j) w_j V dS

The two are one computation with two sides: tokens that are read for (rows i, over X = dY, Z = V) and tokens that were added
(rows j, over X = V, Z = dY). Each side computes dG its own way round, as the transpose of a product of tensor cores must not
be an operand of another (DESIGN.md, decision 4). Row sums of (X Zᵀ) ∘ W ∘ G are the gradients of ρ, κ and of the scales. A
pair of tokens with no decay between them is left out of what goes to ρ and κ: strong decays would drown the rest in it.
"""

import triton
import triton.language as tl

from .rows import first_slot, slot_bounds


@triton.jit
def gradients(
    a, b, x, z, u, w, cu, rho, kappa, total, states, out, sums,
    n_rows, seqlen, tokens, nheads, groups, a_share, b_share, x_share, z_share, scale, row_scale, per_split,
    a_b, a_t, a_h, b_b, b_t, b_h, x_b, x_t, x_h, z_b, z_t, z_h, u_b, u_t, u_h, w_b, w_t, w_h,
    L: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr, READS: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr, SKIP: tl.constexpr, DECAY: tl.constexpr,
    APART: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SUMS: tl.constexpr,
    PACKED: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ (READS) or dK of TILE tokens, half a block. Grid: (blocks · 2, groups · tiles of N, splits of a group's heads).

    Args:
        a, b: q and k, or k and q: the rows' and the columns' side of the scores.
        x, z: dY and V, or V and dY.
        u, w: the scales of rows and columns.
        states: S, or dS, as it enters each block.
        out: `[splits, tokens, groups, N]`.
        sums: float32 `[3, tiles of N, blocks, nheads, BLOCK]`: what rows exchange within the block (pairs without decay
            left out), what they exchange with the state, and all of it before the row's own scale; written if SUMS.
        row_scale: the factor of what rows exchange with the state.
        SKIP: how far from the diagonal pairs have no decay between them.
    """
    tiles: tl.constexpr = (N + BN - 1) // BN
    slot, half = tl.program_id(0) // 2, tl.program_id(0) % 2
    g, tile, split = tl.program_id(1) // tiles, tl.program_id(1) % tiles, tl.program_id(2)
    row, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    mine = first + half * TILE
    if mine >= stop:
        return
    theirs = first + (1 - half) * TILE  # the other half of the block, which rows see if it lies on their side
    sees = (half == (1 if READS == CAUSAL else 0)) & (theirs < stop)
    batch, t = first // seqlen, first % seqlen
    chunk0 = first_slot(start, row, seqlen, L, PACKED) + (first - start) // L
    i, n = tl.arange(0, TILE), tile * BN + tl.arange(0, BN)
    here, there = i < stop - mine, (i < stop - theirs) & sees
    at, away = half * TILE + i, (1 - half) * TILE + i  # in tokens from the block's start
    nheads64, share = nheads.to(tl.int64), nheads // groups
    a += batch * a_b + t * a_t + (g * share // a_share) * a_h
    b += batch * b_b + t * b_t + (g * share // b_share) * b_h
    x += batch * x_b + t * x_t
    z += batch * z_b + t * z_t
    near = tl.zeros([TILE, TILE], tl.float32)  # the scores of the tile's own tokens, and with those of the other half
    far = tl.zeros([TILE, TILE], tl.float32)
    for n0 in tl.static_range(0, N, BN):
        m = n0 + tl.arange(0, BN)
        inside_m = (m < N)[None, :]
        at_a = tl.load(a + at[:, None] * a_t + m[None, :], mask=here[:, None] & inside_m, other=0.0).to(DOT)
        at_b = tl.load(b + at[:, None] * b_t + m[None, :], mask=here[:, None] & inside_m, other=0.0).to(DOT)
        away_b = tl.load(b + away[:, None] * b_t + m[None, :], mask=there[:, None] & inside_m, other=0.0).to(DOT)
        near = tl.dot(at_a, tl.trans(at_b), acc=near, input_precision=PRECISION)
        far = tl.dot(at_a, tl.trans(away_b), acc=far, input_precision=PRECISION)
    inside_n = n < N
    mask = here[:, None] & inside_n[None, :]
    own = tl.load(a + at[:, None] * a_t + n[None, :], mask=mask, other=0.0)  # [TILE, N]
    if READS == CAUSAL:
        ahead = i[:, None] - i[None, :]  # how far a column lies on the side that its row sees
    else:
        ahead = i[None, :] - i[:, None]
    allowed = ahead > 0 if STRICT else ahead >= 0
    dnear = tl.zeros([TILE, TILE], tl.float32)
    dfar = tl.zeros([TILE, TILE], tl.float32)
    total_out = tl.zeros([TILE, BN], tl.float32)
    chunks = tl.arange(0, BLOCK // L)
    exists = first + chunks * L < stop
    for hh in tl.range(split * per_split, tl.minimum((split + 1) * per_split, share), num_stages=STAGES):
        h = g * share + hh
        pairs = tl.full([TILE, TILE], 1.0, tl.float32) * scale
        row_far, col_far = tl.full([TILE], 1.0, tl.float32) * scale, tl.full([TILE], 1.0, tl.float32)
        by_state = tl.full([TILE], 1.0, tl.float32) * row_scale
        if DECAY:
            base = chunk0 * nheads64 + h
            ends = tl.load(total + base + chunks * nheads64, mask=exists, other=0.0)
            offset = _offset(ends, chunks, at // L, CAUSAL)
            away_offset = _offset(ends, chunks, away // L, CAUSAL)
            border = tl.sum(tl.where((chunks < TILE // L) == CAUSAL, ends, 0.0), 0)  # where the halves meet, in local time
            width: tl.constexpr = 2 * L if EXACT else L
            at_place = (base + (at // L) * nheads64) * width + at % L
            away_place = (base + (away // L) * nheads64) * width + away % L
            r, r_low = _sums(rho, at_place, here, L, EXACT)
            kap, kap_low = r, r_low
            far_kap, far_low = _sums(kappa if READS else rho, away_place, there, L, EXACT)
            if APART:
                kap, kap_low = _sums(kappa, at_place, here, L, EXACT)
            if READS:
                gap = r[:, None] - kap[None, :] + (offset[:, None] - offset[None, :])
                if EXACT:
                    gap += r_low[:, None] - kap_low[None, :]
                by_state *= tl.exp2(r + offset + r_low)
                row_far *= tl.exp2((r + offset - border) + r_low)
                col_far *= tl.exp2((border - far_kap - away_offset) - far_low)
            else:
                gap = r[None, :] - kap[:, None] + (offset[None, :] - offset[:, None])
                if EXACT:
                    gap += r_low[None, :] - kap_low[:, None]
                by_state *= tl.exp2((tl.sum(ends, 0) - kap - offset) - kap_low)
                row_far *= tl.exp2((border - kap - offset) - kap_low)
                col_far *= tl.exp2((far_kap + away_offset - border) + far_low)
            pairs *= tl.exp2(tl.where(ahead >= 0, gap, 0.0))  # elsewhere gap may be positive and overflow
        rows, cols, cols_far = tl.full([TILE], 1.0, tl.float32), tl.full([TILE], 1.0, tl.float32), tl.full([TILE], 1.0, tl.float32)
        if ROWS:
            uh = u + batch * u_b + t * u_t + h * u_h
            if READS:
                rows *= tl.load(uh + at * u_t, mask=here, other=0.0).to(tl.float32)
            else:
                cols *= tl.load(uh + at * u_t, mask=here, other=0.0).to(tl.float32)
                cols_far *= tl.load(uh + away * u_t, mask=there, other=0.0).to(tl.float32)
        if COLS:
            wh = w + batch * w_b + t * w_t + h * w_h
            if READS:
                cols *= tl.load(wh + at * w_t, mask=here, other=0.0).to(tl.float32)
                cols_far *= tl.load(wh + away * w_t, mask=there, other=0.0).to(tl.float32)
            else:
                rows *= tl.load(wh + at * w_t, mask=here, other=0.0).to(tl.float32)
        product = tl.zeros([TILE, TILE], tl.float32)
        product_far = tl.zeros([TILE, TILE], tl.float32)
        crossed = tl.zeros([TILE], tl.float32)
        for p0 in tl.static_range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            inside_p = (p < P)[None, :]
            xh, zh = x + (h // x_share) * x_h, z + (h // z_share) * z_h
            xt = tl.load(xh + at[:, None] * x_t + p[None, :], mask=here[:, None] & inside_p, other=0.0).to(DOT)
            zt = tl.load(zh + at[:, None] * z_t + p[None, :], mask=here[:, None] & inside_p, other=0.0).to(DOT)
            z_far = tl.load(zh + away[:, None] * z_t + p[None, :], mask=there[:, None] & inside_p, other=0.0).to(DOT)
            place = (slot * nheads64 + h) * P * N + p[:, None] * N + n[None, :]
            st = tl.load(states + place, mask=tl.trans(inside_p) & inside_n[None, :], other=0.0)
            size = 1.0
            if NORMALIZE:  # float16 holds nothing above 65504
                size = tl.max(tl.abs(st)) + 1e-30
                st = st / size
            moved = tl.dot(xt, st.to(DOT), input_precision=PRECISION) * (by_state * size)[:, None]  # [TILE, N]
            product = tl.dot(xt, tl.trans(zt), acc=product, input_precision=PRECISION)
            product_far = tl.dot(xt, tl.trans(z_far), acc=product_far, input_precision=PRECISION)
            if SUMS:
                crossed += tl.sum(moved * own.to(tl.float32), 1)
            if ROWS or COLS:
                moved *= rows[:, None]
            total_out += moved
        product *= pairs * cols[None, :]
        product_far *= row_far[:, None] * (col_far * cols_far)[None, :]
        if SUMS:
            exchanged = product * near
            across = product_far * far
            if SKIP:  # the two tokens that touch across the halves
                across = tl.where(tl.abs(at[:, None] - away[None, :]) <= SKIP, 0.0, across)
            kept = tl.sum(tl.where(ahead > SKIP, exchanged, 0.0), 1) + tl.sum(across, 1)
            first_tile = tl.where(tile == 0, 1.0, 0.0)  # pairs are summed by the first tile of N
            area = (tl.num_programs(0) // 2).to(tl.int64) * nheads64 * BLOCK
            place = sums + tile * area + (slot * nheads64 + h) * BLOCK + at
            tl.store(place, kept * rows * first_tile)
            tl.store(place + tiles * area, crossed * rows)
            if ROWS or COLS:
                everything = tl.sum(tl.where(allowed, exchanged, 0.0), 1) + tl.sum(product_far * far, 1)
                tl.store(place + 2 * tiles * area, everything * first_tile + crossed)
        dnear += tl.where(allowed, product, 0.0) * rows[:, None]
        dfar += product_far * rows[:, None]
    bt = tl.load(b + at[:, None] * b_t + n[None, :], mask=mask, other=0.0).to(DOT)
    total_out = tl.dot(dnear.to(DOT), bt, acc=total_out, input_precision=PRECISION)
    b_far = tl.load(b + away[:, None] * b_t + n[None, :], mask=there[:, None] & inside_n[None, :], other=0.0).to(DOT)
    total_out = tl.dot(dfar.to(DOT), b_far, acc=total_out, input_precision=PRECISION)
    place = ((split * tokens + mine + i) * groups + g) * N
    tl.store(out + place[:, None] + n[None, :], total_out.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sums(x, place, mask, L: tl.constexpr, EXACT: tl.constexpr):
    """ρ or κ of a chunk, high and low part."""
    high = tl.load(x + place, mask=mask, other=0.0)
    low = tl.load(x + place + L, mask=mask, other=0.0) if EXACT else high * 0.0
    return high, low


@triton.jit
def _offset(ends, chunks, chunk, CAUSAL: tl.constexpr):
    """The log decay of the block's chunks before a token's own, in local time."""
    before = chunks[None, :] < chunk[:, None] if CAUSAL else chunks[None, :] > chunk[:, None]
    return tl.sum(tl.where(before, ends[None, :], 0.0), 1)


@triton.jit
def token_gradients(
    reads, adds, through, cu, dlog_a, drows, dcols,
    n_rows, seqlen, tokens, nheads, tiles, through_tiles,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ROW_INCLUSIVE: tl.constexpr,
    COL_INCLUSIVE: tl.constexpr, DECAY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of log_a, u and w, `[tokens, nheads]`, from the sums of the two sides. Grid: (blocks, nheads / HEADS).

    log_a[t] weighs on what row i ≥ t reads (i > t if ρ is exclusive), on what token j < t adds (j ≤ t if κ is), and on what
    passes the block. What rows and columns exchange cancels where decay is slow, so it is subtracted before it is summed.
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
    area = blocks * nheads64 * BLOCK
    step: tl.constexpr = 1 if CAUSAL else -1
    later = i + (0 if ROW_INCLUSIVE else step)  # the tokens from which the two sums run, in local time
    earlier = i - (step if COL_INCLUSIVE else 0)
    total = tl.zeros([BLOCK, HEADS], tl.float32)
    rows = tl.zeros([BLOCK, HEADS], tl.float32)
    cols = tl.zeros([BLOCK, HEADS], tl.float32)
    for tile in range(0, tiles):
        place = tile * area + (slot * nheads64 + h)[None, :] * BLOCK
        if DECAY:
            real = mask & ((later >= 0) & (later < length))[:, None]
            late = tl.load(reads + place + later[:, None], mask=real, other=0.0)
            late -= tl.load(adds + place + later[:, None], mask=real, other=0.0)
            late += tl.load(reads + tiles * area + place + later[:, None], mask=real, other=0.0)
            real = mask & ((earlier >= 0) & (earlier < length))[:, None]
            early = tl.load(adds + tiles * area + place + earlier[:, None], mask=real, other=0.0)
            total += tl.cumsum(late, 0, reverse=CAUSAL) + tl.cumsum(early, 0, reverse=not CAUSAL)
            if COL_INCLUSIVE and not ROW_INCLUSIVE:
                total -= tl.load(adds + place + i[:, None], mask=mask, other=0.0)
        if ROWS:
            rows += tl.load(reads + 2 * tiles * area + place + i[:, None], mask=mask, other=0.0)
        if COLS:
            cols += tl.load(adds + 2 * tiles * area + place + i[:, None], mask=mask, other=0.0)
    place = (first + i)[:, None] * nheads64 + h[None, :]
    if DECAY:
        for tile in range(0, through_tiles):
            passed = tl.load(through + (tile * blocks + slot) * nheads64 + h, mask=h < nheads, other=0.0)
            total += passed[None, :]
        tl.store(dlog_a + place, total, mask=mask)
    if ROWS:
        tl.store(drows + place, rows, mask=mask)
    if COLS:
        tl.store(dcols + place, cols, mask=mask)
