"""torch.func.vmap over the operators: the mapped axis is folded into batch, over which a contraction maps anyway.

Rows of a batch never see one another, so M mapped calls of B rows are one call of M · B rows. Folding copies what is
not mapped, and is refused where an operand has no batch axis to fold into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UnsupportedError
from .ir import nodes as n
from .ir import operands as ops
from .ir.contraction import parse_contraction

RANKS = {n.TOKEN: 3, n.CHANNEL: 4, n.RANK: 4, n.LEVEL: 4, n.MATRIX: 4, n.IDS: 2}
"""Rank in full of the operands that have a batch axis; it comes first."""
Dims = Sequence["int | None"]


@dataclass(frozen=True)
class Fold:
    """How the tensors of a call with a mapped axis become those of one call.

    Attributes:
        size: M, how many calls are mapped.
        batch: B, the batch of each.
        axes: operand name → its axes, in the order of the operands.
    """

    size: int
    batch: int
    axes: dict[str, frozenset[str]]

    @staticmethod
    def of(program: str, size: int, q: Tensor, q_dim: int | None) -> Fold:
        """The fold of a program, its sizes read from q.

        Raises:
            UnsupportedError: the mask packs documents by boundaries, which takes a batch of one row.
        """
        mask = parse_contraction(program).mask
        axes: dict[str, set[str]] = {name: set() for name in n.operand_names(mask)}
        for x, kind in n.operands_of(mask):
            for name in ops.names(x):
                axes[name].add(kind)
        for name, kinds in axes.items():
            if n.BOUNDARIES in kinds:
                raise UnsupportedError(
                    f"vmap folds the mapped axis into batch, and documents({name}) takes a batch of one; use segment_ids"
                )
        shape = list(q.shape)
        if q_dim is not None:
            del shape[q_dim]
        return Fold(size, shape[0] if shape else 0, {name: frozenset(kinds) for name, kinds in axes.items()})

    def rows(self, x: Tensor, dim: int | None) -> Tensor:
        """[…, M at dim, …] or [rows, …] → [M · rows, …], for what has its rows first (q, k, v, states, cotangents)."""
        x = x.movedim(dim, 0) if dim is not None else x.expand(self.size, *x.shape)
        return x.flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """[M · rows, …] → [M, rows, …]."""
        return x.unflatten(0, (self.size, x.shape[0] // self.size))

    def operands(self, operands: Sequence[Tensor], dims: Dims, apart: bool) -> list[Tensor]:
        """Operands with the mapped axis folded into batch.

        Args:
            operands, dims: the tensors and where their mapped axis is.
            apart: fold every float operand, mapped or not, so that each mapped call has a gradient of its own.

        Raises:
            UnsupportedError: an operand to be folded has no batch axis.
        """
        folded = zip(self.axes, operands, dims, strict=True)
        return [self._operand(name, x, dim, apart and x.is_floating_point()) for name, x, dim in folded]

    def _operand(self, name: str, x: Tensor, dim: int | None, apart: bool) -> Tensor:
        if dim is None and not apart and (self.batch == 1 or not self._has_batch(name, x)):
            return x  # broadcast along batch as it is
        x = x.movedim(dim, 0) if dim is not None else x.expand(self.size, *x.shape)
        rank = self._rank(name)
        x = x.reshape(self.size, *(1,) * (rank + 1 - x.ndim), *x.shape[1:])  # [M, B | 1, …]
        return x.expand(self.size, self.batch, *x.shape[2:]).flatten(0, 1)

    def _has_batch(self, name: str, x: Tensor) -> bool:
        return any(x.ndim == RANKS.get(kind) and x.shape[0] != 1 for kind in self.axes[name])

    def _rank(self, name: str) -> int:
        """The rank of the operand in full; several slots agree on it or cannot be folded."""
        ranks = {RANKS.get(kind) for kind in self.axes[name]}
        rank = ranks.pop() if len(ranks) == 1 else None
        if rank is None:
            kinds = " and ".join(sorted(f"({', '.join(kind.split())})" for kind in self.axes[name]))
            raise UnsupportedError(
                f"vmap folds the mapped axis into batch, and {name} {kinds} has no batch axis; "
                "give it per token, or call ssd once for each"
            )
        return rank

    def operand_gradient(self, name: str, grad: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of a folded operand → [M, *shape], summed over what was expanded."""
        if grad.numel() == 0 and grad.ndim == 1:  # the operand takes no gradient
            return grad.expand(self.size, 0)
        grad = self.unfold(grad)
        padded = (1,) * (self._rank(name) - len(shape)) + tuple(shape)
        if padded[0] == 1 and grad.shape[1] != 1:
            grad = grad.sum(1, keepdim=True)
        return grad.reshape(self.size, *shape)


def unmapped_shape(x: Tensor, dim: int | None) -> torch.Size:
    """The shape of one mapped call's tensor."""
    return x.shape if dim is None else x.select(dim, 0).shape
