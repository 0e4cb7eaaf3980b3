"""The facts a plan needs, taken from tensors once per signature: sizes, head counts, dtypes, device. And their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm

import torch
from torch import Tensor

from ..errors import DeviceError, DtypeError, ShapeError, ValueRangeError
from . import nodes as n
from . import operands as ops

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a call runs: the device type, its index-free name, its compute capability (None off CUDA), its multiprocessors."""

    device: str
    name: str = ""
    capability: tuple[int, int] | None = None
    multiprocessors: int = 132

    @staticmethod
    def of(device: torch.device) -> Target:
        """The target that a tensor's device is."""
        if device.type == "cuda":
            facts = torch.cuda.get_device_properties(device)
            return Target("cuda", facts.name, (facts.major, facts.minor), facts.multi_processor_count)
        return Target(device.type)


@dataclass(frozen=True, slots=True)
class Problem:
    """Sizes, dtypes and the target of one call.

    Attributes:
        q_heads, k_heads, v_heads: head counts; each divides nheads, heads being shared in contiguous groups.
        dtype: of the output, promoted from q, k and v.
        accumulate: float64 if any floating input is, else float32.
        state_dtype: of the final states.
        n_states: states per linear term: batch rows, or documents; None where the mask does not say how many.
        has_state: whether initial states are given.
        strides: of q, k and v.
        state_every: tokens after which the states between are wanted, or None for none of them.
    """

    batch: int
    seqlen: int
    nheads: int
    headdim: int
    dstate: int
    q_heads: int
    k_heads: int
    v_heads: int
    dtype: torch.dtype
    accumulate: torch.dtype
    state_dtype: torch.dtype
    n_states: int | None
    has_state: bool
    strides: tuple[tuple[int, ...], ...]
    target: Target
    state_every: int | None = None


def problem_of(
    mask: n.Node,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Mapping[str, Tensor],
    states: Sequence[Tensor] = (),
    state_dtype: str | None = None,
    state_every: int | None = None,
) -> Problem:
    """Check everything that shapes, dtypes and devices tell, and gather it.

    Raises:
        ShapeError, DtypeError, DeviceError: what disagrees, what was expected, what came, what to do.
    """
    named: dict[str, Tensor] = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if x.ndim != 4:
            dim = "headdim" if name == "v" else "dstate"
            raise ShapeError(f"{name} must be (batch, seqlen, heads, {dim}), got {x.ndim} dimensions: {_shape(x)}")
    batch, seqlen, dstate = q.shape[0], q.shape[1], q.shape[3]
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != batch or x.shape[1] != seqlen:
            raise ShapeError(f"{name} has (batch, seqlen) = {_shape(x)[:2]}, expected {_shape(q)[:2]} as in q")
    if k.shape[3] != dstate:
        raise ShapeError(f"k has dstate {k.shape[3]}, expected {dstate} as in q")
    _check_dtypes(mask, named, operands, states)
    _check_devices(q, {**named, **operands, **{f"initial_state[{i}]": s for i, s in enumerate(states)}})
    nheads = _check_heads(mask, named, operands)
    _check_operand_shapes(mask, operands, batch, seqlen, nheads, dstate)
    floats = [q, k, v, *states, *(x for x in operands.values() if x.is_floating_point())]
    accumulate = torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return Problem(
        batch, seqlen, nheads, v.shape[3], dstate, q.shape[2], k.shape[2], v.shape[2], dtype, accumulate,
        accumulate if state_dtype is None else dtype_named(state_dtype),
        count_states(mask, operands, batch), bool(states), (q.stride(), k.stride(), v.stride()), Target.of(q.device),
        state_every,
    )  # fmt: skip


def dtype_named(name: str) -> torch.dtype:
    """The floating dtype of that name, or a DtypeError that lists those allowed."""
    known = {str(d).removeprefix("torch."): d for d in FLOATS}
    if name not in known:
        raise DtypeError(f"state_dtype {name!r} is not one of {', '.join(known)}")
    return known[name]


def count_states(mask: n.Node, operands: Mapping[str, Tensor], batch: int) -> int | None:
    """States per linear term: one per batch row, or per document; None if documents do not say how many they are."""
    documents = {node for node in n.walk(n.lowered(mask)) if isinstance(node, n.Documents)}
    if not documents:
        return batch
    counts: list[int | None] = []  # no set: traced sizes compare, but do not hash
    for doc in documents:
        if doc.cu_seqlens is not None:
            counts.append(operands[next(ops.names(doc.cu_seqlens))].shape[0] - 1)
        else:
            counts.append(None if doc.n_segments is None else batch * doc.n_segments)
    return counts[0] if all(count == counts[0] for count in counts) else None


def check_states(
    states: Sequence[Tensor], n_terms: int, problem: Problem, given: bool = True, slots: int | None = None
) -> None:
    """Whether the initial states are as many, and of the shape, that the mask's linear terms carry (pools of `slots` each)."""
    if given and len(states) != n_terms:
        raise ShapeError(f"initial_state has {len(states)} states; this mask carries {n_terms}, one per linear term")
    first = problem.n_states if slots is None else slots
    if first is None:
        raise ShapeError("states of packed documents need n_segments: documents(segment_ids, n_segments=…)")
    expected = (first, problem.nheads, problem.headdim, problem.dstate)
    for state in states:
        if tuple(state.shape) != expected:
            rows = "slots" if slots is not None else "batch" if first == problem.batch else "n_segments"
            raise ShapeError(
                f"initial_state has shape {_shape(state)}, expected ({rows}, nheads, headdim, dstate) = {expected}"
            )


def check_values(mask: n.Node, operands: Mapping[str, Tensor], seqlen: int) -> None:
    """Check what only values tell: boundaries and segment ids. Reads them on the host.

    Raises:
        ValueRangeError: the argument, the rule it breaks, and the place.
    """
    for node in n.walk(n.lowered(mask)):
        if isinstance(node, n.Documents) and isinstance(node.cu_seqlens, str):
            _check_boundaries(operands[node.cu_seqlens], seqlen)
        elif isinstance(node, n.Documents) and isinstance(node.segment_ids, str):
            _check_ids(operands[node.segment_ids], node.n_segments)


def _check_boundaries(cu: Tensor, seqlen: int) -> None:
    values = cu.tolist()
    if values[0] != 0:
        raise ValueRangeError(f"cu_seqlens must start at 0, got {values[0]}")
    for at, (a, b) in enumerate(pairwise(values)):
        if b < a:
            raise ValueRangeError(f"cu_seqlens must not decrease, got {a} then {b} at index {at + 1}")
    if values[-1] != seqlen:
        raise ValueRangeError(f"cu_seqlens must end at seqlen={seqlen}, got {values[-1]}")


def _check_ids(ids: Tensor, n_segments: int | None) -> None:
    if ids.shape[-1] and bool((ids[..., 1:] < ids[..., :-1]).any()):
        raise ValueRangeError("segment_ids must not decrease along seqlen; sort the documents, or split the batch")
    if ids.numel() and n_segments is not None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= n_segments:
            raise ValueRangeError(f"segment_ids must lie in [0, n_segments={n_segments}), got {low} to {high}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _check_dtypes(mask: n.Node, named: Mapping[str, Tensor], operands: Mapping[str, Tensor], states: Sequence[Tensor]) -> None:
    integer = {name for x, axes in n.operands_of(mask) if axes in n.INTEGER_AXES for name in ops.names(x)}
    floats = {**named, **{k: x for k, x in operands.items() if k not in integer}}
    floats |= {f"initial_state[{i}]": s for i, s in enumerate(states)}
    for name, x in floats.items():
        if x.dtype not in FLOATS:
            raise DtypeError(f"{name} is {x.dtype}, expected float32, float64, bfloat16 or float16; convert it first")
    for name in integer:
        if operands[name].dtype not in INTEGERS:
            raise DtypeError(f"{name} is {operands[name].dtype}, expected int32 or int64")


def _check_devices(q: Tensor, tensors: Mapping[str, Tensor]) -> None:
    for name, x in tensors.items():
        if x.device != q.device:
            raise DeviceError(f"{name} is on {x.device}, but q is on {q.device}; move it to q's device")


_HEAD_AXIS = {n.TOKEN: -1, n.HEAD: -1, n.CHANNEL: -2, n.RANK: -2, n.LEVEL: -2, n.LAG: -2, n.MATRIX: -3, n.HEAD_CHANNEL: -2}


def _check_heads(mask: n.Node, named: Mapping[str, Tensor], operands: Mapping[str, Tensor]) -> int:
    """nheads: the greatest head count, which every other must divide."""
    counts = {name: x.shape[2] for name, x in named.items()}
    for x, axes in n.operands_of(mask):
        axis = _HEAD_AXIS.get(axes)
        if axis is not None:
            counts |= {name: t.shape[axis] for name in ops.names(x) if (t := operands[name]).ndim >= -axis}
    nheads = max(counts.values())
    for name, count in counts.items():
        if count == 0:
            raise ShapeError(f"{name} has 0 heads, and needs at least one")
        if nheads % count:
            largest = next(other for other, c in counts.items() if c == nheads)
            raise ShapeError(
                f"{name} has {count} heads, which must divide nheads={nheads} (from {largest}); "
                f"expand {name} or change its heads"
            )
    return nheads


def _check_operand_shapes(
    mask: n.Node, operands: Mapping[str, Tensor], batch: int, seqlen: int, nheads: int, dstate: int
) -> None:
    sizes = {"batch": batch, "seqlen": seqlen, "dstate": dstate, "2*seqlen-1": max(2 * seqlen - 1, 0)}
    for node in n.walk(mask):
        for slot, axes in n.SLOTS[type(node)]:
            x = getattr(node, slot)
            for name in ops.names(x) if x is not None else ():
                _check_shape(name, operands[name], axes, sizes, node)
    for node in {m: None for tree in (mask, n.lowered(mask)) for m in n.walk(tree)}:
        match node:
            case n.Documents(cu_seqlens=str(name)) if batch != 1:
                raise ShapeError(
                    f"documents(cu_seqlens) packs documents into one row, so batch must be 1, got {batch}; "
                    "use segment_ids for a batch of packed rows"
                )
            case n.Semiseparable(b=str(b), c=str(c), rank=rank):
                for name in (b, c):
                    if operands[name].shape[-1] != rank:
                        raise ShapeError(f"{name} has rank {operands[name].shape[-1]}, expected {rank}")
            case n.Fenwick(levels=str(name)) if isinstance(seqlen, int):  # a traced seqlen is checked when it is known
                needed, have = fenwick_levels(seqlen), operands[name].shape[-1]
                if have < needed:
                    raise ShapeError(f"{name} has {have} levels; seqlen={seqlen} needs n_levels >= {needed}")
            case n.Registered():
                _check_rank(node, operands)
            case _:
                pass


def _check_rank(node: n.Registered, operands: Mapping[str, Tensor]) -> None:
    """A registered mask with an integer called rank has operands of that rank."""
    rank = getattr(node, "rank", None)
    for slot, axes in n.SLOTS[type(node)]:
        x = getattr(node, slot)
        if axes == n.RANK and isinstance(x, str) and isinstance(rank, int) and operands[x].shape[-1] != rank:
            raise ShapeError(f"{x} has rank {operands[x].shape[-1]}, expected {rank} as {node} says")


def fenwick_levels(seqlen: int) -> int:
    """How many levels a Fenwick mask of that many tokens has: level 0, and one per bit of seqlen − 1."""
    return 1 + max(seqlen - 1, 0).bit_length()


def _check_shape(name: str, x: Tensor, axes: str, sizes: Mapping[str, int], node: n.Node) -> None:
    """Right-aligned broadcasting against the axes; head counts and free axes (rank, levels) are checked elsewhere."""
    wanted = axes.split()
    advice = f"; {node.op} declares it so: reshape it, or declare other axes" if isinstance(node, n.Registered) else ""
    exact = axes in (n.BOUNDARIES, n.IDS, n.CHANNEL, n.RANK, n.LEVEL)
    if x.ndim > len(wanted) or (exact and x.ndim != len(wanted)) or (axes == n.LAG and x.ndim == 0):
        raise ShapeError(f"{name} must be ({', '.join(wanted)}), got {x.ndim} dimensions: {_shape(x)}{advice}")
    if axes == n.BOUNDARIES and x.shape[0] < 1:
        raise ShapeError(f"{name} must hold at least the boundary 0, got shape {_shape(x)}")
    for axis, have in zip(reversed(wanted), reversed(x.shape), strict=False):
        size = sizes.get(axis)
        strict_axis = axis in ("2*seqlen-1", "dstate") or (axes == n.IDS and axis == "seqlen")
        if size is not None and have != size and (have != 1 or strict_axis):
            raise ShapeError(
                f"{name} has shape {_shape(x)}, where {axis} must be {size}; expected ({', '.join(wanted)}){advice}"
            )


def common_heads(problem: Problem) -> int:
    """The least head count at which scores QKᵀ are distinct: heads of one such group share them."""
    return lcm(problem.q_heads, problem.k_heads)


def mask_needs_values_checked(mask: n.Node) -> bool:
    """Whether any operand's values, and not only its shape, can be wrong."""
    return any(isinstance(node, n.Documents) for node in n.walk(n.lowered(mask)))
