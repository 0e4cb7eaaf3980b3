"""The one tolerance of every comparison: `c · eps(dtype) · √(reduction length) · magnitude`, against a float64 oracle.

A reduction of n terms that accumulates in one dtype errs by about eps · √n times the sum of the terms' absolute values.
A result that is then rounded to a coarser dtype errs by one rounding more, a reduction of length 1 in that dtype; the
coarser of the two counts. So do tensor cores: their operands, weighted with decays, are rounded to the dtype that they
multiply, one rounding of every term. The magnitude is what the oracle gives for absolute values
(`ssdops.testing.oracle`), at its greatest over the tensor: where terms cancel, it is what they were, and not what is left.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

C = 2.0
"""The constant; there is one, for every backend, dtype and test."""


def tolerance(
    output: torch.dtype, compute: torch.dtype, length: float, magnitude: float, oracle: float = 0.0,
    operands: torch.dtype | None = None,
) -> float:  # fmt: skip
    """c · max(eps(compute) · √length, eps(output), eps(operands)) · magnitude, and no less than what the dtypes tell from zero.

    Args:
        output: the dtype of the result.
        compute: the dtype in which it accumulates.
        length: how many products meet in one element.
        magnitude: the greatest element that absolute values give.
        oracle: what the oracle itself may be off by, in units of eps(float64); it matters where compute is float64 too.
        operands: the dtype that weighted operands of products are rounded to; None is compute.
    """
    out, acc = torch.finfo(output), torch.finfo(compute)
    floor = max(out.smallest_normal * (out.eps if output is torch.float16 else 1.0), acc.smallest_normal)
    rounding = max(out.eps, torch.finfo(operands or compute).eps)
    error = max(acc.eps * sqrt(max(length, 1.0)), rounding) * magnitude
    return C * max(error + torch.finfo(torch.float64).eps * oracle, floor)


def assert_close(actual: Tensor, expected: Tensor, allowed: float, what: str) -> None:
    """Every element of `actual` lies within `allowed` of `expected`, and is finite where that is.

    Raises:
        AssertionError: names the tensor, the error, the place, and what was allowed.
    """
    assert actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return
    error = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs()
    error = torch.where(error.isnan(), torch.inf, error)
    worst = int(error.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert error.flatten()[worst] <= allowed, (
        f"{what} is off by {error.flatten()[worst]:.3g} at {place}: got {actual[place].item():.6g}, "
        f"expected {expected[place].item():.6g}, allowed {allowed:.3g}"
    )


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """The same bits, NaN included."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, f"{what} has another shape or dtype"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert bool(same.all()), f"{what} differs in {int((~same).sum())} of {same.numel()} elements"
