"""What the tile kernels are launched with: a mask's factors as their arguments, and the sizes of a tile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import config
from ...ir.trace import Call
from ..base import Inputs
from ..quadratic.formula import Expr, Leaf
from ..quadratic.mask import Mask, strides

LOG2E = 1.4426950408889634
WIDEST = 256
"""The greatest headdim and dstate that a tile holds."""
ROWS, COLS = 64, 32
"""Tokens along the sides of a tile: 64 × 64 in 16 bits, 64 × 32 in 32 bits, where a dot is three and registers are short."""
LEAST = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}
"""Numbers along a tile of a product that warp groups make: with Triton 3.6 on an H100 those of float32 by 16 are rounded to
tf32 in places, or read out of bounds."""


def arguments(mask: Mask) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """(factors, strides, support) of every kernel."""
    e, tokens, leaves = mask.entries, (mask.u, mask.w, mask.rows, mask.cols), (mask.leaf_rows, mask.leaf_cols)
    of_tokens = [0 if t is None else strides(t)[0] for t in tokens]
    of_entries = (0, 0, 0, 0, 1) if e is None else (*strides(e), mask.problem.nheads // e.shape[1])
    of_leaves = [stride for t in leaves for stride in ((0, 0) if t is None else strides(t)[:2])]
    at_lags = mask.leaf_lags
    of_leaves.append(0 if at_lags is None else at_lags.stride(0))
    return (*tokens, mask.lags, e, *leaves, at_lags), (*of_tokens, *of_entries, *of_leaves), mask.support


@lru_cache(maxsize=1024)
def program(formula: Expr) -> tuple[tuple[Any, ...], ...] | None:
    """The steps of a formula, as kernels are compiled for them (`kernels/formula.py`), each once."""
    steps: dict[tuple[Any, ...], int] = {}

    def step(e: Expr) -> int:
        match e:
            case Leaf(kind, index):
                found: tuple[Any, ...] = (kind, index)
            case Call(name, args):
                found = (name, *map(step, args))
            case _:
                found = ("number", float(e))
        return steps.setdefault(found, len(steps))

    if formula is None:
        return None
    step(formula)
    return tuple(steps)


def packed(decay: Tensor | None, log: Tensor | None, odd: Tensor | None, x: Inputs) -> Tensor:
    """Exponents for base 2, as a float32, what is left of the float64 beyond it, and odd logs: [B | 1, H, 3, T]."""
    parts = [t for t in (decay, log) if t is not None]
    p = x.problem
    total = sum(parts[1:], parts[0]) if parts else torch.zeros(1, p.nheads, p.seqlen, dtype=torch.float64, device=x.q.device)
    total = total * LOG2E
    high = total.float()
    none = torch.zeros_like(high) if odd is None else odd.float().expand_as(high)
    return torch.stack([high, (total - high.double()).float(), none], 2)


@dataclass(frozen=True)
class Tile:
    """The sizes of a launch: rows and columns of a tile, how the two dims are cut into steps, how the dots are done."""

    rows: int
    cols: int
    d: tuple[int, int]
    e: tuple[int, int]
    dtype: torch.dtype
    warps: int
    stages: int

    @staticmethod
    def fitting(mask: Mask, d: int, e: int, weighs: bool) -> Tile:
        """A tile for products over d dims, which weigh vectors of e dims or are multiplied by products over e dims."""
        p, formula = mask.problem, mask.formula is not None  # whose steps are tiles of float64
        exact = p.dtype.itemsize > 2 or (config.triton_interpreted() and p.dtype == torch.bfloat16)  # which has no such dot
        if exact:  # a dot is three, and takes registers accordingly
            most = (32, 128 if weighs else 32)
        else:
            most = (WIDEST, WIDEST) if weighs and shared_memory(p.target.capability) > 160 * 1024 else (128, 128)
        dtype = torch.float32 if exact else p.dtype
        d_width, e_width = (min(max(LEAST[dtype], power(x)), width) for x, width in zip((d, e), most, strict=True))
        size = max(16, power(p.seqlen))
        return Tile(
            min(ROWS, size), min(COLS if exact or formula else ROWS, size), (d_width, -(-d // d_width)),
            (e_width, -(-e // e_width)), dtype, 8 if formula or max(d_width, e_width) > 128 else 4, 2,
        )  # fmt: skip

    def wider(self, stages: int = 2) -> Tile:
        """The same over more warps, where a program also keeps a sum of tiles."""
        return replace(self, warps=8, stages=stages) if self.dtype.itemsize == 2 else self

    def constants(self, mask: Mask) -> dict[str, Any]:
        """Of every kernel."""
        import triton.language as tl

        types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        return {
            "D_WIDTH": self.d[0], "D_STEPS": self.d[1], "E_WIDTH": self.e[0], "E_STEPS": self.e[1], "DTYPE": types[self.dtype],
            "PRECISION": "ieee" if self.dtype.itemsize == 2 else "tf32x3", "FORMULA": program(mask.formula),
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


def shared_memory(capability: tuple[int, int] | None) -> int:
    """Bytes of it that a program may have; a GPU that is not known has what every one since 8.0 has."""
    return {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227}.get(capability or (9, 0), 99) * 1024


def power(x: int) -> int:
    """The least power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()
