"""Gradients of q, k and v, and what tokens exchange, a block at a time over the heads of a group.

For a block of tokens, with the state S that enters it from one side and the cotangent dS that enters from the other, the scores
G = scale · Q Kᵀ of its pairs and the weights W_ij = exp(ρ_i − κ_j) u_i w_j of a head, there are four parts:

    through S   dQ  = Σ_h a_i dY S               a_i = scale · exp(ρ_i) u_i
    through dS  dK  = Σ_h b_j V dS               b_j = exp(E − κ_j) w_j
    values      dV  = b_j K dSᵀ + (G ∘ W)ᵀ dY
    pairs       dG  = Σ_h (dY Vᵀ) ∘ W

A program has one part of one block and walks over heads, so that sums over heads stay in registers and the next head's tiles
are on their way; for two parts registers do not suffice. The parts of a block are neighbours in the grid, as they read the same
V, dY, S and dS. `finish` adds what dG has for dQ and dK: it is read from memory there, because the transpose of a product of
tensor cores must not be an operand of another (DESIGN.md, decision 4).

What tokens exchange is what gradients of log decays and of scales are made of (`tokens.py`): through states, a_i ⟨dY_i, S q_i⟩
and b_j ⟨V_j, dS k_j⟩; in pairs, the sums by rows and by columns of R = (dY Vᵀ) ∘ W ∘ G, both of one float32 product, so that
what cancels between them does.
"""

import triton
import triton.language as tl

from .rows import slot_bounds, tokens_of

KINDS = tl.constexpr(4)
IN_PAIRS, IN_STATES, ALL_PAIRS, ALL_STATES = (tl.constexpr(kind) for kind in range(4))
"""Kinds of a token's sums: of pairs that decay, of states, then of all pairs and of states before the token's own scale."""


@triton.jit
def gradients(
    q, k, v, dy, u, w, cu, rho, kappa, total, states, dstates, dq, dk, dv, dg, sums, through, onto,
    n_rows, seqlen, tokens, nheads, groups, q_share, k_share, v_share, scale, per_split,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, u_b, u_t, u_h, w_b, w_t, w_h,
    BLOCK: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr, ALL_SUMS: tl.constexpr, SKIP: tl.constexpr,
    ONTO: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STATE_STAGES: tl.constexpr, VALUE_STAGES: tl.constexpr, PAIR_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks · parts, groups, splits of a group's heads); but for pairs there is a part per TILE tokens of a block.

    Args:
        states, dstates: S and dS as they enter each block.
        dq, dk: what comes through states, `[splits, tokens, groups, N]`; dg: `[splits, blocks, groups, BLOCK, BLOCK]`.
        dv: `[tokens, nheads, P]`; onto: what it is added to, if ONTO.
        sums: `[KINDS, 2, blocks, nheads, BLOCK]`, of rows and of columns: the first two kinds if SUMS, all if ALL_SUMS.
        through: ⟨dS, exp(E) S⟩, `[blocks, nheads]`, if SUMS.
        scale: the factor of scores, which dS has in it already.
        STRICT: 1 if a row does not meet its own column, else 0.
        SKIP: how far apart tokens have no decay between them.
    """
    tiles: tl.constexpr = BLOCK // TILE
    parts: tl.constexpr = 3 * tiles + 1
    blocks = tl.num_programs(0) // parts
    slot, part, split = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(2)
    _, _, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, tl.arange(0, 256), BLOCK, PACKED)
    if first >= stop:
        return
    batch, t, share, g = first // seqlen, first % seqlen, nheads // groups, tl.program_id(1)
    q += batch * q_b + t * q_t + (g * share // q_share) * q_h
    k += batch * k_b + t * k_t + (g * share // k_share) * k_h
    v += batch * v_b + t * v_t
    dy += batch * y_b + t * y_t
    u += batch * u_b + t * u_t
    w += batch * w_b + t * w_t
    place = ((split * tokens + first) * groups + g) * N
    base, length, area = slot.to(tl.int64) * nheads, (stop - first).to(tl.int32), blocks.to(tl.int64) * nheads * BLOCK
    lo, hi = g * share + split * per_split, g * share + tl.minimum((split + 1) * per_split, share)
    tile = part % tiles * TILE
    if part < tiles:
        _through(
            q, dy, u, rho, total, states, dstates, dq + place, sums, through, base, area, length, tile, lo, hi, nheads, groups,
            1, scale, q_t, y_t, y_h, u_t, u_h,
            BLOCK, TILE, P, BP, N, BN, True, DECAY, ROWS, SUMS, ALL_SUMS, NORMALIZE, DOT, PRECISION, STATE_STAGES,
        )  # fmt: skip
    elif part < 2 * tiles:
        _through(
            k, v, w, kappa, total, dstates, states, dk + place, sums + area, through, base, area, length, tile, lo, hi, nheads,
            groups, v_share, 1.0, k_t, v_t, v_h, w_t, w_h,
            BLOCK, TILE, P, BP, N, BN, False, DECAY, COLS, SUMS, ALL_SUMS, NORMALIZE, DOT, PRECISION, STATE_STAGES,
        )  # fmt: skip
    elif part < 3 * tiles:
        _values(
            q, k, dy, u, w, rho, kappa, total, dstates, dv + first * nheads * P, onto + first * nheads * P, base,
            length, tile, lo, hi, nheads, scale,
            q_t, k_t, y_t, y_h, u_t, u_h, w_t, w_h,
            BLOCK, TILE, P, BP, N, BN, CAUSAL, STRICT, DECAY, ROWS, COLS, ONTO, NORMALIZE, DOT, PRECISION, VALUE_STAGES,
        )  # fmt: skip
    else:
        _pairs(
            q, k, v, dy, u, w, rho, kappa, dg + ((split * blocks + slot).to(tl.int64) * groups + g) * BLOCK * BLOCK, sums,
            base, area, length, lo, hi, v_share, scale, q_t, k_t, v_t, v_h, y_t, y_h, u_t, u_h, w_t, w_h,
            BLOCK, P, BP, N, BN, CAUSAL, STRICT, DECAY, ROWS, COLS, SUMS, ALL_SUMS, SKIP, DOT, PRECISION, PAIR_STAGES,
        )  # fmt: skip


@triton.jit
def _through(
    a, x, scales, logs, total, states, others, out, sums, through, base, area, length, first, lo, hi, nheads, groups, share,
    scale, a_t, x_t, x_h, s_t, s_h,
    BLOCK: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    READS: tl.constexpr, DECAY: tl.constexpr, SCALED: tl.constexpr, SUMS: tl.constexpr, ALL_SUMS: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ through S (READS: of Q and dY) or dK through dS (of K and V), of the tokens [first, first + TILE), and their sums."""
    i, n, pp = first + tl.arange(0, TILE), tl.arange(0, BN), tl.arange(0, BP)
    here, inside_n = i < length, n < N
    total_out = tl.zeros([TILE, BN], tl.float32)
    own = tokens_of(a, i, here, n, N, a_t, DOT)
    for h in tl.range(lo, hi, num_stages=STAGES):
        weight, decay = tl.full([TILE], 1.0, tl.float32) * scale, 1.0
        if DECAY:
            e, r = tl.load(total + base + h), tl.load(logs + (base + h) * BLOCK + i)  # past the end they stay what they were
            decay = tl.exp2(e).to(tl.float32)
            weight *= tl.exp2(r if READS else e - r).to(tl.float32)
        scaled = weight
        if SCALED:
            scaled = weight * tl.load(scales + i * s_t + h * s_h, mask=here, other=0.0).to(tl.float32)
        crossed, passed = tl.zeros([TILE], tl.float32), 0.0
        for p0 in tl.static_range(0, P, BP):
            p = p0 + pp
            xt = tokens_of(x + (h // share) * x_h, i, here, p, P, x_t, DOT)
            place, inside = (base + h) * P * N + p[:, None] * N + n[None, :], (p < P)[:, None] & inside_n[None, :]
            s, size = _normal(tl.load(states + place, mask=inside, other=0.0), NORMALIZE, DOT)
            total_out += tl.dot(xt, s, input_precision=PRECISION) * (scaled * size)[:, None]  # x is an operand as it is
            if SUMS:
                y = tl.dot(own, tl.trans(s), input_precision=PRECISION)
                crossed += tl.sum(y * xt.to(tl.float32), 1) * size
            if SUMS and READS:
                other, other_size = _normal(tl.load(others + place, mask=inside, other=0.0), NORMALIZE, DOT)
                both = tl.dot(s, tl.trans(other), input_precision=PRECISION)  # a product, as only those are loaded ahead
                passed += tl.sum(tl.where(pp[:, None] == pp[None, :], both, 0.0)) * size * other_size
        if SUMS:
            at = (base + h) * BLOCK + i
            tl.store(sums + 2 * IN_STATES * area + at, crossed * scaled)
            if ALL_SUMS:
                tl.store(sums + 2 * ALL_STATES * area + at, crossed * weight)
            if READS:
                tl.store(through + base + h, passed * decay, mask=first == 0)
    place = i.to(tl.int64)[:, None] * groups * N + n[None, :]
    tl.store(out + place, total_out.to(out.dtype.element_ty), mask=here[:, None] & inside_n[None, :])


@triton.jit
def _values(
    q, k, dy, u, w, rho, kappa, total, dstates, dv, onto, base, length, first, lo, hi, nheads, scale,
    q_t, k_t, y_t, y_h, u_t, u_h, w_t, w_h,
    BLOCK: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ONTO: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dV of the tokens [first, first + TILE)."""
    j, i, n = first + tl.arange(0, TILE), tl.arange(0, BLOCK), tl.arange(0, BN)
    here, inside_n = j < length, n < N
    own = tokens_of(k, j, here, n, N, k_t, DOT)
    scores = tl.dot(own, tl.trans(tokens_of(q, i, i < length, n, N, q_t, DOT)), input_precision=PRECISION)  # [j, i]
    scores = (scores * scale).to(DOT)
    for h in tl.range(lo, hi, num_stages=STAGES):
        unmoved = tl.minimum(h - lo, 0)  # 0, as no compiler knows: what is hoisted takes registers
        weight, c, r = tl.full([TILE], 1.0, tl.float32), tl.full([TILE], 0.0, tl.float32), tl.full([BLOCK], 0.0, tl.float32)
        if DECAY:
            c, r = tl.load(kappa + (base + h) * BLOCK + j), tl.load(rho + (base + h) * BLOCK + i)
            weight = tl.exp2(tl.load(total + base + h) - c).to(tl.float32)
        gap = r[None, :] - c[:, None]
        given = _decayed(scores.to(tl.float32), gap, i[None, :], j[:, None] + unmoved, CAUSAL, STRICT, DECAY)
        if ROWS:
            given *= tl.load(u + i * u_t + h * u_h, mask=i < length, other=0.0).to(tl.float32)[None, :]
        given = given.to(DOT)
        own_scale = tl.full([TILE], 1.0, tl.float32)
        if COLS:
            own_scale = tl.load(w + j * w_t + h * w_h, mask=here, other=0.0).to(tl.float32)
        for p0 in tl.static_range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            place, inside = (base + h) * P * N + p[:, None] * N + n[None, :], (p < P)[:, None] & inside_n[None, :]
            ds, size = _normal(tl.load(dstates + place, mask=inside, other=0.0), NORMALIZE, DOT)
            y = tl.dot(own, tl.trans(ds), input_precision=PRECISION) * (weight * size)[:, None]
            y = tl.dot(given, tokens_of(dy + h * y_h, i, i < length, p, P, y_t, DOT), acc=y, input_precision=PRECISION)
            place, inside = j.to(tl.int64)[:, None] * nheads * P + (h * P + p)[None, :], here[:, None] & (p < P)[None, :]
            y *= own_scale[:, None]
            if ONTO:
                if h < hi:  # always: what is loaded in a branch takes no shared memory for several heads at once
                    y += tl.load(onto + place, mask=inside, other=0.0)
            tl.store(dv + place, y.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _pairs(
    q, k, v, dy, u, w, rho, kappa, dg, sums, base, area, length, lo, hi, v_share, scale,
    q_t, k_t, v_t, v_h, y_t, y_h, u_t, u_h, w_t, w_h,
    BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    STRICT: tl.constexpr, DECAY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SUMS: tl.constexpr,
    ALL_SUMS: tl.constexpr, SKIP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dG of a block, and the sums of R by rows and by columns."""
    i, j, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, BN)
    here, scores = i < length, tl.zeros([BLOCK, BLOCK], DOT)
    if SUMS:
        own = tokens_of(q, i, here, n, N, q_t, DOT)
        wanted = tl.dot(own, tl.trans(tokens_of(k, j, j < length, n, N, k_t, DOT)), input_precision=PRECISION) * scale
        if not ALL_SUMS:  # what does not decay is not wanted
            wanted = tl.where(_meet(i[:, None], j[None, :], CAUSAL, SKIP + 1), wanted, 0.0)
        scores = wanted.to(DOT)
    total_out = tl.zeros([BLOCK, BLOCK], tl.float32)
    for h in tl.range(lo, hi, num_stages=STAGES):
        unmoved = tl.minimum(h - lo, 0)  # 0, as no compiler knows: what is hoisted takes registers
        pairs = tl.zeros([BLOCK, BLOCK], tl.float32)
        for p0 in tl.static_range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            z = tokens_of(v + (h // v_share) * v_h, j, j < length, p, P, v_t, DOT)
            pairs = tl.dot(tokens_of(dy + h * y_h, i, here, p, P, y_t, DOT), tl.trans(z), acc=pairs, input_precision=PRECISION)
        r, c = tl.full([BLOCK], 0.0, tl.float32), tl.full([BLOCK], 0.0, tl.float32)
        if DECAY:
            r, c = tl.load(rho + (base + h) * BLOCK + i), tl.load(kappa + (base + h) * BLOCK + j)
        pairs = _decayed(pairs, r[:, None] - c[None, :], i[:, None] + unmoved, j[None, :], CAUSAL, STRICT, DECAY)
        rows, cols = tl.full([BLOCK], 1.0, tl.float32), tl.full([BLOCK], 1.0, tl.float32)
        if ROWS:
            rows = tl.load(u + i * u_t + h * u_h, mask=here, other=0.0).to(tl.float32)
        if COLS:
            cols = tl.load(w + j * w_t + h * w_h, mask=j < length, other=0.0).to(tl.float32)
        given = pairs
        if ROWS or COLS:
            given *= rows[:, None] * cols[None, :]
        total_out += given
        if SUMS:
            place = (base + h) * BLOCK + i
            exchanged = given * scores.to(tl.float32)
            if ALL_SUMS:
                pairs *= scores.to(tl.float32)
                tl.store(sums + 2 * ALL_PAIRS * area + place, tl.sum(pairs * cols[None, :], 1))
                tl.store(sums + (2 * ALL_PAIRS + 1) * area + place, tl.sum(pairs * rows[:, None], 0))
                exchanged = tl.where(_meet(i[:, None] + unmoved, j[None, :], CAUSAL, SKIP + 1), exchanged, 0.0)
            tl.store(sums + 2 * IN_PAIRS * area + place, tl.sum(exchanged, 1))
            tl.store(sums + (2 * IN_PAIRS + 1) * area + place, tl.sum(exchanged, 0))
    tl.store(dg + i[:, None] * BLOCK + j[None, :], (total_out * scale).to(dg.dtype.element_ty))


@triton.jit
def _normal(s, NORMALIZE: tl.constexpr, DOT: tl.constexpr):
    """A state as an operand, and what it is to be multiplied with: float16 holds nothing above 65504."""
    size = 1.0
    if NORMALIZE:
        size = tl.max(tl.abs(s)) + 1e-30
        s = s / size
    return s.to(DOT), size


@triton.jit
def _meet(i, j, CAUSAL: tl.constexpr, APART: tl.constexpr):
    """Whether row i is at least so far after column j, or before it."""
    return i >= j + APART if CAUSAL else i + APART <= j


@triton.jit
def _decayed(x, gap, i, j, CAUSAL: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr):
    """x exp(ρ_i − κ_j), and 0 where i and j do not meet."""
    meet = _meet(i, j, CAUSAL, STRICT)
    if DECAY:
        out = x * tl.exp2(tl.where(meet, gap, float("-inf")).to(tl.float32))  # elsewhere it may overflow
    else:
        out = tl.where(meet, x, 0.0)
    return out


@triton.jit
def finish(
    q, k, cu, dg, dq_states, dk_states, met, dq, dk,
    n_rows, seqlen, tokens, nheads, groups, q_share, k_share, splits,
    q_b, q_t, q_h, k_b, k_t, k_h,
    BLOCK: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr, DIAGONAL: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = Σ dQ through states + dG K, and dK likewise with dGᵀ Q. Grid: (blocks, groups · tiles of N, 2: dQ or dK).

    Args:
        dg, dq_states, dk_states: what `gradients` leaves, in splits; met: with a DIAGONAL, its m (`hopper_states.py`).
        dq, dk: `[tokens, groups, N]`.
    """
    tiles: tl.constexpr = (N + BN - 1) // BN
    slot, g, tile = tl.program_id(0), tl.program_id(1) // tiles, tl.program_id(1) % tiles
    _, _, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, tl.arange(0, 256), BLOCK, PACKED)
    if first >= stop:
        return
    batch, t, share = first // seqlen, first % seqlen, nheads // groups
    dg += (slot.to(tl.int64) * groups + g) * BLOCK * BLOCK
    met += (slot.to(tl.int64) * groups + g) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * groups * BLOCK
    place, area = (first * groups + g) * N, tl.cast(tokens, tl.int64) * groups * N
    if tl.program_id(2) == 0:
        k += batch * k_b + t * k_t + (g * share // k_share) * k_h
        _finish(dq + place, dq_states + place, dg, met, k, stop - first, tile, area, step, groups, splits, k_t,
                BLOCK, 1, BLOCK, N, BN, DIAGONAL, DOT, PRECISION)  # fmt: skip
    else:
        q += batch * q_b + t * q_t + (g * share // q_share) * q_h
        _finish(dk + place, dk_states + place, dg, met, q, stop - first, tile, area, step, groups, splits, q_t,
                1, BLOCK, BLOCK, N, BN, DIAGONAL, DOT, PRECISION)  # fmt: skip


@triton.jit
def _finish(
    out, through_states, dg, met, b, length, tile, area, step, groups, splits, b_t,
    STRIDE_I: tl.constexpr, STRIDE_J: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    DIAGONAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, j, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tile * BN + tl.arange(0, BN)
    pairs, total = tl.zeros([BLOCK, BLOCK], tl.float32), tl.zeros([BLOCK, BN], tl.float32)
    place, inside = i.to(tl.int64)[:, None] * groups * N + n[None, :], (i < length)[:, None] & (n < N)[None, :]
    for split in range(splits):
        pairs += tl.load(dg + split * step * BLOCK + i[:, None] * STRIDE_I + j[None, :] * STRIDE_J).to(tl.float32)
        if DIAGONAL:
            pairs += tl.where(i[:, None] == j[None, :], tl.load(met + split * step + i)[:, None], 0.0)
        total += tl.load(through_states + split * area + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.dot(pairs.to(DOT), tokens_of(b, j, j < length, n, N, b_t, DOT), acc=total, input_precision=PRECISION)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
