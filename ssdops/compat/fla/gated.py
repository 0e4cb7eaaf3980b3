"""fla's functions whose decay is more than a number per token and head: per key channel, and by levels."""

from __future__ import annotations

from torch import Tensor

from ... import masks
from ...api import ssd
from ...errors import UnsupportedError
from ..shapes import check_shared, sizes_of
from .scan import Gates, Options, scan


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention, `S_t = Diag(exp(g_t)) S_{t−1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: log decays per key channel `[B, T, H, K]`.
        scale: a number; None is `K ** -0.5`.
        initial_state: `[N, H, K, V]`, or `[N, H, V, K]` with state_v_first; any float dtype.
        output_final_state: whether the final state comes back, shaped likewise.
        state_v_first: states are `[N, H, V, K]`.
        cu_seqlens: boundaries of packed sequences `[N + 1]`, int32 or int64; B must be 1.
        cu_seqlens_cpu: accepted, and changes nothing.

    Returns:
        (o `[B, T, H, V]` in q's dtype, final state or None).

    Raises:
        ShapeError, DtypeError, ValueRangeError: an argument that does not fit; the message names it.

    Source: fla-org/flash-linear-attention, `fla/ops/gla`; Yang et al. 2024, "Gated Linear Attention Transformers".

    >>> import torch
    >>> from ssdops.compat.fla import chunk_gla
    >>> q = k = torch.ones(1, 3, 1, 2)
    >>> g = torch.tensor([0.5, 0.25]).log().expand(1, 3, 1, 2)
    >>> chunk_gla(q, k, q[..., :1], g, scale=1.0)[0].flatten()
    tensor([2.0000, 2.7500, 3.0625])
    """
    return scan(q, k, v, Gates(channels=g), Options(scale, initial_state, output_final_state, cu_seqlens, state_v_first))


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla`, or with `reverse` the same from the last token to the first.

    Args, returns and raises as `chunk_gla`, and:
        gk: its g; None is no decay.
        gv: refused; UnsupportedError says what to do.
        reverse: the state enters at the right end and leaves at the left.

    Source: fla-org/flash-linear-attention, `fla/ops/gla/fused_recurrent.py`.

    >>> import torch
    >>> from ssdops.compat.fla import fused_recurrent_gla
    >>> q = k = v = torch.ones(1, 3, 1, 1)
    >>> fused_recurrent_gla(q, k, v, torch.full((1, 3, 1, 1), 0.5).log(), reverse=True)[0].flatten()
    tensor([1.7500, 1.5000, 1.0000])
    """
    if gv is not None:
        raise UnsupportedError(
            "gv: a decay per value channel is no mask of q and k; where gk is None, make every value channel a head: "
            "chunk_simple_gla of v.reshape(B, T, H * V, 1), g = gv.reshape(B, T, H * V), and q and k repeated for each"
        )
    options = Options(scale, initial_state, output_final_state, cu_seqlens, state_v_first, reverse)
    return scan(q, k, v, Gates(channels=gk), options)


def chunk_log_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    initial_state: object | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = 1.0,
) -> tuple[Tensor, None]:
    """Log-linear attention, `o_i = scale · Σ_{j≤i} level_scales[i, level(i, j)] · exp(Σ_{j<s≤i} g_s) · ⟨q_i, k_j⟩ · v_j`.

    level(i, i) = 0, else 1 + the highest bit in which i and j differ: `masks.fenwick`, in time that grows as T log T.

    Args:
        q, k: `[B, T, G, K]`; G divides H, and each head of them is shared by H/G of v's.
        v: `[B, T, H, V]`.
        g: log decays `[B, T, H]`.
        level_scales: `[B, T, H, L]` with L at least 1 + the bits of T − 1.
        scale: a number; None is `K ** -0.5`, and the default, unlike that of the others, 1.
        initial_state, output_final_state, cu_seqlens: refused; levels are counted from the first token of a sequence, and no
            state of them is kept.

    Returns:
        (o `[B, T, H, V]` in q's dtype, None).

    Raises:
        ShapeError, DtypeError: an argument that does not fit; the message names it.
        UnsupportedError: what is refused.

    Source: fla-org/flash-linear-attention, `fla/ops/log_linear_attn`; Guo et al. 2025, "Log-Linear Attention".

    >>> import torch
    >>> from ssdops.compat.fla import chunk_log_linear_attn
    >>> q = k = v = torch.ones(1, 4, 1, 1)
    >>> levels = torch.tensor([1.0, 10.0, 100.0]).expand(1, 4, 1, 3)
    >>> chunk_log_linear_attn(q, k, v, torch.zeros(1, 4, 1), levels)[0].flatten()
    tensor([  1.,  11., 201., 211.])
    """
    if initial_state is not None or output_final_state:
        name = "initial_state" if initial_state is not None else "output_final_state=True"
        raise UnsupportedError(f"{name}: no state of log-linear attention is kept here; run over the whole sequence at once")
    if cu_seqlens is not None:
        raise UnsupportedError("cu_seqlens: levels are counted from a row's first token; give every sequence its own row")
    sizes = sizes_of(
        q=(q, "B T G K"), k=(k, "B T G K"), v=(v, "B T H V"), g=(g, "B T H"), level_scales=(level_scales, "B T H L")
    )
    check_shared(sizes["G"], sizes["H"], "G", "H")
    factor = sizes["K"] ** -0.5 if scale is None else scale
    return ssd(q, k, v, masks.fenwick(g, level_scales), scale=factor).to(q.dtype), None
