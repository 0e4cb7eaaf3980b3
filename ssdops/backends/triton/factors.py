"""The factors of a window's second scan, in one launch each way: torch takes a pass over memory for every step of theirs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ir.problem import Problem
from ...ir.terms import Linear
from .calls import Kernel, Launching
from .kernels import factors as kernels
from .launch import ceil_div

FACTORS, FACTOR_GRADIENTS = Kernel(kernels.block_factors), Kernel(kernels.block_factor_gradients)
PIECE, HEADS = 128, 16
"""Tokens and heads of a tile."""


def block_factors(log: Tensor, scan: Linear, problem: Problem, exact: bool) -> tuple[Tensor, Tensor]:
    """exp of sums of logs from where a scan enters a block, and to where it leaves; differentiable.

    Args:
        log: `(batch, blocks, size, heads)`, two blocks at least.
        exact: whether sums are of float64.

    Returns:
        Of rows and of columns, `(batch, blocks − 1, size, heads)` in float32: of the later of two blocks and the earlier one,
        or the other way round where the scan comes from the right.
    """
    rows, cols = _Factors.apply(log, scan, problem, exact)  # type: ignore[no-untyped-call]
    return rows, cols


class _Factors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log: Tensor, scan: Linear, problem: Problem, exact: bool) -> tuple[Tensor, Tensor]:
        batch, blocks, size, heads = log.shape
        rows, cols = (_float32(batch, blocks - 1, size, heads, device=log.device) for _ in range(2))
        with Launching(problem, log.device):
            FACTORS(
                _grid(log), (log, rows, cols), (heads, blocks, size, *log.stride()),
                **_tile(scan), WIDE=_wide(exact), num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(rows, cols)
        ctx.scan, ctx.problem, ctx.exact, ctx.dtype = scan, problem, exact, log.dtype
        return rows, cols

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dcols: Tensor) -> tuple[Tensor, None, None, None]:
        rows, cols = ctx.saved_tensors
        batch, pairs, size, heads = rows.shape
        dlog = _float32(batch, pairs + 1, size, heads, device=rows.device)
        with Launching(ctx.problem, rows.device):
            FACTOR_GRADIENTS(
                _grid(dlog), (rows, cols, drows.contiguous(), dcols.contiguous(), dlog), (heads, pairs + 1, size),
                **_tile(ctx.scan), WIDE=_wide(ctx.exact), num_warps=4,
            )  # fmt: skip
        return dlog.to(ctx.dtype), None, None, None


_float32 = partial(torch.empty, dtype=torch.float32)  # whatever the default is


def _wide(exact: bool) -> tl.dtype:
    return tl.float64 if exact else tl.float32


def _grid(log: Tensor) -> tuple[int, int, int]:
    batch, blocks, _, heads = log.shape
    return batch * blocks, ceil_div(heads, HEADS), 1


def _tile(scan: Linear) -> dict[str, Any]:
    flags = {"CAUSAL": scan.causal, "ROW_INCLUSIVE": scan.row_inclusive, "COL_INCLUSIVE": scan.col_inclusive}
    return {"PIECE": PIECE, "HEADS": HEADS, **flags}
