"""fla's functions whose state decays per head, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import masks
from ...errors import DtypeError, MaskError, UnsupportedError
from ..shapes import sizes_of
from .scan import Gates, Options, refuse_head_first, scan


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    head_first: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention with a gate per head, `S_t = exp(g_t) S_{t−1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: log decays `[B, T, H]`.
        g_gamma: instead, one log decay per head `[H]`. Without either there is no decay.
        scale: a number; None is `K ** -0.5`.
        initial_state: `[N, H, K, V]`, or `[N, H, V, K]` with state_v_first.
        output_final_state: whether the final state comes back, shaped likewise.
        state_v_first: states are `[N, H, V, K]`.
        cu_seqlens: boundaries of packed sequences `[N + 1]`, int32 or int64; B must be 1.
        cu_seqlens_cpu, chunk_size: accepted, and change nothing.
        head_first: refused, as in fla.

    Returns:
        (o `[B, T, H, V]` in q's dtype, final state or None).

    Raises:
        ShapeError, DtypeError, ValueRangeError: an argument that does not fit; the message names it.
        UnsupportedError: head_first, or both g and g_gamma.

    Source: fla-org/flash-linear-attention, `fla/ops/simple_gla`; Dao & Gu 2024, "Transformers are SSMs", section 5.

    >>> import torch
    >>> from ssdops.compat.fla import chunk_simple_gla
    >>> q = k = v = torch.ones(1, 3, 1, 1)
    >>> o, state = chunk_simple_gla(q, k, v, torch.full((1, 3, 1), 0.5).log(), output_final_state=True)
    >>> o.flatten(), state.shape
    (tensor([1.0000, 1.5000, 1.7500]), torch.Size([1, 1, 1, 1]))
    """
    refuse_head_first(head_first)
    options = Options(scale, initial_state, output_final_state, cu_seqlens, state_v_first)
    return scan(q, k, v, _gates(g, g_gamma), options)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla`, or with `reverse` the same from the last token to the first: `S_t = exp(g_t) S_{t+1} + k_t v_tᵀ`.

    Args, returns and raises as `chunk_simple_gla`; with `reverse` the state enters at the right end and leaves at the left.

    Source: fla-org/flash-linear-attention, `fla/ops/simple_gla/fused_recurrent.py`.

    >>> import torch
    >>> from ssdops.compat.fla import fused_recurrent_simple_gla
    >>> q = k = v = torch.ones(1, 3, 1, 1)
    >>> fused_recurrent_simple_gla(q, k, v, g_gamma=torch.tensor([0.5]).log(), reverse=True)[0].flatten()
    tensor([1.7500, 1.5000, 1.0000])
    """
    options = Options(scale, initial_state, output_final_state, cu_seqlens, state_v_first, reverse)
    return scan(q, k, v, _gates(g, g_gamma), options)


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]:
    """`chunk_simple_gla` without states: (o, None).

    Args and raises as `chunk_simple_gla`, and:
        output_attentions: refused; no backend holds the `[B, H, T, T]` matrix.

    Source: fla-org/flash-linear-attention, `fla/ops/simple_gla/parallel.py`.

    >>> import torch
    >>> from ssdops.compat.fla import parallel_simple_gla
    >>> parallel_simple_gla(*torch.ones(3, 1, 3, 1, 1))[0].flatten()
    tensor([1., 2., 3.])
    """
    if output_attentions:
        raise UnsupportedError(
            "output_attentions=True: the [B, H, T, T] matrix is never formed here; v = torch.eye(T)[None, :, None] expanded to "
            "every head makes o that matrix, for a small T"
        )
    return scan(q, k, v, Gates(heads=g), Options(scale, cu_seqlens=cu_seqlens))[0], None


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    head_first: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RetNet's retention, `S_t = γ_h S_{t−1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t` with γ_h = 1 − 2^{−5−h}, h from 0.

    Args, returns and raises as `chunk_simple_gla`, which says what the shapes are.

    Source: fla-org/flash-linear-attention, `fla/ops/retention`; Sun et al. 2023, "Retentive Network", section 2.2.

    >>> import torch
    >>> from ssdops.compat.fla import chunk_retention
    >>> chunk_retention(*torch.ones(3, 1, 2, 1, 1))[0].flatten()
    tensor([1.0000, 1.9688])
    """
    refuse_head_first(head_first)
    gamma = masks.retnet(_heads(q), q.device).operands["log_gamma"]
    return scan(q, k, v, Gates(gamma=gamma), Options(scale, initial_state, output_final_state, cu_seqlens))


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    head_first: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention as fla has it: retention with γ_h = exp(−8h/H · (1 − layer_idx/num_layers)), heads h from 0.

    The first head does not decay at all. `ssdops.masks.lightning` counts heads from 1, as the paper's slopes do.

    Args, returns and raises as `chunk_simple_gla`, and:
        layer_idx: the layer, from 0 to num_layers − 1; deeper layers forget less. MaskError if there is no such layer.
        num_layers: how many there are.

    Source: fla-org/flash-linear-attention, `fla/ops/lightning_attn`; Qin et al. 2024, "Lightning Attention-2".

    >>> import torch
    >>> from ssdops.compat.fla import chunk_lightning_attn
    >>> o, _ = chunk_lightning_attn(*torch.ones(3, 1, 2, 2, 1), layer_idx=0, num_layers=2)
    >>> o[0, 1].flatten()
    tensor([2.0000, 1.0183])
    """
    refuse_head_first(head_first)
    if not 0 <= layer_idx < num_layers:
        raise MaskError(f"layer_idx={layer_idx}, num_layers={num_layers}: layers are counted from 0 to num_layers - 1")
    nheads = _heads(q)
    heads = torch.arange(nheads, dtype=torch.float64, device=q.device)
    gamma = (-8 * heads / nheads * (1 - layer_idx / num_layers)).float()
    return scan(q, k, v, Gates(gamma=gamma), Options(scale, initial_state, output_final_state, cu_seqlens))


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor | None, Tensor] | None]:
    """Linear attention, `S_t = S_{t−1} + k_t v_tᵀ`, `z_t = z_{t−1} + k_t`, `o_t = scale · S_tᵀ q_t / (scale · ⟨q_t, z_t⟩ + ε)`.

    ε is 1e-10, and without `normalize` there is no denominator.

    Args, returns and raises as `chunk_simple_gla`, and:
        initial_state: with normalize, a pair of S `[N, H, K, V]` and z `[N, 1, H, K]`, or S alone; else S.
        normalize: whether o is divided. As in fla, what comes back beside o is then the pair (S or None, z), asked for or not.

    Source: fla-org/flash-linear-attention, `fla/ops/linear_attn`; Katharopoulos et al. 2020, "Transformers are RNNs".

    >>> import torch
    >>> from ssdops.compat.fla import chunk_linear_attn
    >>> q, v = torch.ones(1, 3, 1, 1), torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)
    >>> o, (state, z) = chunk_linear_attn(q, q, v)
    >>> o.flatten(), state, z.item()
    (tensor([1.0000, 1.5000, 3.0000]), None, 3.0)
    """
    if isinstance(initial_state, tuple | list):
        if not normalize or len(initial_state) != 2:
            raise DtypeError("initial_state is a pair (S, z) with normalize=True, else S alone; pass the one that fits")
        state, z = initial_state
    else:
        state, z = initial_state, None
    o, final = scan(q, k, v, Gates(), Options(scale, state, output_final_state, cu_seqlens))
    if not normalize:
        return o, final
    sizes_of(k=(k, "B T H K"), z_state=(z, "B 1 H K" if cu_seqlens is None else "N 1 H K"))
    z = z if z is None else z.transpose(1, 2)  # a state for values of one channel
    weights, z = scan(q, k, v.new_ones(()).expand(*v.shape[:3], 1), Gates(), Options(scale, z, True, cu_seqlens, True))
    assert z is not None  # it is asked for
    return o / (weights + 1e-10), (final, z.transpose(1, 2))


def _gates(g: Tensor | None, g_gamma: Tensor | None) -> Gates:
    if g is not None and g_gamma is not None:
        raise UnsupportedError("g and g_gamma are both given, and one is taken; add g_gamma to g")
    return Gates(heads=g, gamma=g_gamma)


def _heads(q: Tensor) -> int:
    return sizes_of(q=(q, "B T H K"))["H"]
