"""Launching the kernels of the causal convolution: grids, strides and memory. No arithmetic happens here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..backends.triton.calls import Kernel
from ..backends.triton.launch import ceil_div
from ..backends.triton.tile_mask import power
from .kernels import conv as kernels
from .launching import dense_last, on, processors

CONV, GRADIENTS, WINDOWS, AFTER, STEP = (
    Kernel(fn)
    for fn in (kernels.conv, kernels.conv_gradients, kernels.window_gradients, kernels.windows_after, kernels.conv_step)
)
TOKENS = 16
"""Of a block: what is read twice is then little, and the loads of a program are enough to keep memory busy."""
LONGEST = 128
"""Tokens of a span at most: what is summed per span is then little beside x."""
RESIDENT = 16
"""Programs that each multiprocessor should have before spans grow."""


class Tile(NamedTuple):
    """How the work is cut: channels of a program, tokens that it has in registers, tokens that it walks, its warps."""

    block: int
    tokens: int
    span: int
    warps: int


@lru_cache(maxsize=4096)
def tile_of(batch: int, seqlen: int, channels: int, width: int, processors: int) -> Tile:
    """Four channels a thread, two at widths that leave no registers for more; spans as long as every processor has enough."""
    block = min(power(channels), 256)
    blocks, span = batch * ceil_div(seqlen, TOKENS) * ceil_div(channels, block), TOKENS
    while span < LONGEST and blocks * TOKENS >= 2 * span * RESIDENT * processors:
        span *= 2
    return Tile(block, TOKENS, span, max(block // (32 * (4 if width <= 4 else 2)), 1))


class Convolution:
    """A call of `ops.conv` (`conv_ops.py`): what its kernels have in common."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, packed: Sequence[Tensor], silu: bool
    ) -> None:
        self.x, self.align, self.x_strides = dense_last(x)
        self.weight, self.bias = weight.contiguous(), x if bias is None else bias.contiguous()
        self.window = x if window is None else window.contiguous()
        self.position, self.documents, self.starts, self.stops = [t.contiguous() for t in packed] or (x, x, x, x)
        self.batch, self.seqlen, self.channels = x.shape
        self.width = weight.shape[1]
        self.tile = tile_of(*x.shape, self.width, processors(x.device))
        wide = torch.promote_types(x.dtype, weight.dtype) == torch.float64
        self.dtype = torch.float64 if wide else torch.float32
        self.switches = {"SILU": silu, "BIAS": bias is not None}
        entering = window is not None and window.shape[0] > 0  # tokens of no document, which nothing has refused, read none
        self.packing = {"WINDOW": entering, "PACKED": bool(packed)}
        self.acc = {"ACC": tl.float64 if wide else tl.float32, "num_warps": self.tile.warps}

    @property
    def sizes(self) -> dict[str, Any]:
        """Those that every kernel has."""
        return {"CHANNELS": self.channels, "WIDTH": self.width, "BLOCK": self.tile.block}

    @property
    def spans(self) -> int:
        """Of all rows together."""
        return self.batch * ceil_div(self.seqlen, self.tile.span)

    def grid(self, count: int) -> tuple[int, int, int]:
        """So many times all channels."""
        return count * ceil_div(self.channels, self.tile.block), 1, 1

    def forward(self) -> Tensor:
        """y."""
        y = self.x.new_empty(self.x.shape)
        if y.numel():
            with on(y.device):
                CONV(
                    self.grid(self.spans),
                    (self.x, self.weight, self.bias, self.window, self.position, self.documents, y),
                    (self.seqlen, self.tile.span, *self.x_strides),
                    **self.sizes, TOKENS=self.tile.tokens, ALIGN=self.align, **self.switches, **self.packing, **self.acc,
                )  # fmt: skip
        return y

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """dx, and the gradients of taps and bias, `(width + 1, channels)`, summed span by span in one order."""
        dx = self.x.new_empty(self.x.shape)
        if not dx.numel():
            return dx, dx.new_zeros(self.width + 1, self.channels, dtype=self.dtype)
        sums = dx.new_empty(self.spans, self.width + 1, self.channels, dtype=self.dtype)
        dy, align, strides = dense_last(dy)
        with on(dx.device):
            GRADIENTS(
                self.grid(self.spans),
                (dy, self.x, self.weight, self.bias, self.window, self.position, self.documents, dx, sums),
                (self.seqlen, self.tile.span, *strides, *self.x_strides),
                **self.sizes, TOKENS=self.tile.tokens, DY_ALIGN=align, ALIGN=self.align,
                **self.switches, **self.packing, **self.acc,
            )  # fmt: skip
        return dx, sums.sum(0)

    def backward_window(self, dy: Tensor) -> Tensor:
        """The gradient of the window, which is given and not empty."""
        dwindow = torch.empty_like(self.window)
        if not dwindow.numel():
            return dwindow
        starts, stops = self.starts, self.stops
        if not self.packing["PACKED"]:
            starts = torch.zeros(self.batch, dtype=torch.int64, device=dy.device)
            stops = torch.full_like(starts, self.seqlen)
        dy, align, strides = dense_last(dy)
        with on(dy.device):
            WINDOWS(
                self.grid(len(dwindow)),
                (dy, self.x, self.weight, self.bias, self.window, starts, stops, dwindow),
                (len(dwindow) // self.batch, *strides, *self.x_strides),
                **self.sizes, DY_ALIGN=align, ALIGN=self.align, **self.switches, **self.acc,
            )  # fmt: skip
        return dwindow

    def step(self) -> tuple[Tensor, Tensor]:
        """y of one token of each row, and the window after it."""
        y, after = self.x.new_empty(self.x.shape), torch.empty_like(self.window)
        if y.numel():
            with on(y.device):
                STEP(
                    self.grid(self.batch),
                    (self.x, self.weight, self.bias, self.window, y, after),
                    self.x_strides[:1],
                    **self.sizes, ALIGN=self.align, **self.switches, **self.acc,
                )  # fmt: skip
        return y, after


def windows_after(x: Tensor, window: Tensor | None, starts: Tensor, stops: Tensor, count: int) -> Tensor:
    """The windows that leave packed documents, `(n_rows, channels, count)`."""
    after = x.new_empty(len(starts), x.shape[2], count)
    if after.numel():
        x, align, strides = dense_last(x)
        block = min(power(x.shape[2]), 256)
        with on(x.device):
            AFTER(
                (len(starts) * ceil_div(x.shape[2], block), 1, 1),
                (x, x if window is None else window.contiguous(), starts.contiguous(), stops.contiguous(), after),
                (len(starts) // x.shape[0], *strides),
                CHANNELS=x.shape[2], COUNT=count, BLOCK=block, ALIGN=align, WINDOW=window is not None,
                num_warps=max(block // 128, 1),
            )  # fmt: skip
    return after
