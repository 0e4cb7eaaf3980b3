"""What all heads of a group share, and the sums of log decays: computed once per chunk, read by every scan."""

import triton
import triton.language as tl

from .rows import first_slot, row_of_end, row_of_slot, slot_bounds

GROWTH = tl.constexpr(16.0)


@triton.jit
def prepare(
    q, k, log_a, log_cols, d, u, w, cu, scores, beside, rho, kappa, total, center, reads, adds,
    block_rho, block_kappa, block_total, block_u, block_w, block_d, turns, places, ends,
    n_rows, seqlen, tokens, nheads, groups, blocks, n_places, n_ends, segment, q_share, k_share, scale, d_scale,
    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, z_b, z_t, z_h, d_b, d_t, d_h, u_b, u_t, u_h, w_b, w_t, w_h,
    L: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, ROW_INCLUSIVE: tl.constexpr, COL_INCLUSIVE: tl.constexpr,
    DECAY: tl.constexpr, LOG_COLS: tl.constexpr, APART: tl.constexpr,
    PACKED: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, CENTERS: tl.constexpr, SPAN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, RUNNERS: tl.constexpr, DIAGONAL: tl.constexpr, VALUES: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, FACTORS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Scores K Qᵀ of chunks under the mask's triangle, if CHUNKS; sums of log decays of blocks, in units of log 2.

    Grid: (chunks, groups + parts of HEADS heads): a program has the scores of a chunk and a group, or the sums of a block
    (there are fewer of those) and a part. Without CHUNKS: (blocks, parts of HEADS heads).

    Args:
        scores: `[chunks, groups, L_j, L_i]`.
        beside: `[chunks, nheads, L]`, d_scale · d_i ⟨q_i, k_i⟩ of a DIAGONAL beside the scan; d is 1 unless it has VALUES.
        rho, kappa: `[chunks, nheads, L]`, from the chunk's start in local time; float64 where products are of float32, as
            differences of rounded sums lose digits.
        total: `[chunks, nheads]`, the sum of a chunk. These, and scores and center, only if CHUNKS.
        center: `[chunks, nheads]`, what all ρ and κ of a chunk are within SPAN of; 1e30 if nothing is. With CENTERS, which come
            without CHUNKS, `[blocks, nheads]`, of blocks; 1e30, too, where logs are positive and sums come to more than GROWTH.
        reads, adds: `[chunks, nheads, L]`, if FACTORS: exp(ρ_i − center) u_i scale and exp(center − κ_j) w_j, what a token
            reads of a state and adds to one that are relative to the chunk's center (0 if nothing decays).
        block_rho, block_kappa, block_total: the same sums of blocks, if BLOCKS.
        block_u, block_w, block_d: `[blocks, nheads, BLOCK]`, u, w and d of blocks, if LINES: by tokens, as ρ and κ are.
        turns: `[rows, groups, RUNNERS]`, put to 0 for a relay of as many programs of the scan for each row and group.
        places, n_places: whose the slots of segments of `segment` tokens are, of packed rows: `[n_places]`, no more than there
            are chunks or blocks.
        ends, n_ends: whose segment ends in each cell of so many tokens (`row_of_end`): `[n_ends]`, no more than n_places.
    """
    slot, part = tl.program_id(0), tl.program_id(1)
    if PACKED:
        if (part == 0) & (slot < n_places):
            tl.store(places + slot, row_of_slot(cu, slot, n_rows, tokens, tl.arange(0, 256), segment))
            if slot < n_ends:
                tl.store(ends + slot, row_of_end(cu, slot, n_rows, tokens, tl.arange(0, 256), segment))
    if part < groups:
        row, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, tl.arange(0, 256), L, PACKED)
        if first < stop:
            b, t, i = first // seqlen, first % seqlen, tl.arange(0, L)
            q += b * q_b + t * q_t + (part // q_share) * q_h
            k += b * k_b + t * k_t + (part // k_share) * k_h
            acc = tl.zeros([L, L], tl.float32)
            for n0 in tl.static_range(0, N, BN):
                n = n0 + tl.arange(0, BN)
                inside = (first + i < stop)[:, None] & (n < N)[None, :]
                qt = tl.load(q + i[:, None] * q_t + n[None, :], mask=inside, other=0.0).to(DOT)
                kt = tl.load(k + i[:, None] * k_t + n[None, :], mask=inside, other=0.0).to(DOT)
                acc = tl.dot(kt, tl.trans(qt), acc=acc, input_precision=PRECISION)  # [L_j, L_i]
            if DIAGONAL:
                share, own = nheads // groups, tl.sum(tl.where(i[:, None] == i[None, :], acc, 0.0), 0) * d_scale
                d += b * d_b + t * d_t + part * share * d_h
                beside += (slot.to(tl.int64) * nheads + part * share) * L
                for h0 in range(0, share, HEADS):
                    h = h0 + tl.arange(0, HEADS)
                    out = tl.zeros([HEADS, L], tl.float32) + own[None, :]
                    there = (h < share)[:, None]
                    if VALUES:
                        real = there & (first + i < stop)[None, :]
                        out *= tl.load(d + i[None, :] * d_t + h[:, None] * d_h, mask=real, other=0.0).to(tl.float32)
                    tl.store(beside + h[:, None] * L + i[None, :], out, mask=there)
            late, early = (i[None, :], i[:, None]) if CAUSAL else (i[:, None], i[None, :])
            acc = tl.where(late > early if STRICT else late >= early, acc, 0.0)
            scores += (slot.to(tl.int64) * groups + part) * L * L
            tl.store(scores + i[:, None] * L + i[None, :], acc.to(DOT))
            if first == start:
                for runner in range(0, RUNNERS, 64):
                    of_group = runner + tl.arange(0, 64)
                    place = (row * groups + part) * RUNNERS + of_group
                    tl.store(turns + place, tl.zeros([64], tl.int32), mask=of_group < RUNNERS)
    elif DECAY or LOG_COLS or FACTORS or LINES:
        if slot < blocks:
            row, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, tl.arange(0, 256), BLOCK, PACKED)
            if first < stop:
                chunk0 = first_slot(start, row, seqlen, L, PACKED) + (first - start) // L
                b, t = first // seqlen, first % seqlen
                _sum_logs(
                    log_a + b * a_b + t * a_t, log_cols + b * z_b + t * z_t, u + b * u_b + t * u_t, w + b * w_b + t * w_t,
                    d + b * d_b + t * d_t, rho, kappa, total, center, reads, adds, block_rho, block_kappa, block_total,
                    block_u, block_w, block_d, slot.to(tl.int64), chunk0, (stop - first).to(tl.int32), (part - groups) * HEADS,
                    nheads, scale, a_t, a_h, z_t, z_h, u_t, u_h, w_t, w_h, d_t, d_h,
                    L, BLOCK, HEADS, CAUSAL, ROW_INCLUSIVE, COL_INCLUSIVE, DECAY, LOG_COLS, APART, CHUNKS, BLOCKS, CENTERS,
                    SPAN, ROWS, COLS, VALUES, FACTORS, LINES,
                )  # fmt: skip


@triton.jit
def _sum_logs(
    log_a, log_cols, u, w, d, rho, kappa, total, center, reads, adds, block_rho, block_kappa, block_total,
    block_u, block_w, block_d, block, chunk0, length, h0, nheads, scale,
    a_t, a_h, z_t, z_h, u_t, u_h, w_t, w_h, d_t, d_h,
    L: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ROW_INCLUSIVE: tl.constexpr,
    COL_INCLUSIVE: tl.constexpr, DECAY: tl.constexpr, LOG_COLS: tl.constexpr, APART: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, CENTERS: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VALUES: tl.constexpr, FACTORS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Of the tokens of a block and HEADS heads: sums of log decays, from where scans begin, and what follows from them."""
    chunks: tl.constexpr = BLOCK // L
    SUMS: tl.constexpr = DECAY or LOG_COLS
    i, h = tl.arange(0, BLOCK), h0 + tl.arange(0, HEADS)
    real = (i < length)[:, None] & (h < nheads)[None, :]
    wide: tl.constexpr = (block_rho if BLOCKS else rho).dtype.element_ty if SUMS else tl.float32
    logs = tl.zeros([BLOCK, HEADS], wide)
    if DECAY:
        logs = tl.load(log_a + i[:, None] * a_t + h[None, :] * a_h, mask=real, other=0.0).to(wide) * 1.4426950408889634
    inclusive = tl.cumsum(logs, 0, reverse=not CAUSAL)
    r = inclusive if ROW_INCLUSIVE else inclusive - logs
    c = inclusive if COL_INCLUSIVE else inclusive - logs
    if LOG_COLS:
        z = tl.load(log_cols + i[:, None] * z_t + h[None, :] * z_h, mask=real, other=0.0)
        c -= z.to(wide) * 1.4426950408889634
    inside = (h < nheads)[None, :] & (i < BLOCK)[:, None]
    of_block = (block * nheads + h)[None, :] * BLOCK + i[:, None]
    if BLOCKS:
        tl.store(block_rho + of_block, r, mask=inside)
        if APART:
            tl.store(block_kappa + of_block, c, mask=inside)
        tl.store(block_total + block * nheads + h, tl.sum(logs, 0), mask=h < nheads)
        if CENTERS:
            grown = tl.maximum(tl.max(r, 0), tl.max(c, 0)) > GROWTH
            tl.store(center + block * nheads + h, tl.where(grown, 1e30, _middle(r, c, SPAN, 0)), mask=h < nheads)
    if LINES:
        if ROWS:
            tl.store(block_u + of_block, _of_tokens(u, i, h, u_t, u_h, real), mask=inside)
        if COLS:
            tl.store(block_w + of_block, _of_tokens(w, i, h, w_t, w_h, real), mask=inside)
        if VALUES:
            tl.store(block_d + of_block, _of_tokens(d, i, h, d_t, d_h, real), mask=inside)
    if CHUNKS:
        m = tl.arange(0, chunks)
        ends = tl.sum(tl.reshape(logs, [chunks, L, HEADS]), 1)
        past = tl.cumsum(ends, 0, reverse=not CAUSAL) - ends
        r = tl.reshape(r, [chunks, L, HEADS]) - past[:, None, :]
        c = tl.reshape(c, [chunks, L, HEADS]) - past[:, None, :]
        place = ((chunk0 + i // L)[:, None] * nheads + h[None, :]) * L + (i % L)[:, None]
        inside = ((i // L) * L < length)[:, None] & (h < nheads)[None, :]
        middle = _middle(r, c, SPAN, 1)
        if SUMS:
            tl.store(rho + place, tl.reshape(r, [BLOCK, HEADS]), mask=inside)
            if APART:
                tl.store(kappa + place, tl.reshape(c, [BLOCK, HEADS]), mask=inside)
            of_chunk = (chunk0 + m)[:, None] * nheads + h[None, :]
            there = (m * L < length)[:, None] & (h < nheads)[None, :]
            tl.store(total + of_chunk, ends, mask=there)
            tl.store(center + of_chunk, middle, mask=there)
        if FACTORS:
            read = tl.exp2(tl.minimum(r.to(tl.float32) - middle[:, None, :], SPAN))  # no more than that where they are read
            add = tl.exp2(tl.minimum(middle[:, None, :] - c.to(tl.float32), SPAN))
            read, add = tl.reshape(read, [BLOCK, HEADS]) * scale, tl.reshape(add, [BLOCK, HEADS])
            if ROWS:
                read *= _of_tokens(u, i, h, u_t, u_h, real)
            if COLS:
                add *= _of_tokens(w, i, h, w_t, w_h, real)
            tl.store(reads + place, read, mask=inside)
            tl.store(adds + place, add, mask=inside)


@triton.jit
def _middle(r, c, SPAN: tl.constexpr, AXIS: tl.constexpr):
    """What ρ and κ along an axis are within SPAN of; 1e30 if nothing is."""
    high = tl.maximum(tl.max(r, AXIS), tl.max(c, AXIS)).to(tl.float32)
    low = tl.minimum(tl.min(r, AXIS), tl.min(c, AXIS)).to(tl.float32)
    return tl.where(high - low <= 2 * SPAN, 0.5 * (high + low), 1e30)


@triton.jit
def _of_tokens(x, i, h, x_t, x_h, real):
    """A number of each token i and head h, 0 where there is none."""
    return tl.load(x + i[:, None] * x_t + h[None, :] * x_h, mask=real, other=0.0).to(tl.float32)
