"""The states of every block, and the cotangents of states: walks that write nothing else.

S enters a block from the side that the term is walked from, its cotangent dS from the other; E is a block's sum of log decays:

    S  ← exp(E) S  + Σ_j exp(E − κ_j) w_j v_j k_jᵀ
    dS ← exp(E) dS + Σ_i exp(ρ_i) u_i scale · dy_i q_iᵀ

Both are one walk over other tensors. Weights are relative to the block, so that its tokens may come in portions. Where only the
last state of a segment is wanted, what it does not remember is not read.
"""

import triton
import triton.language as tl

from .rows import bounds, ended_segment, first_slot, remembered, segment_of


@triton.jit
def states(
    v, k, dy, q, u, w, cu, rho, kappa, total, entering, dleaving, blocks, dblocks, dentering, parts, part_totals,
    places, n_rows, seqlen, tokens, nheads, v_share, k_share, q_share, scale, per_segment,
    v_b, v_t, v_h, k_b, k_t, k_h, y_b, y_t, y_h, q_b, q_t, q_h, u_b, u_t, u_h, w_b, w_t, w_h,
    BLOCK: tl.constexpr, PORTION: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PACKED: tl.constexpr, BOTH: tl.constexpr, ENTERING: tl.constexpr, DLEAVING: tl.constexpr, DENTERING: tl.constexpr,
    PARTS: tl.constexpr, LAST: tl.constexpr, ENDS: tl.constexpr, SEGMENTS: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (rows · heads · tiles of P and N, 2 if BOTH or 1 for S alone, segments), or of packed rows in segments
    (slots · heads · tiles, 2 or 1): `segment_of`; if ENDS, (cells · heads · tiles, 2 or 1): `ended_segment`.

    Args:
        rho, kappa, total: sums of log decays by blocks (`prepare`).
        entering, dleaving: S before the first block, dS after the last.
        dentering: dS before the first block.
        blocks, dblocks: S and dS as they enter each block, `[blocks, nheads, P, N]`: written unless PARTS.
        per_segment: blocks of a segment.
        parts, part_totals: the state that each segment makes from zero, `[sides, slots of segments, nheads, P, N]`, and its
            E: written if PARTS, but of a row's last segment only if LAST, and read if SEGMENTS.
        places: the row of each slot of segments, or of each cell that they end in, of packed rows in segments (`prepare`).
    """
    tiles_p: tl.constexpr = (P + BP - 1) // BP
    tiles: tl.constexpr = tiles_p * ((N + BN - 1) // BN)
    portions: tl.constexpr = BLOCK // PORTION
    at, h, tile = tl.program_id(0) // (nheads * tiles), tl.program_id(0) // tiles % nheads, tl.program_id(0) % tiles
    if ENDS:
        row, segment, part0 = ended_segment(places, cu, at, tokens, per_segment * BLOCK)
        if row < 0:
            return
    else:
        row, segment, part0 = segment_of(places, cu, at, tokens, per_segment * BLOCK, PACKED, PARTS or SEGMENTS)
    start, stop = bounds(cu, row, seqlen, tokens, PACKED)
    batch, t0, length = start // seqlen, start % seqlen, (stop - start).to(tl.int32)
    whole = (length + BLOCK - 1) // BLOCK * portions  # the last of them may be empty
    lo, hi = segment * per_segment * portions, tl.minimum((segment + 1) * per_segment * portions, whole)
    if PARTS and not LAST:
        if hi >= whole:  # nobody starts from what it leaves
            return
    if SEGMENTS:
        if (lo >= whole) & (segment > 0):
            return
    slot0 = first_slot(start, row, seqlen, BLOCK, PACKED)
    row, nheads64 = row.to(tl.int64), tl.cast(nheads, tl.int64)
    p, n, i = (tile % tiles_p) * BP + tl.arange(0, BP), (tile // tiles_p) * BN + tl.arange(0, BN), tl.arange(0, PORTION)
    inside_p, inside_n = p < P, n < N
    inside = inside_p[:, None] & inside_n[None, :]
    place, state = p[:, None] * N + n[None, :], (row * nheads64 + h) * P * N
    reads, from_left, factor, part0 = False, CAUSAL, 1.0, part0 * nheads64 + h
    x = v + batch * v_b + t0 * v_t + (h // v_share) * v_h
    b = k + batch * k_b + t0 * k_t + (h // k_share) * k_h
    if BOTH:  # the other side's tensors instead
        reads = tl.program_id(1) == 1  # tensors that are chosen between are of one dtype
        from_left = reads != CAUSAL
        x = tl.where(reads, dy + batch * y_b + t0 * y_t + h * y_h, x)
        b = tl.where(reads, q + batch * q_b + t0 * q_t + (h // q_share) * q_h, b)
        v_t, k_t, factor = tl.where(reads, y_t, v_t), tl.where(reads, q_t, k_t), tl.where(reads, scale, 1.0)
        blocks = tl.where(reads, dblocks, blocks)
        if ENTERING and DLEAVING:
            entering = tl.where(reads, dleaving, entering)
        elif DLEAVING:
            entering = dleaving
        kappa = tl.where(reads, rho, kappa)
        if PACKED and (PARTS or SEGMENTS):
            slots = tokens // (per_segment * BLOCK) + n_rows
        else:
            slots = tl.cast(n_rows, tl.int64) * tl.num_programs(2)
        part0 += tl.where(reads, slots * nheads64, 0)
    s = tl.zeros([BP, BN], tl.float32)
    if ENTERING or DLEAVING:
        given = tl.where(reads, DLEAVING, ENTERING) if BOTH else ENTERING
        s += tl.load(entering + state + place, mask=inside & given, other=0.0).to(tl.float32)
    if SEGMENTS:
        kept, _ = remembered(part_totals + part0, nheads64, 0, segment)
        s = tl.where(kept > 0, 0.0, s)
        for earlier in range(kept, segment):
            part = part0 + earlier * nheads64
            s = s * tl.exp2(tl.load(part_totals + part)) + tl.load(parts + part * P * N + place, mask=inside, other=0.0)
    if PARTS:
        passed = 0.0
        if DECAY:
            walk = total + slot0 * nheads64 + h + tl.where(from_left, 0, (whole // portions - 1) * nheads64)
            kept, passed = remembered(walk, tl.where(from_left, nheads64, -nheads64), lo // portions, hi // portions)
            lo = kept * portions
        tl.store(part_totals + part0 + segment * nheads64, passed)
    for step in tl.range(lo, hi, num_stages=STAGES):
        c = tl.where(from_left, step, whole - 1 - step)
        first = c % portions == tl.where(from_left, 0, portions - 1)
        c0 = c.to(tl.int64) * PORTION
        here = i < length - c * PORTION
        head = (slot0 + c // portions) * nheads64 + h
        if not PARTS:
            if first:
                tl.store(blocks + head * P * N + place, s.to(blocks.dtype.element_ty), mask=inside)
        xt = tl.trans(tl.load(x + c0 * v_t + i[:, None] * v_t + p[None, :], mask=here[:, None] & inside_p[None, :], other=0.0))
        bt = tl.load(b + c0 * k_t + i[:, None] * k_t + n[None, :], mask=here[:, None] & inside_n[None, :], other=0.0).to(DOT)
        weight = tl.full([PORTION], 1.0, tl.float32) * factor
        if DECAY:
            e = tl.load(total + head)
            r = tl.load(kappa + head * BLOCK + c % portions * PORTION + i)
            weight *= tl.exp2(tl.where(reads, r, e - r)).to(tl.float32)
            s *= tl.where(first, tl.exp2(e).to(tl.float32), 1.0)
        t = t0 + c0 + i
        if ROWS and BOTH:
            weight *= tl.load(u + batch * u_b + t * u_t + h * u_h, mask=here & reads, other=1.0).to(tl.float32)
        if COLS:
            weight *= tl.load(w + batch * w_b + t * w_t + h * w_h, mask=here & (reads == 0), other=1.0).to(tl.float32)
        s = tl.dot((xt.to(tl.float32) * weight[None, :]).to(DOT), bt, acc=s, input_precision=PRECISION)
    if PARTS:
        tl.store(parts + (part0 + segment * nheads64) * P * N + place, s, mask=inside)
    if DENTERING:
        last = (hi == whole) if SEGMENTS else (segment == tl.num_programs(2) - 1)
        tl.store(dentering + state + place, s, mask=inside & last & reads)
