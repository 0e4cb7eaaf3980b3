"""The nodes of a mask expression: frozen values that name operands and never hold tensors.

Every node stands for a matrix `L[i, j]` per batch row and head (`channel_decay` for one per state channel too); its
dense meaning is in `evaluate.py`, its text in `text.py`. Operand fields carry their axes as metadata, from which
validation, verification and the parser take what they need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, Protocol

from .. import plugins
from ..errors import MaskError
from . import operands as ops
from .operands import Operand

TOKEN = "batch seqlen nheads"
"""Axes of a per-token operand; broadcast from the right, so a scalar and `(nheads,)` are allowed."""
HEAD = "nheads"
CHANNEL = "batch seqlen nheads dstate"
RANK = "batch seqlen nheads rank"
LEVEL = "batch seqlen nheads n_levels"
LAG = "nheads 2*seqlen-1"
MATRIX = "batch nheads seqlen seqlen"
HEAD_CHANNEL = "nheads dstate"
BOUNDARIES = "n_segments+1"
IDS = "batch seqlen"
INTEGER_AXES = (BOUNDARIES, IDS)


def axes(kind: str, optional: bool = False) -> Any:
    """A dataclass field that holds an operand with the named axes."""
    return field(default=None, metadata={"axes": kind}) if optional else field(metadata={"axes": kind})


@dataclass(frozen=True, slots=True)
class Node:
    """A mask expression."""

    op: ClassVar[str] = "node"

    def __str__(self) -> str:
        from .text import show

        return show(self)


@dataclass(frozen=True, slots=True)
class Leaf(Node):
    """A node without masks inside it."""


# --- the structures of the mask table -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Causal(Leaf):
    """1[i ≥ j]."""

    op: ClassVar[str] = "causal"


@dataclass(frozen=True, slots=True)
class Full(Leaf):
    """1."""

    op: ClassVar[str] = "full"


@dataclass(frozen=True, slots=True)
class Decay(Leaf):
    """a_{i:j} · 1[i ≥ j] with a_{i:j} = exp(Σ_{j<s≤i} log_a[s]): 1-semiseparable."""

    op: ClassVar[str] = "decay"
    log_a: Operand = axes(TOKEN)


@dataclass(frozen=True, slots=True)
class Retention(Leaf):
    """γ_h^{i−j} · 1[i ≥ j]."""

    op: ClassVar[str] = "retention"
    log_gamma: Operand = axes(HEAD)


@dataclass(frozen=True, slots=True)
class Documents(Leaf):
    """1[same segment], from boundaries or from ids; exactly one of the two."""

    op: ClassVar[str] = "documents"
    cu_seqlens: Operand | None = axes(BOUNDARIES, optional=True)
    segment_ids: Operand | None = axes(IDS, optional=True)
    n_segments: int | None = None


@dataclass(frozen=True, slots=True)
class Window(Leaf):
    """1[−right ≤ i − j ≤ left]."""

    op: ClassVar[str] = "window"
    left: int
    right: int = 0


@dataclass(frozen=True, slots=True)
class Toeplitz(Leaf):
    """c_h[i − j + seqlen − 1]."""

    op: ClassVar[str] = "toeplitz"
    coeffs: Operand = axes(LAG)


@dataclass(frozen=True, slots=True)
class Dense(Leaf):
    """A given matrix."""

    op: ClassVar[str] = "dense"
    L: Operand = axes(MATRIX)


@dataclass(frozen=True, slots=True)
class Diagonal(Leaf):
    """d[i] · 1[i = j]."""

    op: ClassVar[str] = "diagonal"
    d: Operand = axes(TOKEN)


@dataclass(frozen=True, slots=True)
class Semiseparable(Leaf):
    """Σ_r c[i, r] · a_{i:j} · b[j, r] · 1[i ≥ j]."""

    op: ClassVar[str] = "semiseparable"
    log_a: Operand = axes(TOKEN)
    b: Operand = axes(RANK)
    c: Operand = axes(RANK)
    rank: int = 1


@dataclass(frozen=True, slots=True)
class Fenwick(Leaf):
    """levels[i, level(i, j)] · a_{i:j} · 1[i ≥ j]; level(i, i) = 0, else 1 + the highest bit in which i and j differ."""

    op: ClassVar[str] = "fenwick"
    log_a: Operand = axes(TOKEN)
    levels: Operand = axes(LEVEL)


@dataclass(frozen=True, slots=True)
class Trapezoidal(Leaf):
    """(γ_j · 1[i = j] + (γ_j + β_{j+1}/a_{j+1}) · 1[i > j]) · a_{i:j}; give β or β/a."""

    op: ClassVar[str] = "trapezoidal"
    log_a: Operand = axes(TOKEN)
    beta: Operand | None = axes(TOKEN, optional=True)
    gamma: Operand | None = axes(TOKEN, optional=True)
    beta_over_a: Operand | None = axes(TOKEN, optional=True)


@dataclass(frozen=True, slots=True)
class ChannelDecay(Leaf):
    """exp(Σ_{j<s≤i} log_a[s, n]) · 1[i ≥ j], inside the sum over the state channel n; log_a, or dt and A."""

    op: ClassVar[str] = "channel_decay"
    log_a: Operand | None = axes(CHANNEL, optional=True)
    dt: Operand | None = axes(TOKEN, optional=True)
    A: Operand | None = axes(HEAD_CHANNEL, optional=True)


class Meaning(Protocol):
    """What a registered structure says of itself (`definition.py`)."""

    causal: bool
    """Whether entries above the diagonal are 0."""

    def entries(self, node: Registered, at: Any) -> tuple[Any, Any]:
        """Its values and support at an `evaluate.Scope`."""
        ...

    def lowered(self, node: Registered) -> Node | None:
        """The same matrix by other structures, or None."""
        ...


@dataclass(frozen=True, slots=True)
class Registered(Leaf):
    """A structure that a user brings: `register_mask` makes a class below this one, whose fields are its operands."""

    definition: ClassVar[Meaning]

    def __reduce__(self) -> tuple[Any, ...]:
        """By name: the class itself was made when the mask was registered."""
        return _registered, (self.op, tuple(getattr(self, name) for name in FIELDS[type(self)]))


# --- combinators ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sum(Node):
    """m1 + m2 + …, flat; no terms at all is the zero mask."""

    op: ClassVar[str] = "sum"
    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Product(Node):
    """m1 ∘ m2 ∘ …, flat, at least two factors."""

    op: ClassVar[str] = "product"
    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Neg(Node):
    """−m."""

    op: ClassVar[str] = "neg"
    mask: Node


@dataclass(frozen=True, slots=True)
class Transpose(Node):
    """L[j, i]."""

    op: ClassVar[str] = "T"
    mask: Node


@dataclass(frozen=True, slots=True)
class Reverse(Node):
    """L[T−1−i, T−1−j]."""

    op: ClassVar[str] = "reverse"
    mask: Node


@dataclass(frozen=True, slots=True)
class Shift(Node):
    """L[i − n, j], the first n rows zero."""

    op: ClassVar[str] = "shift"
    mask: Node
    n: int = 1


@dataclass(frozen=True, slots=True)
class Strict(Node):
    """L without its diagonal."""

    op: ClassVar[str] = "strict"
    mask: Node


@dataclass(frozen=True, slots=True)
class Scale(Node):
    """rows[i] · L[i, j] · cols[j] · exp(log_cols[j])."""

    op: ClassVar[str] = "scale"
    mask: Node
    rows: Operand | None = axes(TOKEN, optional=True)
    cols: Operand | None = axes(TOKEN, optional=True)
    log_cols: Operand | None = axes(TOKEN, optional=True)


LEAVES: dict[str, type[Leaf]] = {
    leaf.op: leaf
    for leaf in (
        Causal, Full, Decay, Retention, Documents, Window, Toeplitz, Dense, Diagonal,
        Semiseparable, Fenwick, Trapezoidal, ChannelDecay,
    )
}  # fmt: skip
"""The structures that are built in, by name."""
REGISTERED: dict[str, type[Registered]] = {}
"""Those that `register_mask` has added."""
ZERO = Sum(())


# --- structure, derived from the fields -----------------------------------------------------------------------------


FIELDS: dict[type[Node], tuple[str, ...]] = {
    kind: tuple(f.name for f in fields(kind))
    for kind in (*LEAVES.values(), Sum, Product, Neg, Transpose, Reverse, Shift, Strict, Scale)
}
"""Field names by node class, read once: torch.compile traces lookups, not dataclass reflection."""
SLOTS: dict[type[Node], tuple[tuple[str, str], ...]] = {
    kind: tuple((f.name, f.metadata["axes"]) for f in fields(kind) if "axes" in f.metadata) for kind in FIELDS
}
"""(field, axes) of the operand fields by node class."""


def add_leaf(kind: type[Registered]) -> None:
    """Make a registered structure known by its name."""
    FIELDS[kind] = tuple(f.name for f in fields(kind))
    SLOTS[kind] = tuple((f.name, f.metadata["axes"]) for f in fields(kind) if "axes" in f.metadata)
    REGISTERED[kind.op] = kind


def leaf_named(name: str) -> type[Leaf] | None:
    """The structure of that name, built in or registered, its entry point loaded if it has one; None if there is none."""
    if name not in LEAVES and name not in REGISTERED:
        plugins.load(plugins.MASKS, name)
    return LEAVES.get(name) or REGISTERED.get(name)


def _registered(name: str, values: tuple[Any, ...]) -> Node:
    kind = leaf_named(name)
    if kind is None:
        raise MaskError(f"no mask {name!r} is registered in this process; import the module whose register_mask({name!r}) does")
    return kind(*values)


def children(node: Node) -> tuple[Node, ...]:
    """The masks directly inside node."""
    match node:
        case Sum(inner) | Product(inner):
            return inner
        case Neg(m) | Transpose(m) | Reverse(m) | Shift(m) | Strict(m) | Scale(m):
            return (m,)
        case _:
            return ()


def rebuild(node: Node, inner: tuple[Node, ...]) -> Node:
    """node with its children replaced; sums and products stay flat."""
    match node:
        case Sum():
            return sum_of(*inner)
        case Product():
            return product_of(*inner)
        case Shift(_, n):
            return Shift(inner[0], n)
        case Scale(_, rows, cols, log_cols):
            return Scale(inner[0], rows, cols, log_cols)
        case Neg() | Transpose() | Reverse() | Strict():
            return type(node)(inner[0])
        case _:
            return node


def rank_of(node: Node) -> int:
    """How many ranks its operands with that axis have, as far as the node says; else 1."""
    return rank if isinstance(rank := getattr(node, "rank", 1), int) else 1


def sum_of(*terms: Node) -> Node:
    """The flat sum of the terms; one term is itself."""
    flat: list[Node] = []
    for term in terms:
        flat.extend(term.terms if isinstance(term, Sum) else (term,))
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def product_of(*factors: Node) -> Node:
    """The flat Hadamard product of the factors; one factor is itself."""
    flat: list[Node] = []
    for factor in factors:
        flat.extend(factor.factors if isinstance(factor, Product) else (factor,))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def walk(node: Node) -> Iterator[Node]:
    """node and everything inside it, outside first."""
    yield node
    for child in children(node):
        yield from walk(child)


@lru_cache(maxsize=4096)
def lowered(node: Node) -> Node:
    """The same matrix, with what `lower` gives in the place of every registered mask that has one."""
    if not any(isinstance(m, Registered) for m in walk(node)):
        return node
    node = rebuild(node, tuple(lowered(child) for child in children(node)))
    other = node.definition.lowered(node) if isinstance(node, Registered) else None
    return node if other is None else lowered(other)


def operands_of(node: Node) -> Iterator[tuple[Operand, str]]:
    """Every operand expression in the tree with the axes of its slot, in printing order."""
    for child in children(node):
        yield from operands_of(child)
    for name, axes_ in SLOTS[type(node)]:
        value = getattr(node, name)
        if value is not None:
            yield value, axes_


def names_of(node: Node) -> tuple[str, ...]:
    """The operand names of the tree, each once, in order of first appearance: the order in which ops take tensors."""
    return tuple(dict.fromkeys([name for x, _ in operands_of(node) for name in ops.names(x)]))


operand_names = lru_cache(maxsize=4096)(names_of)
"""`names_of`, remembered; torch.compile cannot trace the cache, so traced code calls `names_of`."""


def rename_operands(node: Node, table: Mapping[str, Operand]) -> Node:
    """The same tree over other operands: names, or expressions in their place."""
    node = rebuild(node, tuple([rename_operands(child, table) for child in children(node)]))
    slots = {name for name, _ in SLOTS[type(node)] if getattr(node, name) is not None}
    if not slots:
        return node
    values = {name: getattr(node, name) for name in FIELDS[type(node)]}
    return type(node)(**{name: ops.rename(x, table) if name in slots else x for name, x in values.items()})
