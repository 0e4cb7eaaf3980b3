"""Gradients of a diagonal beside a scan, y_i += scale · d_i ⟨q_i, k_i⟩ v_i, added to those of the scan.

With g = ⟨q_i, k_i⟩, of the token's group of heads:

    dv_i += scale · d_i g dy_i        dd_i  = scale · g ⟨dy_i, v_i⟩
    dq_i += m_i k_i                   dk_i += m_i q_i        m_i = Σ_h scale · d_i ⟨dy_i, v_i⟩
"""

import triton
import triton.language as tl


@triton.jit
def diagonal_gradients(
    q, k, v, dy, d, dq_scan, dk_scan, dv_scan, dq, dk, dv, dd,
    seqlen, tokens, nheads, groups, q_share, k_share, v_share, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, d_b, d_t, d_h,
    TILE: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, VALUES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of TILE tokens of the whole batch, groups); a program walks over the heads of its group.

    Args:
        dq_scan, dk_scan, dv_scan: what the scan has made, in float32, laid out as dq, dk and dv are.
        dq, dk: `[tokens, groups, N]`; dv: `[tokens, nheads, P]`.
        dd: `[tokens, nheads]`, if there are VALUES d; else they are 1.
    """
    g, share = tl.program_id(1), nheads // groups
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here, p, n = t < tokens, tl.arange(0, BP), tl.arange(0, BN)
    b, s = t // seqlen, t % seqlen
    inside_p, inside_n = here[:, None] & (p < P)[None, :], here[:, None] & (n < N)[None, :]
    q += (b * q_b + s * q_t)[:, None] + (g * share // q_share) * q_h + n[None, :]
    k += (b * k_b + s * k_t)[:, None] + (g * share // k_share) * k_h + n[None, :]
    v += (b * v_b + s * v_t)[:, None] + p[None, :]
    dy += (b * y_b + s * y_t)[:, None] + p[None, :]
    d += b * d_b + s * d_t
    qt, kt = tl.load(q, mask=inside_n, other=0.0).to(tl.float32), tl.load(k, mask=inside_n, other=0.0).to(tl.float32)
    product = tl.sum(qt * kt, 1) * scale  # [TILE]
    met = tl.zeros([TILE], tl.float32)
    for h in tl.range(g * share, (g + 1) * share, num_stages=STAGES):
        vt = tl.load(v + (h // v_share) * v_h, mask=inside_p, other=0.0).to(tl.float32)
        yt = tl.load(dy + h * y_h, mask=inside_p, other=0.0).to(tl.float32)
        place = (t * nheads + h)[:, None] * P + p[None, :]
        out = tl.load(dv_scan + place, mask=inside_p, other=0.0)
        along, weight = tl.sum(vt * yt, 1), product
        if VALUES:
            value = tl.load(d + h * d_h, mask=here, other=0.0).to(tl.float32)
            tl.store(dd + t * nheads + h, product * along, mask=here)
            weight, along = product * value, along * value
        met += along
        tl.store(dv + place, (out + weight[:, None] * yt).to(dv.dtype.element_ty), mask=inside_p)
    met = met[:, None] * scale
    place = (t * groups + g)[:, None] * N + n[None, :]
    from_k, from_q = tl.load(dq_scan + place, mask=inside_n, other=0.0), tl.load(dk_scan + place, mask=inside_n, other=0.0)
    tl.store(dq + place, (from_k + met * kt).to(dq.dtype.element_ty), mask=inside_n)
    tl.store(dk + place, (from_q + met * qt).to(dk.dtype.element_ty), mask=inside_n)
