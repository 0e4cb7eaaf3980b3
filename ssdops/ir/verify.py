"""The invariants of the IR, checked when a mask is made and between passes."""

from __future__ import annotations

from ..errors import MaskError
from . import nodes as n
from . import operands as ops

MAX_NODES = 512
"""A mask expression may hold this many nodes, so that rewriting stays bounded."""
MAX_DEPTH = 64
"""And nest this deeply, so that recursion over a mask never meets Python's limit."""

_COUNTS: dict[type[n.Node], tuple[str, ...]] = {
    n.Window: ("left", "right"), n.Documents: ("n_segments",), n.Shift: ("n",), n.Semiseparable: ("rank",),
}  # fmt: skip


def verify(node: n.Node) -> n.Node:
    """Return node if it is well formed.

    Raises:
        MaskError: it is not; the message names the part and the rule.
    """
    total = _check(node, 1)
    if total > MAX_NODES:
        raise MaskError(f"the mask expression has {total} nodes, more than {MAX_NODES}; simplify it or split the sum")
    kinds: dict[str, bool] = {}
    for x, axes in n.operands_of(node):
        for name in ops.names(x):
            if not name.isidentifier():
                raise MaskError(f"operand name {name!r} is not an identifier")
            if kinds.setdefault(name, axes in n.INTEGER_AXES) != (axes in n.INTEGER_AXES):
                raise MaskError(f"operand {name!r} is used both as integers and as floats; give it two names")
    return node


def _check(node: n.Node, depth: int) -> int:
    if depth > MAX_DEPTH:
        raise MaskError(f"the mask expression nests deeper than {MAX_DEPTH} levels; write it flatter")
    check_fields(node)
    return 1 + sum(_check(child, depth + 1) for child in n.children(node))


def _counts(node: n.Node) -> tuple[str, ...]:
    """The fields that hold integers."""
    if isinstance(node, n.Registered):
        return tuple(name for name in n.FIELDS[type(node)] if name not in dict(n.SLOTS[type(node)]))
    return _COUNTS.get(type(node), ())


def check_fields(node: n.Node) -> None:
    """Whether the node itself is well formed, its children apart; raises MaskError if not."""
    for name in _counts(node):
        value = getattr(node, name)
        missing = value is None and not isinstance(node, n.Registered)
        if not missing and (not isinstance(value, int) or isinstance(value, bool)):
            raise MaskError(f"{node.op}({name}) must be an int, got {type(value).__name__}: {value!r}")
    match node:
        case n.Sum(terms) if len(terms) == 1 or any(isinstance(t, n.Sum) for t in terms):
            raise MaskError(f"a sum must be flat and have no or several terms, got {terms}; use sum_of")
        case n.Product(factors) if len(factors) < 2 or any(isinstance(f, n.Product) for f in factors):
            raise MaskError(f"a product must be flat and have several factors, got {factors}; use product_of")
        case n.Shift(_, count) if count < 0:
            raise MaskError(f"shift({count}) must not be negative; use .reverse() or .T to shift the other way")
        case n.Scale(_, None, None, None):
            raise MaskError("scale() needs at least one of rows, cols and log_cols")
        case n.Documents(cu, ids) if (cu is None) == (ids is None):
            given = "both" if cu is not None else "neither"
            raise MaskError(f"documents() needs exactly one of cu_seqlens and segment_ids, got {given}")
        case n.Documents(cu, _, n_segments) if cu is not None and n_segments is not None:
            raise MaskError("documents(cu_seqlens) already says how many segments there are; drop n_segments")
        case n.Documents(_, _, n_segments) if n_segments is not None and n_segments < 0:
            raise MaskError(f"documents(n_segments={n_segments}) must not be negative")
        case n.Window(left, right) if left + right < 0:
            raise MaskError(f"window(left={left}, right={right}) is empty; left + right must be at least 0")
        case n.Trapezoidal(_, beta, gamma, beta_over_a) if gamma is None or (beta is None) == (beta_over_a is None):
            raise MaskError("trapezoidal() needs gamma and exactly one of beta and beta_over_a")
        case n.ChannelDecay(log_a, dt, big_a) if (log_a is None) != (dt is not None and big_a is not None):
            raise MaskError("channel_decay() needs either log_a, or dt and A")
        case n.ChannelDecay(log_a, dt, big_a) if log_a is not None and (dt is not None or big_a is not None):
            raise MaskError("channel_decay() needs either log_a, or dt and A, not both")
        case n.Semiseparable(rank=rank) if rank < 1:
            raise MaskError(f"semiseparable(rank={rank}) must be at least 1")
        case _:
            pass
