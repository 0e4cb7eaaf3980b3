"""Log-linear attention, forward: states in a binary indexed tree over chunks, and then all chunks at once.

A chunk is C tokens in local time, C a power of two: from the right if the term is anticausal. P is the sum of its log decays up
to a token, ρ is P, and κ is P less log_cols. Of a row of n chunks the tree has for every boundary m, 0 < m < n, which is before
chunk m, the state of the chunks [m − low, m), low being the lowest bit that m has:

    S[m] = Σ_j exp(P(m) − κ_j) v_j k_jᵀ,   P(m) − κ_j the sum of logs between token j and the boundary.

These are the left halves of the Fenwick mask, each once. Its right half is the chunks [m, m + low), and a token i of chunk c is
in the right half of just those m that one gets from c by clearing its lowest bit, again and again: m = c, c & (c − 1), …

    y_i += Σ_m levels[i, level(m)] · exp(P_i − P(m)) · S[m] q_i

So sums of logs only ever span what lies between two tokens, and none is subtracted from another.
"""

import triton
import triton.language as tl

from .rows import tokens_of

GROUP = tl.constexpr(16)
"""Leaves that a program of `fenwick_tree` joins: states that wait for their right halves are in registers, one a level."""


@triton.jit
def chunk_tokens(c, i, seqlen, C: tl.constexpr, CAUSAL: tl.constexpr):
    """The tokens at places i of a chunk of local time, and which of them there are."""
    t = c * C + i
    inside = t < seqlen
    if not CAUSAL:
        t = seqlen - 1 - t
    return t.to(tl.int64), inside


@triton.jit
def length(x):
    """How many binary digits x has, below 2^24: its exponent as a float."""
    return tl.maximum((x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def bits(x):
    """How many bits of x are set: sums of pairs of digits, of pairs of these, and so on."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 63


@triton.jit
def level_weights(place, step, pairs, i, j):
    """levels[i, level(i, j)] of some pairs of a chunk, 0 for the others; `place` has the levels of each row i."""
    return tl.load(place + length(i ^ j) * step, mask=pairs, other=0.0).to(tl.float32)


@triton.jit
def fenwick_spans(total, left, right, chunks, nheads, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """The sums of log decays of both halves at each boundary. Grid: (batch · chunks, nheads / HEADS, 1).

    Args:
        total: of chunks.
        left, right: of chunks [m − low, m) and [m, m + low), as far as there are any; all `[batch, chunks, nheads]`.
    """
    m, row = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64) * chunks
    h, i = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    low = m & -m
    before, after = tl.zeros([HEADS], total.dtype.element_ty), tl.zeros([HEADS], total.dtype.element_ty)
    for first in range(0, low, BLOCK):
        at = first + i
        place = total + (row + m + at[:, None]) * nheads + h[None, :]
        mask = (at < low)[:, None] & (h < nheads)[None, :]
        before += tl.sum(tl.load(place - low * nheads, mask=mask, other=0.0), 0)
        after += tl.sum(tl.load(place, mask=mask & (m + at < chunks)[:, None], other=0.0), 0)
    tl.store(left + (row + m) * nheads + h, before, mask=h < nheads)
    tl.store(right + (row + m) * nheads + h, after, mask=h < nheads)


@triton.jit
def fenwick_tree(
    v, k, tree, kappa, total, right, seqlen, chunks, nheads, groups, stride, v_share, k_share,
    v_b, v_t, v_h, k_b, k_t, k_h,
    C: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    LEAVES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S[m], in passes. Grid: (batch · groups · heads · tiles of P and N, 1, 1).

    The first pass (LEAVES) makes states of chunks and joins those of GROUP; each further one joins GROUP of what the one before
    has left at multiples of its stride, in place. What ends at a boundary is joined to the left half that waits for it, level
    by level, as in counting in binary; where it has to wait itself, it is the left half that is wanted there.

    Args:
        tree: S, `[batch · chunks, nheads, P, N]`; that of m = 0 is left as it is.
        right: sums of log decays of right halves (`fenwick_spans`).
        groups, stride: groups of a row, and chunks between what they join.
    """
    tiles_p: tl.constexpr = (P + BP - 1) // BP
    tiles: tl.constexpr = tiles_p * ((N + BN - 1) // BN)
    tile, h = tl.program_id(0) % tiles, (tl.program_id(0) // tiles % nheads).to(tl.int64)
    group = tl.program_id(0) // (tiles * nheads) % groups
    b = (tl.program_id(0) // (tiles * nheads * groups)).to(tl.int64)
    p, n, i = (tile % tiles_p) * BP + tl.arange(0, BP), (tile // tiles_p) * BN + tl.arange(0, BN), tl.arange(0, C)
    state = p[:, None] * N + n[None, :]
    whole = (p < P)[:, None] & (n < N)[None, :]
    v += b * v_b + (h // v_share) * v_h
    k += b * k_b + (h // k_share) * k_h
    s0, s1 = tl.zeros([BP, BN], tl.float32), tl.zeros([BP, BN], tl.float32)
    s2, s3 = tl.zeros([BP, BN], tl.float32), tl.zeros([BP, BN], tl.float32)
    for step in tl.range(0, tl.minimum(GROUP, (chunks - 1) // stride - group * GROUP), num_stages=STAGES):
        m = (group * GROUP + step + 1) * stride
        place = tree + ((b * chunks + m) * nheads + h) * P * N + state
        if LEAVES:
            head = (b * chunks + m - 1) * nheads + h
            t, inside = chunk_tokens(m - 1, i, seqlen, C, CAUSAL)
            weight = tl.exp2((tl.load(total + head) - tl.load(kappa + head * C + i)).to(tl.float32))
            vt = tokens_of(v, t, inside, p, P, v_t, tl.float32)
            x = tl.dot(
                tl.trans((vt * weight[:, None]).to(DOT)), tokens_of(k, t, inside, n, N, k_t, DOT), input_precision=PRECISION
            )
        else:
            x = tl.load(place, mask=whole, other=0.0).to(tl.float32)
        middle = right + (b * chunks + m) * nheads + h
        x, s0, rises = _join(x, s0, True, step & 1, middle - stride * nheads)
        x, s1, rises = _join(x, s1, rises, step & 2, middle - 2 * stride * nheads)
        x, s2, rises = _join(x, s2, rises, step & 4, middle - 4 * stride * nheads)
        x, s3, rises = _join(x, s3, rises, step & 8, middle - 8 * stride * nheads)
        tl.store(place, x.to(tree.dtype.element_ty), mask=whole)


@triton.jit
def _join(x, waiting, rises, bit, log):
    """x with the left half that waits for it, if it rises to this level and the bit is set; else, if it rises, it waits."""
    joins = rises & (bit != 0)
    decay = tl.exp2(tl.load(log, mask=joins, other=0.0).to(tl.float32))
    return tl.where(joins, waiting * decay + x, x), tl.where(rises & (bit == 0), x, waiting), joins


@triton.jit
def fenwick_output(
    q, k, v, levels, y, rho, kappa, left, tree, seqlen, chunks, nheads, n_levels, q_share, k_share, v_share, l_share, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, l_b, l_t, l_h, l_l,
    C: tl.constexpr, LOG: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y of every chunk. Grid: (batch · chunks · tiles of P · heads, 1, 1).

    Args:
        levels: `n_levels` weights of each token and head.
        left: sums of log decays of left halves (`fenwick_spans`).
        tree: S (`fenwick_tree`).
    """
    tiles: tl.constexpr = (P + BP - 1) // BP
    h, slot = (tl.program_id(0) % nheads).to(tl.int64), (tl.program_id(0) // (nheads * tiles)).to(tl.int64)
    c, b, row = (slot % chunks).to(tl.int32), slot // chunks, slot // chunks * chunks
    i, n = tl.arange(0, C), tl.arange(0, BN)
    p = tl.program_id(0) // nheads % tiles * BP + tl.arange(0, BP)
    t, inside = chunk_tokens(c, i, seqlen, C, CAUSAL)
    head = slot * nheads + h
    qt = tokens_of(q + b * q_b + (h // q_share) * q_h, t, inside, n, N, q_t, DOT)
    kt = tokens_of(k + b * k_b + (h // k_share) * k_h, t, inside, n, N, k_t, DOT)
    vt = tokens_of(v + b * v_b + (h // v_share) * v_h, t, inside, p, P, v_t, DOT)
    levels += b * l_b + t * l_t + (h // l_share) * l_h
    r, x = tl.load(rho + head * C + i), tl.load(kappa + head * C + i)
    pairs = (i[:, None] > i[None, :] if STRICT else i[:, None] >= i[None, :]) & inside[:, None]
    scores = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
    scores *= tl.exp2(tl.where(pairs, r[:, None] - x[None, :], 0.0).to(tl.float32))
    scores *= level_weights(levels[:, None], l_l, pairs, i[:, None], i[None, :])
    out = tl.dot(tl.where(pairs, scores, 0.0).to(DOT), vt, input_precision=PRECISION)
    m, before = c, tl.zeros([1], rho.dtype.element_ty)
    for _ in tl.range(0, bits(c), num_stages=1):
        low = m & -m
        node = (row + m) * nheads + h
        s = tl.load(tree + node * P * N + p[:, None] * N + n[None, :], mask=(p < P)[:, None] & (n < N)[None, :], other=0.0).to(
            DOT
        )
        weight = tl.load(levels + (LOG + length(low)) * l_l, mask=inside, other=0.0).to(tl.float32)
        weight *= tl.exp2((before + r).to(tl.float32))
        out += tl.dot(qt, tl.trans(s), input_precision=PRECISION) * weight[:, None]
        before += tl.load(left + node)
        m -= low
    y += b * y_b + h * y_h + t[:, None] * y_t + p[None, :]
    tl.store(y, (out * scale).to(y.dtype.element_ty), mask=inside[:, None] & (p < P)[None, :])
