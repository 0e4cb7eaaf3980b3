"""The causal depthwise convolution in front of a scan, in plain torch: the path of CPUs, and right on any device."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DeviceError, DtypeError, ShapeError, UnsupportedError
from ..masks import Mask
from .packing import Packing, packing

ACTIVATIONS = (None, "silu", "swish")


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ..., window: Tensor | None = ...,
    documents: Mask | None = ..., return_window: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ..., window: Tensor | None = ...,
    documents: Mask | None = ..., return_window: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ..., window: Tensor | None = ...,
    documents: Mask | None = ..., return_window: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    window: Tensor | None = None,
    documents: Mask | None = None,
    return_window: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A causal convolution of each channel with its own taps.

        y[b,t,c] = act(bias[c] + Σ_{0≤l<width} weight[c, width−1−l] · x[b,t−l,c])

    Before the first token (of its document) x is what the window has, or zero. The window that leaves is the last width − 1
    tokens; it enters the call that goes on with the same sequence, so that parts give what the whole gives.

    Args:
        x: `(batch, seqlen, channels)`, any floating dtype, any strides.
        weight: the taps `(channels, width)`, the one on the token itself last; `conv.weight[:, 0]` of a depthwise `nn.Conv1d`.
        bias: `(channels,)`.
        activation: None, "silu" or its other name "swish".
        window: the tokens before, oldest first, `(batch, channels, width − 1)`; with documents a row per document, in the
            order of their states: `(n_segments, …)`, or `(batch · n_segments, …)` for segment ids. None is zero.
        documents: `masks.documents(…)`: no tap reaches over a document's start.
        return_window: also return the window that leaves, shaped likewise, in the dtype of x.

    Returns:
        y like x, summed in float32 (float64 if x or weight is); with `return_window`, (y, window).

    Raises:
        ShapeError, DtypeError, DeviceError, UnsupportedError: an argument that does not fit; the message names it.
        MaskError, ValueRangeError: what is given as documents is none, or is not in order.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 7.1 (the convolution over x, B and C).

    >>> import torch
    >>> from ssdops import masks
    >>> from ssdops.nn import causal_conv1d
    >>> x, taps = torch.arange(1.0, 5.0).view(1, 4, 1), torch.tensor([[10.0, 1.0]])
    >>> causal_conv1d(x, taps).flatten()
    tensor([ 1., 12., 23., 34.])
    >>> causal_conv1d(x, taps, documents=masks.documents(torch.tensor([0, 2, 4]))).flatten()
    tensor([ 1., 12.,  3., 34.])
    >>> _, window = causal_conv1d(x[:, :2], taps, return_window=True)
    >>> causal_conv1d(x[:, 2:], taps, window=window).flatten()
    tensor([23., 34.])
    """
    _check(x, weight, bias, activation)
    packed = None if documents is None else packing(documents, x)
    if window is not None or return_window:
        _check_window(window, x, weight, packed)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    taps, before = weight.to(dtype), None if window is None else window.to(x.dtype).transpose(1, 2)
    if packed is None:
        before = x.new_zeros(x.shape[0], taps.shape[1] - 1, x.shape[2]) if before is None else before
        tokens = torch.cat([before, x], 1)
        y = _slide(tokens.to(dtype), taps)
    else:
        y = _slide_in_documents(x.to(dtype), taps, packed, None if before is None else before.to(dtype))
    y = y if bias is None else y + bias
    y = (y if activation is None else F.silu(y)).to(x.dtype)
    if not return_window:
        return y
    after = tokens[:, x.shape[1] :] if packed is None else _last(x, taps.shape[1] - 1, packed, before)
    return y, after.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _slide(tokens: Tensor, taps: Tensor) -> Tensor:
    """The sums over every whole window of tokens `(rows, seqlen + width − 1, channels)`: `(rows, seqlen, channels)`."""
    width = taps.shape[1]
    seqlen = tokens.shape[1] - (width - 1)
    y = tokens[:, width - 1 :] * taps[:, -1]
    for at in range(width - 1):
        y = torch.addcmul(y, tokens[:, at : at + seqlen], taps[:, at])
    return y


def _slide_in_documents(x: Tensor, taps: Tensor, packed: Packing, before: Tensor | None) -> Tensor:
    """The sums over the tokens of one document each; what lies before it is selected away, so that its NaN is too."""
    width, seqlen = taps.shape[1], x.shape[1]
    y = x * taps[:, -1]
    for lag in range(1, width):
        earlier = F.pad(x, (0, 0, lag, 0))[:, :seqlen]
        inside = (packed.position >= lag)[..., None]
        y = torch.addcmul(y, torch.where(inside, earlier, 0.0), taps[:, -1 - lag])
    if before is None or width == 1 or not before.shape[0]:
        return y
    # What windows add to the first width − 1 tokens of a document, whether it has as many or not.
    heads = _slide(F.pad(before, (0, 0, 0, width - 1)), taps)
    added = heads[packed.row, packed.position.clamp(max=width - 2)]
    return y + torch.where((packed.position < width - 1)[..., None], added, 0.0)


def _last(x: Tensor, count: int, packed: Packing, before: Tensor | None) -> Tensor:
    """The last `count` tokens of every document, after those of its window: `(n_rows, count, channels)`."""
    rows, seqlen = len(packed.starts), x.shape[1]
    older = x.new_zeros(rows, count, x.shape[2]) if before is None else before
    if not rows or not count or not seqlen:
        return older
    back = torch.arange(count, device=x.device)
    document = torch.arange(rows, device=x.device)[:, None]
    starts, stops = packed.starts[:, None], packed.stops[:, None]
    older = older[document, (stops - starts + back).clamp(0, count - 1)]
    at = stops - count + back
    newer = x[document // (rows // x.shape[0]), at.clamp(0, seqlen - 1)]
    return torch.where((at >= starts)[..., None], newer, older)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DtypeError(f"{name} must be a tensor of floating dtype, got {got}")
        if tensor is not None and tensor.device != x.device:
            raise DeviceError(f"{name} is on {tensor.device}, but x is on {x.device}; move it to x's device")
    if x.ndim != 3:
        raise ShapeError(f"x must be (batch, seqlen, channels), got {tuple(x.shape)}")
    if weight.ndim != 2 or weight.shape[0] != x.shape[2] or not weight.shape[1]:
        hint = "; drop the middle axis of nn.Conv1d's, weight[:, 0]" if weight.ndim == 3 else ""
        raise ShapeError(f"weight must be (channels, width) with channels={x.shape[2]}, got {tuple(weight.shape)}{hint}")
    if bias is not None and tuple(bias.shape) != (x.shape[2],):
        raise ShapeError(f"bias must be (channels,) = ({x.shape[2]},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"activation must be None, 'silu' or 'swish', got {activation!r}; apply another one to y")


def _check_window(window: Tensor | None, x: Tensor, weight: Tensor, packed: Packing | None) -> None:
    rows = x.shape[0] if packed is None else packed.n_rows
    if rows is None:
        raise ShapeError("windows of packed documents need n_segments: documents(segment_ids=…, n_segments=…)")
    if window is None:
        return
    if not isinstance(window, Tensor) or not window.is_floating_point():
        got = window.dtype if isinstance(window, Tensor) else type(window).__name__
        raise DtypeError(f"window must be a tensor of floating dtype, got {got}")
    expected, what = (rows, x.shape[2], weight.shape[1] - 1), "batch" if packed is None else "documents"
    if tuple(window.shape) != expected:
        raise ShapeError(f"window must be ({what}, channels, width − 1) = {expected}, got {tuple(window.shape)}")
    if window.device != x.device:
        raise DeviceError(f"window is on {window.device}, but x is on {x.device}; move it to x's device")
