"""One call of `ssd` as a value, and what can be done to it along time: cutting, extending, stepping, flipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..ir import nodes as n
from ..ir import operands as ops
from ..ir.problem import Problem, count_states, problem_of
from ..ir.terms import Linear
from ..masks import Mask
from ..plan import state_terms

TIME_AXIS = {n.TOKEN: -2, n.CHANNEL: -3, n.RANK: -3, n.LEVEL: -3, n.IDS: -1}
"""Where operands per token have seqlen, counted from the right."""


@dataclass(frozen=True, eq=False)
class Case:
    """The arguments of one call.

    Attributes:
        q, k, v, mask, scale: as for `ssd`.
        initial: a state per linear term; empty is none.
        operands: the dtype that operands of products are rounded to by the backend that it is for; None is none of them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float = 1.0
    initial: tuple[Tensor, ...] = ()
    operands: torch.dtype | None = None

    def __repr__(self) -> str:
        def shape(x: Tensor) -> str:
            strided = "" if x.is_contiguous() else f" strides {x.stride()}"
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{strided}"

        named = {"q": self.q, "k": self.k, "v": self.v, **self.mask.operands}
        shapes = ", ".join(f"{name}: {shape(x)}" for name, x in named.items())
        integers = {name: x.tolist() for name, x in self.mask.operands.items() if not x.is_floating_point()}
        return f"Case({self.mask.tree}; {shapes}; {integers or ''} scale={self.scale}, {len(self.initial)} states)"

    @cached_property
    def problem(self) -> Problem:
        """The facts of the call."""
        return problem_of(self.mask.tree, self.q, self.k, self.v, self.mask.operands, self.initial)

    @cached_property
    def carried(self) -> tuple[Linear, ...] | None:
        """The terms that carry a state, or None where the mask has no states to give, or carries more (a trapezoid)."""
        if any(isinstance(node, n.Trapezoidal) for node in n.walk(n.lowered(self.mask.tree))):
            return None
        if count_states(self.mask.tree, self.mask.operands, self.q.shape[0]) is None:
            return None
        try:
            return state_terms(self.mask.tree)
        except UnsupportedError:
            return None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the call by name."""
        yield from (("q", self.q), ("k", self.k), ("v", self.v))
        yield from self.mask.operands.items()
        yield from ((f"initial_state[{i}]", state) for i, state in enumerate(self.initial))

    def floats(self) -> dict[str, Tensor]:
        """Those that have gradients."""
        return {name: x for name, x in self.tensors() if x.is_floating_point()}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print every element

    def map(self, fn: Callable[[str, Tensor], Tensor]) -> Case:
        """The same call on other tensors of the same meaning."""
        new = {name: fn(name, x) for name, x in self.tensors()}
        operands = {name: new[name] for name in self.mask.operands}
        initial = tuple(new[f"initial_state[{i}]"] for i in range(len(self.initial)))
        return replace(self, q=new["q"], k=new["k"], v=new["v"], mask=Mask(self.mask.tree, operands), initial=initial)


class Unsliceable(Exception):
    """A mask that has no meaning on a part of the tokens, or whose operands are read from both ends."""


@dataclass(frozen=True)
class Use:
    """How one operand is used: its axes, its slot, and whether it is read from the last token."""

    axes: str
    slot: str
    flipped: bool


def uses(node: n.Node, flipped: bool = False) -> Iterator[tuple[str, Use]]:
    """Every operand name with its use."""
    flipped ^= isinstance(node, n.Reverse)
    for child in n.children(node):
        yield from uses(child, flipped)
    for slot, axes in n.SLOTS[type(node)]:
        value = getattr(node, slot)
        for name in ops.names(value) if value is not None else ():
            yield name, Use(axes, slot, flipped)


def map_operands(mask: Mask, fn: Callable[[Tensor, Use], Tensor]) -> Mask:
    """The mask with each operand replaced by fn of it and its use.

    Raises:
        Unsliceable: an operand is used in two ways.
    """
    table = dict(uses(mask.tree))
    if any(table[name] != use for name, use in uses(mask.tree)):
        raise Unsliceable(f"{mask} reads an operand in two ways")
    return Mask(mask.tree, {name: fn(x, table[name]) for name, x in mask.operands.items()})


def restrict(mask: Mask, start: int, stop: int, seqlen: int) -> Mask:
    """The mask of tokens [start, stop) alone.

    Raises:
        Unsliceable: its entries are not a function of the tokens between i and j (fenwick, a shift of scaled rows, or a
            registered mask of which nothing but entries is known).
    """
    for node in n.walk(n.lowered(mask.tree)):
        if isinstance(node, n.Fenwick | n.Registered) or (isinstance(node, n.Shift) and not isinstance(node.mask, _SHIFTABLE)):
            raise Unsliceable(f"{node} on a part of the tokens is another mask")

    def cut(x: Tensor, use: Use) -> Tensor:
        a, b = (seqlen - stop, seqlen - start) if use.flipped else (start, stop)
        if use.axes == n.BOUNDARIES:
            return x.clamp(a, b) - a
        if use.axes == n.LAG:
            return x[:, seqlen - (stop - start) : seqlen + (stop - start) - 1] if stop > start else x[:, :0]
        if use.axes == n.MATRIX:
            for axis in (-1, -2):
                x = _cut_axis(x, axis, a, b, seqlen)
            return x
        return _cut_axis(x, TIME_AXIS[use.axes], a, b, seqlen) if use.axes in TIME_AXIS else x

    return map_operands(mask, cut)


_SHIFTABLE = (n.Causal, n.Decay, n.Retention, n.ChannelDecay, n.Product)


def _cut_axis(x: Tensor, axis: int, start: int, stop: int, seqlen: int) -> Tensor:
    if x.ndim < -axis or x.shape[axis] != seqlen:
        return x
    return x.narrow(axis, start, stop - start)


def token(mask: Mask, t: int) -> Mask:
    """The mask's operands of token t, as `ssd_step` takes them."""

    def at(x: Tensor, use: Use) -> Tensor:
        axis = TIME_AXIS.get(use.axes)
        return x if axis is None or x.ndim < -axis else x.select(axis, t if x.shape[axis] > 1 else 0)

    return map_operands(mask, at)


def extend(mask: Mask, count: int, left: bool, seqlen: int) -> Mask:
    """The mask with `count` tokens more at one end, which neither decay nor scale anything.

    Raises:
        Unsliceable: an operand is one number for all tokens, and so for new ones too.
    """

    def grow(x: Tensor, use: Use) -> Tensor:
        axis = TIME_AXIS.get(use.axes)
        if axis is None or x.ndim < -axis or x.shape[axis] != seqlen:
            raise Unsliceable(f"{use.slot} has no axis of tokens")
        shape = list(x.shape)
        shape[axis] = count
        neutral = x.new_full(shape, 0.0 if use.slot.startswith("log") or use.slot in ("d", "dt") else 1.0)
        return torch.cat([neutral, x] if left != use.flipped else [x, neutral], axis)

    return map_operands(mask, grow)
