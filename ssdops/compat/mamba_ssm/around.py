"""What Mamba does before its scan: step sizes and a short convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import masks
from ...errors import UnsupportedError
from ...nn import causal_conv1d


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """dt + bias, or its softplus."""
    dt = dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype)
    return F.softplus(dt) if softplus else dt


def channels(state: Tensor) -> Tensor:
    """The same memory with every channel a head of headdim 1."""
    slots, nheads, dim, dstate = state.shape
    try:
        return state.view(slots, nheads * dim, 1, dstate)
    except RuntimeError:
        raise UnsupportedError(
            f"state has strides {state.stride()}, under which {nheads} heads and {dim} channels are not one axis, and it is "
            "updated in place; keep it contiguous, or expand A and dt over headdim where they are one number per head"
        ) from None


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, activation: str | None = None
) -> Tensor:
    """`causal_conv1d`, over earlier tokens of the same id.

    Args:
        x: `(batch, seqlen, channels)`.
        weight, bias: `(channels, width)`, and `(channels,)` or None.
        ids: `(batch, seqlen)` or None.
    """
    if ids is None:
        return causal_conv1d(x, weight, bias, activation=activation)
    changes = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0)).cumsum(1)
    return causal_conv1d(x, weight, bias, activation=activation, documents=masks.documents(segment_ids=changes))
