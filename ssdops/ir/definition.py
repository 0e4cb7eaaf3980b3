"""What a registered mask means: its class's formula, evaluated block by block as the oracle evaluates built-in structures.

    L[i, j] = entries(i, j)   where support(i, j), and i ≥ j if the class says `causal`; else 0

`masks.register_mask` makes a `Definition` and a node class that carries it; `evaluate.py` and the rewrite passes ask it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError, ShapeError
from . import nodes as n
from .evaluate import Block, Scope
from .views import Index, view


@dataclass(frozen=True)
class Definition:
    """A user's class as the compiler sees it.

    Attributes:
        name: the mask's name in text.
        cls: the class, with `entries` and perhaps `support` and `lower`.
        operands: name → axes.
        integers: names of its integers.
        causal: whether entries above the diagonal are 0.
        lower: the same mask by other structures, or None where the class has no `lower`.
    """

    name: str
    cls: type
    operands: Mapping[str, str]
    integers: tuple[str, ...]
    causal: bool
    lower: Callable[[Definition, n.Registered], n.Node] | None

    @property
    def where(self) -> str:
        """The class by its full name, for messages."""
        return f"{self.cls.__module__}.{self.cls.__qualname__}"

    @property
    def per_channel(self) -> bool:
        """Whether entries differ by state channel."""
        return any(axes in (n.CHANNEL, n.HEAD_CHANNEL) for axes in self.operands.values())

    def instance(self, node: n.Registered, operands: Mapping[str, Any]) -> Any:
        """An instance of the class with these operands, and the node's integers; its `__init__` is not called."""
        me: Any = object.__new__(self.cls)
        for name, value in operands.items():
            setattr(me, name, value)
        for name in self.integers:
            setattr(me, name, getattr(node, name))
        return me

    def lowered(self, node: n.Registered) -> n.Node | None:
        """The same matrix by other structures, or None."""
        return None if self.lower is None else self.lower(self, node)

    def entries(self, node: n.Registered, at: Scope) -> Block:
        """Values and support at the rows and columns of `at`."""
        tail = int(self.per_channel)
        views = {name: view(getattr(node, name), axes, name, at, tail) for name, axes in self.operands.items()}
        me = self.instance(node, views)
        i, j = ((x[..., None] if tail else x).as_subclass(Index) for x in (at.i[:, None], at.j[None, :]))
        value = self._checked("entries", me.entries(i, j), at).double()
        support = at.lag >= 0 if self.causal else at.lag == at.lag
        if hasattr(me, "support"):
            given = self._checked("support", me.support(i, j), at)
            if given.dtype != torch.bool:
                raise MaskError(f"support() of {self.name!r} gave {given.dtype}, expected torch.bool: a comparison of i and j")
            support = support & given
        return torch.where(support, value, 0.0), support

    def _checked(self, method: str, x: Any, at: Scope) -> Tensor:
        """What a method gave, as [B | 1, H | 1, rows | 1, cols | 1, N | 1]."""
        if not isinstance(x, Tensor):
            x = torch.tensor(x, device=at.i.device)
        x = x.as_subclass(Tensor)
        full = [at.batch, at.nheads, at.i.shape[0], at.j.shape[0]]
        full += [x.shape[-1]] if self.per_channel and x.ndim else []
        fits = x.ndim <= len(full) and all(a in (1, b) for a, b in zip(reversed(x.shape), reversed(full), strict=False))
        if not fits:
            axes = "batch, nheads, rows, cols" + (", dstate" if self.per_channel else "")
            raise ShapeError(
                f"{method}() of {self.name!r} gave shape {tuple(x.shape)}, expected one for ({axes}) = {tuple(full)}; "
                "i is (rows, 1) and j is (1, cols): combine them, and operands read at them, elementwise"
            )
        x = x.reshape((1,) * (4 + int(self.per_channel) - x.ndim) + tuple(x.shape))
        return x if self.per_channel else x[..., None]
