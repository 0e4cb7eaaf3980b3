"""What holds of `discretize` on any backend and device: it is its formula, and has that formula's gradients."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from conv_laws import DTYPES, drawn
from torch import Tensor

from ssdops import nn
from ssdops.testing import assert_close, tolerance
from ssdops.testing.tolerance import assert_same

LIMITS = {"none": (-math.inf, math.inf), "default": (0.0, math.inf), "both": (0.1, 1.3)}


def by_formula(
    dt: Tensor, A: Tensor, bias: Tensor | None, log: bool, softplus: bool, limit: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """In float64, a column at a time."""
    steps, logs = torch.empty_like(dt, dtype=torch.float64), torch.empty_like(dt, dtype=torch.float64)
    for column in range(dt.shape[-1]):
        head = column % len(A)
        x = dt[..., column].double() + (0 if bias is None else bias[head].double())
        x = torch.log1p(torch.exp(x)) if softplus else x
        x = torch.where(x < limit[0], limit[0], torch.where(x > limit[1], limit[1], x))
        steps[..., column] = x
        logs[..., column] = x * (-A[head].double().exp() if log else A[head].double())
    return steps, logs


class RatesLaws:
    """Subclass it, and name a backend and a device."""

    backend: str
    device: str = "cpu"

    @property
    def discretize(self) -> Any:
        return partial(nn.discretize, backend=self.backend)

    def operands(self, dtype: torch.dtype, biased: bool = True, directions: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
        """dt, a slice of something wider, of great and small values; A and the bias, in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        dt = 6 * drawn(2, 7, 3 * directions + 4, dtype=dtype, device=self.device)[..., 2 : 2 + 3 * directions]
        A, bias = (drawn(3, dtype=wide, seed=seed, device=self.device) for seed in (1, 2))
        return dt, A, bias - 2 if biased else None

    @pytest.mark.parametrize("directions", [1, 2])
    @pytest.mark.parametrize("limit", LIMITS)
    @pytest.mark.parametrize(("biased", "log", "softplus"), [(True, True, True), (False, False, True), (True, False, False)])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_is_its_formula(
        self, dtype: torch.dtype, biased: bool, log: bool, softplus: bool, limit: str, directions: int
    ) -> None:
        """Small steps to as many digits as great ones."""
        given = self.operands(dtype, biased, directions)
        wide = torch.promote_types(dtype, torch.float32)
        options = {"log": log, "softplus": softplus, "limit": LIMITS[limit]}
        for found, wanted in zip(self.discretize(*given, **options), by_formula(*given, **options), strict=True):
            assert found.dtype == wide and found.is_contiguous()
            # x is rounded before softplus takes it, and its error is as great beside steps as x is, up to twenty
            relative = (found.double() - wanted).abs() / wanted.abs().clamp(min=torch.finfo(wide).tiny)
            assert relative.max() <= 40 * torch.finfo(wide).eps, f"off by {relative.max():.2e} of its size"

    @pytest.mark.parametrize("limit", LIMITS)
    @pytest.mark.parametrize(("biased", "log", "softplus"), [(True, True, True), (False, False, True), (True, False, False)])
    def test_gradients(self, biased: bool, log: bool, softplus: bool, limit: str) -> None:
        """Of everything, and their own."""
        dt, A, bias = self.operands(torch.float64, biased, 2)
        given = [x.detach().requires_grad_() for x in (dt / 6, A, bias) if x is not None]

        def run(dt: Tensor, A: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.discretize(dt, A, bias, log=log, softplus=softplus, limit=LIMITS[limit])

        assert torch.autograd.gradcheck(run, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, given, fast_mode=True)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_gradients_of_a_dtype(self, dtype: torch.dtype) -> None:
        """Those of plain torch, over rows enough for several programs; by one output alone, too."""
        dt = drawn(3, 700, 24, dtype=dtype, device=self.device).requires_grad_()
        A, bias = (drawn(24, dtype=torch.float32, seed=seed, device=self.device).requires_grad_() for seed in (1, 2))
        cotangents = [drawn(3, 700, 24, dtype=torch.float64, seed=seed, device=self.device) for seed in (3, 4)]
        wide = torch.promote_types(dtype, torch.float32)
        for kept in ((0, 1), (0,), (1,)):
            found, wanted = [], []
            for grads, out in (
                (found, self.discretize(dt, A, bias)),
                (wanted, nn.discretize(dt.double(), A.double(), bias.double(), backend="torch")),
            ):
                dy = [cotangents[i].to(out[i].dtype) for i in kept]
                grads += torch.autograd.grad([out[i] for i in kept], (dt, A, bias) if 1 in kept else (dt, bias), dy)
            rows = [wanted[0], *([cotangents[1] * out[0].detach()] if 1 in kept else []), wanted[0]]  # A's comes before bias's
            for x, y, summed in zip(found, wanted, rows, strict=True):
                several = x.shape != dt.shape
                terms, largest = (2100, summed.abs().sum((0, 1)).max()) if several else (10, summed.abs().max())
                assert_close(x, y.double(), tolerance(x.dtype, wide, terms, float(largest)), "a gradient")

    def test_extremes(self) -> None:
        """Nothing overflows, and a NaN is handed on."""
        dt = torch.tensor([[-1e4, -80.0, 0.0, 80.0, 1e4, math.inf, math.nan]], device=self.device)
        A = torch.full((7,), -1.0, device=self.device)
        steps, logs = self.discretize(dt, A)
        wanted = torch.tensor([[0.0, math.exp(-80), math.log(2), 80.0, 1e4, math.inf, math.nan]], device=self.device)
        torch.testing.assert_close(steps, wanted, equal_nan=True, atol=0, rtol=1e-5)
        torch.testing.assert_close(logs, -steps, equal_nan=True, atol=0, rtol=0)

    @pytest.mark.parametrize("sizes", [(0, 4), (2, 0, 4), (4,)])
    def test_few_tokens(self, sizes: tuple[int, ...]) -> None:
        dt, A = drawn(*sizes, device=self.device).requires_grad_(), drawn(2, device=self.device).requires_grad_()
        out = self.discretize(dt, A)
        assert all(x.shape == sizes for x in out)
        ddt, dA = torch.autograd.grad([x.sum() for x in out], (dt, A))
        assert ddt.shape == dt.shape and (dt.numel() or (dA == 0).all())

    def test_deterministic(self) -> None:
        given = [x.requires_grad_() for x in self.operands(torch.float32) if x is not None]
        first, second = (torch.autograd.grad(sum(x.sum() for x in self.discretize(*given)), given) for _ in range(2))
        for x, y in zip(first, second, strict=True):
            assert_same(x, y, "a gradient")
