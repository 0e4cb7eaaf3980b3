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

from .rows import any_wide, slot_bounds, tokens_of


@triton.jit
def gradients(
    q, k, v, dy, u, w, cu, rho, kappa, total, center, states, dstates, dq, dk,
    n_rows, seqlen, tokens, nheads, groups, q_share, k_share, v_share, scale, per_split,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, u_b, u_t, u_h, w_b, w_t, w_h,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, PACKED: tl.constexpr, FACTORED: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ and dK of every block. Grid: (blocks · sides, groups · tiles of N, splits of a group's heads).

    The two sides of a block are neighbours in the grid, as they read the same dY and V.

    Args:
        states, dstates: S and dS as they enter each block.
        dq, dk: `[splits, tokens, groups, N]`.
        scale: the factor of scores, which dS has in it already.
    """
    tiles: tl.constexpr = (N + BN - 1) // BN
    slot, split = tl.program_id(0) // 2, tl.program_id(2)
    g, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    _, _, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    batch, t, share = first // seqlen, first % seqlen, nheads // groups
    q += batch * q_b + t * q_t + (g * share // q_share) * q_h
    k += batch * k_b + t * k_t + (g * share // k_share) * k_h
    v += batch * v_b + t * v_t
    dy += batch * y_b + t * y_t
    u += batch * u_b + t * u_t
    w += batch * w_b + t * w_t
    place = ((split * tokens + first) * groups + g) * N
    base, length = slot.to(tl.int64) * nheads, (stop - first).to(tl.int32)
    lo, hi = split * per_split, tl.minimum((split + 1) * per_split, share)
    wide = False
    if FACTORED:
        wide = any_wide(center, base + g * share + lo, 1, hi - lo)
    if tl.program_id(0) % 2 == 0:
        _side(
            k, dy, v, u, w, rho, kappa, total, center, states, dq + place, wide, base, length, g * share, lo, hi, tile,
            nheads, groups, 1, v_share, scale, scale, k_t, y_t, y_h, v_t, v_h, u_t, u_h, w_t, w_h,
            BLOCK, P, BP, N, BN, True, CAUSAL, STRICT, DECAY, APART, ROWS, COLS, FACTORED, NORMALIZE, DOT, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _side(
            q, v, dy, w, u, kappa, rho, total, center, dstates, dk + place, wide, base, length, g * share, lo, hi, tile,
            nheads, groups, v_share, 1, scale, 1.0, q_t, v_t, v_h, y_t, y_h, w_t, w_h, u_t, u_h,
            BLOCK, P, BP, N, BN, False, CAUSAL, STRICT, DECAY, APART, COLS, ROWS, FACTORED, NORMALIZE, DOT, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _side(
    b, x, z, own_scales, far_scales, own_sums, far_sums, total, center, states, out, wide, base, length, h0, lo, hi, tile,
    nheads, groups, x_share, z_share, scale, state_scale, b_t, x_t, x_h, z_t, z_h, own_t, own_h, far_t, far_h,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    READS: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr,
    OWN: tl.constexpr, FAR: tl.constexpr, FACTORED: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ (READS) or dK of a block's tokens: rows, over x; what they meet are columns, over z and b.

    Args:
        own_scales, far_scales: scales of rows, if OWN, and of columns, if FAR; their sums of logs likewise.
        scale, state_scale: the factors of what comes through pairs and of what comes through the state.
    """
    i, half, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2), tile * BN + tl.arange(0, BN)
    here, inside_n = i < length, n < N
    if FACTORED and wide:
        total_out, first_half, second_half = _heads(
            x, z, own_scales, far_scales, own_sums, far_sums, total, center, states, base, length, h0, lo, hi, n, nheads,
            x_share, z_share, state_scale, x_t, x_h, z_t, z_h, own_t, own_h, far_t, far_h,
            BLOCK, P, BP, N, BN, READS, CAUSAL, STRICT, DECAY, OWN, FAR, False, NORMALIZE, DOT, PRECISION, STAGES,
        )  # fmt: skip
    else:
        total_out, first_half, second_half = _heads(
            x, z, own_scales, far_scales, own_sums, far_sums, total, center, states, base, length, h0, lo, hi, n, nheads,
            x_share, z_share, state_scale, x_t, x_h, z_t, z_h, own_t, own_h, far_t, far_h,
            BLOCK, P, BP, N, BN, READS, CAUSAL, STRICT, DECAY, OWN, FAR, FACTORED, NORMALIZE, DOT, PRECISION, STAGES,
        )  # fmt: skip
    for part in tl.static_range(2):
        j = part * (BLOCK // 2) + half
        pairs = second_half if part else first_half
        pairs = (tl.where(meet(i, j, READS == CAUSAL, 1 if STRICT else 0), pairs, 0.0) * scale).to(DOT)
        total_out = tl.dot(pairs, tokens_of(b, j, j < length, n, N, b_t, DOT), acc=total_out, input_precision=PRECISION)
    place = i.to(tl.int64)[:, None] * groups * N + n[None, :]
    tl.store(out + place, total_out.to(out.dtype.element_ty), mask=here[:, None] & inside_n[None, :])


@triton.jit
def _heads(
    x, z, own_scales, far_scales, own_sums, far_sums, total, center, states, base, length, h0, lo, hi, n, nheads,
    x_share, z_share, state_scale, x_t, x_h, z_t, z_h, own_t, own_h, far_t, far_h,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    READS: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, OWN: tl.constexpr,
    FAR: tl.constexpr, FACTORED: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What the heads [h0 + lo, h0 + hi) give through states, and dG by halves of its columns: anything where no pair meets."""
    i, half, here, inside_n = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2), tl.arange(0, BLOCK) < length, n < N
    total_out = tl.zeros([BLOCK, BN], tl.float32)
    first_half, second_half = tl.zeros([BLOCK, BLOCK // 2], tl.float32), tl.zeros([BLOCK, BLOCK // 2], tl.float32)
    for hh in tl.range(lo, hi, num_stages=STAGES):
        h = h0 + hh
        unmoved = tl.minimum(hh, 0)  # 0, as no compiler knows: hoisted comparisons of tiles would take every register
        own = tl.full([BLOCK], 1.0, tl.float32)
        r = own
        by_state = own * state_scale
        if DECAY:
            r = tl.load(own_sums + (base + h) * BLOCK + i)  # past the row's end they stay what they were
            through = r if READS else tl.load(total + base + h) - r
            by_state *= tl.exp2(through).to(tl.float32)
        if OWN:
            own = tl.load(own_scales + i * own_t + h * own_h, mask=here, other=0.0).to(tl.float32)
            by_state *= own
        for p0 in tl.static_range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            xt = tokens_of(x + (h // x_share) * x_h, i, here, p, P, x_t, DOT)
            place = (base + h) * P * N + p[:, None] * N + n[None, :]
            st = tl.load(states + place, mask=(p < P)[:, None] & inside_n[None, :], other=0.0)
            if NORMALIZE:  # float16 holds nothing above 65504
                size = tl.max(tl.abs(st)) + 1e-30
                st = (st / size).to(DOT)
                total_out += tl.dot(xt, st, input_precision=PRECISION) * (by_state * size)[:, None]
            else:
                weighted = (xt.to(tl.float32) * by_state[:, None]).to(DOT)
                total_out = tl.dot(weighted, st, acc=total_out, input_precision=PRECISION)
            for part in tl.static_range(2):
                j = part * (BLOCK // 2) + half
                zt = tokens_of(z + (h // z_share) * z_h, j, j < length, p, P, z_t, DOT)
                pairs = tl.dot(xt, tl.trans(zt), input_precision=PRECISION)
                pairs *= weights(
                    far_sums, far_scales, base, h, length, i + unmoved, j, r, far_t, far_h, center,
                    BLOCK, READS, READS == CAUSAL, STRICT, DECAY, FAR, FACTORED,
                )  # fmt: skip
                if OWN:
                    pairs *= own[:, None]
                if part:
                    second_half += pairs
                else:
                    first_half += pairs
    return total_out, first_half, second_half


@triton.jit
def meet(i, j, LATER: tl.constexpr, APART: tl.constexpr):
    """Which rows and columns are at least so far apart, rows being LATER or earlier."""
    return i[:, None] >= j[None, :] + APART if LATER else i[:, None] + APART <= j[None, :]


@triton.jit
def weights(
    sums, scales, base, h, length, i, j, r, s_t, s_h, center,
    BLOCK: tl.constexpr, READS: tl.constexpr, LATER: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr,
    SCALED: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """W of rows i, without their own scale, and of columns j, whose sums and scales are read; anything where they do not meet.

    FACTORED: exp(ρ_i − κ_j) is the product of two factors about the block's middle; else it is computed for each pair.
    """
    weight = tl.full([1, j.shape[0]], 1.0, tl.float32)
    if SCALED:
        weight *= tl.load(scales + j * s_t + h * s_h, mask=j < length, other=0.0).to(tl.float32)[None, :]
    if DECAY:
        c = tl.load(sums + (base + h) * BLOCK + j)
        if FACTORED:
            middle = tl.load(center + base + h)
            sign = 1.0 if READS else -1.0
            weight = weight * tl.exp2(sign * (middle - c))[None, :] * tl.exp2(sign * (r - middle))[:, None]
        else:
            gap = r[:, None] - c[None, :]
            meets = meet(i, j, LATER, 1 if STRICT else 0)
            weight *= tl.exp2(tl.where(meets, gap if READS else -gap, float("-inf"))).to(
                tl.float32
            )  # elsewhere it may overflow
    return weight
