"""The scan: one pass over a row's chunks with the state on chip.

A program owns BP rows of one head's state S [P, N] and walks the chunks of one row (or a segment of it). With the
shared scores G = K Qᵀ of a chunk, the state S that enters it, and V as [P, L]:

    Yᵀ = (S Qᵀ) ∘ exp(ρ_i) u_i + V (G ∘ exp(ρ_i − κ_j) u_i w_j)
    S ← exp(E) S + (V ∘ exp(E − κ_j) w_j) K

Everything is [P, ·], so that S and V are left operands, which tensor cores read from registers: S is never written anywhere
between chunks.

What other terms of a mask give is added on the way out: d_i ⟨q_i, k_i⟩ v_i of a diagonal, in registers, and the sum of the
terms before, from memory.
"""

import triton
import triton.language as tl

from .rows import any_wide, bounds, first_slot, remembered, segment_of, tokens_of


@triton.jit
def scan(
    q, k, v, y, u, w, cu, scores, beside, rho, kappa, total, center, reads, adds, entering, leaving, blocks, parts,
    part_totals, places, handed, turns, onto,
    n_rows, seqlen, tokens, nheads, groups, q_share, k_share, v_share, scale, per_segment,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, u_b, u_t, u_h, w_b, w_t, w_h,
    L: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    BN2: tl.constexpr, CAUSAL: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIAGONAL: tl.constexpr, ONTO: tl.constexpr,
    PACKED: tl.constexpr, ENTERING: tl.constexpr, LEAVING: tl.constexpr, BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr, RELAY: tl.constexpr, ALIGN: tl.constexpr,
    FACTORED: tl.constexpr, FACTORS: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (rows · heads · tiles of P, 1, segments), or of SEGMENTS of packed rows (slots · heads · tiles of P): `segment_of`.

    Args:
        scale: the factor of Y.
        beside: what a DIAGONAL multiplies v with (`prepare`).
        reads, adds: out and into of every token, if they are FACTORED and not all alike (`prepare`).
        onto: what Y is added to, laid out as Y is, and Y itself or no part of it: of float32 if ONTO is 1, of DOT if it is 2;
            if it is 3, Y itself, whose numbers are added to where they are.
        per_segment: chunks of a segment, a multiple of ALIGN, which segments begin at.
        parts, part_totals: the state that each segment makes from zero, `[slots of segments, nheads, P, N]`, and its E
            (`states`): read if SEGMENTS.
        places: the row of each slot of segments, of packed rows in SEGMENTS (`prepare`).
        handed, turns: where, in a RELAY, a segment leaves the state to the next one, and whose turn it is (0 before:
            `prepare`), of `[rows, nheads, P, N]` and of each program of a segment.
        CAUSAL: whether chunks are walked from the left.
        BLOCKS: write the state that enters each block of BLOCK tokens.
    """
    tiles: tl.constexpr = (P + BP - 1) // BP
    at, h = tl.program_id(0) // (nheads * tiles), tl.program_id(0) // tiles % nheads
    row, segment, part0 = segment_of(places, cu, at, tokens, per_segment * L, PACKED, SEGMENTS)
    start, stop = bounds(cu, row, seqlen, tokens, PACKED)
    b, t0, length = start // seqlen, start % seqlen, (stop - start).to(tl.int32)
    chunks = (length + L - 1) // L
    empty = 0 if CAUSAL else (chunks + ALIGN - 1) // ALIGN * ALIGN - chunks  # chunks at the right end that have no tokens
    lo = tl.maximum(segment * per_segment - empty, 0)
    hi = tl.minimum((segment + 1) * per_segment - empty, chunks)
    if SEGMENTS:
        if (lo >= chunks) & (segment > 0):
            return
    slot0 = first_slot(start, row, seqlen, L, PACKED)
    block0 = first_slot(start, row, seqlen, BLOCK, PACKED)
    row, nheads64 = row.to(tl.int64), tl.cast(nheads, tl.int64)
    n = tl.arange(0, BN)
    p = (tl.program_id(0) % tiles) * BP + tl.arange(0, BP)
    n2 = BN + tl.arange(0, BN2 if BN2 else BN)
    g = h // (nheads // groups)
    q += b * q_b + t0 * q_t + (h // q_share) * q_h
    k += b * k_b + t0 * k_t + (h // k_share) * k_h
    v += b * v_b + t0 * v_t + (h // v_share) * v_h
    y += b * y_b + t0 * y_t + h * y_h
    if ROWS:
        u += b * u_b + t0 * u_t + h * u_h
    if COLS:
        w += b * w_b + t0 * w_t + h * w_h
    if ONTO == 1 or ONTO == 2:
        onto += b * y_b + t0 * y_t + h * y_h
    state = (row * nheads64 + h) * P * N + p[:, None] * N
    inside_p, inside_n, inside_n2 = (p < P)[:, None], (n < N)[None, :], (n2 < N)[None, :]
    s = tl.zeros([BP, BN], tl.float32)
    s2 = tl.zeros([BP, BN2 if BN2 else 1], tl.float32)
    if ENTERING:
        s += tl.load(entering + state + n[None, :], mask=inside_p & inside_n, other=0.0).to(tl.float32)
        if BN2:
            s2 += tl.load(entering + state + n2[None, :], mask=inside_p & inside_n2, other=0.0).to(tl.float32)
    if SEGMENTS:
        kept, _ = remembered(part_totals + part0 * nheads64 + h, nheads64, 0, segment)
        if kept > 0:
            s, s2 = tl.zeros_like(s), tl.zeros_like(s2)
        for earlier in range(kept, segment):
            part = (part0 + earlier) * nheads64 + h
            decay = tl.exp2(tl.load(part_totals + part))
            place = parts + part * P * N + p[:, None] * N
            s = s * decay + tl.load(place + n[None, :], mask=inside_p & inside_n, other=0.0)
            if BN2:
                s2 = s2 * decay + tl.load(place + n2[None, :], mask=inside_p & inside_n2, other=0.0)
    if RELAY:
        turns += tl.program_id(0)
        if segment > 0:
            while tl.atomic_add(turns, 0, sem="acquire") < segment:  # programs start in order: that one has
                pass
            s = tl.load(handed + state + n[None, :], mask=inside_p & inside_n, other=0.0, cache_modifier=".cg")
            if BN2:
                s2 = tl.load(handed + state + n2[None, :], mask=inside_p & inside_n2, other=0.0, cache_modifier=".cg")
    if FACTORED and DECAY:  # of decays, those that may be apart
        leftmost = lo if CAUSAL else chunks - hi
        if any_wide(center, (slot0 + leftmost) * nheads64 + h, nheads64, hi - lo):
            s, s2 = _chunks(
                q, k, v, y, u, w, scores, beside, rho, kappa, total, center, reads, adds, blocks, onto, s, s2, lo, hi, chunks,
                length, slot0, block0, h, nheads64, g, groups, p, scale, q_t, k_t, v_t, y_t, u_t, w_t,
                L, BLOCK, P, BP, N, BN, BN2, CAUSAL, DECAY, APART, ROWS, COLS, DIAGONAL, ONTO, BLOCKS, False,
                False, NORMALIZE, DOT, PRECISION, STAGES,
            )  # fmt: skip
        else:
            s, s2 = _chunks(
                q, k, v, y, u, w, scores, beside, rho, kappa, total, center, reads, adds, blocks, onto, s, s2, lo, hi, chunks,
                length, slot0, block0, h, nheads64, g, groups, p, scale, q_t, k_t, v_t, y_t, u_t, w_t,
                L, BLOCK, P, BP, N, BN, BN2, CAUSAL, DECAY, APART, ROWS, COLS, DIAGONAL, ONTO, BLOCKS, True,
                FACTORS, NORMALIZE, DOT, PRECISION, STAGES,
            )  # fmt: skip
    else:
        s, s2 = _chunks(
            q, k, v, y, u, w, scores, beside, rho, kappa, total, center, reads, adds, blocks, onto, s, s2, lo, hi, chunks,
            length, slot0, block0, h, nheads64, g, groups, p, scale, q_t, k_t, v_t, y_t, u_t, w_t,
            L, BLOCK, P, BP, N, BN, BN2, CAUSAL, DECAY, APART, ROWS, COLS, DIAGONAL, ONTO, BLOCKS, FACTORED,
            FACTORS, NORMALIZE, DOT, PRECISION, STAGES,
        )  # fmt: skip
    if RELAY or LEAVING:  # where the state goes is worked out anew: what is kept over the loop takes registers of the loop
        unmoved = lo >> 30  # 0, as no compiler knows
        n, n2, p = n + unmoved, n2 + unmoved, p + unmoved
        state = ((row + unmoved) * nheads64 + h) * P * N + p[:, None] * N
        inside_p, inside_n, inside_n2 = (p < P)[:, None], (n < N)[None, :], (n2 < N)[None, :]
    if RELAY:
        if segment < tl.num_programs(2) - 1:
            tl.store(handed + state + n[None, :], s, mask=inside_p & inside_n)
            if BN2:
                tl.store(handed + state + n2[None, :], s2, mask=inside_p & inside_n2)
            tl.debug_barrier()
            tl.atomic_xchg(turns, segment + 1, sem="release")
    if LEAVING:
        if (hi == chunks) if SEGMENTS else (segment == tl.num_programs(2) - 1):
            tl.store(leaving + state + n[None, :], s.to(leaving.dtype.element_ty), mask=inside_p & inside_n)
            if BN2:
                tl.store(leaving + state + n2[None, :], s2.to(leaving.dtype.element_ty), mask=inside_p & inside_n2)


@triton.jit
def _chunks(
    q, k, v, y, u, w, scores, beside, rho, kappa, total, center, reads, adds, blocks, onto, s, s2, lo, hi, chunks, length,
    slot0, block0, h, nheads64, g, groups, p, scale, q_t, k_t, v_t, y_t, u_t, w_t,
    L: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    BN2: tl.constexpr, CAUSAL: tl.constexpr, DECAY: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIAGONAL: tl.constexpr, ONTO: tl.constexpr, BLOCKS: tl.constexpr,
    FACTORED: tl.constexpr, FACTORS: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The chunks [lo, hi) of a walk, and the state after them.

    FACTORED: exp(ρ_i − κ_j), if anything decays, is the product of two factors about the chunk's middle, so that every head
    reads the shared scores as they are; else pairs are weighted one by one. With FACTORS they are there, scales included.
    """
    per_block: tl.constexpr = BLOCK // L
    i, n = tl.arange(0, L), tl.arange(0, BN)
    n2 = BN + tl.arange(0, BN2 if BN2 else BN)
    inside_p, inside_n, inside_n2 = (p < P)[:, None], (n < N)[None, :], (n2 < N)[None, :]
    one = tl.exp2((lo >> 30).to(tl.float32))  # as no compiler knows: without it Triton loads v through registers, and waits
    pending, eye = 0.0, tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(DOT)
    for step in tl.range(lo, hi, num_stages=STAGES):
        c = step if CAUSAL else chunks - 1 - step
        c0 = c.to(tl.int64) * L
        inside = i < length - c * L
        if ONTO == 2:
            before = tokens_of(onto + c0 * y_t, i, inside, p, P, y_t, DOT)
        elif ONTO == 1:  # long before it is wanted; in branches, as outside one it would take shared memory for two chunks
            of_sum = onto + c0 * y_t
            if step < hi:
                before = tokens_of(of_sum, i, inside, p, P, y_t, tl.float32)
            else:  # never: without it the compiler would wait for the tile in the branch
                before = tokens_of(of_sum, i, inside, p, P, y_t, tl.float32)
        if BLOCKS:
            if (c % per_block == 0) if CAUSAL else ((c % per_block == per_block - 1) | (c == chunks - 1)):
                owed = tl.exp2(pending)
                block = (block0 + c // per_block) * nheads64 + h
                place = block * P * N + p[:, None] * N
                tl.store(blocks + place + n[None, :], (s * owed).to(blocks.dtype.element_ty), mask=inside_p & inside_n)
                if BN2:
                    tl.store(blocks + place + n2[None, :], (s2 * owed).to(blocks.dtype.element_ty), mask=inside_p & inside_n2)
        kt = tl.load(k + c0 * k_t + i[:, None] * k_t + n[None, :], mask=inside[:, None] & inside_n, other=0.0).to(DOT)
        vt = tl.trans(tl.load(v + c0 * v_t + i[:, None] * v_t + p[None, :], mask=inside[:, None] & (p < P)[None, :], other=0.0))
        vt = vt.to(DOT)  # [BP, L]
        if BN2:
            kt2 = tl.load(k + c0 * k_t + i[:, None] * k_t + n2[None, :], mask=inside[:, None] & inside_n2, other=0.0).to(DOT)
        base = (slot0 + c) * nheads64 + h
        into, out = tl.full([L], 1.0, tl.float32), tl.full([L], 1.0, tl.float32) * scale
        r, ut, wt = into, out, into
        kap = r
        if FACTORED:
            if FACTORS:
                into = tl.load(adds + base * L + i) * one
                if not DIAGONAL:
                    out = tl.load(reads + base * L + i)
            if DECAY:
                middle = tl.load(center + base)
                s *= tl.exp2(pending + middle)
                if BN2:
                    s2 *= tl.exp2(pending + middle)
                pending = tl.load(total + base) - middle
        else:
            if DECAY:
                e = tl.load(total + base)
                r = tl.load(rho + base * L + i)
                kap = tl.load(kappa + base * L + i) if APART else r
                into *= tl.exp2(e - kap).to(tl.float32)
                out *= tl.exp2(r).to(tl.float32)
            if COLS:
                wt = tl.load(w + c0 * w_t + i * w_t, mask=inside, other=0.0).to(tl.float32)
                into *= wt
            if ROWS:
                ut = tl.load(u + c0 * u_t + i * u_t, mask=inside, other=0.0).to(tl.float32)
                out *= ut
        added = (vt.to(tl.float32) * into[None, :]).to(DOT)
        qt = tl.load(q + c0 * q_t + i[:, None] * q_t + n[None, :], mask=inside[:, None] & inside_n, other=0.0).to(DOT)
        place = scores + ((slot0 + c) * groups + g) * L * L
        pairs = tl.load(place + i[:, None] * L + i[None, :])  # [L_j, L_i]
        size = 1.0
        if NORMALIZE:  # float16 holds nothing above 65504
            size = tl.maximum(tl.max(tl.abs(s)), tl.max(tl.abs(s2)) if BN2 else 0.0) + 1e-30
            out *= size
        yt = tl.dot((s / size if NORMALIZE else s).to(DOT), tl.trans(qt), input_precision=PRECISION)
        if BN2:
            qt2 = tl.load(q + c0 * q_t + i[:, None] * q_t + n2[None, :], mask=inside[:, None] & inside_n2, other=0.0).to(DOT)
            yt = tl.dot((s2 / size if NORMALIZE else s2).to(DOT), tl.trans(qt2), acc=yt, input_precision=PRECISION)
        if FACTORED:
            yt = tl.dot(added, pairs, acc=yt, input_precision=PRECISION)
            if FACTORS and DIAGONAL:  # read only now: until here it would take registers that are not there
                out = tl.load(reads + base * L + i)
            yt *= out[None, :]
        else:
            weighted = _weighted(pairs, r, kap, ut, wt, scale, i, L, CAUSAL, DECAY, ROWS, COLS)
            yt = tl.dot(vt, weighted.to(DOT), acc=yt * out[None, :], input_precision=PRECISION)  # [BP, L]
        if DIAGONAL and FACTORED:  # a product: v as Y is laid out would be read from one bank
            own = tl.where(i[:, None] == i[None, :], tl.load(beside + base * L + i)[None, :], 0.0).to(DOT)
            yt = tl.dot(vt, own, acc=yt, input_precision=PRECISION)
        elif DIAGONAL:
            yt += vt.to(tl.float32) * tl.load(beside + base * L + i)[None, :]
        place = y + c0 * y_t + i[None, :] * y_t + p[:, None]
        if ONTO == 2:  # exact: a product with 1, which the tensor cores read from where it has been loaded to
            yt = tl.dot(tl.trans(before), eye, acc=yt, input_precision=PRECISION)
        elif ONTO == 1:
            yt += tl.trans(before)
        if ONTO == 3:  # where it is: nobody waits for what is there
            tl.atomic_add(place, yt.to(y.dtype.element_ty), mask=inside_p & inside[None, :], sem="relaxed")
        else:
            tl.store(place, yt.to(y.dtype.element_ty), mask=inside_p & inside[None, :])
        if DECAY and not FACTORED:
            s *= tl.exp2(e).to(tl.float32)
            if BN2:
                s2 *= tl.exp2(e).to(tl.float32)
        s = tl.dot(added, kt, acc=s, input_precision=PRECISION)
        if BN2:
            s2 = tl.dot(added, kt2, acc=s2, input_precision=PRECISION)
    if FACTORED and DECAY:
        s *= tl.exp2(pending)
        if BN2:
            s2 *= tl.exp2(pending)
    return s, s2


@triton.jit
def _weighted(
    pairs, r, kap, ut, wt, scale, i,
    L: tl.constexpr, CAUSAL: tl.constexpr, DECAY: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """scores ∘ exp(ρ_i − κ_j) u_i w_j · scale, [L_j, L_i]."""
    weight = tl.full([L, L], 1.0, tl.float32) * scale
    if DECAY:
        gap = r[None, :] - kap[:, None]
        late = (i[None, :] >= i[:, None]) if CAUSAL else (i[None, :] <= i[:, None])
        weight *= tl.exp2(tl.where(late, gap, 0.0)).to(tl.float32)  # elsewhere gap may be positive and overflow
    if ROWS:
        weight *= ut[None, :]
    if COLS:
        weight *= wt[:, None]
    return pairs.to(tl.float32) * weight
