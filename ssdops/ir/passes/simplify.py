"""Simplify: the same matrix, a smaller expression."""

from __future__ import annotations

from .. import nodes as n
from .. import operands as ops
from .driver import Pass


def drop_double(m: n.Node) -> n.Node | None:
    """-(-m), m.T.T, m.reverse().reverse() are m; m.strict().strict() is m.strict()."""
    match m:
        case n.Neg(n.Neg(x)) | n.Transpose(n.Transpose(x)) | n.Reverse(n.Reverse(x)):
            return x
        case n.Strict(n.Strict()):
            return m.mask
        case _:
            return None


def drop_symmetric(m: n.Node) -> n.Node | None:
    """Transposing what is symmetric, and reversing what looks the same from both ends, changes nothing."""
    match m:
        case n.Transpose(n.Full() | n.Documents() | n.Diagonal()) | n.Reverse(n.Full() | n.Window() | n.Toeplitz()):
            inner = m.mask
            return n.Window(inner.right, inner.left) if isinstance(inner, n.Window) else _reversed_leaf(inner)
        case n.Transpose(n.Window(left, right)):
            return n.Window(right, left)
        case _:
            return None


def _reversed_leaf(leaf: n.Node) -> n.Node:
    """Reversing a Toeplitz matrix transposes it; the other leaves of drop_symmetric stay as they are."""
    return n.Transpose(leaf) if isinstance(leaf, n.Toeplitz) else leaf


def merge_shifts(m: n.Node) -> n.Node | None:
    """m.shift(0) is m; m.shift(a).shift(b) is m.shift(a + b)."""
    match m:
        case n.Shift(x, 0):
            return x
        case n.Shift(n.Shift(x, a), b):
            return n.Shift(x, a + b)
        case _:
            return None


def drop_units(m: n.Node) -> n.Node | None:
    """full() is the unit of the Hadamard product."""
    match m:
        case n.Product(factors) if any(isinstance(f, n.Full) for f in factors):
            rest = tuple(f for f in factors if not isinstance(f, n.Full))
            return n.product_of(*rest) if rest else n.Full()
        case _:
            return None


def drop_zeros(m: n.Node) -> n.Node | None:
    """The zero mask: unchanged by every combinator, absorbing in products, without a diagonal of its own to be strict."""
    match m:
        case n.Neg(n.Sum(())) | n.Transpose(n.Sum(())) | n.Reverse(n.Sum(())) | n.Strict(n.Sum(()) | n.Diagonal()):
            return n.ZERO
        case n.Shift(n.Sum(())) | n.Scale(n.Sum(())):
            return n.ZERO
        case n.Product(factors) if n.ZERO in factors:
            return n.ZERO
        case _:
            return None


def keep_one_of_equals(m: n.Node) -> n.Node | None:
    """A 0/1 mask times itself is itself."""
    match m:
        case n.Product(factors):
            binary = (n.Causal, n.Documents, n.Window)
            kept = [f for i, f in enumerate(factors) if not (isinstance(f, binary) and f in factors[:i])]
            return n.product_of(*kept) if len(kept) < len(factors) else None
        case _:
            return None


def absorb_causal(m: n.Node) -> n.Node | None:
    """causal() times something causal is that thing."""
    match m:
        case n.Product(factors) if n.Causal() in factors:
            rest = tuple(f for f in factors if f != n.Causal())
            return n.product_of(*rest) if any(is_causal(f) for f in rest) else None
        case _:
            return None


def is_causal(m: n.Node) -> bool:
    """Whether a mask is known to be 0 above its diagonal."""
    match m:
        case n.Decay() | n.Retention() | n.Semiseparable() | n.Fenwick() | n.Trapezoidal() | n.ChannelDecay():
            return True
        case n.Diagonal() | n.Causal():
            return True
        case n.Registered():
            return m.definition.causal
        case n.Neg(x) | n.Scale(x) | n.Strict(x) | n.Shift(x):
            return is_causal(x)
        case n.Sum(parts) if parts:
            return all(is_causal(p) for p in parts)
        case n.Product(parts):
            return any(is_causal(p) for p in parts)
        case _:
            return False


def merge_decays(m: n.Node) -> n.Node | None:
    """Products of decays add their logs."""
    match m:
        case n.Product(factors):
            decays = [f for f in factors if isinstance(f, n.Decay)]
            if len(decays) < 2:
                return None
            log_a = decays[0].log_a
            for other in decays[1:]:
                log_a = ops.Add(log_a, other.log_a)
            return n.product_of(n.Decay(log_a), *(f for f in factors if not isinstance(f, n.Decay)))
        case _:
            return None


def merge_scales(m: n.Node) -> n.Node | None:
    """m.scale(rows=a).scale(rows=b) is m.scale(rows=a·b), likewise for columns; exponents add."""
    match m:
        case n.Scale(n.Scale(x, rows, cols, log_cols), rows2, cols2, log_cols2):
            return n.Scale(x, ops.mul(rows, rows2), ops.mul(cols, cols2), ops.add(log_cols, log_cols2))
        case _:
            return None


SIMPLIFY = Pass(
    "simplify",
    (
        drop_double,
        drop_symmetric,
        merge_shifts,
        drop_units,
        drop_zeros,
        keep_one_of_equals,
        absorb_causal,
        merge_decays,
        merge_scales,
    ),
)
