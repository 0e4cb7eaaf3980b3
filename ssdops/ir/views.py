"""Operands as the formula of a registered mask reads them: at tokens, `self.log_a[i]`, whatever their layout.

What is read is float64 (integers stay integers) and broadcasts against i `(rows, 1)` and j `(1, cols)`:
`(batch | 1, nheads, rows | 1, cols | 1)`. In a mask with an operand per state channel everything has that axis, last.
Indices outside the sequence read the token nearest to it: the formula, or the support, selects such entries away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import MaskError
from . import nodes as n
from .evaluate import Scope
from .operands import Operand
from .resolve import repeat_heads, resolve


class Index(Tensor):
    """Token indices, whose arithmetic becomes float64 where it leaves the integers: torch would go on in float32."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **given)
            if not isinstance(found, Tensor):
                return found
            if not found.is_floating_point():
                return found.as_subclass(cls)
            if found.dtype != torch.float64 and not any(_is_float(x) for x in (*args, *given.values())):
                wide = partial(_widened, picks=func in (torch.where, Tensor.where), device=found.device)
                found = func(*map(wide, args), **{key: wide(x) for key, x in given.items()})
            return found.as_subclass(Tensor)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _widened(x: Any, picks: bool, device: torch.device) -> Any:
    """Integers in float64; and the numbers that `where` picks from."""
    if isinstance(x, Tensor):
        return x.as_subclass(Tensor) if x.dtype == torch.bool else x.double()
    return torch.tensor(x, dtype=torch.float64, device=device) if picks and isinstance(x, float) else x


class View:
    """An operand that has to be read at an index."""

    how = ""

    def __init__(self, x: Tensor, name: str, tail: int) -> None:
        self._x, self._name, self._tail = x, name, tail

    def _unread(self, *_: Any, **__: Any) -> NoReturn:
        raise MaskError(f"{self._name} cannot be used before it is read: write {self.how.format(name='self.' + self._name)}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = __pow__ = _unread
    __torch_function__ = classmethod(lambda cls, *_: _refuse(cls))

    def _plain(self, index: Tensor | int) -> Tensor:
        """An index without the axis of state channels."""
        at = index if isinstance(index, Tensor) else torch.tensor(index, device=self._x.device)
        if at.is_floating_point() or at.dtype == torch.bool:
            raise MaskError(f"{self._name} is read at {at.dtype} indices; tokens are counted in integers, as i and j are")
        at = at.as_subclass(Tensor)
        at = at.reshape((1,) * (2 + self._tail - at.ndim) + tuple(at.shape))
        return at.squeeze(-1) if self._tail else at

    def _with_tail(self, x: Tensor) -> Tensor:
        return x[..., None] if self._tail else x


def _refuse(kind: type[View]) -> NoReturn:
    raise MaskError(f"an operand cannot be used before it is read: write {kind.how.format(name='self.name')}")


def _within(at: Tensor, size: int) -> Tensor:
    return at.clamp(0, max(size - 1, 0))


class Tokens(View):
    """Per token: `x[i]`, `x[j]`, `x[j + 1]`; `x.cumsum()` is read likewise."""

    how = "{name}[i] or {name}[j]"

    def __getitem__(self, index: Tensor | int) -> Tensor:
        at = _within(self._plain(index), self._x.shape[1])
        if self._x.ndim == 2:  # ids, [B | 1, T]
            return self._with_tail(self._x[:, at][:, None])
        found = self._x[:, at].movedim(3, 1)  # [B | 1, H, rows, cols, (N)]
        return self._with_tail(found) if found.ndim == 4 else found

    def cumsum(self) -> Tokens:
        """Σ_{s ≤ t} x_s: the log of a decay from token j to i is `x.cumsum()[i] - x.cumsum()[j]`."""
        return Tokens(self._x.cumsum(1), self._name, self._tail)


class Ranked(View):
    """Per token and rank or level: `x[i, r]`, with r a number or a tensor of integers; `x.count` of them."""

    how = "{name}[i, r] or {name}[j, r]"

    @property
    def count(self) -> int:
        """Size of the last axis."""
        return self._x.shape[3]

    def __getitem__(self, index: tuple[Tensor | int, Tensor | int]) -> Tensor:
        if not isinstance(index, tuple) or len(index) != 2:
            self._unread()
        at, r = _within(self._plain(index[0]), self._x.shape[1]), _within(self._plain(index[1]), self.count)
        at, r = torch.broadcast_tensors(at, r)
        return self._with_tail(self._x.transpose(1, 2)[:, :, at, r])


class Lags(View):
    """Per lag: `x[i - j]`."""

    how = "{name}[i - j]"

    def __getitem__(self, lag: Tensor | int) -> Tensor:
        at = self._plain(lag) + self._x.shape[1] // 2
        return self._with_tail(self._x[:, _within(at, self._x.shape[1])])


class Pairs(View):
    """Per pair of tokens: `x[i, j]`."""

    how = "{name}[i, j]"

    def __getitem__(self, index: tuple[Tensor | int, Tensor | int]) -> Tensor:
        if not isinstance(index, tuple) or len(index) != 2:
            self._unread()
        i, j = (_within(self._plain(at), self._x.shape[2]) for at in index)
        return self._with_tail(self._x[:, :, i, j])


def view(x: Operand, axes: str, name: str, at: Scope, tail: int) -> View | Tensor:
    """An operand with those axes as a formula reads it; what has no axis of tokens is a tensor that broadcasts."""
    match axes:
        case n.TOKEN | n.CHANNEL:
            return Tokens(at.token(x, axes), name, tail)
        case n.IDS:
            return Tokens(resolve(x, at.operands, axes, at.seqlen), name, tail)
        case n.RANK | n.LEVEL:
            return Ranked(at.token(x, axes), name, tail)
        case n.LAG:
            return Lags(repeat_heads(resolve(x, at.operands, axes, at.seqlen).double(), at.nheads, 0), name, tail)
        case n.MATRIX:
            dense = repeat_heads(resolve(x, at.operands, axes, at.seqlen).double(), at.nheads, 1)
            return Pairs(dense.expand(-1, -1, at.seqlen, at.seqlen), name, tail)
        case n.HEAD:
            per_head = at.token(x, axes)[0, :1].transpose(0, 1) if at.seqlen else at.token(x, axes).new_zeros(at.nheads, 1)
            return per_head.reshape(at.nheads, 1, 1, *(1,) * tail)
        case n.HEAD_CHANNEL:
            value = repeat_heads(resolve(x, at.operands, axes, at.seqlen).double(), at.nheads, 0)
            return value[:, None, None]  # [H, 1, 1, N]
        case _:  # boundaries, as they are
            return resolve(x, at.operands, axes, at.seqlen)
