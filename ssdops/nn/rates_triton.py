"""Launching the kernels of `discretize`: grids, strides and memory. No arithmetic happens here."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..backends.triton.calls import Kernel
from ..backends.triton.launch import ceil_div
from ..backends.triton.tile_mask import power
from .kernels import rates as kernels
from .launching import by_rows, on, processors

FORWARD, GRADIENTS = Kernel(kernels.discretize), Kernel(kernels.discretize_gradients)
TILE, RESIDENT = 1024, 4
"""Elements of a tile, and programs of a multiprocessor: each walks some tiles."""
TERMS = {torch.float32: 8, torch.float64: 17}
"""Of the series of softplus: the next is less than what a 1 of the dtype is rounded by."""


class Layout(NamedTuple):
    """How the work is cut, and what the kernels are compiled for."""

    rows: int
    columns: int
    parts: int
    per_program: int
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def layout_of(
    shape: torch.Size, heads: int, biased: bool, low: float, high: float, softplus: bool, log: bool, dtype: torch.dtype,
    processors: int,
) -> Layout:  # fmt: skip
    """Tiles of whole rows, shared out over as many programs as have some."""
    rows, columns = shape[:-1].numel(), shape[-1]
    block = power(columns)
    tile = max(TILE // block, 1)
    tiles = ceil_div(rows, tile)
    per_program = ceil_div(tiles, max(min(RESIDENT * processors, tiles), 1)) * tile
    constants = {
        "HEADS": heads, "COLUMNS": columns, "ROWS": tile, "BLOCK": block, "LOW": low, "HIGH": high, "BIASED": biased,
        "SOFTPLUS": softplus, "LOG": log, "TERMS": TERMS[dtype], "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": 4,
    }  # fmt: skip
    return Layout(rows, columns, ceil_div(rows, max(per_program, 1)), per_program, constants)


class Rates:
    """A call of `discretize`: what its kernels have in common."""

    def __init__(
        self, dt: Tensor, A: Tensor, bias: Tensor | None, low: float, high: float, softplus: bool, log: bool, dtype: torch.dtype
    ) -> None:
        self.shape, self.dtype, self.bias = dt.shape, dtype, bias
        self.dt, self.dt_row = by_rows(dt)
        self.A = A.contiguous()
        self.added = self.A if bias is None else bias.contiguous()
        heads, biased = A.shape[0], bias is not None
        self.layout = layout_of(dt.shape, heads, biased, low, high, softplus, log, dtype, processors(dt.device))

    def forward(self) -> tuple[Tensor, Tensor]:
        """steps and logs."""
        z, steps, logs = self.layout, *(self.dt.new_empty(self.shape, dtype=self.dtype) for _ in range(2))
        if z.parts and z.columns:
            with on(steps.device):
                FORWARD(
                    (z.parts, 1, 1),
                    (self.dt, self.added, self.A, steps, logs),
                    (z.rows, z.per_program, self.dt_row),
                    **z.constants,
                )
        return steps, logs

    def backward(self, dsteps: Tensor, dlogs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients of dt, A and bias; the latter two summed part by part in one order."""
        z, ddt = self.layout, self.dt.new_empty(self.shape)
        sums = ddt.new_empty(z.parts, 2, z.columns, dtype=self.dtype)
        if z.parts and z.columns:
            (dsteps, dsteps_row), (dlogs, dlogs_row) = by_rows(dsteps), by_rows(dlogs)
            with on(ddt.device):
                GRADIENTS(
                    (z.parts, 1, 1),
                    (dsteps, dlogs, self.dt, self.added, self.A, ddt, sums),
                    (z.rows, z.per_program, dsteps_row, dlogs_row, self.dt_row),
                    **z.constants,
                )
        dA, dbias = sums.unflatten(2, (-1, self.A.shape[0])).sum((0, 2))
        return ddt, dA.to(self.A.dtype), None if self.bias is None else dbias.to(self.bias.dtype)
