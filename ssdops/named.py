"""Masks under the names that papers give them, each a short expression over the structures of `ssdops.masks`.

They are found there too: `masks.retnet(nheads)`. They stand in a file of their own as they reckon their operands from fewer
numbers, which the structures never do; and what a structure is has one place. Three papers have a structure to
themselves: log-linear attention is `masks.fenwick`, Mamba-3 `masks.trapezoidal`, GLA and RWKV-6 `masks.channel_decay`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import MaskError
from .masks import Mask, causal, decay, diagonal, retention, window

__all__ = ["alibi", "lightning", "linear_attention", "mamba2", "mlstm", "quasiseparable", "retnet", "sliding_window"]


def linear_attention() -> Mask:
    """L[i, j] = 1[i ≥ j]: causal linear attention; q and k are what the paper calls φ(Q) and φ(K).

    Its normaliser Σ_j ⟨q_i, k_j⟩ is a second contraction, with v = 1.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", section 3.3.

    >>> print(linear_attention())
    causal()
    """
    return causal()


def retnet(nheads: int, device: torch.device | str | None = None) -> Mask:
    """L[i, j] = γ_h^{i−j} · 1[i ≥ j] with γ_h = 1 − 2^{−5−h}, h from 0.

    Args:
        nheads: how many heads; the first forgets fastest.
        device: of the operand.

    Source: Sun et al. 2023, "Retentive Network", sections 2.1 and 2.2. Its rotation (xPos) is one of q and k.

    >>> (retnet(2).operands["log_gamma"].exp() * 64).tolist()
    [62.0, 63.0]
    """
    heads = _heads(nheads, device)
    return retention(torch.log1p(-torch.exp2(-5 - heads)).float())


def lightning(nheads: int, layer: int, n_layers: int, device: torch.device | str | None = None) -> Mask:
    """L[i, j] = λ_h^{i−j} · 1[i ≥ j] with λ_h = exp(−8h/H · (1 − l/L)), heads h counted from 1 and layers l from 0.

    flash-linear-attention counts heads from 0, so that its first does not decay: `ssdops.compat.fla.chunk_lightning_attn`.

    Args:
        nheads: H.
        layer: l; deeper layers forget less.
        n_layers: L.
        device: of the operand.

    Raises:
        MaskError: there is no such layer.

    Source: Qin et al. 2023, "TransNormerLLM" (lightning attention), section 3.1; Qin et al. 2024, "Lightning Attention-2".

    >>> lightning(2, layer=1, n_layers=2).operands["log_gamma"].tolist()
    [-2.0, -4.0]
    """
    if not 0 <= layer < n_layers:
        raise MaskError(f"lightning(layer={layer}, n_layers={n_layers}): layers are counted from 0 to n_layers - 1")
    heads = _heads(nheads, device) + 1
    return retention((-8 * heads / nheads * (1 - layer / n_layers)).float())


def alibi(nheads: int, device: torch.device | str | None = None) -> Mask:
    """L[i, j] = exp(−m_h · (i − j)) · 1[i ≥ j] with m_h = 2^{−8h/H}, h from 1: ALiBi without softmax's normaliser.

    The paper adds −m_h · (i − j) to a score before exp is taken; here the score stands outside.

    Args:
        nheads: H.
        device: of the operand.

    Source: Press et al. 2022, "Train Short, Test Long", section 3.

    >>> alibi(8).operands["log_gamma"].tolist()[:3]
    [-0.5, -0.25, -0.125]
    """
    heads = _heads(nheads, device) + 1
    return retention(-torch.exp2(-8 * heads / nheads).float())


def mamba2(dt: Tensor, A: Tensor) -> Mask:
    """L[i, j] = exp(Σ_{j<s≤i} dt_s · A_h) · 1[i ≥ j]: Mamba-2's, for q = C, k = B and v = x · dt.

    Its skip connection has no score in it, and is added to what comes back.

    Args:
        dt: step sizes `(batch, seqlen, nheads)`, after softplus.
        A: one negative number per head `(nheads,)`.

    Source: Dao & Gu 2024, "Transformers are SSMs", sections 5 and 7.

    >>> from ssdops import ssd
    >>> x, B, C = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    >>> dt, A, D = torch.ones(1, 3, 1), -torch.ones(1), torch.full((1,), 10.0)
    >>> y = ssd(C, B, x * dt[..., None], mamba2(dt, A)) + D[:, None] * x
    >>> y[0, :, 0, 0]
    tensor([11.0000, 11.3679, 11.5032])
    """
    return decay(dt * A)


def quasiseparable(log_a: Tensor, log_b: Tensor, d: Tensor) -> Mask:
    """L[i, j] = a_{i:j} below the diagonal, d[i] on it, b_{j:i} above it: bidirectional, with q and k shared by both ways.

    Args:
        log_a: log decays of the way forward `(batch, seqlen, nheads)` or broadcastable.
        log_b: of the way back.
        d: the diagonal.

    Source: Hwang et al. 2024, "Hydra", section 3: quasiseparable matrix mixers.

    >>> print(quasiseparable(*torch.zeros(3, 1, 4, 2)))
    decay(log_a).strict() + decay(log_a_1).strict().T + diagonal(d)
    """
    return decay(log_a).strict() + decay(log_b).strict().T + diagonal(d)


def mlstm(log_f: Tensor, log_i: Tensor) -> Mask:
    """L[i, j] = exp(Σ_{j<s≤i} log f_s + log i_j) · 1[i ≥ j]: forget gates, and exponential input gates, of the mLSTM.

    The exponents are added before exp is taken. The paper's normaliser max(|n_iᵀ q_i|, 1), with n_i = Σ_j L[i, j] k_j, comes
    of a second contraction, with v = 1.

    Args:
        log_f: logs of forget gates `(batch, seqlen, nheads)`, log sigmoid of their inputs.
        log_i: logs of input gates, which are their inputs.

    Source: Beck et al. 2024, "xLSTM", section 2.3 (equations 19 to 27).

    >>> from ssdops import ssd
    >>> q, k, v = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
    >>> mask = mlstm(torch.full((1, 3, 1), 0.5).log(), torch.zeros(1, 3, 1))
    >>> normaliser = ssd(q, k, torch.ones_like(v), mask).abs().clamp_min(1)
    >>> (ssd(q, k, v, mask) / normaliser).flatten()
    tensor([1.0000, 1.6667, 3.0000])
    """
    return decay(log_f).scale(log_cols=log_i)


def sliding_window(left: int, log_a: Tensor | None = None) -> Mask:
    """L[i, j] = a_{i:j} · 1[0 ≤ i − j ≤ left]: the token itself and `left` before it, decayed or not.

    Args:
        left: how many earlier tokens are seen; a window of w tokens, as papers count them, is left = w − 1.
        log_a: log decays `(batch, seqlen, nheads)` or broadcastable; None is no decay.

    Source: Beltagy et al. 2020, "Longformer", section 3.1; with the decay of Dao & Gu 2024.

    >>> print(sliding_window(127, torch.zeros(4)))
    decay(log_a) * window(left=127, right=0)
    """
    band = window(left, 0)
    return band if log_a is None else decay(log_a) * band


def _heads(nheads: int, device: torch.device | str | None) -> Tensor:
    """0, 1, …, nheads − 1 in float64: γ is close to 1, and its log is to be right to the last bit."""
    if nheads < 1:
        raise MaskError(f"nheads must be at least 1, got {nheads}")
    return torch.arange(nheads, dtype=torch.float64, device=device)
