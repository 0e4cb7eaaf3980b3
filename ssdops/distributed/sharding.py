"""Sharding rules: what `ssd` of DTensors does on each rank, and where its results lie.

Rows of the batch, and heads, never see one another, so a call whose tensors are sharded along these is as many calls of their
local parts. What all of a mesh dimension's ranks read has a gradient that is the sum of theirs, a partial one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo

from ..errors import UnsupportedError
from ..ir import nodes as n
from ..ir.contraction import Contraction, parse_contraction
from ..ir.operands import names as names_in
from ..ops import LIBRARY
from ..plan import state_terms

_HEADS_FROM_RIGHT = {n.TOKEN: 1, n.HEAD: 1, n.CHANNEL: 2, n.RANK: 2, n.LEVEL: 2, n.LAG: 2, n.MATRIX: 3, n.HEAD_CHANNEL: 2}
_RANK = {n.TOKEN: 3, n.CHANNEL: 4, n.RANK: 4, n.LEVEL: 4, n.MATRIX: 4, n.IDS: 2}


def register_dtensor() -> None:
    """Let `ssdops.ssd` take DTensors: all of q, k, v, the mask's operands and the states, on one mesh.

    Each dimension of the mesh may shard the batch (`Shard(0)`), the heads (`Shard(2)` of q, k and v; what has one head, for
    all of them, is replicated) or nothing. What lies otherwise is moved to where the first sharded of v, q, k and the operands
    wants it. Y and the states lie likewise.

    Raises (from calls, later):
        UnsupportedError: shards along seqlen (that is `distributed.ssd`), headdim or dstate; heads or rows that a dimension of
            the mesh does not divide.
    """
    register = DTensor._op_dispatcher.sharding_propagator.register_op_strategy
    operators = getattr(torch.ops, LIBRARY.ns)
    register(operators.forward.default, _forward, RuntimeSchemaInfo(5, needs_pytree=True))
    register(operators.backward.default, _backward, RuntimeSchemaInfo(7, needs_pytree=True))


@dataclass(frozen=True)
class Axes:
    """Where a tensor has the batch, and heads of its own; None where it has not."""

    batch: int | None
    heads: int | None

    def placement(self, kind: str) -> Placement:
        """Of the tensor, on a mesh dimension that shards that."""
        axis = {"batch": self.batch, "heads": self.heads}.get(kind)
        return Replicate() if axis is None else Shard(axis)


class _Call:
    """The arguments of one call of `ssdops::forward`, as DTensor sees them."""

    def __init__(self, args: Sequence[Any]) -> None:
        q, k, v, operands, states, program, *_ = args
        self.contraction: Contraction = parse_contraction(program)
        self.specs = [_spec(x) for x in (q, k, v, *_each(operands), *_each(states))]
        self.mesh: DeviceMesh = self.specs[0].mesh
        shapes = [tuple(spec.shape) for spec in self.specs]
        self.batch, count = shapes[0][0], len(_each(operands))
        by_name = {name: axes for x, axes in n.operands_of(self.contraction.mask) for name in names_in(x)}
        names = n.operand_names(self.contraction.mask)
        self.axes = [Axes(0, 2 if shape[2] > 1 else None) for shape in shapes[:3]]
        self.axes += [self._of_operand(by_name[name], shape) for name, shape in zip(names, shapes[3 : 3 + count], strict=True)]
        self.axes += [Axes(0, 1) for _ in shapes[3 + count :]]
        self.kinds = [self._kind(at) for at in range(self.mesh.ndim)]
        self._check(shapes)

    def _of_operand(self, axes: str, shape: tuple[int, ...]) -> Axes:
        batch = 0 if len(shape) == _RANK.get(axes) and shape[0] == self.batch > 1 else None
        from_right = _HEADS_FROM_RIGHT.get(axes)
        heads = None if from_right is None or len(shape) < from_right else len(shape) - from_right
        return Axes(batch, None if heads is None or shape[heads] == 1 else heads)

    def _kind(self, at: int) -> str:
        """What a mesh dimension shards, as the first sharded of v, q, k and the rest says."""
        for index in (2, 0, 1, *range(3, len(self.specs))):
            placement, axes = self.specs[index].placements[at], self.axes[index]
            if not isinstance(placement, Shard):
                continue
            for kind in ("batch", "heads"):
                if axes.placement(kind) == placement:
                    return kind
            raise UnsupportedError(
                f"tensor {index} of (q, k, v, operands, states) is sharded along its axis {placement.dim}; ssd of DTensors is "
                "sharded along batch or heads, and a sequence in slices is ssdops.distributed.ssd of local tensors"
            )
        return "nothing"

    def _check(self, shapes: Sequence[tuple[int, ...]]) -> None:
        for kind in ("batch", "heads"):
            parts = 1
            for at, of in enumerate(self.kinds):
                parts *= self.mesh.size(at) if of == kind else 1
            for axes, shape in zip(self.axes, shapes, strict=True):
                axis = axes.batch if kind == "batch" else axes.heads
                if axis is not None and shape[axis] % parts:
                    raise UnsupportedError(f"{shape[axis]} of {kind} do not divide among {parts} ranks: {shape}")

    def place(self, axes: Axes) -> tuple[Placement, ...]:
        """Placements of a tensor on all dimensions of the mesh."""
        return tuple(axes.placement(kind) for kind in self.kinds)

    def strategy(self, inputs: Sequence[tuple[Placement, ...]], outputs: Sequence[tuple[Placement, ...]]) -> OpStrategy:
        """The one way to run."""
        given, results = ([DTensorSpec(self.mesh, x) for x in places] for places in (inputs, outputs))
        return OpStrategy([OpSpec(tuple(results), given, [[0.0] for _ in given])])


def _forward(schema: OpSchema) -> OpStrategy:
    call = _Call(schema.args_schema)
    c = call.contraction
    count = len(state_terms(c.mask)) if c.return_state or c.state_every is not None else 0
    outputs = [Axes(0, 2), *[Axes(0, 1)] * (count * c.return_state), *[Axes(0, 2)] * (count * (c.state_every is not None))]
    return call.strategy([call.place(x) for x in call.axes], [call.place(x) for x in outputs])


def _backward(schema: OpSchema) -> OpStrategy:
    cotangents, saved, *rest = schema.args_schema
    call = _Call(rest)
    assert not _each(saved)  # nothing is saved for DTensors
    given = [Axes(0, 2), *[Axes(0, 1)] * (len(_each(cotangents)) - 1)]
    outputs = []
    for axes, spec in zip(call.axes, call.specs, strict=True):
        floating = spec.tensor_meta is not None and spec.tensor_meta.dtype.is_floating_point
        outputs.append(tuple(
            Partial() if floating and kind != "nothing" and isinstance(place, Replicate) else place if floating else Replicate()
            for kind, place in zip(call.kinds, call.place(axes), strict=True)
        ))  # fmt: skip
    return call.strategy([call.place(x) for x in (*given, *call.axes)], outputs)


def _each(x: Any) -> Sequence[Any]:
    """The tensors of a list, which is none of DTensor's own where it is empty."""
    return getattr(x, "children", x)


def _spec(x: OpStrategy) -> DTensorSpec:
    found = x.strategies[0].output_spec
    return found
