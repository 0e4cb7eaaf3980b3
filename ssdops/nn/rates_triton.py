"""Launching the kernels of `discretize`: grids, strides and memory. No arithmetic happens here."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..backends.triton.calls import Kernel
from ..backends.triton.launch import ceil_div, power_of_2
from .kernels import rates as kernels
from .launching import on, processors

FORWARD, GRADIENTS = Kernel(kernels.discretize), Kernel(kernels.discretize_gradients)
TILE, RESIDENT = 1024, 4
"""Elements of a tile, and programs of a multiprocessor: each walks some tiles."""
TERMS = {torch.float32: 8, torch.float64: 17}
"""Of the series of softplus: the next is less than what a 1 of the dtype is rounded by."""


class Rates:
    """A call of `discretize`: what its kernels have in common."""

    def __init__(
        self, dt: Tensor, A: Tensor, bias: Tensor | None, low: float, high: float, softplus: bool, log: bool, dtype: torch.dtype
    ) -> None:
        self.given, self.learnt, self.dtype = dt, (A, bias), dtype
        self.dt, self.dt_row = _rows(dt)
        self.A = A.contiguous()
        self.bias = self.A if bias is None else bias.contiguous()
        self.rows, self.columns = self.dt.shape
        block = power_of_2(max(self.columns, 1))
        tile = max(TILE // block, 1)
        parts = max(min(RESIDENT * processors(dt.device), ceil_div(self.rows, tile)), 1)
        self.per_program = ceil_div(ceil_div(self.rows, tile), parts) * tile
        self.parts = ceil_div(self.rows, max(self.per_program, 1))
        self.constants: dict[str, Any] = {
            "HEADS": len(A), "COLUMNS": self.columns, "ROWS": tile, "BLOCK": block, "LOW": low, "HIGH": high,
            "BIASED": bias is not None, "SOFTPLUS": softplus, "LOG": log, "TERMS": TERMS[dtype],
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32, "num_warps": 4,
        }  # fmt: skip

    def forward(self) -> tuple[Tensor, Tensor]:
        """steps and logs."""
        steps, logs = (self.dt.new_empty(self.given.shape, dtype=self.dtype) for _ in range(2))
        if steps.numel():
            with on(steps.device):
                FORWARD(
                    (self.parts, 1, 1),
                    (self.dt, self.bias, self.A, steps, logs),
                    (self.rows, self.per_program, self.dt_row),
                    **self.constants,
                )
        return steps, logs

    def backward(self, dsteps: Tensor, dlogs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradients of dt, A and bias; the latter two summed part by part in one order."""
        ddt = self.dt.new_empty(self.given.shape)
        sums = ddt.new_empty(self.parts, 2, self.columns, dtype=self.dtype)
        if ddt.numel():
            (dsteps, dsteps_row), (dlogs, dlogs_row) = _rows(dsteps), _rows(dlogs)
            with on(ddt.device):
                GRADIENTS(
                    (self.parts, 1, 1),
                    (dsteps, dlogs, self.dt, self.bias, self.A, ddt, sums),
                    (self.rows, self.per_program, dsteps_row, dlogs_row, self.dt_row),
                    **self.constants,
                )
        A, bias = self.learnt
        dA, dbias = sums.unflatten(2, (-1, len(A))).sum((0, 2))
        return ddt, dA.to(A.dtype), None if bias is None else dbias.to(bias.dtype)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x by rows of neighbouring elements, a view wherever it can be, and how far one is from the next."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return x, x.stride(0)
