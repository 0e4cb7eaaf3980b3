"""A part of a traced formula in the place of an operand: what it is at every token, or at every lag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import nodes as n
from ...ir.evaluate import Scope
from ...ir.trace import Expr, replay
from ...ir.views import Index, view


@dataclass(frozen=True, slots=True)
class Traced:
    """An expression of a registered mask, in the place of an operand.

    Attributes:
        place: what it depends on, "i", "j" or "lag".
        low, high, holes: the lags at which a factor per lag is asked for; elsewhere it need not be finite.
    """

    node: n.Registered
    expr: Expr
    place: str
    low: int = 0
    high: int = 0
    holes: tuple[int, ...] = ()


def pair_at(lags: Tensor) -> tuple[Tensor, Tensor]:
    """A row and a column at each lag."""
    return lags.clamp_min(0), (-lags).clamp_min(0)


def per_token(x: Traced, at: Scope) -> Tensor:
    """The expression at every token, as a row or as a column: [B | 1, H, T] in float64."""
    tokens = torch.arange(at.seqlen, device=at.i.device)
    nothing = torch.zeros_like(tokens[:1])
    i, j = (tokens[:, None], nothing[None]) if x.place == "i" else (nothing[:, None], tokens[None])
    value = _value(x, i, j, at)
    return value.expand(-1, at.nheads, *value.shape[2:]).reshape(value.shape[0], at.nheads, at.seqlen)


def per_lag(x: Traced, at: Scope) -> Tensor:
    """The expression at every lag from 1 − T, or at another lag where there are no entries: [H, 2 T − 1] in float64."""
    lags = torch.arange(1 - at.seqlen, at.seqlen, device=at.i.device).clamp(x.low, x.high)
    for hole in x.holes:
        lags = torch.where(lags == hole, x.low, lags)
    i, j = (side[:, None] for side in pair_at(lags))
    return _value(x, i, j, at).expand(1, at.nheads, len(lags), 1)[0, :, :, 0]


def _value(x: Traced, i: Tensor, j: Tensor, at: Scope) -> Tensor:
    """[B | 1, H | 1, rows | 1, cols | 1] in float64."""
    definition: Any = x.node.definition
    views = {name: view(getattr(x.node, name), axes, name, at, 0) for name, axes in definition.operands.items()}
    value = torch.as_tensor(replay(x.expr, i.as_subclass(Index), j.as_subclass(Index), views), device=at.i.device)
    value = value.as_subclass(Tensor).double()
    value = value.reshape((1,) * (4 - value.ndim) + tuple(value.shape))
    return value.expand(-1, -1, max(value.shape[2], i.shape[0]), max(value.shape[3], j.shape[1]))
