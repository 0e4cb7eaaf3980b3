"""Log-linear attention, backward: the cotangents of the tree's states, and then gradients by rows and by columns of chunks.

With dY_i of the right half of a boundary m (`fenwick.py`), whose weights differ from level to level,

    dS[m] = Σ_i levels[i, level(m)] · exp(P_i − P(m)) · scale · dy_i q_iᵀ

is a walk over the chunks of that half. Rows read S[m] as they do forward. A column j of chunk c is in the left halves of
m = c + 1, and of what one gets from it by adding its lowest bit, again and again; so the state behind chunk c has the cotangent

    D = Σ_m exp(Σ log decays of chunks [c + 1, m)) · dS[m].

With R_ij what a pair gives to the exponent of its decay, log_a[t] gets Σ R_ij of all j < t ≤ i: of pairs in t's chunk, of rows
from t on and columns before t that meet tokens elsewhere, and of pairs that pass over the chunk. For these, chunks say how much
of R they have at each boundary, and `fenwick_passing` sums it over the rest of their half: what passes, and no differences.
"""

import triton
import triton.language as tl

from .fenwick import bits, chunk_tokens, length, level_weights
from .rows import tokens_of


@triton.jit
def fenwick_cotangents(
    dy, q, levels, rho, total, dtree, seqlen, chunks, nheads, q_share, l_share, scale,
    y_b, y_t, y_h, q_b, q_t, q_h, l_b, l_t, l_h, l_l,
    C: tl.constexpr, LOG: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dS[m], `[batch · chunks, nheads, P, N]`. Grid: (boundaries · batch · heads · tiles of P and N, 1, 1).

    The longest walks come first: of n − 1 boundaries (n − 1) >> l have the lowest bit l or a higher one.
    """
    tiles_p: tl.constexpr = (P + BP - 1) // BP
    tiles: tl.constexpr = tiles_p * ((N + BN - 1) // BN)
    tile, h = tl.program_id(0) % tiles, (tl.program_id(0) // tiles % nheads).to(tl.int64)
    rank, of = tl.program_id(0) // (tiles * nheads) % (chunks - 1), tl.program_id(0) // (tiles * nheads * (chunks - 1))
    bit = 0
    for higher in tl.static_range(1, 28):
        bit += (((chunks - 1) >> higher) > rank).to(tl.int32)
    m = (2 * (rank - ((chunks - 1) >> (bit + 1))) + 1) << bit
    b, i = of.to(tl.int64), tl.arange(0, C)
    p, n = (tile % tiles_p) * BP + tl.arange(0, BP), (tile // tiles_p) * BN + tl.arange(0, BN)
    dy += b * y_b + h * y_h
    q += b * q_b + (h // q_share) * q_h
    levels += b * l_b + (h // l_share) * l_h + (LOG + 1 + bit) * l_l
    s, before = tl.zeros([BP, BN], tl.float32), tl.zeros([1], rho.dtype.element_ty)
    for c in tl.range(m, tl.minimum(m + (1 << bit), chunks), num_stages=STAGES):
        head = (b * chunks + c) * nheads + h
        t, inside = chunk_tokens(c, seqlen, C, CAUSAL)
        weight = tl.load(levels + t * l_t, mask=inside, other=0.0).to(tl.float32)
        weight *= tl.exp2((before + tl.load(rho + head * C + i)).to(tl.float32)) * scale
        g = (tokens_of(dy, t, inside, p, P, y_t, tl.float32) * weight[:, None]).to(DOT)
        s = tl.dot(tl.trans(g), tokens_of(q, t, inside, n, N, q_t, DOT), acc=s, input_precision=PRECISION)
        before += tl.load(total + head)
    place = dtree + ((b * chunks + m) * nheads + h) * P * N + p[:, None] * N + n[None, :]
    tl.store(place, s.to(dtree.dtype.element_ty), mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit
def fenwick_rows(
    q, k, v, dy, levels, rho, kappa, left, tree, dq, dlevels, inner, late, across,
    seqlen, chunks, nheads, n_levels, above, q_share, k_share, v_share, l_share, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, l_b, l_t, l_h, l_l,
    C: tl.constexpr, LOG: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, the gradient of levels, and what rows gather of R. Grid: (batch · chunks · heads, 1, 1).

    Args:
        dq, dlevels: of every head, `[batch, seqlen, nheads, N]` and `[…, n_levels]`, where levels of no pair stay as they are.
        inner: Σ R_ij of j < t ≤ i inside the chunk of t, a sum of these alone, `[batch, chunks, nheads, C]`.
        late: Σ_j R_ij of row i and columns of other chunks, likewise.
        across: R of the chunk's rows at each boundary, by its level: `[batch, chunks, above, nheads]`.
    """
    h, slot = (tl.program_id(0) % nheads).to(tl.int64), (tl.program_id(0) // nheads).to(tl.int64)
    c, b, row = (slot % chunks).to(tl.int32), slot // chunks, slot // chunks * chunks
    i, n = tl.arange(0, C), tl.arange(0, BN)
    t, inside = chunk_tokens(c, seqlen, C, CAUSAL)
    head = slot * nheads + h
    qt = tokens_of(q + b * q_b + (h // q_share) * q_h, t, inside, n, N, q_t, DOT)
    kt = tokens_of(k + b * k_b + (h // k_share) * k_h, t, inside, n, N, k_t, DOT)
    v += b * v_b + (h // v_share) * v_h
    dy += b * y_b + h * y_h
    levels += b * l_b + t * l_t + (h // l_share) * l_h
    dlevels += ((b * seqlen + t) * nheads + h) * n_levels
    r, x = tl.load(rho + head * C + i), tl.load(kappa + head * C + i)
    g = tl.zeros([C, C], tl.float32)
    for p0 in tl.range(0, P, BP, num_stages=1):
        p = p0 + tl.arange(0, BP)
        vt = tokens_of(v, t, inside, p, P, v_t, DOT)
        g = tl.dot(tokens_of(dy, t, inside, p, P, y_t, DOT), tl.trans(vt), acc=g, input_precision=PRECISION)
    pairs = (i[:, None] > i[None, :] if STRICT else i[:, None] >= i[None, :]) & inside[:, None]
    g *= tl.exp2(tl.where(pairs, r[:, None] - x[None, :], 0.0).to(tl.float32)) * scale
    g = tl.where(pairs, g, 0.0)
    weights = level_weights(levels[:, None], l_l, pairs, i[:, None], i[None, :])
    grad = tl.dot((g * weights).to(DOT), kt, input_precision=PRECISION)
    g *= tl.where(pairs, tl.dot(qt, tl.trans(kt), input_precision=PRECISION), 0.0)
    for level in tl.static_range(LOG + 1):
        found = tl.sum(tl.where(length(i[:, None] ^ i[None, :]) == level, g, 0.0), 1)
        tl.store(dlevels + level, found, mask=inside & (level < n_levels))
    later = tl.where(i[:, None] <= i[None, :], 1.0, 0.0).to(DOT)
    over = tl.dot(later, (g * weights).to(DOT), input_precision=PRECISION)  # of R, what rows from t on have of column j
    tl.store(inner + head * C + i, tl.sum(tl.where(i[:, None] > i[None, :], over, 0.0), 1))
    gathered = tl.zeros([C], tl.float32)
    m, before = c, tl.zeros([1], rho.dtype.element_ty)
    for _ in tl.range(0, bits(c), num_stages=1):
        low = m & -m
        bit, node = length(low) - 1, (row + m) * nheads + h
        met = tl.zeros([C, BN], tl.float32)
        for p0 in tl.range(0, P, BP, num_stages=1):
            p = p0 + tl.arange(0, BP)
            s = tl.load(
                tree + node * P * N + p[:, None] * N + n[None, :], mask=(p < P)[:, None] & (n < N)[None, :], other=0.0
            ).to(DOT)
            met = tl.dot(tokens_of(dy, t, inside, p, P, y_t, DOT), s, acc=met, input_precision=PRECISION)
        met *= (tl.exp2((before + r).to(tl.float32)) * scale)[:, None]
        weight = tl.load(levels + (LOG + 1 + bit) * l_l, mask=inside, other=0.0).to(tl.float32)
        found = tl.sum(met * qt.to(tl.float32), 1)
        tl.store(dlevels + LOG + 1 + bit, found, mask=inside)
        grad += met * weight[:, None]
        gathered += found * weight
        tl.store(across + (slot * above + bit) * nheads + h, tl.sum(found * weight, 0))
        before += tl.load(left + node)
        m -= low
    tl.store(late + head * C + i, gathered)
    dq += ((b * seqlen + t) * nheads + h)[:, None] * N + n[None, :]
    tl.store(dq, grad.to(dq.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@triton.jit
def fenwick_columns(
    q, k, v, dy, levels, rho, kappa, total, right, dtree, dk, dv, early, across,
    seqlen, chunks, nheads, n_levels, above, q_share, k_share, v_share, l_share, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, l_b, l_t, l_h, l_l,
    C: tl.constexpr, LOG: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV, and what columns give of R. Grid: (batch · chunks · heads, 1, 1).

    Args:
        dk, dv: of every head, `[batch, seqlen, nheads, N]` and `[…, P]`.
        early: Σ_i R_ij of column j and rows of other chunks, `[batch, chunks, nheads, C]`.
        across: R of the chunk's columns at each boundary, by its level: `[tiles of P, batch, chunks, above, nheads]`.
    """
    h, slot = (tl.program_id(0) % nheads).to(tl.int64), (tl.program_id(0) // nheads).to(tl.int64)
    c, b, row = (slot % chunks).to(tl.int32), slot // chunks, slot // chunks * chunks
    j, n = tl.arange(0, C), tl.arange(0, BN)
    t, inside = chunk_tokens(c, seqlen, C, CAUSAL)
    head = slot * nheads + h
    qt = tokens_of(q + b * q_b + (h // q_share) * q_h, t, inside, n, N, q_t, DOT)
    kt = tokens_of(k + b * k_b + (h // k_share) * k_h, t, inside, n, N, k_t, DOT)
    v += b * v_b + (h // v_share) * v_h
    dy += b * y_b + h * y_h
    levels += b * l_b + t * l_t + (h // l_share) * l_h
    r, x = tl.load(rho + head * C + j), tl.load(kappa + head * C + j)
    pairs = (j[:, None] < j[None, :] if STRICT else j[:, None] <= j[None, :]) & inside[None, :]  # of columns and rows
    weights = tl.exp2(tl.where(pairs, r[None, :] - x[:, None], 0.0).to(tl.float32)) * scale
    weights *= level_weights(levels[None, :], l_l, pairs, j[None, :], j[:, None])
    scores = tl.dot(kt, tl.trans(qt), input_precision=PRECISION)
    scores = tl.where(pairs, scores * weights, 0.0).to(DOT)
    rest = tl.exp2((tl.load(total + head) - x).to(tl.float32))
    g, met = tl.zeros([C, C], tl.float32), tl.zeros([C, BN], tl.float32)
    count = 0  # of the boundaries whose left halves the chunk is in
    for bit in tl.static_range(28):
        count += ((((c >> bit) & 1) == 0) & ((((c >> bit) + 1) << bit) < chunks)).to(tl.int32)
    for p0 in tl.range(0, P, BP, num_stages=1):
        p = p0 + tl.arange(0, BP)
        vt, dyt = tokens_of(v, t, inside, p, P, v_t, DOT), tokens_of(dy, t, inside, p, P, y_t, DOT)
        g = tl.dot(vt, tl.trans(dyt), acc=g, input_precision=PRECISION)
        own = (vt.to(tl.float32) * rest[:, None]).to(DOT)
        made = tl.dot(tl.trans(own), kt, input_precision=PRECISION)  # the chunk's state
        d = tl.zeros([BP, BN], tl.float32)
        m, after = c + 1, tl.zeros([1], rho.dtype.element_ty)
        for _ in tl.range(0, count, num_stages=1):
            low = m & -m
            node = (row + m) * nheads + h
            ds = tl.load(
                dtree + node * P * N + p[:, None] * N + n[None, :], mask=(p < P)[:, None] & (n < N)[None, :], other=0.0
            ).to(tl.float32)
            ds *= tl.expand_dims(tl.exp2(after.to(tl.float32)), 1)
            d += ds
            place = across + ((p0 // BP * (tl.num_programs(0) // nheads) + slot) * above + length(low) - 1) * nheads + h
            tl.store(place, tl.sum(tl.sum(ds * made, 1), 0))
            after += tl.load(right + node)
            m += low
        dt = d.to(DOT)
        met = tl.dot(vt, dt, acc=met, input_precision=PRECISION)
        out = tl.dot(kt, tl.trans(dt), input_precision=PRECISION) * rest[:, None]
        out = tl.dot(scores, dyt, acc=out, input_precision=PRECISION)
        place = dv + ((b * seqlen + t) * nheads + h)[:, None] * P + p[None, :]
        tl.store(place, out.to(dv.dtype.element_ty), mask=inside[:, None] & (p < P)[None, :])
    met *= rest[:, None]
    tl.store(early + head * C + j, tl.sum(met * kt.to(tl.float32), 1))
    met = tl.dot(tl.where(pairs, g * weights, 0.0).to(DOT), qt, acc=met, input_precision=PRECISION)
    dk += ((b * seqlen + t) * nheads + h)[:, None] * N + n[None, :]
    tl.store(dk, met.to(dk.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@triton.jit
def fenwick_passing(across, passing, chunks, nheads, above, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """R of pairs that pass over a chunk, by level, at each boundary. Grid: (batch · chunks, nheads / HEADS, 1).

    Over a chunk of the left half pass the columns of those before it, over one of the right half the rows of those behind it.

    Args:
        across: R of columns of left halves, of rows of right halves (`fenwick_rows`, `fenwick_columns`).
        passing: the same sums over the others of the half; both `[batch, chunks, above, nheads]`, 0 where there is no boundary.
    """
    m, row = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64) * chunks
    h, i = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    low = m & -m
    lines = (row * above + length(tl.maximum(low, 1)) - 1) * nheads + h  # of chunk 0 at this level
    columns, rows = tl.zeros([HEADS], tl.float32), tl.zeros([HEADS], tl.float32)
    for first in range(0, low, BLOCK):
        far = first + i  # from the outer end of the half
        mask = (far < low)[:, None] & (h < nheads)[None, :]
        place = (m - low + far).to(tl.int64)[:, None] * above * nheads + lines[None, :]
        x = tl.load(across + place - above * nheads, mask=mask & (far > 0)[:, None], other=0.0)
        tl.store(passing + place, tl.cumsum(x, 0) + columns[None, :], mask=mask)
        columns += tl.sum(x, 0)
        at = m + low - 1 - far
        place = at.to(tl.int64)[:, None] * above * nheads + lines[None, :]
        x = tl.load(across + place + above * nheads, mask=mask & ((far > 0) & (at + 1 < chunks))[:, None], other=0.0)
        tl.store(passing + place, tl.cumsum(x, 0) + rows[None, :], mask=mask & (at < chunks)[:, None])
        rows += tl.sum(x, 0)
