"""What holds of the gated norm on any backend and device: it is its formula, and rows see nothing of one another."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conv_laws import DTYPES, drawn
from torch import Tensor

from ssdops import nn
from ssdops.testing import assert_close, tolerance
from ssdops.testing.tolerance import assert_same


def by_formula(y: Tensor, z: Tensor, weight: Tensor, groups: int, before: bool, skip: tuple[Tensor, Tensor] | None) -> Tensor:
    """In float64, a group at a time; eps is 0.1."""
    y, z, size = y.double(), z.double(), y.shape[-1] // groups
    if skip is not None:
        D, x = skip
        y = y + D.double().repeat_interleave(y.shape[-1] // len(D)) * x.double()
    gate = z / (1 + torch.exp(-z))
    value = y * (1 if before else gate)
    for start in range(0, y.shape[-1], size):
        part = value[..., start : start + size].clone()
        value[..., start : start + size] = part / ((part**2).sum(-1, keepdim=True) / size + 0.1).sqrt()
    return value * weight.double() * (gate if before else 1)


class NormLaws:
    """Subclass it, and name a backend and a device."""

    backend: str
    device: str = "cpu"
    rounds_once = True
    """Whether casts to fewer bits round to the nearest: Triton's interpreter cuts off."""

    @property
    def norm(self) -> Any:
        return partial(nn.gated_rms_norm, backend=self.backend, eps=0.1)

    def drawn(self, *sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        return drawn(*sizes, dtype=dtype, seed=seed, device=self.device)

    def operands(self, dtype: torch.dtype, heads: int | None, channels: int = 6) -> tuple[list[Tensor], Any]:
        """y, z and the weight, z and x slices of something wider; and the skip connection with so many heads, if any."""
        wide = self.drawn(2, 3, 3 * channels + 1, dtype=dtype, seed=1)
        y, z, x = self.drawn(2, 3, channels, dtype=dtype), wide[..., 1 : 1 + channels], wide[..., -channels:]
        skip = None if heads is None else (self.drawn(heads, dtype=torch.promote_types(dtype, torch.float32), seed=2), x)
        return [y, z, self.drawn(channels, dtype=dtype)], skip

    @pytest.mark.parametrize("heads", [None, 3, 6])
    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("groups", [1, 2, 6])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_is_its_formula(self, dtype: torch.dtype, groups: int, before: bool, heads: int | None) -> None:
        given, skip = self.operands(dtype, heads)
        out = self.norm(*given, groups=groups, norm_before_gate=before, skip=skip)
        value, size = by_formula(*given, groups, before, skip), 6 // groups
        assert out.dtype == dtype and out.is_contiguous()
        # Ten operations in the accumulation dtype, each with its rounding, and the sum of squares. What a skip connection
        # adds up can cancel, and is then great beside its sum.
        largest = value.abs().max().item() * (1 if skip is None else 4)
        assert_close(out, value, tolerance(dtype, torch.promote_types(dtype, torch.float32), 10 + size, largest), "the norm")

    @pytest.mark.parametrize("heads", [None, 2])
    @pytest.mark.parametrize("before", [False, True])
    def test_gradients(self, before: bool, heads: int | None) -> None:
        """Of everything, and their own."""
        given, skip = self.operands(torch.float64, heads, 4)
        given = [t.detach().requires_grad_() for t in (*given, *(skip or ()))]

        def run(y: Tensor, z: Tensor, weight: Tensor, *skip: Tensor) -> Tensor:
            return self.norm(y, z, weight, groups=2, norm_before_gate=before, skip=skip or None)

        assert torch.autograd.gradcheck(run, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, given, fast_mode=True)

    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_gradients_are_those_of_float64(self, dtype: torch.dtype, before: bool) -> None:
        """Autograd's of plain torch, on the same rounded inputs, of more rows than a program has."""
        shape, channels = (7, 5, 48), 48
        given = [self.drawn(*shape, dtype=dtype, seed=i) for i in range(2)]
        given += [
            self.drawn(channels, dtype=dtype),
            self.drawn(4, dtype=torch.float32),
            self.drawn(*shape, dtype=dtype, seed=3),
        ]
        given = [t.requires_grad_() for t in given]
        wide = [t.detach().double().requires_grad_() for t in given]
        dout = self.drawn(*shape, dtype=dtype, seed=4)

        def gradients(inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
            y, z, weight, D, x = inputs
            options = {"groups": 2, "norm_before_gate": before, "skip": (D, x), "eps": 0.1, "backend": backend}
            out = nn.gated_rms_norm(y, z, weight, **options)
            return torch.autograd.grad(out, inputs, dout.to(out.dtype))

        found, exact = gradients(given, self.backend), gradients(wide, "torch")
        rows, size = 35, 24
        for name, sums, ours, value in zip(
            ("y", "z", "weight", "D", "x"), (1, 1, rows, rows * 12, 1), found, exact, strict=True
        ):
            # a sum over the channels of a group is in each; what is summed over rows is no greater than these were alone
            largest = value.abs().max().item() * (4 if sums == 1 else 8)
            limit = tolerance(dtype, torch.promote_types(dtype, torch.float32), size + 12 + sums, largest)
            assert_close(ours, value, limit, f"the gradient of {name}")

    def test_rows_do_not_see_one_another(self) -> None:
        """A row's bits are the same in any batch, and whatever the other rows hold."""
        (y, z, weight), skip = self.operands(torch.float32, 3)
        bad = y.clone()
        bad[0, 1] = float("nan")
        out, dirty = self.norm(y, z, weight, skip=skip), self.norm(bad, z, weight, skip=skip)
        assert dirty[0, 1].isnan().all()
        assert_same(dirty[1], out[1], "rows beside a NaN")
        assert_same(self.norm(y[1:], z[1:], weight, skip=(skip[0], skip[1][1:])), out[1:], "a row alone")

    def test_low_precision_is_float32_rounded_once(self) -> None:
        if not self.rounds_once:
            pytest.skip("Triton's interpreter cuts bits off where the GPU rounds; test_cuda_conv.py has the same test")
        (y, z, weight), (D, x) = self.operands(torch.bfloat16, 3)
        low = self.norm(y, z, weight, groups=3, skip=(D, x))
        wide = self.norm(y.float(), z.float(), weight.float(), groups=3, skip=(D, x.float()))
        assert_same(low, wide.bfloat16(), "the norm")

    def test_sizes_of_nothing(self) -> None:
        weight = self.drawn(6, dtype=torch.float32).requires_grad_()
        nothing = self.drawn(0, 3, 6, dtype=torch.float32).requires_grad_()
        out = self.norm(nothing, nothing, weight)
        assert out.shape == (0, 3, 6) and not torch.autograd.grad(out.sum(), weight)[0].any()

    def test_compiles_whole(self) -> None:
        given, skip = self.operands(torch.float32, 3)
        given = [t.detach().requires_grad_() for t in (*given, *skip)]

        def loss(y: Tensor, z: Tensor, weight: Tensor, D: Tensor, x: Tensor) -> Tensor:
            return self.norm(y, z, weight, groups=2, skip=(D, x)).square().sum()

        torch._dynamo.reset()
        ours, plain = torch.compile(loss, fullgraph=True, backend="aot_eager")(*given), loss(*given)
        torch.testing.assert_close(torch.autograd.grad(ours, given), torch.autograd.grad(plain, given))
