"""dV, and what the tokens of a block exchange, from the states on both sides of it.

With a block's scores G = scale · Q Kᵀ, the state S that enters it from one side and the cotangent dS from the other,

    Y  = exp(ρ) u scale ∘ Q S ᵀ + (G ∘ W) V
    dV = exp(E − κ) w  ∘ K dSᵀ + (G ∘ W)ᵀ dY

are one computation with two sides. Y is known; what is wanted of it is ⟨dY_i, Y_i⟩, what row i reads, and of dV, besides
itself, ⟨V_j, dV_j⟩, what column j gives: gradients of log decays are made of these (`tokens.py`). Neither may have pairs in it
that do not decay, as strong decays would drown everything else in those: they are added after the sum is taken.
"""

import triton
import triton.language as tl

from .gradients import meet, weights
from .rows import any_wide, slot_bounds, tokens_of


@triton.jit
def exchange(
    q, k, v, dy, u, w, cu, rho, kappa, total, center, states, dstates, dv, reads, gives, all_reads, all_gives,
    n_rows, seqlen, tokens, nheads, groups, q_share, k_share, v_share, scale, per_split,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, u_b, u_t, u_h, w_b, w_t, w_h,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    STRICT: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PACKED: tl.constexpr, SUMS: tl.constexpr, ALL_SUMS: tl.constexpr, SKIP: tl.constexpr, LOG_COLS: tl.constexpr,
    FACTORED: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks · sides, groups, splits of a group's heads); columns are the only side unless SUMS.

    Args:
        dv: `[tokens, nheads, P]`.
        reads, gives: `[blocks, nheads, BLOCK]`: written if SUMS; all_reads, all_gives: with pairs that do not decay, and
            without the token's own scale, if ALL_SUMS.
        SKIP: how far apart tokens have no decay between them.
    """
    sides: tl.constexpr = 2 if SUMS else 1
    slot = tl.program_id(0) // sides
    _, _, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, BLOCK, PACKED)
    if first >= stop:
        return
    batch, t, share, g = first // seqlen, first % seqlen, nheads // groups, tl.program_id(1)
    q += batch * q_b + t * q_t + (g * share // q_share) * q_h
    k += batch * k_b + t * k_t + (g * share // k_share) * k_h
    v += batch * v_b + t * v_t
    dy += batch * y_b + t * y_t
    u += batch * u_b + t * u_t
    w += batch * w_b + t * w_t
    dv += first * nheads * P
    base, length = slot.to(tl.int64) * nheads, (stop - first).to(tl.int32)
    h0 = g * share
    lo, hi = h0 + tl.program_id(2) * per_split, h0 + tl.minimum((tl.program_id(2) + 1) * per_split, share)
    wide = False
    if FACTORED:
        wide = any_wide(center, base + lo, 1, hi - lo)
    if tl.program_id(0) % sides == sides - 1:
        _side(
            k, q, v, dy, w, u, kappa, rho, total, center, dstates, dv, gives, all_gives, wide, base, length, lo, hi, nheads,
            v_share, 1, scale, 1.0, k_t, q_t, v_t, v_h, y_t, y_h, w_t, w_h, u_t, u_h,
            BLOCK, P, BP, N, BN, False, CAUSAL, STRICT, DECAY, COLS, ROWS, SUMS, ALL_SUMS, SKIP, LOG_COLS,
            FACTORED, NORMALIZE, DOT, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _side(
            q, k, dy, v, u, w, rho, kappa, total, center, states, dv, reads, all_reads, wide, base, length, lo, hi, nheads,
            1, v_share, scale, scale, q_t, k_t, y_t, y_h, v_t, v_h, u_t, u_h, w_t, w_h,
            BLOCK, P, BP, N, BN, True, CAUSAL, STRICT, DECAY, ROWS, COLS, SUMS, ALL_SUMS, SKIP, LOG_COLS,
            FACTORED, NORMALIZE, DOT, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _side(
    a, b, x, z, own_scales, far_scales, own_sums, far_sums, total, center, states, out, sums, all_sums, wide, base, length,
    lo, hi, nheads, x_share, z_share, scale, state_scale, a_t, b_t, x_t, x_h, z_t, z_h, own_t, own_h, far_t, far_h,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    READS: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, OWN: tl.constexpr,
    FAR: tl.constexpr, SUMS: tl.constexpr, ALL_SUMS: tl.constexpr, SKIP: tl.constexpr, LOG_COLS: tl.constexpr,
    FACTORED: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows (READS) or columns of a block, over a, x, their own scales and sums of logs; what they meet are those of b and z."""
    i, half = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    here = i < length
    LATER: tl.constexpr = READS == CAUSAL
    near = tl.zeros([BLOCK, BLOCK // 2], tl.float32)  # scores by halves of their columns
    far = tl.zeros([BLOCK, BLOCK // 2], tl.float32)
    for n0 in tl.static_range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        at = tokens_of(a, i, here, n, N, a_t, DOT)
        near = tl.dot(at, tl.trans(tokens_of(b, half, half < length, n, N, b_t, DOT)), acc=near, input_precision=PRECISION)
        j = BLOCK // 2 + half
        far = tl.dot(at, tl.trans(tokens_of(b, j, j < length, n, N, b_t, DOT)), acc=far, input_precision=PRECISION)
    bare: tl.constexpr = SUMS and READS and not ALL_SUMS  # what does not decay is not wanted at all
    apart: tl.constexpr = SKIP + 1 if bare else (1 if STRICT else 0)
    near = (tl.where(meet(i, half, LATER, apart), near, 0.0) * scale).to(DOT)
    far = (tl.where(meet(i, BLOCK // 2 + half, LATER, apart), far, 0.0) * scale).to(DOT)
    if FACTORED and wide:
        _heads(
            a, x, z, own_scales, far_scales, own_sums, far_sums, total, center, states, out, sums, all_sums, near, far, base,
            length, lo, hi, nheads, x_share, z_share, state_scale, a_t, x_t, x_h, z_t, z_h, own_t, own_h, far_t, far_h,
            BLOCK, P, BP, N, BN, READS, LATER, STRICT, DECAY, OWN, FAR, SUMS, ALL_SUMS, SKIP, LOG_COLS,
            False, NORMALIZE, DOT, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _heads(
            a, x, z, own_scales, far_scales, own_sums, far_sums, total, center, states, out, sums, all_sums, near, far, base,
            length, lo, hi, nheads, x_share, z_share, state_scale, a_t, x_t, x_h, z_t, z_h, own_t, own_h, far_t, far_h,
            BLOCK, P, BP, N, BN, READS, LATER, STRICT, DECAY, OWN, FAR, SUMS, ALL_SUMS, SKIP, LOG_COLS,
            FACTORED, NORMALIZE, DOT, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _heads(
    a, x, z, own_scales, far_scales, own_sums, far_sums, total, center, states, out, sums, all_sums, near, far, base, length,
    lo, hi, nheads, x_share, z_share, state_scale, a_t, x_t, x_h, z_t, z_h, own_t, own_h, far_t, far_h,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    READS: tl.constexpr, LATER: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, OWN: tl.constexpr,
    FAR: tl.constexpr, SUMS: tl.constexpr, ALL_SUMS: tl.constexpr, SKIP: tl.constexpr, LOG_COLS: tl.constexpr,
    FACTORED: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The heads [lo, hi); near and far are the scores of the two halves of columns, 0 where no pair meets."""
    i, half, here = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2), tl.arange(0, BLOCK) < length
    n = tl.arange(0, BN)
    first_a = tokens_of(a, i, here, n, N, a_t, DOT)  # they stay in shared memory; what is beyond is loaded anew for every head
    second_a = tokens_of(a, i, here, BN + n, N, a_t, DOT) if N > BN else first_a
    x_ahead = tokens_of(x + (lo // x_share) * x_h, i, here & (lo < hi), tl.arange(0, BP), P, x_t, DOT)
    for h in tl.range(lo, hi, num_stages=STAGES):
        x_now, ahead = x_ahead, h + 1
        if SUMS and P <= BP:  # Triton loads ahead what products read, and x is not of that
            x_ahead = tokens_of(x + (ahead // x_share) * x_h, i, here & (ahead < hi), tl.arange(0, BP), P, x_t, DOT)
        unmoved = tl.minimum(h - lo, 0)  # 0, as no compiler knows: hoisted comparisons of tiles would take every register
        by_state = tl.full([BLOCK], 1.0, tl.float32) * state_scale
        r = by_state
        if DECAY:
            r = tl.load(own_sums + (base + h) * BLOCK + i)  # past the row's end they stay what they were
            by_state *= tl.exp2(r if READS else tl.load(total + base + h) - r).to(tl.float32)
        own = tl.full([BLOCK], 1.0, tl.float32)
        if OWN:
            own = tl.load(own_scales + i * own_t + h * own_h, mask=here, other=0.0).to(tl.float32)
        exchanged, everything = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for p0 in tl.static_range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            xt = x_now
            if SUMS and P > BP:
                xt = tokens_of(x + (h // x_share) * x_h, i, here, p, P, x_t, DOT)
            y = tl.zeros([BLOCK, BP], tl.float32)
            for n0 in tl.static_range(0, N, BN):
                n = n0 + tl.arange(0, BN)
                place = (base + h) * P * N + p[:, None] * N + n[None, :]
                st = tl.load(states + place, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
                if n0 == 0:
                    at = first_a
                elif n0 == BN:
                    at = second_a
                else:
                    at = tokens_of(a, i, here, n, N, a_t, DOT)
                if NORMALIZE:  # float16 holds nothing above 65504
                    size = tl.max(tl.abs(st)) + 1e-30
                    y += tl.dot(at, tl.trans((st / size).to(DOT)), input_precision=PRECISION) * size
                else:
                    y = tl.dot(at, tl.trans(st), acc=y, input_precision=PRECISION)
            y *= by_state[:, None]
            for part in tl.static_range(2):
                j = part * (BLOCK // 2) + half
                pairs = tl.where(unmoved == 0, far if part else near, 0.0).to(tl.float32)
                pairs *= weights(
                    far_sums, far_scales, base, h, length, i + unmoved, j, r, far_t, far_h, center,
                    BLOCK, READS, LATER, STRICT, DECAY, FAR, FACTORED,
                )  # fmt: skip
                if SUMS and (ALL_SUMS or not READS):
                    pairs = tl.where(meet(i + unmoved, j, LATER, SKIP + 1), pairs, 0.0)
                zt = tokens_of(z + (h // z_share) * z_h, j, j < length, p, P, z_t, DOT)
                y = tl.dot(pairs.to(DOT), zt, acc=y, input_precision=PRECISION)
            if SUMS:
                exchanged += tl.sum(y * xt.to(tl.float32), 1)
                if ALL_SUMS or not READS:
                    for part in tl.static_range(2):
                        j = part * (BLOCK // 2) + half
                        pairs = tl.where(unmoved == 0, far if part else near, 0.0).to(tl.float32)
                        pairs *= weights(  # what does not decay weighs 1, but for log_cols
                            far_sums, far_scales, base, h, length, i + unmoved, j, r, far_t, far_h, center,
                            BLOCK, READS, LATER, STRICT, DECAY and LOG_COLS, FAR, FACTORED,
                        )  # fmt: skip
                        pairs = tl.where(meet(i + unmoved, j, LATER, SKIP + 1), 0.0, pairs)
                        zt = tokens_of(z + (h // z_share) * z_h, j, j < length, p, P, z_t, DOT)
                        y = tl.dot(pairs.to(DOT), zt, acc=y, input_precision=PRECISION)
                if ALL_SUMS:
                    everything += tl.sum(y * xt.to(tl.float32), 1)
            if not READS:
                place = i.to(tl.int64)[:, None] * nheads * P + (h * P + p)[None, :]
                tl.store(out + place, (y * own[:, None]).to(out.dtype.element_ty), mask=here[:, None] & (p < P)[None, :])
        if SUMS:
            tl.store(sums + (base + h) * BLOCK + i, exchanged * own)
            if ALL_SUMS:
                tl.store(all_sums + (base + h) * BLOCK + i, everything)
