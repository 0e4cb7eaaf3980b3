"""The causal depthwise convolution in plain torch: the path of CPUs, and right on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import Packing


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, packed: Packing | None, silu: bool
) -> Tensor:
    """y of `causal_conv1d`, of arguments that fit; the window is in the dtype of x."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    taps, before = weight.to(dtype), None if window is None else window.transpose(1, 2)
    if packed is None:
        before = x.new_zeros(x.shape[0], taps.shape[1] - 1, x.shape[2]) if before is None else before
        y = _slide(torch.cat([before, x], 1).to(dtype), taps)
    else:
        y = _slide_in_documents(x.to(dtype), taps, packed, None if before is None else before.to(dtype))
    y = y if bias is None else y + bias
    return (F.silu(y) if silu else y).to(x.dtype)


def window_after(x: Tensor, count: int, window: Tensor | None, packed: Packing | None) -> Tensor:
    """The last `count` tokens, oldest first: `(rows, channels, count)`, with rows as the window has them."""
    before = None if window is None else window.transpose(1, 2)
    if packed is not None:
        after = _last(x, count, packed, before)
    elif x.shape[1] >= count:
        after = x[:, x.shape[1] - count :]
    else:
        before = x.new_zeros(x.shape[0], count, x.shape[2]) if before is None else before
        after = torch.cat([before, x], 1)[:, x.shape[1] :]
    return after.transpose(1, 2).clone(memory_format=torch.contiguous_format)


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
    # What windows add to the first width − 1 tokens of a document, whether it has as many or not; if it has none, 0 times NaN.
    before = torch.where((packed.starts < packed.stops)[:, None, None], before, 0.0)
    heads = _slide(F.pad(before, (0, 0, 0, width - 1)), taps)
    added = heads[packed.row, packed.position.clamp(max=width - 2)]
    return y + torch.where((packed.position < width - 1)[..., None], added, 0.0)


def _last(x: Tensor, count: int, packed: Packing, before: Tensor | None) -> Tensor:
    """The last `count` tokens of every document, after those of its window: `(n_rows, count, channels)`."""
    rows, seqlen = len(packed.starts), x.shape[1]
    older = x.new_zeros(rows, count, x.shape[2]) if before is None else before
    if not rows or not count or not seqlen:
        return older
    own, document, at, before_it = _whence(packed, x.shape[0], seqlen, count)
    return torch.where((at >= packed.starts[:, None])[..., None], x[own, at.clamp(0, seqlen - 1)], older[document, before_it])


def spread(dafter: Tensor, shape: torch.Size, packed: Packing) -> tuple[Tensor, Tensor]:
    """The transpose of `window_after` of packed documents: the cotangents of x, whose shape is given, and of the window."""
    dafter, count = dafter.transpose(1, 2), dafter.shape[2]  # [documents, count, channels]
    dx, dwindow = dafter.new_zeros(shape), torch.zeros_like(dafter)
    if not len(dafter) or not count or not shape[1]:
        return dx, dafter.transpose(1, 2)
    own, document, at, before_it = _whence(packed, shape[0], shape[1], count)
    newer = (at >= packed.starts[:, None])[..., None]
    dx = dx.index_put((own, at.clamp(0, shape[1] - 1)), torch.where(newer, dafter, 0.0), accumulate=True)
    dwindow = dwindow.index_put((document, before_it), torch.where(newer, 0.0, dafter), accumulate=True)
    return dx, dwindow.transpose(1, 2)


def _whence(packed: Packing, batch: int, seqlen: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the windows that leave documents come from: batch row and document, `[documents, 1]`; token, and what stands for it
    in the window that entered if it lies before the document's start, `[documents, count]`.
    """
    starts, stops = packed.starts[:, None], packed.stops[:, None]
    back = torch.arange(count, device=starts.device)
    document = torch.arange(len(starts), device=starts.device)[:, None]
    return document // (len(starts) // batch), document, stops - count + back, (stops - starts + back).clamp(0, count - 1)
