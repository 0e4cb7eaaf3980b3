"""Launching the kernels of `gated_skip`: grids, strides and memory. No arithmetic happens here."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..backends.triton.calls import Kernel
from ..backends.triton.launch import ceil_div
from ..backends.triton.tile_mask import power
from .kernels import skip as kernels
from .launching import even_rows, on, processors

FORWARD, GRADIENTS = Kernel(kernels.gated_skip), Kernel(kernels.gated_skip_gradients)
TILE, WIDE, RESIDENT = 2048, 1024, 8
"""Elements of a tile, channels of one at most, and programs of a multiprocessor: each walks some tiles."""


class Layout(NamedTuple):
    """How the work is cut: channels and rows of a tile, rows of a program, and the grid."""

    block: int
    tile: int
    per_program: int
    grid: tuple[int, int, int]


@lru_cache(maxsize=4096)
def layout_of(rows: int, channels: int, processors: int) -> Layout:
    """Tiles shared out over as many programs as have some."""
    block = min(power(channels), WIDE)
    tile, blocks = TILE // block, ceil_div(channels, block)
    tiles = ceil_div(rows, tile)
    parts = max(min(RESIDENT * processors // max(blocks, 1), tiles), 1)
    per_program = max(ceil_div(tiles, parts), 1) * tile
    return Layout(block, tile, per_program, (ceil_div(rows, per_program), blocks, 1))


class Skip:
    """A call of `gated_skip`: what its kernels have in common. y, x and z `(…, channels)`; D `(heads,)` of neighbours."""

    def __init__(self, y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> None:
        self.given, self.D, (rows, channels) = (y, x, z), D, (y.shape[:-1].numel(), y.shape[-1])
        (self.y, y_align, y_row), (self.x, x_align, x_row) = even_rows(y), even_rows(x)
        self.z, z_align, z_row = (self.y, y_align, y_row) if z is None else even_rows(z)
        self.d = self.x if D is None else D.contiguous()
        self.rows, self.strides = rows, (y_row, x_row, z_row)
        self.layout = layout_of(rows, channels, processors(y.device))
        wide = torch.float64 in (y.dtype, x.dtype, self.d.dtype, self.z.dtype)
        self.dtype = torch.float64 if wide else torch.float32
        self.constants = {
            "CHANNELS": channels, "SHARE": 1 if D is None else channels // D.shape[0], "ROWS": self.layout.tile,
            "BLOCK": self.layout.block, "Y_ALIGN": y_align, "X_ALIGN": x_align, "Z_ALIGN": z_align, "SKIP": D is not None,
            "GATE": z is not None, "ACC": tl.float64 if wide else tl.float32, "num_warps": 4,
        }  # fmt: skip

    def forward(self) -> Tensor:
        """out."""
        out = self.x.new_empty(self.given[1].shape)
        if out.numel():
            with on(out.device):
                FORWARD(
                    self.layout.grid,
                    (self.y, self.x, self.d, self.z, out),
                    (self.rows, self.layout.per_program, *self.strides),
                    **self.constants,
                )
        return out

    def backward(self, dout: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of y, x, D and z; that of D summed part by part in one order."""
        dy, dx, dz = (self.y.new_empty(0) if x is None else x.new_empty(x.shape) for x in self.given)
        sums = dy.new_empty(self.layout.grid[0], dy.shape[-1], dtype=self.dtype)
        if dy.numel():
            dout, align, row = even_rows(dout)
            with on(dy.device):
                GRADIENTS(
                    self.layout.grid,
                    (dout, self.y, self.x, self.d, self.z, dy, dx, dz, sums),
                    (self.rows, self.layout.per_program, row, *self.strides),
                    D_ALIGN=align, **self.constants,
                )  # fmt: skip
        if self.D is None:
            return dy, None, None, dz
        dD = sums.unflatten(1, (self.D.shape[0], -1)).sum((0, 2)).to(self.D.dtype)
        return dy, dx, dD, dz if self.given[2] is not None else None
