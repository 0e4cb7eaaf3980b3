"""Masks as users write them: an expression over named operands, paired with the operands' tensors.

    from ssdops import masks
    m = masks.decay(log_a) * masks.documents(cu_seqlens) + masks.diagonal(D)
    print(m)            # decay(log_a) * documents(cu_seqlens) + diagonal(d)

Making a mask takes no arithmetic and copies nothing; what it means is in `ssdops.ir.evaluate`, and its table in the README.
Operands per token are `(batch, seqlen, nheads)` or broadcastable from the right; head counts divide `nheads`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import MaskError
from .ir import nodes as n
from .ir.verify import MAX_DEPTH, MAX_NODES, check_fields

__all__ = [
    "Mask", "causal", "channel_decay", "decay", "dense", "diagonal", "documents", "fenwick", "full", "retention",
    "semiseparable", "toeplitz", "trapezoidal", "window",
]  # fmt: skip

NAMED = ("alibi", "lightning", "linear_attention", "mamba2", "mlstm", "quasiseparable", "retnet", "sliding_window")
"""Masks of papers, made of these structures in `ssdops.named`; imported from there when they are asked for here."""


DRAWING = "ssdops.plot"
"""The module that draws masks: it stands above this one, and is known by its name alone."""


def __getattr__(name: str) -> Callable[..., Mask]:
    if name not in NAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import named

    found: Callable[..., Mask] = getattr(named, name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMED])


class Mask:
    """A structured matrix `L[b, h, i, j]`: a tree that names operands, and their tensors.

    Combine with `m1 * m2` (Hadamard product), `m1 + m2`, `m1 - m2`, `-m`, `m.T`, `m.reverse()`, `m.shift(n)`, `m.strict()`,
    `m.scale(rows=, cols=, log_cols=)`. The same tensor used twice is one operand; an expression holds at most 512 nodes,
    64 deep.

    Attributes:
        tree: the expression, a frozen value that hashes, compares and prints.
        operands: name → tensor, in the order in which the names came in.
    """

    __slots__ = ("_depth", "_size", "operands", "tree")

    def __init__(self, tree: n.Node, operands: dict[str, Tensor], size: int = 1, depth: int = 1) -> None:
        if size > MAX_NODES or depth > MAX_DEPTH:
            raise MaskError(
                f"the mask expression has {size} nodes, {depth} deep; at most {MAX_NODES} nodes and {MAX_DEPTH} levels "
                "are taken; simplify it, or split the sum over several calls"
            )
        self.tree, self.operands, self._size, self._depth = tree, operands, size, depth

    def __mul__(self, other: Mask) -> Mask:
        """The Hadamard product L1[i, j] · L2[i, j]."""
        return self._with(other, n.Product) if isinstance(other, Mask) else NotImplemented

    def __add__(self, other: Mask) -> Mask:
        """L1[i, j] + L2[i, j]."""
        return self._with(other, n.Sum) if isinstance(other, Mask) else NotImplemented

    def __sub__(self, other: Mask) -> Mask:
        """L1[i, j] − L2[i, j]."""
        return self + -other if isinstance(other, Mask) else NotImplemented

    def __neg__(self) -> Mask:
        """−L[i, j]."""
        return self._around(n.Neg(self.tree))

    @property
    def T(self) -> Mask:
        """The matrix transpose L[j, i]: a causal mask becomes anticausal."""
        return self._around(n.Transpose(self.tree))

    def reverse(self) -> Mask:
        """Both indices flipped: L[T−1−i, T−1−j]."""
        return self._around(n.Reverse(self.tree))

    def shift(self, count: int = 1) -> Mask:
        """Delayed by `count` tokens: L[i − count, j], the first `count` rows zero."""
        node = n.Shift(self.tree, count)
        check_fields(node)
        return self._around(node)

    def strict(self) -> Mask:
        """Without the diagonal: L[i, j] · 1[i ≠ j]."""
        return self._around(n.Strict(self.tree))

    def scale(self, rows: Tensor | None = None, cols: Tensor | None = None, log_cols: Tensor | None = None) -> Mask:
        """rows[i] · L[i, j] · cols[j] · exp(log_cols[j]).

        Args:
            rows, cols: per-token factors `(batch, seqlen, nheads)` or broadcastable.
            log_cols: an exponent per token, added to the decay's own before exp is taken, so that an exponential gate
                overflows only where the mask's entries do.
        """
        given = {k: t for k, t in (("rows", rows), ("cols", cols), ("log_cols", log_cols)) if t is not None}
        if not given:
            raise MaskError("scale() needs at least one of rows, cols and log_cols")
        operands, table = _merged(self.operands, _tensors(given))
        tree = n.Scale(self.tree, **{slot: table.get(slot, slot) for slot in given})
        return Mask(tree, operands, self._size + 1, self._depth + 1)

    def plot(self, path: str | Path | None = None, *, seqlen: int | None = None, row: int = 0, head: int = 0) -> Any:
        """Draw L[i, j] of one batch row and head, and the blocks in which each term of the normal form runs, with their ranks.

        Args:
            path: of a PNG to write, if one is wanted.
            seqlen: where no operand has tokens; 64 if that is not said either. At most 2048 are drawn.
            row, head: which matrix.

        Returns:
            A matplotlib figure.

        Raises:
            UnsupportedError: matplotlib is not installed: `pip install ssdops[plot]`.
            ShapeError: operands disagree, or there is no such row or head.
            ValueRangeError: there are too many tokens, or the path is not a PNG's, or cannot be written.
        """
        drawing: Callable[..., Any] = import_module(DRAWING).plot
        return drawing(self, path, seqlen, row, head)

    def _around(self, tree: n.Node) -> Mask:
        return Mask(tree, self.operands, self._size + 1, self._depth + 1)

    def _with(self, other: Mask, kind: type[n.Sum] | type[n.Product]) -> Mask:
        operands, table = _merged(self.operands, other.operands)
        right = n.rename_operands(other.tree, table) if table else other.tree
        tree = n.sum_of(self.tree, right) if kind is n.Sum else n.product_of(self.tree, right)
        # sums in sums and products in products are flattened: they add neither a node nor a level
        sizes = [m._size - isinstance(m.tree, kind) for m in (self, other)]
        depths = [m._depth + (not isinstance(m.tree, kind)) for m in (self, other)]
        return Mask(tree, operands, sum(sizes) + 1, max(depths))

    def __str__(self) -> str:
        return str(self.tree)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(t.shape)}" for name, t in self.operands.items())
        return f"Mask({self.tree}; {shapes})" if shapes else f"Mask({self.tree})"


_OPTIONAL = {kind: frozenset(f.name for f in fields(kind) if f.default is None) for kind in n.LEAVES.values()}
"""Operands that a leaf may be without; which ones together, `check_fields` knows."""


def _tensors(operands: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    given: dict[str, Tensor] = {}
    for name, x in operands.items():
        if not isinstance(x, Tensor):
            raise MaskError(f"{name} must be a torch.Tensor, got {type(x).__name__}; wrap it with torch.as_tensor")
        given[name] = x
    return given


def _merged(left: dict[str, Tensor], right: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Both sets of operands under distinct names, one name per tensor; and the renames of the right side."""
    names = dict(left)
    table: dict[str, str] = {}
    for name, tensor in right.items():
        chosen = next((other for other, t in names.items() if t is tensor), None)
        if chosen is None:
            chosen, count = name, 0
            while chosen in names:
                count += 1
                chosen = f"{name.rstrip('0123456789').removesuffix('_')}_{count}"
        if chosen != name:
            table[name] = chosen
        names[chosen] = tensor
    return names, table


def leaf(kind: type[n.Leaf], operands: Mapping[str, Tensor | None], **static: int | None) -> Mask:
    """The mask of one structure, its operands by name; integers are given apart."""
    optional = _OPTIONAL.get(kind, frozenset())
    given = _tensors({name: t for name, t in operands.items() if t is not None or name not in optional})
    kept, table = _merged({}, given) if len(given) > 1 else (given, {})
    tree = kind(**{name: table.get(name, name) for name in given}, **static)
    if optional or static:
        check_fields(tree)
    return Mask(tree, kept)


def causal() -> Mask:
    """L[i, j] = 1[i ≥ j]: linear attention (Katharopoulos et al. 2020).

    >>> print(causal().strict())
    causal().strict()
    """
    return Mask(n.Causal(), {})


def full() -> Mask:
    """L[i, j] = 1: attention without a mask, still linear in seqlen."""
    return Mask(n.Full(), {})


def decay(log_a: Tensor) -> Mask:
    """L[i, j] = exp(Σ_{j<s≤i} log_a[s]) · 1[i ≥ j]: 1-semiseparable, the mask of Mamba-2 (Dao & Gu 2024, section 5).

    Args:
        log_a: natural logs of the decay per token `(batch, seqlen, nheads)` or broadcastable; finite; growth (> 0) allowed.
            In Mamba-2's words `A · dt`.

    >>> import torch
    >>> print(decay(torch.zeros(1, 8, 2)) + decay(torch.zeros(1, 8, 2)).strict().T)
    decay(log_a) + decay(log_a_1).strict().T
    """
    return leaf(n.Decay, {"log_a": log_a})


def retention(log_gamma: Tensor) -> Mask:
    """L[i, j] = γ_h^{i−j} · 1[i ≥ j]: RetNet (Sun et al. 2023).

    Args:
        log_gamma: log γ per head `(nheads,)`; no per-token operand is read.
    """
    return leaf(n.Retention, {"log_gamma": log_gamma})


def documents(cu_seqlens: Tensor | None = None, *, segment_ids: Tensor | None = None, n_segments: int | None = None) -> Mask:
    """L[i, j] = 1[i and j lie in the same document]: multiply any mask by it to pack documents.

    Args:
        cu_seqlens: boundaries `(n_segments + 1,)`, int32 or int64, from 0 to seqlen, not decreasing; batch must be 1.
        segment_ids: instead, an id per token `(batch, seqlen)` or `(1, seqlen)`, int32 or int64, not decreasing.
        n_segments: how many ids there may be; needed with segment_ids where states are carried.

    Levels of `fenwick` stay those of positions in the row, so its documents are as if alone only where they begin at a multiple
    of a power of two no smaller than their length.

    Raises:
        MaskError: both or neither of cu_seqlens and segment_ids are given.
    """
    return leaf(n.Documents, {"cu_seqlens": cu_seqlens, "segment_ids": segment_ids}, n_segments=n_segments)


def window(left: int, right: int = 0) -> Mask:
    """L[i, j] = 1[−right ≤ i − j ≤ left]: a band of `left` earlier tokens, the token itself, and `right` later ones."""
    return leaf(n.Window, {}, left=left, right=right)


def toeplitz(coeffs: Tensor) -> Mask:
    """L[i, j] = c_h[i − j + seqlen − 1].

    Args:
        coeffs: `(nheads, 2·seqlen − 1)`, from lag −(seqlen − 1) to seqlen − 1.
    """
    return leaf(n.Toeplitz, {"coeffs": coeffs})


def dense(L: Tensor) -> Mask:
    """A given matrix.

    Args:
        L: `(batch, nheads, seqlen, seqlen)` or broadcastable from the right.
    """
    return leaf(n.Dense, {"L": L})


def diagonal(d: Tensor) -> Mask:
    """L[i, j] = d[i] · 1[i = j]: a weight on a token's own score, so d[i] · ⟨q_i, k_i⟩ · v_i is added to y_i (RWKV's bonus).

    Mamba's skip connection D · x has no score in it: add it to what `ssd` returns.

    Args:
        d: `(batch, seqlen, nheads)` or broadcastable; `(nheads,)` for one D per head.
    """
    return leaf(n.Diagonal, {"d": d})


def semiseparable(log_a: Tensor, b: Tensor, c: Tensor) -> Mask:
    """L[i, j] = Σ_r c[i, r] · exp(Σ_{j<s≤i} log_a[s]) · b[j, r] · 1[i ≥ j]: rank R, one decay (Dao & Gu 2024, section 3).

    Args:
        log_a: `(batch, seqlen, nheads)` or broadcastable.
        b, c: `(batch, seqlen, nheads, rank)`, sizes of 1 broadcast.
    """
    if isinstance(b, Tensor) and isinstance(c, Tensor) and (b.ndim != 4 or c.ndim != 4 or b.shape[3] != c.shape[3]):
        raise MaskError(f"b and c must be (batch, seqlen, nheads, rank) of one rank, got {tuple(b.shape)} and {tuple(c.shape)}")
    operands = _tensors({"log_a": log_a, "b": b, "c": c})
    return leaf(n.Semiseparable, operands, rank=b.shape[3])


def fenwick(log_a: Tensor, levels: Tensor) -> Mask:
    """L[i, j] = levels[i, level(i, j)] · exp(Σ_{j<s≤i} log_a[s]) · 1[i ≥ j]: log-linear attention.

    Args:
        log_a: `(batch, seqlen, nheads)` or broadcastable.
        levels: `(batch, seqlen, nheads, n_levels)`; level(i, i) = 0, else 1 + the highest bit in which i and j differ, so
            n_levels is at least 1 + the bits of seqlen − 1.

    Source: Guo et al. 2025, "Log-Linear Attention".
    """
    return leaf(n.Fenwick, {"log_a": log_a, "levels": levels})


def trapezoidal(
    log_a: Tensor, beta: Tensor | None = None, gamma: Tensor | None = None, *, beta_over_a: Tensor | None = None
) -> Mask:
    """L[i, j] = (γ_j · 1[i = j] + (γ_j + β_{j+1}/a_{j+1}) · 1[i > j]) · exp(Σ_{j<s≤i} log_a[s]): Mamba-3's trapezoidal rule,
    h_t = a_t h_{t−1} + β_t k_{t−1} v_{t−1}ᵀ + γ_t k_t v_tᵀ with a_t = exp(log_a[t]).

    Args:
        log_a, beta, gamma: `(batch, seqlen, nheads)` or broadcastable.
        beta_over_a: instead of beta, β/a, which costs one scan where beta costs two; nothing is divided either way.

    Raises:
        MaskError: gamma is missing, or not exactly one of beta and beta_over_a is given.

    Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles". Its β is
    (1 − λ_t) Δ_t a_t, its γ is λ_t Δ_t; its rotary part is one of q and k: `examples/mamba3.py`.
    """
    return leaf(n.Trapezoidal, {"log_a": log_a, "beta": beta, "gamma": gamma, "beta_over_a": beta_over_a})


def channel_decay(log_a: Tensor | None = None, *, dt: Tensor | None = None, A: Tensor | None = None) -> Mask:
    """L[i, j, n] = exp(Σ_{j<s≤i} log_a[s, n]) · 1[i ≥ j] inside the sum over state channels n: GLA, RWKV-6, Mamba-1.

    Args:
        log_a: `(batch, seqlen, nheads, dstate)`; batch, seqlen and nheads may be 1 and broadcast.
        dt, A: instead, the factored form log_a = dt[..., None] · A, with dt per token and A `(nheads, dstate)`.

    Source: Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient Training"; Peng et al. 2024, "Eagle
    and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", for RWKV-6, which reads `.shift(1)` of it and has its
    bonus from a second contraction, over `diagonal`; Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective
    State Spaces", the factored form. `examples/channel_decay.py` has all three.
    """
    return leaf(n.ChannelDecay, {"log_a": log_a, "dt": dt, "A": A})
