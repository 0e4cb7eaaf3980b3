"""Gradients of q and k, summed over the heads of a group inside one program.

For a block of tokens, with the state S that enters it from one side and the cotangent dS that enters from the other, and the
weights W_ij = exp(ρ_i − κ_j) u_i w_j of a head's scores G = Q Kᵀ:

    dG = Σ_h (dY Vᵀ) ∘ W        dQ = dG K  + Σ_h exp(ρ_i) u_i dY S
                                dK = dGᵀ Q + Σ_h exp(E − κ_j) w_j V dS

The two are one computation with two sides: tokens that are read for (rows i, over X = dY, Z = V) and tokens that were added
(rows j, over X = V, Z = dY). Each side computes dG its own way round, as the transpose of a product of tensor cores must not
be an operand of another (DESIGN.md, decision 4).
"""

import triton
import triton.language as tl

from .rows import slot_bounds

SUM_KINDS = tl.constexpr(3)
KEPT, CROSSED, EVERYTHING = (tl.constexpr(index) for index in range(3))
"""The kinds of sums over a row: what it exchanges within its block, by pairs that decay; what it exchanges with the state; and
both, with pairs that do not decay, before the row's own scale."""


@triton.jit
def contract(
    a, b, x, z, u, w, cu, rho, kappa, block_total, states, out, sums,
    n_rows, seqlen, tokens, nheads, groups, a_share, b_share, x_share, z_share, scale, row_scale, per_split,
    a_b, a_t, a_h, b_b, b_t, b_h, x_b, x_t, x_h, z_b, z_t, z_h, u_b, u_t, u_h, w_b, w_t, w_h,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    READS: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr, SCALES: tl.constexpr, SKIP: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ (READS) or dK of a block. Grid: (blocks, groups · tiles of N, splits of a group's heads).

    Args:
        a, b: q and k, or k and q: the rows' and the columns' side of the scores.
        x, z: dY and V, or V and dY.
        u, w: the scales of rows and columns.
        states: S, or dS, as it enters each block.
        out: `[splits, tokens, groups, N]`.
        sums: float32 `[tiles of N, 3, blocks, nheads, BLOCK]`, what each row exchanges through (X Zᵀ) ∘ W ∘ G and through the
            state: written if SUMS, the last of them if SCALES.
        SKIP: how far apart tokens have no decay between them.
        scale, row_scale: the factors of what comes through pairs and of what comes through the state.
    """
    tiles: tl.constexpr = (N + BN - 1) // BN
    slot, split = tl.program_id(0), tl.program_id(2)
    g, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    n = tile * BN + tl.arange(0, BN)
    _, _, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    batch, t = first // seqlen, first % seqlen
    base = slot.to(tl.int64) * nheads
    i, half = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    here, in_first, in_second = i < stop - first, half < stop - first, BLOCK // 2 + half < stop - first
    share = nheads // groups
    a += batch * a_b + t * a_t + (g * share // a_share) * a_h
    b += batch * b_b + t * b_t + (g * share // b_share) * b_h
    x += batch * x_b + t * x_t
    z += batch * z_b + t * z_t
    u += batch * u_b + t * u_t
    w += batch * w_b + t * w_t
    total_out = tl.zeros([BLOCK, BN], tl.float32)
    first_half = tl.zeros([BLOCK, BLOCK // 2], tl.float32)  # dG by halves of its columns
    second_half = tl.zeros([BLOCK, BLOCK // 2], tl.float32)
    inside_n = (n < N)[None, :]
    own_a = tl.load(a + i[:, None] * a_t + n[None, :], mask=here[:, None] & inside_n, other=0.0).to(DOT)
    near = tl.zeros([BLOCK, BLOCK // 2], tl.float32)  # scores by halves of their columns
    far = tl.zeros([BLOCK, BLOCK // 2], tl.float32)
    if SUMS:
        for n0 in tl.static_range(0, N, BN):
            m = n0 + tl.arange(0, BN)
            inside_m = (m < N)[None, :]
            at = tl.load(a + i[:, None] * a_t + m[None, :], mask=here[:, None] & inside_m, other=0.0).to(DOT)
            bt = tl.load(b + half[:, None] * b_t + m[None, :], mask=in_first[:, None] & inside_m, other=0.0).to(DOT)
            near = tl.dot(at, tl.trans(bt), acc=near, input_precision=PRECISION)
            bt = tl.load(b + (BLOCK // 2 + half)[:, None] * b_t + m[None, :], mask=in_second[:, None] & inside_m, other=0.0).to(
                DOT
            )
            far = tl.dot(at, tl.trans(bt), acc=far, input_precision=PRECISION)
    near, far = (near * scale).to(DOT), (far * scale).to(DOT)
    area = tl.num_programs(0).to(tl.int64) * nheads * BLOCK
    for hh in tl.range(split * per_split, tl.minimum((split + 1) * per_split, share), num_stages=STAGES):
        h = g * share + hh
        unmoved = tl.minimum(hh, 0)  # 0, as no compiler knows: hoisted comparisons of tiles would take every register
        by_state = tl.full([BLOCK], 1.0, tl.float32) * row_scale
        r = by_state
        if DECAY:
            r = tl.load((rho if READS else kappa) + (base + h) * BLOCK + i)  # past the row's end they stay what they were
            through = r if READS else tl.load(block_total + base + h) - r
            by_state *= tl.exp2(through).to(tl.float32)
        own = tl.full([BLOCK], 1.0, tl.float32)
        if READS and ROWS:
            own = tl.load(u + i * u_t + h * u_h, mask=here, other=0.0).to(tl.float32)
        if COLS and not READS:
            own = tl.load(w + i * w_t + h * w_h, mask=here, other=0.0).to(tl.float32)
        crossed, kept = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        everything = tl.zeros([BLOCK], tl.float32)
        for p0 in tl.static_range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            inside_p = (p < P)[None, :]
            xh, zh = x + (h // x_share) * x_h, z + (h // z_share) * z_h
            xt = tl.load(xh + i[:, None] * x_t + p[None, :], mask=here[:, None] & inside_p, other=0.0).to(DOT)
            z_first = tl.load(zh + half[:, None] * z_t + p[None, :], mask=in_first[:, None] & inside_p, other=0.0).to(DOT)
            z_second = tl.load(
                zh + (BLOCK // 2 + half)[:, None] * z_t + p[None, :], mask=in_second[:, None] & inside_p, other=0.0
            ).to(DOT)
            place = (base + h) * P * N + p[:, None] * N + n[None, :]
            st = tl.load(states + place, mask=(p < P)[:, None] & inside_n, other=0.0)
            if NORMALIZE:  # float16 holds nothing above 65504
                size = tl.max(tl.abs(st)) + 1e-30
                st = (st / size).to(DOT)
                total_out += tl.dot(xt, st, input_precision=PRECISION) * (by_state * own * size)[:, None]
            else:
                size = 1.0
                weighted = (xt.to(tl.float32) * (by_state * own)[:, None]).to(DOT)
                total_out = tl.dot(weighted, st, acc=total_out, input_precision=PRECISION)
            if SUMS:
                y = tl.dot(own_a, tl.trans(st), input_precision=PRECISION)  # what rows exchange with the state, over X
                crossed += tl.sum(y * xt.to(tl.float32), 1) * size
            for part in tl.static_range(2):
                j = part * (BLOCK // 2) + half
                pairs = tl.dot(xt, tl.trans(z_second if part else z_first), input_precision=PRECISION)
                pairs *= _column_weights(
                    kappa if READS else rho, u, w, base, h, first, stop, i + unmoved, j, r,
                    u_t, u_h, w_t, w_h, BLOCK, READS, CAUSAL, STRICT, DECAY, ROWS, COLS,
                )  # fmt: skip
                given = pairs * own[:, None] if ROWS or COLS else pairs
                if part:
                    second_half += given
                else:
                    first_half += given
                if SUMS:
                    pairs *= tl.where(unmoved == 0, far if part else near, 0.0).to(tl.float32)
                    if SCALES:
                        everything += tl.sum(pairs, 1)
                    if READS == CAUSAL:
                        pairs = tl.where(i[:, None] + unmoved > j[None, :] + SKIP, pairs, 0.0)
                    else:
                        pairs = tl.where(j[None, :] + unmoved > i[:, None] + SKIP, pairs, 0.0)
                    kept += tl.sum(pairs, 1)
        if SUMS:
            crossed *= by_state
            kept = tl.where(tile == 0, kept, 0.0)  # pairs are summed by the first tile of N
            place = sums + tile * SUM_KINDS * area + (base + h) * BLOCK + i
            tl.store(place + KEPT * area, kept * own)
            tl.store(place + CROSSED * area, crossed * own)
            if SCALES:
                tl.store(place + EVERYTHING * area, tl.where(tile == 0, everything, 0.0) + crossed)
    bt = tl.load(b + half[:, None] * b_t + n[None, :], mask=in_first[:, None] & inside_n, other=0.0).to(DOT)
    total_out = tl.dot((first_half * scale).to(DOT), bt, acc=total_out, input_precision=PRECISION)
    bt = tl.load(b + (BLOCK // 2 + half)[:, None] * b_t + n[None, :], mask=in_second[:, None] & inside_n, other=0.0).to(DOT)
    total_out = tl.dot((second_half * scale).to(DOT), bt, acc=total_out, input_precision=PRECISION)
    place = ((split * tokens + first + i) * groups + g) * N
    tl.store(out + place[:, None] + n[None, :], total_out.to(out.dtype.element_ty), mask=here[:, None] & inside_n)


@triton.jit
def _column_weights(
    sums, u, w, base, h, first, stop, i, j, r, u_t, u_h, w_t, w_h,
    BLOCK: tl.constexpr, READS: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    DECAY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """W of rows i, whose own scale is left out, and of columns j, whose sums and scales are read."""
    there = j < stop - first
    if READS == CAUSAL:
        sees = i[:, None] > j[None, :] if STRICT else i[:, None] >= j[None, :]
    else:
        sees = i[:, None] < j[None, :] if STRICT else i[:, None] <= j[None, :]
    if DECAY:
        c = tl.load(sums + (base + h) * BLOCK + j)
        gap = r[:, None] - c[None, :]
        gap = tl.where(sees, gap if READS else -gap, float("-inf"))  # elsewhere it may be positive and overflow
        weight = tl.exp2(gap).to(tl.float32)
    else:
        weight = tl.where(sees, 1.0, 0.0)
    if ROWS and not READS:
        weight *= tl.load(u + j * u_t + h * u_h, mask=there, other=0.0).to(tl.float32)[None, :]
    if COLS and READS:
        weight *= tl.load(w + j * w_t + h * w_h, mask=there, other=0.0).to(tl.float32)[None, :]
    return weight
