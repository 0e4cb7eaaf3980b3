"""Discretisation: step sizes, and the logs of decays, from a projection's output; a Triton kernel on GPUs, torch elsewhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends.base import Support
from ..errors import DeviceError, DtypeError, ShapeError
from .fused import Fused
from .launching import is_plain, on_triton

WIDEST = 8192
"""The most columns that the kernel has registers for."""


def discretize(
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None = None,
    *,
    log: bool = False,
    softplus: bool = True,
    limit: tuple[float, float] = (0.0, math.inf),
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Step sizes, and the logs of the decays that they make of Mamba-2's A.

        Δ = clamp(softplus(dt + bias), *limit),   log_a = Δ · A              (A = −exp(A) with `log`)

    A scan takes them as `masks.decay(log_a).scale(cols=Δ)`.

    Args:
        dt: `(…, nheads)`, any floating dtype; or `(…, n · nheads)`, heads of one direction after another.
        A: `(nheads,)`, negative; with `log` the log of −A, which blocks learn.
        bias: `(nheads,)`, added before softplus.
        softplus: whether it is taken.
        limit: the least and the greatest Δ.
        dtype: of the result and the reckoning, float32 or float64; None is float32, or float64 if dt is that.
        backend: "triton", a kernel for GPUs (in Triton's interpreter also on CPUs) that takes up to 8192 columns and no tensors
            that something traces or wraps; "torch", which takes everything; or "auto", the former wherever it can be.

    Returns:
        Δ and log_a, of the shape of dt.

    Raises:
        ShapeError: nheads does not divide the columns of dt, or bias is not of the shape of A.
        DeviceError, DtypeError: A or bias is not where dt is; dtype is another.
        UnsupportedError: a backend that does not take it.

    Source: Gu & Dao 2023, "Mamba", section 3.2, algorithm 2 (softplus and the bias); Dao & Gu 2024, "Transformers are SSMs",
    section 7.1.

    >>> import torch
    >>> from ssdops.nn import discretize
    >>> discretize(torch.zeros(1, 2), torch.tensor([-1.0, -2.0]))
    (tensor([[0.6931, 0.6931]]), tensor([[-0.6931, -1.3863]]))
    """
    if A.ndim != 1 or not A.shape[0] or dt.ndim == 0 or dt.shape[-1] % A.shape[0]:
        raise ShapeError(f"A must be (nheads,) that divide the columns of dt, {tuple(dt.shape)}, got {tuple(A.shape)}")
    if bias is not None and bias.shape != A.shape:
        raise ShapeError(f"bias must have the shape of A, {tuple(A.shape)}, got {tuple(bias.shape)}")
    for name, tensor in (("A", A), ("bias", bias)):
        if tensor is not None and tensor.device != dt.device:
            raise DeviceError(f"{name} is on {tensor.device}, but dt is on {dt.device}; move it to dt's device")
    dtype = torch.promote_types(dt.dtype, torch.float32) if dtype is None else dtype
    if dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    columns, (low, high) = dt.shape[-1], limit
    limits = Support.yes() if columns <= WIDEST else Support.no(f"a token has {columns} columns, more than {WIDEST}")
    if not is_plain((dt, A, bias)):  # torch.compile fuses what is plain torch with what stands around it
        limits = Support.no("its tensors are traced or wrapped")
    options = (float(low), float(high), softplus, log, dtype)
    if not on_triton(dt, backend, limits):
        return rates(dt, A, bias, *options)
    steps, logs = FUSED(dt, A, bias, *options)
    return steps, logs


def rates(
    dt: Tensor, A: Tensor, bias: Tensor | None, low: float, high: float, softplus: bool, log: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`discretize` in plain torch, of arguments that fit."""
    x = dt.to(dtype).unflatten(-1, (-1, len(A)))
    if bias is not None:
        x = x + bias.to(dtype)
    steps = (F.softplus(x) if softplus else x).clamp(low, high)
    rate = -A.to(dtype).exp() if log else A.to(dtype)
    return steps.flatten(-2), (steps * rate).flatten(-2)


def _launcher(*args: Any) -> Any:
    from .rates_triton import Rates  # which imports triton

    return Rates(*args)


FUSED = Fused(3, rates, _launcher)
