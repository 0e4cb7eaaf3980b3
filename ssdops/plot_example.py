"""What is drawn of a mask: its operands, made up or its own, and which batch row and head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ShapeError, ValueRangeError
from .ir import nodes as n
from .ir import operands as ops
from .ir.evaluate import evaluate
from .ir.problem import fenwick_levels, problem_of
from .masks import Mask

TOKENS, MOST_TOKENS = 64, 2048


@dataclass(frozen=True)
class Example:
    """An instance of a mask: its operands, and which batch row and head of them is drawn."""

    operands: dict[str, Tensor]
    seqlen: int
    batch: int = 1
    nheads: int = 1
    row: int = 0
    head: int = 0

    @property
    def caption(self) -> str:
        """What is drawn."""
        if self.batch == self.nheads == 1:
            return f"an example of {self.seqlen} tokens, one head"
        return f"{self.seqlen} tokens, row {self.row} of {self.batch}, head {self.head} of {self.nheads}"

    def matrix(self, tree: n.Node) -> Tensor:
        """L[i, j] in float64; of a per-channel decay, its first channel."""
        dense = evaluate(tree, self.operands, self.batch, self.seqlen, self.nheads)[self.row, self.head].detach().cpu()
        return dense if dense.ndim == 2 else dense[..., 0]


def own_operands(mask: Mask, seqlen: int | None, row: int, head: int) -> Example:
    """A mask with its own operands.

    Raises:
        ShapeError: operands disagree, with one another or with seqlen, or there is no such row or head.
        ValueRangeError: there are too many tokens.
    """
    tree, operands = mask.tree, {name: x.detach().cpu() for name, x in mask.operands.items()}
    have = seqlen_of(tree, operands)
    if seqlen is not None and have is not None and seqlen != have:
        raise ShapeError(f"seqlen={seqlen} was asked for, and the operands of {mask} have {have} tokens")
    seqlen = have or seqlen or TOKENS
    if seqlen > MOST_TOKENS:
        raise ValueRangeError(f"a mask of {seqlen} tokens has too many entries to draw, at most {MOST_TOKENS} tokens have not")
    empty = torch.empty(_size(tree, operands, "batch"), seqlen, 1, _size(tree, operands, "dstate"), device="meta")
    p = problem_of(tree, empty, empty, empty, {name: x.to("meta") for name, x in operands.items()})
    if not (0 <= row < p.batch and 0 <= head < p.nheads):
        raise ShapeError(f"row {row} and head {head} are not of {p.batch} rows and {p.nheads} heads")
    return Example(operands, seqlen, p.batch, p.nheads, row, head)


def seqlen_of(tree: n.Node, operands: Mapping[str, Tensor]) -> int | None:
    """How many tokens the operands have; None where nothing says so."""
    found = 1
    for x, axes in n.operands_of(tree):
        for t in (operands[name] for name in ops.names(x)):
            axis = axes.split()[::-1].index("seqlen") + 1 if "seqlen" in axes.split() else None
            if axes == n.BOUNDARIES:
                found = max(found, int(t[-1]))
            elif axes == n.LAG:
                found = max(found, (t.shape[-1] + 1) // 2)
            elif axis is not None and t.ndim >= axis:
                found = max(found, t.shape[-axis])
    return found if found > 1 else None


def _size(tree: n.Node, operands: Mapping[str, Tensor], axis: str) -> int:
    """The greatest size of an axis among the operands that have all their axes."""
    sizes = [1]
    for x, axes in n.operands_of(tree):
        full = axes.split()
        if axis in full:
            found = (operands[name] for name in ops.names(x))
            sizes += [t.shape[full.index(axis)] for t in found if t.ndim == len(full)]
    return max(sizes)


def example_of(tree: n.Node, seqlen: int) -> Example:
    """Seeded operands for every name in the tree, for one batch row, one head and one state channel."""
    generator = torch.Generator().manual_seed(0)
    operands = {}
    for node in n.walk(tree):
        rank = n.rank_of(node)
        for slot, axes in n.SLOTS[type(node)]:
            x = getattr(node, slot)
            for name in ops.names(x) if x is not None else ():
                operands[name] = _operand(slot, axes, seqlen, rank, generator)
    return Example(operands, seqlen)


def _operand(slot: str, axes: str, seqlen: int, rank: int, generator: torch.Generator) -> Tensor:
    """Values that make a readable picture: decays that fade over a few chunks, and scales around 1."""
    sizes = {"seqlen": seqlen, "rank": rank, "n_levels": fenwick_levels(seqlen), "2*seqlen-1": 2 * seqlen - 1}
    shape = [sizes.get(axis, 1) for axis in axes.split()]
    cuts = torch.tensor([0, round(seqlen * 0.36), round(seqlen * 0.62), seqlen])
    noise = torch.rand(shape, generator=generator) if axes not in n.INTEGER_AXES else cuts
    match slot if axes not in n.INTEGER_AXES else axes:
        case "log_a" | "log_gamma":
            return -0.18 * noise
        case n.BOUNDARIES:
            return cuts
        case n.IDS:
            return (torch.arange(seqlen)[None, :, None] >= cuts[1:-1]).sum(2)
        case "coeffs":
            lag = torch.arange(2 * seqlen - 1) - (seqlen - 1)
            return ((lag / 3).cos() * (-lag.abs() / 12).exp())[None]
        case "levels":
            return noise * 0.75 ** torch.arange(shape[-1])
        case "dt":
            return 0.1 + 0.2 * noise
        case "A":
            return -noise
        case "log_cols":
            return noise - 0.5
        case "L":
            return torch.randn([*shape[:2], seqlen, seqlen], generator=generator)
        case _:
            return 0.5 + noise
