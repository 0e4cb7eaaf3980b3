"""The Hydra block is its equations, transcribed token by token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssdops.errors import ShapeError, ValueRangeError
from ssdops.nn import Hydra

SIZES = {"d_state": 6, "d_conv": 5, "headdim": 4, "ngroups": 2}
D_MODEL = 8


def make_block(**options) -> Hydra:
    """A block in float64 all of whose parameters are random."""
    torch.manual_seed(0)
    block = Hydra(D_MODEL, **SIZES | options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def reference(block: Hydra, u: Tensor) -> Tensor:
    """One sequence `(seqlen, d_model)`, by sums over pairs of tokens."""
    seqlen, heads, groups, n = len(u), block.nheads, block.ngroups, block.d_state
    projected = u @ block.in_proj.weight.T + (0 if block.in_proj.bias is None else block.in_proj.bias)
    z, mixed, dt = projected.split([block.d_inner, block.conv1d.weight.shape[0], 2 * heads], -1)
    reach = block.d_conv // 2
    padded = torch.cat([mixed.new_zeros(reach, mixed.shape[1]), mixed, mixed.new_zeros(reach, mixed.shape[1])])
    taps = block.conv1d.weight[:, 0]
    mixed = torch.stack([sum(padded[t + l] * taps[:, l] for l in range(block.d_conv)) for t in range(seqlen)])
    mixed = mixed + (0 if block.conv1d.bias is None else block.conv1d.bias)
    mixed = mixed * torch.sigmoid(mixed)
    x, B, C, B_right, C_right = mixed.split([block.d_inner, *[groups * n] * 4], -1)
    low, high = block.dt_limit
    dt = torch.log1p(torch.exp(dt + torch.cat([block.dt_bias] * 2))).clamp(low, high)
    y = []
    for i in range(seqlen):
        own = block.fc_D.weight @ x[i] + block.D
        for h in range(heads):
            A, at = -block.A_log[h].exp(), slice(h * block.headdim, (h + 1) * block.headdim)
            group = slice(h // (heads // groups) * n, (h // (heads // groups) + 1) * n)
            left, right = dt[:, h], dt[:, heads + h]
            total = own[h] * x[i, at]
            for j in range(i):
                total = total + C[i - 1, group] @ B[j, group] * (A * left[j + 1 : i].sum()).exp() * left[j] * x[j, at]
            for j in range(i + 1, seqlen):
                decayed = (A * right[i + 1 : j].sum()).exp()
                total = total + C_right[i + 1, group] @ B_right[j, group] * decayed * right[j] * x[j, at]
            y.append(total)
    y = torch.stack(y).view(seqlen, block.d_inner)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight * z * torch.sigmoid(z)
    return y @ block.out_proj.weight.T + (0 if block.out_proj.bias is None else block.out_proj.bias)


@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False, "dt_limit": (0.3, 0.8)}, {"expand": 1}])
@pytest.mark.parametrize("seqlen", [1, 2, 11])
def test_the_block_is_its_equations(options, seqlen):
    block = make_block(**options)
    u = torch.randn(2, seqlen, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(block(u), torch.stack([reference(block, row) for row in u]), rtol=1e-12, atol=1e-12)


def test_gradients():
    """Of u and of every parameter: those of the transcription."""
    block, u = make_block(), torch.randn(1, 7, D_MODEL, dtype=torch.float64, requires_grad=True)
    weights, inputs = torch.randn(1, 7, D_MODEL, dtype=torch.float64), [u, *block.parameters()]
    ours = torch.autograd.grad((block(u) * weights).sum(), inputs)
    theirs = torch.autograd.grad((reference(block, u[0]) * weights[0]).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_it_looks_both_ways_and_not_across_the_batch():
    block, u = make_block(), torch.randn(2, 9, D_MODEL, dtype=torch.float64)
    changed = u.clone()
    changed[0, 4] += 1
    apart = (block(changed) - block(u)).abs().amax(-1)
    assert (apart[0] > 0).all() and not apart[1].any()


def test_parameters_are_those_of_the_released_block():
    shapes = {name: tuple(p.shape) for name, p in Hydra(32, d_state=16, headdim=16).named_parameters()}
    channels = 64 + 4 * 16
    assert shapes == {
        "dt_bias": (4,), "A_log": (4,), "D": (4,), "in_proj.weight": (64 + channels + 8, 32), "conv1d.weight": (channels, 1, 7),
        "conv1d.bias": (channels,), "fc_D.weight": (4, 64), "norm.weight": (64,), "out_proj.weight": (32, 64),
    }  # fmt: skip


def test_initial_values():
    block = Hydra(64, headdim=2, dt_min=0.01, dt_max=0.02)
    dt = torch.nn.functional.softplus(block.dt_bias)
    assert ((dt > 0.0099) & (dt < 0.0201)).all() and dt.std() > 1e-3
    assert not block.A_log.any() and (block.D == 1).all()


def test_autocast_and_the_meta_device():
    block = Hydra(32, d_state=16, headdim=8)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(torch.randn(2, 10, 32))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert Hydra(32, headdim=8, device="meta").A_log.is_meta


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"d_conv": 4}, ShapeError, "d_conv must be odd"),
        ({"headdim": 5}, ShapeError, "headdim must divide"),
        ({"ngroups": 3}, ShapeError, "ngroups must divide"),
        ({"dt_min": 0.0}, ValueRangeError, "dt_min, dt_max"),
    ],
)
def test_sizes_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        Hydra(D_MODEL, **SIZES | options)


def test_an_input_that_does_not_fit():
    with pytest.raises(ShapeError, match=r"u must be \(batch, seqlen, d_model=8\)"):
        make_block()(torch.zeros(2, 5, 7, dtype=torch.float64))
