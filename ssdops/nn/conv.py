"""The causal depthwise convolution in front of a scan: a Triton kernel on GPUs, plain torch elsewhere."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ..backends.base import Support
from ..errors import DeviceError, DtypeError, ShapeError, UnsupportedError
from ..masks import Mask
from . import conv_ops
from .conv_torch import convolve, window_after
from .launching import is_learnt, on_triton
from .packing import Packing, packing

WIDEST = 8
"""The most taps that the kernel has registers for."""
ACTIVATIONS = (None, "silu", "swish")


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ..., window: Tensor | None = ...,
    documents: Mask | None = ..., return_window: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ..., window: Tensor | None = ...,
    documents: Mask | None = ..., return_window: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, activation: str | None = ..., window: Tensor | None = ...,
    documents: Mask | None = ..., return_window: bool = ..., backend: str = ...,
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
    backend: str = "auto",
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
        backend: "triton", a kernel for GPUs (in Triton's interpreter also on CPUs) that takes up to 8 taps and is fastest where
            channels are the last axis in memory: other layouts are copied; "torch", which takes everything; or "auto", the
            former wherever it can be.

    Returns:
        y like x, summed in float32 (float64 if x or weight is); with `return_window`, (y, window).

    Raises:
        ShapeError, DtypeError, DeviceError, UnsupportedError: an argument that does not fit, or a backend that does not take
            it; the message names it.
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
    fits = weight.shape[1] <= WIDEST
    by_kernel = on_triton(x, backend, Support.yes() if fits else Support.no(f"width={weight.shape[1]} exceeds {WIDEST}"))
    packed = None if documents is None else packing(documents, x, by_kernel)
    if window is not None or return_window:
        _check_window(window, x, weight, packed)
        window = None if window is None else window.to(x.dtype)
    silu, count = activation is not None, weight.shape[1] - 1
    if not by_kernel:
        y = convolve(x, weight, bias, window, packed, silu)
    elif window is not None and return_window and _is_step(x, weight, bias, window, packed):
        return conv_ops.step(x, weight, bias, window, silu)
    else:
        before = window if count else None
        y = conv_ops.conv(x, weight, bias, before, [] if packed is None else packed.tensors, silu)
    if not return_window:
        return y
    if by_kernel and packed is not None:
        return y, conv_ops.windows(x, window, packed.tensors, count)
    return y, window_after(x, count, window, packed)


def _is_step(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, packed: Packing | None) -> bool:
    """Whether this is a token of each sequence, from which nothing is learnt."""
    one = packed is None and x.shape[1] == 1 and window.shape[2] > 0
    return one and not is_learnt((x, weight, bias, window))


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
