"""Decay per channel, forward: sums of log decays by chunks, the states between chunks, and then all chunks at once.

A chunk is L tokens in local time: from the right if the term is anticausal. With P the sum of its log decays up to a token,
and P' the same up to the token before, ρ is P or P' and κ is P or P', as the term's flags say, for every channel.

**Scores by halves.** Cut a segment of 2s tokens in the middle, m being P at the last token of its left half. Then

    exp(ρ_i − κ_j) = exp(ρ_i − m) · exp(m − κ_j),   i in the right half, j in the left one,

and both exponents are sums of log decays between j and i, so that of decays neither is ever positive. Each pair of tokens
meets at one level s = L/2, …, 2, 1. Tokens of a right half take part as rows only, those of a left half as columns only, so a
level has a single factor per token and channel, and one tile W: q or k times it. W Wᵀ has the scores of all pairs
of the level, in both triangles; that it has others too is no matter, they are selected away. So a level costs an exponential
per token and channel, a tile in shared memory and one product.
"""

import triton
import triton.language as tl

from .rows import FORGOTTEN, bounds, first_slot, slot_bounds, tokens_of


@triton.jit
def local_tokens(start, stop, first, L: tl.constexpr, CAUSAL: tl.constexpr):
    """The tokens of a chunk in local time, counted from the start of their row, and which of them there are."""
    t = first - start + tl.arange(0, L)
    inside = t < stop - start
    if not CAUSAL:
        t = stop - start - 1 - t
    return t, inside


@triton.jit
def sums_at(chunk, i, n, N: tl.constexpr):
    """P at places i of a chunk, `[i, n]`; 0 before the first."""
    return tl.load(chunk + i[:, None] * N + n[None, :], mask=(i >= 0)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def level_factors(chunk, rho, kappa, i, n, level, N: tl.constexpr):
    """Of halves of 2^level tokens: whether a token is in a right one, and exp of what lies between it and the cut."""
    right = (((i >> level) & 1) == 1)[:, None]
    cut = sums_at(chunk, ((i >> (level + 1)) << (level + 1)) + (1 << level) - 1, n, N)
    return right, tl.exp2(tl.where(right, rho - cut, cut - kappa).to(tl.float32))


@triton.jit
def channel_sums(
    channel, dt, a, log_a, cu, sums,
    n_rows, seqlen, tokens, nheads, c_share, d_share, a_share, l_share,
    c_b, c_t, c_h, d_b, d_t, d_h, l_b, l_t, l_h,
    L: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, CHANNEL: tl.constexpr,
    FACTORS: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: (slots · heads · tiles of N, 1, 1).

    Args:
        channel, dt, a, log_a: log decays are channel (CHANNEL) + dt · a (FACTORS) + log_a (SCALAR); a is `[heads, N]`.
        sums: P in units of log 2, `[slots, nheads, L, N]`; behind the last token of a row it stays what it was.
    """
    tiles: tl.constexpr = (N + BN - 1) // BN
    slot, h = tl.program_id(0) // (nheads * tiles), tl.program_id(0) // tiles % nheads
    _, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, tl.arange(0, 64), L, PACKED)
    wide = sums.dtype.element_ty
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    if first < stop:
        t, inside = local_tokens(start, stop, first, L, CAUSAL)
        b, t = start // seqlen, t + start % seqlen
        real = inside[:, None] & (n < N)[None, :]
        d = tl.zeros([L, BN], wide)
        if CHANNEL:
            place = channel + b * c_b + (h // c_share) * c_h
            d += tl.load(place + t[:, None] * c_t + n[None, :], mask=real, other=0.0).to(wide)
        if FACTORS:
            step = tl.load(dt + b * d_b + (h // d_share) * d_h + t * d_t, mask=inside, other=0.0).to(wide)
            d += step[:, None] * tl.load(a + (h // a_share) * N + n, mask=n < N, other=0.0).to(wide)[None, :]
        if SCALAR:
            d += tl.load(log_a + b * l_b + (h // l_share) * l_h + t * l_t, mask=inside, other=0.0).to(wide)[:, None]
        d = tl.where(real, d * 1.4426950408889634, 0.0)
        if wide == tl.float32:  # what forgets everything may do so exactly: larger sums would round what comes after
            d = tl.where(d < FORGOTTEN, FORGOTTEN, d)
        chunk = sums + (slot.to(tl.int64) * nheads + h) * L * N
        tl.store(chunk + tl.arange(0, L)[:, None] * N + n[None, :], tl.cumsum(d, 0), mask=(n < N)[None, :])


@triton.jit
def channel_states(
    v, k, dy, q, cu, sums, entering, dleaving, blocks, dblocks, leaving, dentering,
    n_rows, seqlen, tokens, nheads, v_share, k_share, q_share, scale,
    v_b, v_t, v_h, k_b, k_t, k_h, y_b, y_t, y_h, q_b, q_t, q_h,
    L: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    ROW_INCLUSIVE: tl.constexpr, COL_INCLUSIVE: tl.constexpr, PACKED: tl.constexpr, BOTH: tl.constexpr,
    ENTERING: tl.constexpr, DLEAVING: tl.constexpr, LEAVING: tl.constexpr, DENTERING: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (rows · heads · tiles of P and N, 2 if BOTH or 1 for S alone, 1).

    With E the sum of a chunk's log decays, per channel, each is one walk over chunks, dS from the last to the first:

        S  ← exp(E) S  + Σ_j v_j (exp(E − κ_j) k_j)ᵀ
        dS ← exp(E) dS + Σ_i scale · dy_i (exp(ρ_i) q_i)ᵀ

    Args:
        sums: P (`channel_sums`).
        entering, dleaving: S before the first chunk, dS after the last.
        leaving, dentering: S after the last chunk, dS before the first.
        blocks, dblocks: S as it enters, and dS as it leaves each chunk, `[slots, nheads, P, N]`.
    """
    tiles_p: tl.constexpr = (P + BP - 1) // BP
    tiles: tl.constexpr = tiles_p * ((N + BN - 1) // BN)
    row, h, tile = tl.program_id(0) // (nheads * tiles), tl.program_id(0) // tiles % nheads, tl.program_id(0) % tiles
    start, stop = bounds(cu, row, seqlen, tokens, PACKED)
    batch, t0, length = start // seqlen, start % seqlen, (stop - start).to(tl.int32)
    slot0 = first_slot(start, row, seqlen, L, PACKED)
    row, nheads64 = row.to(tl.int64), tl.cast(nheads, tl.int64)
    p, n, i = (tile % tiles_p) * BP + tl.arange(0, BP), (tile // tiles_p) * BN + tl.arange(0, BN), tl.arange(0, L)
    inside_p, inside_n = p < P, n < N
    inside = inside_p[:, None] & inside_n[None, :]
    place, state = p[:, None] * N + n[None, :], (row * nheads64 + h) * P * N
    reads, factor, before = False, 1.0, 0 if COL_INCLUSIVE else 1
    x = v + batch * v_b + t0 * v_t + (h // v_share) * v_h
    b = k + batch * k_b + t0 * k_t + (h // k_share) * k_h
    if BOTH:  # the other side's tensors instead
        reads = tl.program_id(1) == 1  # tensors that are chosen between are of one dtype
        x = tl.where(reads, dy + batch * y_b + t0 * y_t + h * y_h, x)
        b = tl.where(reads, q + batch * q_b + t0 * q_t + (h // q_share) * q_h, b)
        v_t, k_t, factor = tl.where(reads, y_t, v_t), tl.where(reads, q_t, k_t), tl.where(reads, scale, 1.0)
        blocks = tl.where(reads, dblocks, blocks)
        before = tl.where(reads, 0 if ROW_INCLUSIVE else 1, before)
        if ENTERING and DLEAVING:
            entering = tl.where(reads, dleaving, entering)
        elif DLEAVING:
            entering = dleaving
    s = tl.zeros([BP, BN], tl.float32)
    if ENTERING or DLEAVING:
        given = tl.where(reads, DLEAVING, ENTERING) if BOTH else ENTERING
        s += tl.load(entering + state + place, mask=inside & given, other=0.0).to(tl.float32)
    chunks = (length + L - 1) // L
    for step in tl.range(0, chunks, num_stages=STAGES):
        c = tl.where(reads, chunks - 1 - step, step)
        head = (slot0 + c) * nheads64 + h
        tl.store(blocks + head * P * N + place, s.to(blocks.dtype.element_ty), mask=inside)
        at = c * L + i
        here = at < length
        t = (at if CAUSAL else length - 1 - at).to(tl.int64)
        xt = tl.trans(tl.load(x + t[:, None] * v_t + p[None, :], mask=here[:, None] & inside_p[None, :], other=0.0))
        bt = tl.load(b + t[:, None] * k_t + n[None, :], mask=here[:, None] & inside_n[None, :], other=0.0)
        r = sums_at(sums + head * L * N, i - before, n, N)
        e = tl.load(sums + head * L * N + (L - 1) * N + n, mask=inside_n, other=0.0)
        weight = tl.exp2(tl.where(reads, r, e[None, :] - r).to(tl.float32)) * factor
        s *= tl.exp2(e.to(tl.float32))[None, :]
        s = tl.dot(xt.to(DOT), (bt.to(tl.float32) * weight).to(DOT), acc=s, input_precision=PRECISION)
    if LEAVING:
        tl.store(leaving + state + place, s.to(leaving.dtype.element_ty), mask=inside & (reads == 0))
    if DENTERING:
        tl.store(dentering + state + place, s, mask=inside & reads)


@triton.jit
def channel_output(
    q, k, v, y, cu, sums, blocks,
    n_rows, seqlen, tokens, nheads, q_share, k_share, v_share, levels, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h,
    L: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    STRICT: tl.constexpr, ROW_INCLUSIVE: tl.constexpr, COL_INCLUSIVE: tl.constexpr, PACKED: tl.constexpr,
    TURNED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (slots · heads, 1, 1). Of each chunk Y, or if TURNED dV, from dY and dS:

        Y  = scale · (scores · V + (exp(ρ) ∘ Q) Sᵀ)
        dV = scale · scoresᵀ · dY + (exp(E − κ) ∘ K) dSᵀ

    Args:
        v, y: V and Y; dY and dV.
        sums: P (`channel_sums`).
        blocks: S as it enters, dS as it leaves each chunk (`channel_states`).
        levels: log2 of L, which the compiler is not to know: it would unroll them, and run out of registers.
    """
    slot, h = tl.program_id(0) // nheads, tl.program_id(0) % nheads
    _, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, tl.arange(0, 64), L, PACKED)
    head = slot.to(tl.int64) * nheads + h
    chunk = sums + head * L * N
    i, n = tl.arange(0, L), tl.arange(0, BN)
    b, t0 = start // seqlen, start % seqlen
    q += b * q_b + t0 * q_t + (h // q_share) * q_h
    k += b * k_b + t0 * k_t + (h // k_share) * k_h
    v += b * v_b + t0 * v_t + (h // v_share) * v_h
    y += b * y_b + t0 * y_t + h * y_h
    if first < stop:
        t, inside = local_tokens(start, stop, first, L, CAUSAL)
        qt = tokens_of(q, t, inside, n, N, q_t, DOT)
        kt = tokens_of(k, t, inside, n, N, k_t, DOT)
        rho = sums_at(chunk, i if ROW_INCLUSIVE else i - 1, n, N)
        kappa = rho
        if COL_INCLUSIVE and not ROW_INCLUSIVE:
            kappa = sums_at(chunk, i, n, N)
        pairs = tl.zeros([L, L], DOT)  # both triangles of scores
        for level in tl.range(0, levels, num_stages=1):
            right, factor = level_factors(chunk, rho, kappa, i, n, level, N)
            w = (tl.where(right, qt, kt).to(tl.float32) * factor).to(DOT)
            scores = tl.dot(w, tl.trans(w), input_precision=PRECISION)
            pairs = tl.where(((i[:, None] >> level) ^ (i[None, :] >> level)) == 1, scores.to(DOT), pairs)
        if not STRICT:
            own = tl.sum(qt.to(tl.float32) * kt.to(tl.float32), 1).to(DOT)
            pairs = tl.where(i[:, None] == i[None, :], own[:, None], pairs)
        if TURNED:
            pairs = tl.where(i[:, None] <= i[None, :], pairs, 0.0)
            total = tl.load(chunk + (L - 1) * N + n, mask=n < N, other=0.0)
            met = (kt.to(tl.float32) * tl.exp2((total[None, :] - kappa).to(tl.float32))).to(DOT)  # by dS
        else:
            pairs = tl.where(i[:, None] >= i[None, :], pairs, 0.0)
            met = (qt.to(tl.float32) * (tl.exp2(rho.to(tl.float32)) * scale)).to(DOT)  # by S
        for p0 in tl.range(0, P, BP, num_stages=1):
            p = p0 + tl.arange(0, BP)
            here = inside[:, None] & (p < P)[None, :]
            vt = tokens_of(v, t, inside, p, P, v_t, DOT)
            s = tl.load(
                blocks + head * P * N + p[:, None] * N + n[None, :], mask=(p < P)[:, None] & (n < N)[None, :], other=0.0
            ).to(DOT)
            out = tl.dot(pairs, vt, input_precision=PRECISION) * scale
            out = tl.dot(met, tl.trans(s), acc=out, input_precision=PRECISION)
            tl.store(y + t[:, None] * y_t + p[None, :], out.to(y.dtype.element_ty), mask=here)
