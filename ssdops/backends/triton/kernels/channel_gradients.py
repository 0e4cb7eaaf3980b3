"""Decay per channel, backward: dQ, dK and the gradient of log decays by chunks, from S as it enters and dS as it leaves.

The scores of a level are W Wᵀ (`channel.py`), so what its W gets is one product, too: with G the gradients of scores in both
triangles, dW = G W over the level's pairs, and of dW rows of right halves are q's, of left halves k's.

A log decay gets q̃ ∘ dq̃ of all rows whose exponent it is in, and k̃ ∘ dk̃ likewise: at every level those of its own half, as far
as it lies between them and the cut, and of the chunk as a whole those that meet the states. W ∘ dW is both, and the sums are
products with matrices of ones. So each pair that a log decay lies between counts once, and nothing is subtracted.
"""

import triton
import triton.language as tl

from .channel import level_factors, local_tokens, sums_at
from .rows import slot_bounds, tokens_of


@triton.jit
def channel_gradients(
    q, k, v, dy, cu, sums, states, dstates, dq, dk, dlogs,
    n_rows, seqlen, tokens, nheads, q_share, k_share, v_share, levels, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h,
    L: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    STRICT: tl.constexpr, ROW_INCLUSIVE: tl.constexpr, COL_INCLUSIVE: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (slots · heads, 1, 1).

    Args:
        sums: P (`channel_sums`).
        states, dstates: S as it enters, dS as it leaves each chunk (`channel_states`).
        dq, dk, dlogs: of every head, `[batch, seqlen, nheads, N]`; the last of log decays.
        levels: log2 of L, which the compiler is not to know.
    """
    slot, h = tl.program_id(0) // nheads, tl.program_id(0) % nheads
    _, start, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, tl.arange(0, 64), L, PACKED)
    nheads64 = tl.cast(nheads, tl.int64)
    head = slot * nheads64 + h
    chunk = sums + head * L * N
    i, n = tl.arange(0, L), tl.arange(0, BN)
    b, t0 = start // seqlen, start % seqlen
    q += b * q_b + t0 * q_t + (h // q_share) * q_h
    k += b * k_b + t0 * k_t + (h // k_share) * k_h
    v += b * v_b + t0 * v_t + (h // v_share) * v_h
    dy += b * y_b + t0 * y_t + h * y_h
    states, dstates = states + head * P * N, dstates + head * P * N
    if first < stop:
        t, inside = local_tokens(start, stop, first, L, CAUSAL)
        inside_n = (n < N)[None, :]
        # what scores and states get, over all of headdim
        below, above = tl.zeros([L, L], tl.float32), tl.zeros([L, L], tl.float32)
        q_grad, k_grad = tl.zeros([L, BN], tl.float32), tl.zeros([L, BN], tl.float32)
        through = tl.zeros([BN], tl.float32)
        for p0 in tl.range(0, P, BP, num_stages=1):
            p = p0 + tl.arange(0, BP)
            place, real = p[:, None] * N + n[None, :], (p < P)[:, None] & inside_n
            vt, g = tokens_of(v, t, inside, p, P, v_t, DOT), tokens_of(dy, t, inside, p, P, y_t, DOT)
            s = tl.load(states + place, mask=real, other=0.0)
            ds = tl.load(dstates + place, mask=real, other=0.0)
            below = tl.dot(g, tl.trans(vt), acc=below, input_precision=PRECISION)
            above = tl.dot(vt, tl.trans(g), acc=above, input_precision=PRECISION)  # no transpose of a product: DESIGN, 4
            q_grad = tl.dot(g, s.to(DOT), acc=q_grad, input_precision=PRECISION)
            k_grad = tl.dot(vt, ds.to(DOT), acc=k_grad, input_precision=PRECISION)
            through += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 0)
        below *= scale
        own = tl.sum(tl.where(i[:, None] == i[None, :], below, 0.0), 1)
        both = tl.where(i[:, None] > i[None, :], below, above * scale).to(DOT)  # G, [L, L]
        rho = sums_at(chunk, i if ROW_INCLUSIVE else i - 1, n, N)
        kappa = rho
        if COL_INCLUSIVE and not ROW_INCLUSIVE:
            kappa = sums_at(chunk, i, n, N)
        total = tl.load(chunk + (L - 1) * N + n, mask=n < N, other=0.0)
        qt = tokens_of(q, t, inside, n, N, q_t, DOT)
        kt = tokens_of(k, t, inside, n, N, k_t, DOT)
        q_grad *= scale * tl.exp2(rho.to(tl.float32))
        k_grad *= tl.exp2((total[None, :] - kappa).to(tl.float32))
        # tokens [a, b]: whether the log decay of a is in ρ_b, and whether it is in E − κ_b
        rows = (i[:, None] <= i[None, :]) if ROW_INCLUSIVE else (i[:, None] < i[None, :])
        cols = (i[:, None] > i[None, :]) if COL_INCLUSIVE else (i[:, None] >= i[None, :])
        q_logs, k_logs = (qt.to(tl.float32) * q_grad).to(DOT), (kt.to(tl.float32) * k_grad).to(DOT)
        logs = tl.dot(tl.where(rows, 1.0, 0.0).to(DOT), q_logs, input_precision=PRECISION)
        logs = tl.dot(tl.where(cols, 1.0, 0.0).to(DOT), k_logs, acc=logs, input_precision=PRECISION)
        logs += (through * tl.exp2(total.to(tl.float32)))[None, :]
        if not STRICT:
            q_grad += own[:, None] * kt.to(tl.float32)
            k_grad += own[:, None] * qt.to(tl.float32)
        for level in tl.range(0, levels, num_stages=1):
            right, factor = level_factors(chunk, rho, kappa, i, n, level, N)
            w = (tl.where(right, qt, kt).to(tl.float32) * factor).to(DOT)
            met = ((i[:, None] >> level) ^ (i[None, :] >> level)) == 1
            dw = tl.dot(tl.where(met, both, 0.0).to(DOT), w, input_precision=PRECISION)
            q_grad += tl.where(right, dw * factor, 0.0)
            k_grad += tl.where(right, 0.0, dw * factor)
            reach = tl.where(right, rows, cols) & ((i[:, None] >> level) == (i[None, :] >> level))
            dw = (dw * w.to(tl.float32)).to(DOT)
            logs = tl.dot(tl.where(reach, 1.0, 0.0).to(DOT), dw, acc=logs, input_precision=PRECISION)
        at = (start + t) * nheads64 + h  # in tensors of every head
        here = inside[:, None] & inside_n
        tl.store(dq + at[:, None] * N + n[None, :], q_grad.to(dq.dtype.element_ty), mask=here)
        tl.store(dk + at[:, None] * N + n[None, :], k_grad.to(dk.dtype.element_ty), mask=here)
        tl.store(dlogs + at[:, None] * N + n[None, :], logs.to(dlogs.dtype.element_ty), mask=here)
