"""Tensor parallelism: a Mamba-2 block whose heads are split over ranks, as a style for `parallelize_module`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from ..errors import DtypeError, ShapeError
from .mamba2 import Mamba2


class HeadsParallel(ParallelStyle):
    """Heads of an `nn.Mamba2` over the ranks of a mesh, with one all-reduce per block in each pass.

        rank r:  z, x, dt of its heads;  B and C of its groups, or of the one that its heads are of
        out = Σ_r W_out[:, r] norm(y_r · silu(z_r))

    Each rank's block becomes one of its own heads, with plain local parameters, cut from those that it has when it is
    parallelised: load checkpoints before. Groups are sharded where there are as many as ranks, or more; ranks that share one
    have all of its rows of B and C, and sum the gradients of these rows of weights, so that they stay the same. Inputs and
    outputs are whole, and the same on all ranks. `fully_shard` over another dimension of the mesh, and activation
    checkpointing, go around it.

        parallelize_module(model, mesh["tp"], {"layers.*.mixer": HeadsParallel()})

    Raises:
        DtypeError: the module is no `nn.Mamba2`.
        ShapeError: heads, groups or groups of the norm that the ranks do not divide: a group is normalised on one rank.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 8.1.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Mamba2):
            raise DtypeError(f"HeadsParallel is for nn.Mamba2, got {type(module).__name__}")
        size = device_mesh.size()
        if size > 1:
            _check(module, size)
            _cut(module, size, device_mesh.get_local_rank(), device_mesh.get_group())
        return module


def _check(block: Mamba2, size: int) -> None:
    if block.nheads % size:
        raise ShapeError(f"nheads={block.nheads} heads do not divide among {size} ranks; take a mesh whose size divides them")
    if block.ngroups % size and size % block.ngroups:
        raise ShapeError(f"ngroups={block.ngroups} must divide the {size} ranks, or be divided by them")
    if block.norm is not None and block.norm.groups % size:
        raise ShapeError(
            f"groups={block.norm.groups} of the norm do not divide among {size} ranks, and one is normalised on one rank; "
            f"build the block with norm_groups a multiple of {size}"
        )


@dataclass(frozen=True)
class Sharing:
    """Rows of a parameter that ranks have in common.

    Attributes:
        rows: where they are in this rank's parameter.
        slot, slots: which group of B and C they are of, of how many.
    """

    group: dist.ProcessGroup
    rows: slice
    slot: int
    slots: int


def _cut(block: Mamba2, size: int, rank: int, group: dist.ProcessGroup) -> None:
    """Make the block one of this rank's heads."""
    n_groups, first = max(block.ngroups // size, 1), rank * block.ngroups // size
    channels, heads = _part(block.d_inner, size, rank), _part(block.nheads, size, rank)
    states = torch.arange(first * block.d_state, (first + n_groups) * block.d_state)
    widths = [block.d_inner, block.d_inner, *2 * [block.ngroups * block.d_state], block.nheads]
    rows, of_conv = (
        _joined([channels, channels, states, states, heads], widths),
        _joined([channels, states, states], widths[1:4]),
    )
    for holder, name, index, axis in (
        (block.in_proj, "weight", rows, 0), (block.in_proj, "bias", rows, 0), (block.conv1d, "weight", of_conv, 0),
        (block.conv1d, "bias", of_conv, 0), (block, "dt_bias", heads, 0), (block, "A_log", heads, 0),
        (block, "D", channels if block.D_has_hdim else heads, 0), (block.norm, "weight", channels, 0),
        (block.out_proj, "weight", channels, 1),
    ):  # fmt: skip
        _keep(holder, name, index, axis)
    sharing = [
        Sharing(group, slice(at, at + 2 * len(states)), first, block.ngroups) for at in (len(channels), 2 * len(channels))
    ]
    if block.ngroups < size:
        block.common_channels = partial(_common, sharing=sharing[0])
    block.in_proj.__class__, block.in_proj.ranks = ColumnLinear, group  # type: ignore[assignment]
    block.in_proj.sharing = sharing[1] if block.ngroups < size else None  # type: ignore[assignment]
    block.out_proj.__class__, block.out_proj.ranks = RowLinear, group  # type: ignore[assignment]
    if block.norm is not None:
        block.norm.groups //= size
    block.d_inner, block.nheads, block.ngroups = len(channels), len(heads), n_groups


def _part(count: int, size: int, rank: int) -> Tensor:
    return torch.arange(count * rank // size, count * (rank + 1) // size)


def _joined(parts: list[Tensor], widths: list[int]) -> Tensor:
    """Indices into parts of these widths, as indices into all of them side by side."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return torch.cat([part + start for part, start in zip(parts, starts, strict=True)])


def _keep(holder: nn.Module | None, name: str, index: Tensor, axis: int) -> None:
    """Cut a parameter down to some of its rows or columns."""
    whole = None if holder is None else getattr(holder, name)
    if holder is not None and whole is not None:
        part = whole.detach().index_select(axis, index.to(whole.device)).contiguous()
        setattr(holder, name, nn.Parameter(part, requires_grad=whole.requires_grad))


class ColumnLinear(nn.Linear):
    """A linear map whose outputs are split over ranks, some of them shared."""

    ranks: dist.ProcessGroup
    sharing: Sharing | None

    def forward(self, u: Tensor) -> Tensor:
        """`(…, d_model)`, the same on all ranks → this rank's outputs."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.sharing is not None:
            weight, bias = _common(weight, self.sharing), None if bias is None else _common(bias, self.sharing)
        return F.linear(_SumGradient.apply(u, self.ranks), weight, bias)  # type: ignore[no-untyped-call]  # as torch has it


class RowLinear(nn.Linear):
    """A linear map whose inputs are split over ranks."""

    ranks: dist.ProcessGroup

    def forward(self, y: Tensor) -> Tensor:
        """This rank's inputs → `(…, d_model)`, the same on all ranks."""
        out: Tensor = _Sum.apply(F.linear(y, self.weight), self.ranks)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


def _common(x: Tensor, sharing: Sharing) -> Tensor:
    """A parameter whose shared rows have the gradients of all ranks."""
    a, b = sharing.rows.start, sharing.rows.stop
    return torch.cat([x[:a], _SumShared.apply(x[a:b], sharing), x[b:]])  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    """Forward the sum over ranks, backward nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


class _SumGradient(torch.autograd.Function):
    """Forward nothing, backward the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        total = dx.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumShared(torch.autograd.Function):
    """Forward nothing, backward the sum over the ranks that have the same rows: all take part, each in its group's slot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sharing: Sharing) -> Tensor:
        ctx.sharing = sharing
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        s: Sharing = ctx.sharing
        every = dx.new_zeros(s.slots, *dx.shape)
        every[s.slot] = dx
        dist.all_reduce(every, group=s.group)
        return every[s.slot], None
