"""What holds of the skip connection and the gate on any backend and device: they are their formula, and have its gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conv_laws import DTYPES, drawn
from torch import Tensor

from ssdops.nn.skip import gated_skip
from ssdops.testing import assert_close, tolerance
from ssdops.testing.tolerance import assert_same

SKIPS = {"no D": None, "by heads": (3,), "by channels": (3, 2), "one a head, expanded": (3, 1)}


def by_formula(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """In float64, a head at a time."""
    out = y.double().clone()
    for head in range(0 if D is None else x.shape[-2]):
        assert D is not None
        out[..., head, :] += D[head].double() * x[..., head, :].double()
    return out if z is None else out * z.double() / (1 + torch.exp(-z.double()))


class SkipLaws:
    """Subclass it, and name a backend and a device."""

    backend: str
    device: str = "cpu"

    @property
    def skip(self) -> Any:
        return partial(gated_skip, backend=self.backend)

    def operands(self, dtype: torch.dtype, skip: str, gated: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """y; x and z slices of something wider; D in float32 at least."""
        wide = drawn(2, 5, 19, dtype=dtype, seed=1, device=self.device)
        x, z = wide[..., 1:7].unflatten(-1, (3, 2)), wide[..., -6:].unflatten(-1, (3, 2))
        sizes = SKIPS[skip]
        D = (
            None
            if sizes is None
            else drawn(*sizes, dtype=torch.promote_types(dtype, torch.float32), seed=2, device=self.device)
        )
        D = D.expand(3, 2) if D is not None and "expanded" in skip else D
        return drawn(2, 5, 3, 2, dtype=dtype, device=self.device), x, D, z if gated else None

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("skip", SKIPS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_is_its_formula(self, dtype: torch.dtype, skip: str, gated: bool) -> None:
        given = self.operands(dtype, skip, gated)
        out, value = self.skip(*given), by_formula(*given)
        assert out.dtype == dtype and out.is_contiguous()
        # Six operations in the accumulation dtype. What is added up can cancel, and is then great beside its sum.
        allowed = tolerance(dtype, torch.promote_types(dtype, torch.float32), 6, 4 * value.abs().max().item())
        assert_close(out, value, allowed, "y")

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("skip", SKIPS)
    def test_gradients(self, skip: str, gated: bool) -> None:
        """Of everything that there is, and their own."""
        y, x, D, z = self.operands(torch.float64, skip, gated)
        D = None if D is None else D[:, :1].contiguous() if "expanded" in skip else D.clone()
        given = [t.detach().requires_grad_() for t in ((y,) if D is None else (y, x, D)) + (() if z is None else (z,))]

        def run(y: Tensor, *rest: Tensor) -> Tensor:
            skipped, by = (x, None) if D is None else (rest[0], rest[1].expand(3, 2) if "expanded" in skip else rest[1])
            return self.skip(y, skipped, by, rest[-1] if gated else None)

        assert torch.autograd.gradcheck(run, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, given, fast_mode=True)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_gradients_of_a_dtype(self, dtype: torch.dtype) -> None:
        """Over rows enough for several programs, and more channels than a tile has."""
        wide = torch.promote_types(dtype, torch.float32)
        y, x, z = (drawn(2, 90, 5, 260, dtype=dtype, seed=seed, device=self.device).requires_grad_() for seed in range(3))
        D = drawn(5, dtype=torch.float32, seed=3, device=self.device).requires_grad_()
        dout = drawn(2, 90, 5, 260, dtype=dtype, seed=4, device=self.device)
        found = torch.autograd.grad(self.skip(y, x, D, z), (y, x, D, z), dout)
        exact = [t.detach().double().requires_grad_() for t in (y, x, D, z)]
        wanted = torch.autograd.grad(by_formula(*exact), exact, dout.double())
        summed = (dout.double() * torch.nn.functional.silu(exact[3]) * exact[1]).abs().sum((0, 1, 3)).max().detach()
        for grad, value in zip(found, wanted, strict=True):
            terms, largest = (2 * 90 * 260, summed) if grad.shape == D.shape else (8, 4 * value.abs().max())
            assert_close(grad, value, tolerance(grad.dtype, wide, terms, float(largest)), "a gradient")

    @pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 3, 2), (3, 2)])
    def test_few_tokens(self, sizes: tuple[int, ...]) -> None:
        y, x, z = (drawn(*sizes, seed=seed, device=self.device).requires_grad_() for seed in range(3))
        D = drawn(3, device=self.device).requires_grad_()
        out = self.skip(y, x, D, z)
        grads = torch.autograd.grad(out.sum(), (y, x, D, z))
        assert out.shape == sizes and [g.shape for g in grads] == [y.shape, x.shape, D.shape, z.shape]

    def test_deterministic(self) -> None:
        given = [t.detach().requires_grad_() for t in self.operands(torch.float32, "by heads", True) if t is not None]
        first, second = (torch.autograd.grad(self.skip(*given).sum(), given) for _ in range(2))
        for x, y in zip(first, second, strict=True):
            assert_same(x, y, "a gradient")
