"""Random mask trees over a fixed set of named operands, and what it takes to compare their dense meanings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from registered import TheirAlibi, TheirBand, TheirPowers
from torch import Tensor

from ssdops.ir import nodes as n
from ssdops.ir import operands as ops
from ssdops.ir.evaluate import evaluate
from ssdops.ir.operands import Operand
from ssdops.ir.problem import fenwick_levels

RANK = 2
LOGS = ("log_a", "log_gamma", "log_cols", "dt", "A")
"""Slots that hold exponents (or their factors): what makes a term's size, not its sign."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of one random problem."""

    batch: int = 2
    seqlen: int = 6
    nheads: int = 4
    dstate: int = 3


SIZES = st.builds(Sizes, st.integers(1, 2), st.integers(0, 12), st.sampled_from([1, 2, 4]), st.just(3))
MORE_TOKENS = st.builds(Sizes, st.integers(1, 2), st.integers(13, 96), st.sampled_from([1, 2]), st.just(2))
"""Sums and shifts along many tokens, which cost the dense oracle seqlen² each."""
NAMES = {
    n.TOKEN: ("t", "t_batch", "t_shared", "t_head", "t_scalar"),
    n.HEAD: ("g", "g_one"),
    n.CHANNEL: ("c", "c_one"),
    n.RANK: ("r", "r_one"),
    n.LEVEL: ("levels",),
    n.LAG: ("lags", "lags_one"),
    n.MATRIX: ("m", "m_one"),
    n.HEAD_CHANNEL: ("A",),
    n.BOUNDARIES: ("cu",),
    n.IDS: ("ids",),
}


def tensors(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """A tensor for every name of NAMES: every way in which an operand may broadcast, logs of either sign."""
    batch, seqlen, nheads, dstate = sizes.batch, sizes.seqlen, sizes.nheads, sizes.dstate
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)

    half = max(nheads // 2, 1)
    ids = torch.randint(0, 2, (batch, seqlen), generator=generator).cumsum(1)
    inner = torch.randint(0, seqlen + 1, (2,), generator=generator).sort().values
    lags = max(2 * seqlen - 1, 0)
    return {
        "t": random(batch, seqlen, nheads),
        "t_batch": random(batch, 1, half),
        "t_shared": random(1, seqlen, 1),
        "t_head": random(nheads),
        "t_scalar": random(),
        "g": random(nheads),
        "g_one": random(1),
        "c": random(batch, seqlen, nheads, dstate),
        "c_one": random(1, seqlen, 1, dstate),
        "r": random(batch, seqlen, nheads, RANK),
        "r_one": random(1, 1, half, RANK),
        "levels": random(batch, seqlen, nheads, fenwick_levels(seqlen)),
        "lags": random(nheads, lags),
        "lags_one": random(1, lags),
        "m": random(batch, nheads, seqlen, seqlen),
        "m_one": random(seqlen, seqlen),
        "A": random(nheads, dstate),
        "cu": torch.tensor([0, *inner.tolist(), seqlen]),
        "ids": ids,
    }


# --- strategies -----------------------------------------------------------------------------------------------------


@st.composite
def operand_trees(draw: Callable, axes: str, depth: int = 2) -> Operand:
    """An operand expression that may stand in a slot with these axes."""
    name = st.sampled_from(NAMES[axes])
    if axes in (n.LEVEL, n.LAG, n.MATRIX, n.HEAD_CHANNEL) or depth == 0:
        return draw(name)
    if axes in n.INTEGER_AXES:
        return ops.Mirror(draw(operand_trees(axes, depth - 1))) if draw(st.booleans()) else draw(name)
    inner = operand_trees(axes, depth - 1)
    kinds = ["name", "name", "name", "add", "mul", "exp", "scaled"]
    kinds += ["flip", "advance", "delay"] if axes != n.HEAD else []
    kinds += ["select", "centre", "main"] if axes == n.TOKEN else []
    kinds += ["channel_log"] if axes == n.CHANNEL else []
    match draw(st.sampled_from(kinds)):
        case "add":
            return ops.Add(draw(inner), draw(inner))
        case "mul":
            return ops.Mul(draw(inner), draw(inner))
        case "exp":
            return ops.Exp(draw(inner))
        case "scaled":
            return ops.Scaled(draw(inner), draw(st.sampled_from([2.0, 0.5, 1e-3])))
        case "flip":
            return ops.Flip(draw(inner))
        case "advance":
            return ops.Advance(draw(inner))
        case "delay":
            return ops.Delay(draw(inner))
        case "select":
            return ops.Select(draw(operand_trees(n.RANK, depth - 1)), draw(st.integers(0, RANK - 1)))
        case "centre":
            return ops.Centre(draw(operand_trees(n.LAG)))
        case "main":
            return ops.Main(draw(operand_trees(n.MATRIX)))
        case "channel_log":
            return ops.ChannelLog(draw(operand_trees(n.TOKEN, depth - 1)), draw(operand_trees(n.HEAD_CHANNEL)))
        case _:
            return draw(name)


@st.composite
def leaf_trees(draw: Callable) -> n.Node:
    """Any leaf; boundaries only where `single_row` later holds (see `mask_trees`)."""
    kind = draw(st.sampled_from([*n.LEAVES.values(), *REGISTERED]))
    slots = {slot: operand_trees(axes) for slot, axes in n.SLOTS[kind]}
    if kind is n.Window:
        left = draw(st.integers(-3, 5))
        return n.Window(left, draw(st.integers(-left, 5)))
    if kind is n.Documents:
        if draw(st.booleans()):
            return n.Documents(cu_seqlens=draw(slots["cu_seqlens"]))
        return n.Documents(segment_ids=draw(slots["segment_ids"]), n_segments=draw(st.sampled_from([None, 13])))
    if kind is n.Trapezoidal:
        beta = draw(st.sampled_from(["beta", "beta_over_a"]))
        return n.Trapezoidal(**{slot: draw(slots[slot]) for slot in ("log_a", "gamma", beta)})
    if kind is n.ChannelDecay:
        chosen = draw(st.sampled_from([("log_a",), ("dt", "A")]))
        return n.ChannelDecay(**{slot: draw(slots[slot]) for slot in chosen})
    if kind is n.Semiseparable:
        return n.Semiseparable(**{slot: draw(x) for slot, x in slots.items()}, rank=RANK)
    return kind(**{slot: draw(x) for slot, x in slots.items()}, **integers(kind))


REGISTERED = (TheirAlibi.node, TheirBand.node, TheirPowers.node)
"""Masks from outside: two that are lowered, and one that is not."""


def integers(kind: type[n.Leaf]) -> dict[str, int]:
    """A number for each integer of a registered mask."""
    names = set(n.FIELDS[kind]) - {slot for slot, _ in n.SLOTS[kind]} if issubclass(kind, n.Registered) else ()
    return {name: RANK if name == "rank" else 2 for name in names}


def leaf_of(kind: type[n.Registered]) -> n.Node:
    """A registered mask over the first name of each kind of operand."""
    return kind(**{slot: NAMES[axes][0] for slot, axes in n.SLOTS[kind]}, **integers(kind))


@st.composite
def mask_trees(draw: Callable, depth: int = 5) -> n.Node:
    """Any mask tree at most `depth` deep, built as users and rules build them: sums and products flat."""
    combinators = ("sum", "product", "neg", "T", "reverse", "shift", "strict", "scale", "zero")
    kind = draw(st.sampled_from(combinators)) if depth > 1 and draw(st.integers(0, 3)) else "leaf"
    inner = mask_trees(depth - 1)
    match kind:
        case "sum":
            return n.sum_of(*draw(st.lists(inner, min_size=2, max_size=3)))
        case "product":
            return n.product_of(*draw(st.lists(inner, min_size=2, max_size=3)))
        case "neg":
            return n.Neg(draw(inner))
        case "T":
            return n.Transpose(draw(inner))
        case "reverse":
            return n.Reverse(draw(inner))
        case "shift":
            return n.Shift(draw(inner), draw(st.sampled_from([1, 1, 1, 0, 2, 9])))
        case "strict":
            return n.Strict(draw(inner))
        case "scale":
            slots = draw(st.sets(st.sampled_from(["rows", "cols", "log_cols"]), min_size=1))
            return n.Scale(draw(inner), **{slot: draw(operand_trees(n.TOKEN)) for slot in sorted(slots)})
        case "zero":
            return n.ZERO
        case _:
            return draw(leaf_trees())


# --- comparing meanings ---------------------------------------------------------------------------------------------


def single_row(node: n.Node) -> bool:
    """Whether the tree reads boundaries, which belong to one batch row."""
    return any(isinstance(m, n.Documents) and m.cu_seqlens is not None for m in n.walk(node))


def fitting(node: n.Node, sizes: Sizes) -> Sizes:
    """The sizes, with one batch row if the tree asks for it."""
    return replace(sizes, batch=1) if single_row(node) else sizes


def dense(node: n.Node, operands: dict[str, Tensor], sizes: Sizes) -> Tensor:
    """The meaning of a tree as `(batch, nheads, seqlen, seqlen, dstate | 1)`."""
    value = evaluate(node, operands, sizes.batch, sizes.seqlen, sizes.nheads)
    return value if value.ndim == 5 else value[..., None]


def magnitude(node: n.Node) -> n.Node:
    """A tree whose entries bound Σ|terms| of the given one: signs dropped, operands other than logs named `…_abs`."""
    if isinstance(node, n.Neg):
        return magnitude(node.mask)
    positive = n.rebuild(node, tuple(magnitude(child) for child in n.children(node)))  # a sum may be one of its terms then
    changed = {
        slot: ops.rename(value, {name: f"{name}_abs" for name in ops.names(value)})
        for slot, axes in n.SLOTS[type(node)]
        if slot not in LOGS and axes not in n.INTEGER_AXES and (value := getattr(node, slot)) is not None
    }
    return replace(positive, **changed) if changed else positive


def assert_same_meaning(before: n.Node, after: n.Node, sizes: Sizes, seed: int = 0) -> None:
    """Both trees have the same entries, within 1e-12 of the sum of the absolute values of their terms."""
    sizes = fitting(before, sizes)
    operands = tensors(sizes, seed)
    operands |= {f"{name}_abs": x.abs() for name, x in operands.items()}
    want, got = dense(before, operands, sizes), dense(after, operands, sizes)
    bound = 1e-12 * dense(magnitude(before), operands, sizes)
    wrong = ((got - want).abs() > bound) | got.isnan()
    assert not wrong.any(), (
        f"{before}  →  {after}\n{sizes}: {int(wrong.sum())} entries differ, by {(got - want).abs().max():.3g}"
    )
