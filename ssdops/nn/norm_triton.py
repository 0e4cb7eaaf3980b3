"""Launching the kernels of the gated norm: grids, strides and memory. No arithmetic happens here."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..backends.triton.calls import Kernel
from ..backends.triton.launch import ceil_div
from ..backends.triton.tile_mask import power
from .kernels import norm as kernels
from .launching import even_rows, on, processors

NORM, GRADIENTS = Kernel(kernels.gated_norm), Kernel(kernels.gated_norm_gradients)
RESIDENT = 8
"""Programs of a multiprocessor: each walks some rows, and reads weights once."""


class Norm:
    """A call of `ops.gated_norm` (`norm_ops.py`): what its kernels have in common."""

    def __init__(
        self, y: Tensor, z: Tensor, weight: Tensor, x: Tensor | None, D: Tensor | None, eps: float, groups: int, before: bool
    ) -> None:
        self.shape, channels = y.shape, y.shape[-1]
        self.given = (y, z, y if x is None else x)
        (self.y, y_align, y_row), (self.z, z_align, z_row), (self.x, x_align, x_row) = map(even_rows, self.given)
        self.weight, self.d = weight.contiguous(), weight if D is None else D.contiguous()
        self.rows, self.channels, self.groups = y.shape[:-1].numel(), channels, groups
        self.strides = (y_row, z_row, x_row)
        wide = torch.float64 in (y.dtype, z.dtype, weight.dtype, self.x.dtype, self.d.dtype)
        self.dtype = torch.float64 if wide else torch.float32
        block = power(channels // groups)
        parts = min(max(RESIDENT * processors(y.device) // groups, 1), max(self.rows, 1))
        self.per_program = ceil_div(self.rows, parts)
        self.parts = ceil_div(self.rows, max(self.per_program, 1))
        self.grid = (self.parts * groups, 1, 1)
        self.constants: dict[str, Any] = {
            "GROUPS": groups, "SIZE": channels // groups, "SHARE": 1 if D is None else channels // len(D), "BLOCK": block,
            "Y_ALIGN": y_align, "Z_ALIGN": z_align, "X_ALIGN": x_align, "BEFORE": before, "SKIP": x is not None,
            "EPS": eps, "ACC": tl.float64 if wide else tl.float32, "num_warps": min(max(block // 256, 1), 16),
        }  # fmt: skip

    def forward(self) -> Tensor:
        """out."""
        out = self.y.new_empty(self.shape)
        if out.numel():
            with on(out.device):
                NORM(
                    self.grid,
                    (self.y, self.z, self.weight, self.x, self.d, out),
                    (self.rows, self.per_program, *self.strides),
                    **self.constants,
                )
        return out

    def backward(self, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dy, dz, dx, and the gradients of weight and D, `(2, channels)`, D's by channels, summed part by part in one order."""
        dy, dz, dx = (x.new_empty(self.shape) for x in self.given)
        sums = dy.new_empty(self.parts, 2, self.channels, dtype=self.dtype)
        if not dy.numel():
            return dy, dz, dx, dy.new_zeros(2, self.channels, dtype=self.dtype)
        dout, align, row = even_rows(dout)
        with on(dy.device):
            GRADIENTS(
                self.grid,
                (dout, self.y, self.z, self.weight, self.x, self.d, dy, dz, dx, sums),
                (self.rows, self.per_program, row, *self.strides),
                D_ALIGN=align, **self.constants,
            )  # fmt: skip
        return dy, dz, dx, sums.sum(0)
