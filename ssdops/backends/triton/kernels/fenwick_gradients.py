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
    bit = length((chunks - 1) // (rank + 1)) - 1
    m = (2 * (rank - ((chunks - 1) >> (bit + 1))) + 1) << bit
    b, i = of.to(tl.int64), tl.arange(0, C)
    p, n = (tile % tiles_p) * BP + tl.arange(0, BP), (tile // tiles_p) * BN + tl.arange(0, BN)
    dy += b * y_b + h * y_h
    q += b * q_b + (h // q_share) * q_h
    levels += b * l_b + (h // l_share) * l_h + (LOG + 1 + bit) * l_l
    s, before = tl.zeros([BP, BN], tl.float32), tl.zeros([1], rho.dtype.element_ty)
    for c in tl.range(m, tl.minimum(m + (1 << bit), chunks), num_stages=STAGES):
        head = (b * chunks + c) * nheads + h
        t, inside = chunk_tokens(c, i, seqlen, C, CAUSAL)
        weight = tl.load(levels + t * l_t, mask=inside, other=0.0).to(tl.float32)
        weight *= tl.exp2((before + tl.load(rho + head * C + i)).to(tl.float32)) * scale
        g = (tokens_of(dy, t, inside, p, P, y_t, tl.float32) * weight[:, None]).to(DOT)
        s = tl.dot(tl.trans(g), tokens_of(q, t, inside, n, N, q_t, DOT), acc=s, input_precision=PRECISION)
        before += tl.load(total + head)
    place = dtree + ((b * chunks + m) * nheads + h) * P * N + p[:, None] * N + n[None, :]
    tl.store(place, s.to(dtree.dtype.element_ty), mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit
def fenwick_inner(
    q, k, v, dy, levels, rho, kappa, grad, dv, dlevels, inner,
    seqlen, chunks, nheads, together, n_levels, q_share, k_share, v_share, l_share, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, l_b, l_t, l_h, l_l,
    C: tl.constexpr, LOG: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What pairs inside chunks give: if ROWS to dQ, levels and decays, else to dK and dV. No product is ever transposed.

    Grid: (batch · chunks · heads / together, 1, 1).

    Args:
        together: heads that share q and k, whose gradients a program sums.
        grad: dQ or dK, `[batch, seqlen, nheads / together, N]`.
        dv, dlevels: of every head, `[batch, seqlen, nheads, P]` and `[…, n_levels]`.
        inner: Σ R_ij of j < t ≤ i inside the chunk of t, a sum of these alone, `[batch, chunks, nheads, C]`.
    """
    groups = nheads // together
    group, slot = (tl.program_id(0) % groups).to(tl.int64), (tl.program_id(0) // groups).to(tl.int64)
    c, b = (slot % chunks).to(tl.int32), slot // chunks
    total = tl.zeros([C, BN], tl.float32)
    for h in tl.range(group * together, (group + 1) * together, num_stages=1):
        head, unmoved = slot * nheads + h, tl.minimum(h - group * together, 0).to(tl.int32)
        i, n = tl.arange(0, C) + unmoved, tl.arange(0, BN) + unmoved  # 0, as no compiler knows: what is hoisted takes registers
        t, inside = chunk_tokens(c, i, seqlen, C, CAUSAL)
        qt = tokens_of(q + b * q_b + (h // q_share) * q_h, t, inside, n, N, q_t, DOT)
        kt = tokens_of(k + b * k_b + (h // k_share) * k_h, t, inside, n, N, k_t, DOT)
        v_head, dy_head = v + b * v_b + (h // v_share) * v_h, dy + b * y_b + h * y_h
        own = levels + b * l_b + t * l_t + (h // l_share) * l_h
        r, x = tl.load(rho + head * C + i), tl.load(kappa + head * C + i)
        g = tl.zeros([C, C], tl.float32)
        for p0 in tl.range(0, P, BP, num_stages=1):
            p = p0 + tl.arange(0, BP)
            vt, dyt = tokens_of(v_head, t, inside, p, P, v_t, DOT), tokens_of(dy_head, t, inside, p, P, y_t, DOT)
            if ROWS:
                g = tl.dot(dyt, tl.trans(vt), acc=g, input_precision=PRECISION)
            else:
                g = tl.dot(vt, tl.trans(dyt), acc=g, input_precision=PRECISION)
        if ROWS:
            pairs = (i[:, None] > i[None, :] if STRICT else i[:, None] >= i[None, :]) & inside[:, None]
            g *= tl.exp2(tl.where(pairs, r[:, None] - x[None, :], 0.0).to(tl.float32)) * scale
            g = tl.where(pairs, g, 0.0)
            weights = level_weights(own[:, None], l_l, pairs, i[:, None], i[None, :])
            total = tl.dot((g * weights).to(DOT), kt, acc=total, input_precision=PRECISION)
            g *= tl.where(pairs, tl.dot(qt, tl.trans(kt), input_precision=PRECISION), 0.0)
            for level in tl.static_range(LOG + 1):
                found = tl.sum(tl.where(length(i[:, None] ^ i[None, :]) == level, g, 0.0), 1)
                place = dlevels + ((b * seqlen + t) * nheads + h) * n_levels + level
                tl.store(place, found, mask=inside & (level < n_levels))
            over = tl.cumsum(g * weights, 0, reverse=True)  # of R, column j and the rows from t on
            tl.store(inner + head * C + i, tl.sum(tl.where(i[:, None] > i[None, :], over, 0.0), 1))
        else:
            pairs = (i[:, None] < i[None, :] if STRICT else i[:, None] <= i[None, :]) & inside[None, :]
            weights = tl.exp2(tl.where(pairs, r[None, :] - x[:, None], 0.0).to(tl.float32)) * scale
            weights *= level_weights(own[None, :], l_l, pairs, i[None, :], i[:, None])
            total = tl.dot(tl.where(pairs, g * weights, 0.0).to(DOT), qt, acc=total, input_precision=PRECISION)
            scores = tl.dot(kt, tl.trans(qt), input_precision=PRECISION)
            scores = tl.where(pairs, scores * weights, 0.0).to(DOT)
            for p0 in tl.range(0, P, BP, num_stages=1):
                p = p0 + tl.arange(0, BP)
                out = tl.dot(scores, tokens_of(dy_head, t, inside, p, P, y_t, DOT), input_precision=PRECISION)
                place = dv + ((b * seqlen + t) * nheads + h)[:, None] * P + p[None, :]
                tl.store(place, out.to(dv.dtype.element_ty), mask=inside[:, None] & (p < P)[None, :])
    n = tl.arange(0, BN)
    t, inside = chunk_tokens(c, tl.arange(0, C), seqlen, C, CAUSAL)
    grad += ((b * seqlen + t) * groups + group)[:, None] * N + n[None, :]
    tl.store(grad, total.to(grad.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@triton.jit
def fenwick_across(
    x, z, levels, sums, total, spans, tree, grad, dv, dlevels, along, across,
    seqlen, chunks, nheads, together, n_levels, above, x_share, z_share, l_share, scale,
    x_b, x_t, x_h, z_b, z_t, z_h, l_b, l_t, l_h, l_l,
    C: tl.constexpr, LOG: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What tokens get from what is at boundaries: rows from S, or columns from dS; added to what pairs inside chunks give.

    Grid: (batch · chunks · heads / together, 1, 1).

    Args:
        x, z: Q and dY, or K and V.
        sums, total: ρ; or κ, and sums of log decays of chunks.
        spans: sums of log decays of left halves, or of right ones.
        tree: S, or dS.
        grad, dv: dQ, or dK and dV, added to.
        dlevels: written where a row meets a boundary; elsewhere it stays as it is.
        along: R of row i and columns of other chunks, or of column j and rows of others, `[batch, chunks, nheads, C]`.
        across: the same for a chunk as a whole, at each boundary, by its level: `[batch, chunks, above, nheads]`.
    """
    groups = nheads // together
    group, slot = (tl.program_id(0) % groups).to(tl.int64), (tl.program_id(0) // groups).to(tl.int64)
    c, b, row = (slot % chunks).to(tl.int32), slot // chunks, slot // chunks * chunks
    i, n = tl.arange(0, C), tl.arange(0, BN)
    t, inside = chunk_tokens(c, i, seqlen, C, CAUSAL)
    count = bits(c)  # of boundaries that it meets
    if not ROWS:  # those up to chunks − 1: adding the lowest bit sets digits of c that are 0, up to the first that differs
        digits = length(c ^ (chunks - 1))
        count = digits - bits(c & ((1 << digits) - 1))
    grad += ((b * seqlen + t) * groups + group)[:, None] * N + n[None, :]
    out = tl.load(grad, mask=inside[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
    for h in tl.range(group * together, (group + 1) * together, num_stages=1):
        head = slot * nheads + h
        xt = tokens_of(x + b * x_b + (h // x_share) * x_h, t, inside, n, N, x_t, DOT)
        own = levels + b * l_b + t * l_t + (h // l_share) * l_h
        dlevel = dlevels + ((b * seqlen + t) * nheads + h) * n_levels
        r, gathered = tl.load(sums + head * C + i), tl.zeros([C], tl.float32)
        if not ROWS:
            r = tl.load(total + head) - r
        for p0 in tl.static_range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            zt = tokens_of(z + b * z_b + (h // z_share) * z_h, t, inside, p, P, z_t, DOT)
            m, passed = c if ROWS else c + 1, tl.zeros([1], sums.dtype.element_ty)
            other = tl.zeros([C, BP], tl.float32)
            for _ in tl.range(0, count, num_stages=STAGES):
                low = m & -m
                bit, node = length(low) - 1, (row + m) * nheads + h
                s = tl.load(
                    tree + node * P * N + p[:, None] * N + n[None, :], mask=(p < P)[:, None] & (n < N)[None, :], other=0.0
                ).to(DOT)
                seen = tl.dot(xt, tl.trans(s), input_precision=PRECISION)
                weight = tl.exp2((passed + r).to(tl.float32))
                if ROWS:
                    weight *= scale
                found = tl.sum(seen * zt.to(tl.float32), 1) * weight
                if ROWS:
                    level = tl.load(own + (LOG + 1 + bit) * l_l, mask=inside, other=0.0).to(tl.float32)
                    _add(dlevel + LOG + 1 + bit, found, inside, p0 > 0)
                    weight *= level
                    found *= level
                else:
                    other += seen * weight[:, None]
                out = tl.dot((zt.to(tl.float32) * weight[:, None]).to(DOT), s, acc=out, input_precision=PRECISION)
                gathered += found
                # along a tile's axis, as a sum of a vector of tensor memory makes Triton 3.7.1 fail for sm_100
                place = across + (slot * above + bit) * nheads + h + tl.arange(0, 1)
                _add(place, tl.sum(tl.expand_dims(found, 0), 1), None, p0 > 0)
                passed += tl.load(spans + node)
                m = m - low if ROWS else m + low
            if not ROWS:
                here = inside[:, None] & (p < P)[None, :]
                dvt = dv + ((b * seqlen + t) * nheads + h)[:, None] * P + p[None, :]
                tl.store(dvt, (other + tl.load(dvt, mask=here, other=0.0)).to(dv.dtype.element_ty), mask=here)
        tl.store(along + head * C + i, gathered)
    tl.store(grad, out.to(grad.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@triton.jit
def _add(place, x, mask, LATER: tl.constexpr):
    """Store, or of a LATER tile of headdim add to what those before it have left."""
    if LATER:
        tl.debug_barrier()
        x += tl.load(place, mask=mask)
    tl.store(place, x, mask=mask)


@triton.jit
def fenwick_passing(across, passing, chunks, nheads, above, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """R of pairs that pass over a chunk, by level, at each boundary. Grid: (batch · chunks, nheads / HEADS, 1).

    Over a chunk of the left half pass the columns of those before it, over one of the right half the rows of those behind it.

    Args:
        across: R of columns of left halves, of rows of right ones (`fenwick_across`).
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
