"""From tensors to the kernels of log-linear attention: grids, strides and allocation for one Fenwick term.

Row scales are in levels, column scales in V, and sums of log decays over chunks of tokens are torch's, as they are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ir.passes.structure import Structure
from ...ir.problem import common_heads
from ...ir.resolve import repeat_heads
from ..base import Config, Gradients, Inputs, Output, reduce_value, share_heads
from ..structured import Values
from .backward import filled
from .calls import Grid, Kernel, Launching
from .channel import dot_dtype, whole_sizes
from .kernels.fenwick import GROUP, fenwick_output, fenwick_spans, fenwick_tree
from .kernels.fenwick_gradients import fenwick_across, fenwick_cotangents, fenwick_inner, fenwick_passing
from .kernels.rows import FORGOTTEN
from .launch import DOTS, ceil_div, strides
from .sizes import fenwick_chunks, padded
from .tile_mask import LOG2E

SPANS, TREE, OUTPUT = Kernel(fenwick_spans), Kernel(fenwick_tree), Kernel(fenwick_output)
COTANGENTS, INNER, ACROSS, PASSING = (
    Kernel(x) for x in (fenwick_cotangents, fenwick_inner, fenwick_across, fenwick_passing)
)  # fmt: skip

ENOUGH = 4
"""Programs that a multiprocessor gets before heads share one, in which their gradients of q and k are summed."""


@dataclass(frozen=True)
class Sums:
    """Sums of log decays in units of log 2: of tokens ρ, κ `[batch, chunks, nheads, C]`; of chunks, and of the halves at each
    boundary, `[batch, chunks, nheads]`."""

    rho: Tensor
    kappa: Tensor
    total: Tensor
    left: Tensor
    right: Tensor


class Fenwick:
    """A Fenwick term on its tensors, with sizes of heads filled up to what kernels take."""

    def __init__(self, structure: Structure, values: Values, config: Config) -> None:
        p, given = values.scan.problem, values.tensors
        self.term, self.given, self.problem, self.out = structure.scan, given, p, values.scan.out
        self.size = config.chunk_size or fenwick_chunks(p)[0]
        self.chunks = ceil_div(p.seqlen, self.size)
        self.scale = float(structure.scan.sign * values.scan.scale)
        self.headdim, self.dstate = whole_sizes(p)
        self.dot = dot_dtype(p)
        self.kept = torch.bfloat16 if self.dot == torch.bfloat16 else torch.float32  # of states
        self.q, self.k = (filled(given[name], self.dstate) for name in ("q", "k"))
        self.shares = p.nheads // p.q_heads, p.nheads // p.k_heads, p.nheads // self.v.shape[2]

    @cached_property
    def v(self) -> Tensor:
        """V with the column scales in it."""
        v = self.given["v"]
        if "cols" in self.given:
            v = repeat_heads(v, self.problem.nheads, 2) * self.per_token("cols")[..., None]
            v = v.float() if self.dot == torch.float32 else v.to(self.problem.dtype)
        return filled(v, self.headdim)

    @cached_property
    def levels(self) -> Tensor:
        """With the row scales in them, `(batch, seqlen, nheads or fewer, n_levels)`, a view wherever it can be."""
        p, levels = self.problem, self.given["levels"]
        if "rows" in self.given:
            levels = repeat_heads(levels, p.nheads, 2) * self.per_token("rows")[..., None]
        return levels.expand(p.batch, p.seqlen, *levels.shape[2:])

    def per_token(self, name: str) -> Tensor:
        """An operand as `(batch, seqlen, nheads)`."""
        p, x = self.problem, self.given[name]
        return repeat_heads(x, p.nheads, 2).expand(p.batch, p.seqlen, p.nheads)

    def turned(self, x: Tensor) -> Tensor:
        """From one of the two orders of tokens to the other: local time and theirs."""
        return x if self.term.causal else x.flip(1)

    @cached_property
    def sums(self) -> Sums:
        """float64 where products are finer than rounded sums of many logs would allow."""
        p = self.problem
        wide = torch.float32 if p.dtype == torch.bfloat16 else torch.float64

        def by_chunks(name: str) -> Tensor:
            x = self.turned(self.per_token(name)).to(wide) * LOG2E
            x = pad(x, (0, 0, 0, self.chunks * self.size - p.seqlen)).unflatten(1, (self.chunks, self.size))
            return x.transpose(2, 3).contiguous()

        logs = by_chunks("log_a")
        if wide == torch.float32:  # what forgets everything may do so exactly: larger sums would round what comes after
            logs.clamp_(min=FORGOTTEN.value)
        rho = logs.cumsum(3)
        kappa = rho - by_chunks("log_cols") if "log_cols" in self.given else rho
        total = rho[..., -1].contiguous()
        left, right = torch.empty_like(total), torch.empty_like(total)
        self.run(
            SPANS, (p.batch * self.chunks, ceil_div(p.nheads, 16), 1), (total, left, right), (self.chunks, p.nheads),
            BLOCK=64, HEADS=16, num_warps=4,
        )  # fmt: skip
        return Sums(rho, kappa, total, left, right)

    @cached_property
    def common(self) -> dict[str, Any]:
        """The compile-time switches that all but the smallest kernels share."""
        return {
            "C": self.size, "P": self.headdim, "BP": min(padded(self.headdim), 32 if self.dot == torch.float32 else 64),
            "N": self.dstate, "CAUSAL": self.term.causal, "DOT": DOTS[self.dot], "PRECISION": "tf32x3",
        }  # fmt: skip

    @property
    def by_chunk(self) -> dict[str, Any]:
        """Those of kernels that have a chunk with all of its columns."""
        return {**self.common, "LOG": self.size.bit_length() - 1, "BN": padded(self.dstate)}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory on the term's device."""
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def states(self) -> Tensor:
        """Room for a state at each boundary."""
        p = self.problem
        return self.empty(p.batch * self.chunks, p.nheads, self.headdim, self.dstate, dtype=self.kept)

    def run(
        self, kernel: Kernel, grid: Grid, tensors: Sequence[Tensor], numbers: Sequence[int | float], **constants: Any
    ) -> None:
        """Launch a kernel."""
        kernel(grid, tensors, numbers, **constants)

    # --- launches -------------------------------------------------------------------------------------------------------

    def tree(self) -> Tensor:
        """S at every boundary."""
        p, s, tree, stride, columns = self.problem, self.sums, self.states(), 1, min(padded(self.dstate), 32)
        tiles = ceil_div(self.headdim, self.common["BP"]) * ceil_div(self.dstate, columns)
        while (count := (self.chunks - 1) // stride) > (0 if stride == 1 else 1):
            groups = ceil_div(count, GROUP.value)
            self.run(
                TREE, (p.batch * groups * p.nheads * tiles, 1, 1), (self.v, self.k, tree, s.kappa, s.total, s.right),
                (
                    p.seqlen, self.chunks, p.nheads, groups, stride, self.shares[2], self.shares[1],
                    *strides(self.v), *strides(self.k),
                ),
                BN=columns, LEAVES=stride == 1, STAGES=2, **self.common, num_warps=4,
            )  # fmt: skip
            stride *= GROUP.value
        return tree

    def forward(self) -> Tensor:
        """Y."""
        p, s = self.problem, self.sums
        y = self.empty(p.batch, p.seqlen, p.nheads, self.headdim, dtype=self.out)
        grid = p.batch * self.chunks * p.nheads * ceil_div(self.headdim, self.common["BP"])
        self.run(
            OUTPUT, (grid, 1, 1), (self.q, self.k, self.v, self.levels, y, s.rho, s.kappa, s.left, self.tree()),
            (*self.numbers, *strides(self.q), *strides(self.k), *strides(self.v), *strides(y), *self.levels.stride()),
            STRICT=self.term.strict, **self.by_chunk, num_warps=4,
        )  # fmt: skip
        return y[..., : p.headdim]

    @property
    def numbers(self) -> tuple[int | float, ...]:
        """Sizes, and how many heads share what, of a kernel that has a chunk."""
        p = self.problem
        share = p.nheads // self.levels.shape[2]
        return p.seqlen, self.chunks, p.nheads, self.levels.shape[3], *self.shares, share, self.scale

    def cotangents(self, dy: Tensor) -> Tensor:
        """dS at every boundary."""
        p, s, dtree = self.problem, self.sums, self.states()
        columns = min(padded(self.dstate), 64 if self.dot == torch.float32 else 128)
        tiles = ceil_div(self.headdim, self.common["BP"]) * ceil_div(self.dstate, columns)
        if self.chunks > 1:
            self.run(
                COTANGENTS, (p.batch * (self.chunks - 1) * p.nheads * tiles, 1, 1),
                (dy, self.q, self.levels, s.rho, s.total, dtree),
                (
                    p.seqlen, self.chunks, p.nheads, self.shares[0], p.nheads // self.levels.shape[2], self.scale,
                    *strides(dy), *strides(self.q), *self.levels.stride(),
                ),
                LOG=self.size.bit_length() - 1, BN=columns, STAGES=2, **self.common, num_warps=4,
            )  # fmt: skip
        return dtree

    def backward(self, dy: Tensor) -> Gradients:
        """Gradients of q, k, v and of values, by slot."""
        p, s, dy = self.problem, self.sums, filled(dy, self.headdim)
        tokens, above = (p.batch, p.seqlen), max((self.chunks - 1).bit_length(), 1)
        groups = p.nheads // self.together
        dq, dk = (self.empty(*tokens, groups, self.dstate) for _ in range(2))
        dv = self.empty(*tokens, p.nheads, self.headdim, dtype=self.out if self.v.shape[2] == p.nheads else torch.float32)
        dlevels = torch.zeros(*tokens, p.nheads, self.levels.shape[3], device=dy.device)
        inner, late, early = (self.empty(p.batch, self.chunks, p.nheads, self.size) for _ in range(3))
        across = torch.zeros(p.batch, self.chunks, above, p.nheads, device=dy.device)
        grid, n_levels, l_share = (p.batch * self.chunks * groups, 1, 1), self.levels.shape[3], p.nheads // self.levels.shape[2]
        sizes = p.seqlen, self.chunks, p.nheads, self.together, n_levels
        steps = *strides(self.q), *strides(self.k), *strides(self.v), *strides(dy), *self.levels.stride()
        for rows, grad in ((True, dq), (False, dk)):
            self.run(
                INNER, grid, (self.q, self.k, self.v, dy, self.levels, s.rho, s.kappa, grad, dv, dlevels, inner),
                (*sizes, *self.shares, l_share, self.scale, *steps),
                ROWS=rows, STRICT=self.term.strict, **self.by_chunk, num_warps=8,
            )  # fmt: skip
        for x, z, x_share, z_share, given, grad, along in (
            (self.q, dy, self.shares[0], 1, (s.rho, s.total, s.left, self.tree()), dq, late),
            (self.k, self.v, *self.shares[1:], (s.kappa, s.total, s.right, self.cotangents(dy)), dk, early),
        ):
            self.run(
                ACROSS, grid, (x, z, self.levels, *given, grad, dv, dlevels, along, across),
                (*sizes, above, x_share, z_share, l_share, self.scale, *strides(x), *strides(z), *self.levels.stride()),
                ROWS=along is late, STAGES=1 if self.dot == torch.float32 else 2, **self.by_chunk, num_warps=8,
            )  # fmt: skip
        values = {"log_a": self._of_logs(inner, late, early, across), **self._of_scales(dlevels, dv)}
        if "cols" in self.given:
            dv = dv * self.per_token("cols")[..., None]
        return Gradients(
            share_heads(dq, p.q_heads)[..., : p.dstate], share_heads(dk, p.k_heads)[..., : p.dstate],
            share_heads(dv, p.v_heads)[..., : p.headdim],
            values={name: reduce_value(grad, self.given[name]) for name, grad in values.items()},
        )  # fmt: skip

    @property
    def together(self) -> int:
        """How many heads that share q and k a program takes: all, where enough programs are left."""
        p, sharing = self.problem, self.problem.nheads // common_heads(self.problem)
        most = max(p.batch * self.chunks * p.nheads // max(ENOUGH * p.target.multiprocessors, 1), 1)
        return max(each for each in range(1, sharing + 1) if sharing % each == 0 and each <= most)

    def _of_logs(self, inner: Tensor, late: Tensor, early: Tensor, across: Tensor) -> Tensor:
        """Of log decays, `(batch, seqlen, nheads)`: what later rows gather, what columns before give, what passes."""
        p, passing = self.problem, torch.zeros_like(across)
        self.run(
            PASSING, (p.batch * self.chunks, ceil_div(p.nheads, 16), 1), (across, passing),
            (self.chunks, p.nheads, across.shape[2]), BLOCK=64, HEADS=16, num_warps=4,
        )  # fmt: skip
        logs = inner + late.flip(3).cumsum(3).flip(3) + pad(early, (1, -1)).cumsum(3) + passing.sum(2)[..., None]
        return self.turned(logs.transpose(2, 3).flatten(1, 2)[:, : p.seqlen])

    def _of_scales(self, dlevels: Tensor, dv: Tensor) -> dict[str, Tensor]:
        """Of levels and of scales, from those of levels and V with the scales in them."""
        p, given, out = self.problem, self.given, {"levels": dlevels}
        if "rows" in given:
            out["rows"] = (dlevels * repeat_heads(given["levels"], p.nheads, 2)).sum(3)
            out["levels"] = dlevels * self.per_token("rows")[..., None]
        dv = dv[..., : p.headdim]
        if "cols" in given:
            out["cols"] = (dv * repeat_heads(given["v"], p.nheads, 2)).sum(3)
        if "log_cols" in given:
            out["log_cols"] = (dv * repeat_heads(self.v[..., : p.headdim], p.nheads, 2)).sum(3)
        return out


def forward(structure: Structure, x: Inputs, config: Config) -> Output:
    """Y."""
    with Launching(x.problem, x.q.device):
        return Output(Fenwick(structure, Values(structure, x), config).forward())


def backward(structure: Structure, x: Inputs, config: Config, dy: Tensor, learnt: bool = True) -> Gradients:
    """Gradients of q, k, v and, if those are `learnt`, the operands."""
    values = Values(structure, x, learnt)
    with Launching(x.problem, x.q.device):
        grads = Fenwick(structure, values, config).backward(dy)
    return Gradients(grads.q, grads.k, grads.v, operands=values.operand_gradients(grads.values))
