"""Normalize: any mask as a sum of terms, each read by `read_term` into what backends take (`ir/terms.py`).

`expand` writes structures by simpler ones (full as causal plus strict anticausal, a rank-R mask as R scans, Mamba-3's
trapezoid as one or two). `distribute` moves sums outwards and scales to the top of each term. What then has no linear
reading stays a quadratic term, run by entries.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import product
from math import prod

from ...errors import MaskError
from .. import nodes as n
from .. import operands as ops
from ..terms import Diagonal, Linear, Quadratic, Term
from ..verify import MAX_NODES
from .driver import OnPass, Pass, run
from .simplify import SIMPLIFY, is_causal

# --- expand: structures by simpler ones -----------------------------------------------------------------------------


def split_full(m: n.Node) -> n.Node | None:
    """full() = causal() + causal().strict().T."""
    match m:
        case n.Full():
            return n.Sum((n.Causal(), n.Transpose(n.Strict(n.Causal()))))
        case _:
            return None


def split_ranks(m: n.Node) -> n.Node | None:
    """A rank-R semiseparable mask is R scaled decays."""
    match m:
        case n.Semiseparable(log_a, b, c, rank):
            return n.sum_of(*(n.Scale(n.Decay(log_a), rows=ops.Select(c, r), cols=ops.Select(b, r)) for r in range(rank)))
        case _:
            return None


def split_trapezoid(m: n.Node) -> n.Node | None:
    """Mamba-3's rule: with β/a given, one strict decay and a diagonal; with β, two decays and no division.

    γ_j + β_{j+1}/a_{j+1} scales column j of the strict decay. Without the quotient, β_{j+1} · a_{i:j+1} is a decay over
    the logs of the token after, shifted by one. At a document's end column j is read by no later row of the document.
    """
    match m:
        case n.Trapezoidal(log_a, beta_over_a=ratio, gamma=gamma) if ratio is not None and gamma is not None:
            below = n.Scale(n.Strict(n.Decay(log_a)), cols=ops.Add(gamma, ops.Advance(ratio)))
            return n.Sum((below, n.Diagonal(gamma)))
        case n.Trapezoidal(log_a, beta=beta, gamma=gamma) if beta is not None:
            next_log = ops.Advance(log_a)
            return n.Sum(
                (
                    n.Scale(n.Decay(log_a), cols=gamma),
                    n.Scale(n.Shift(n.Decay(next_log), 1), cols=ops.Advance(beta)),
                )
            )
        case _:
            return None


def retention_as_decay(m: n.Node) -> n.Node | None:
    """A constant decay is a decay whose log broadcasts along seqlen."""
    match m:
        case n.Retention(log_gamma):
            return n.Decay(log_gamma)
        case _:
            return None


def lower_registered(m: n.Node) -> n.Node | None:
    """What a user's class says that its mask is made of."""
    return m.definition.lowered(m) if isinstance(m, n.Registered) else None


# --- distribute: sums outwards, scales to the top of each term ------------------------------------------------------


def distribute(m: n.Node) -> n.Node | None:
    """Every combinator is linear in its mask, and the product is bilinear."""
    match m:
        case n.Neg(n.Sum(terms)) | n.Transpose(n.Sum(terms)) | n.Reverse(n.Sum(terms)) | n.Strict(n.Sum(terms)):
            return n.sum_of(*(n.rebuild(m, (t,)) for t in terms))
        case n.Shift(n.Sum(terms)) | n.Scale(n.Sum(terms)):
            return n.sum_of(*(n.rebuild(m, (t,)) for t in terms))
        case n.Product(factors) if any(isinstance(f, n.Sum) for f in factors):
            choices = [f.terms if isinstance(f, n.Sum) else (f,) for f in factors]
            count = prod(len(terms) for terms in choices)
            if count > MAX_NODES:
                raise MaskError(
                    f"the mask multiplies {len(factors)} factors out to {count} terms, more than {MAX_NODES}; "
                    "split it over several calls, whose outputs add"
                )
            return n.sum_of(*(n.product_of(*picked) for picked in product(*choices)))
        case _:
            return None


def lift_neg(m: n.Node) -> n.Node | None:
    """Signs go to the top of a term."""
    match m:
        case n.Transpose(n.Neg(x)) | n.Reverse(n.Neg(x)) | n.Strict(n.Neg(x)) | n.Shift(n.Neg(x)) | n.Scale(n.Neg(x)):
            return n.Neg(n.rebuild(m, (x,)))
        case n.Product(factors) if any(isinstance(f, n.Neg) for f in factors):
            bare = n.product_of(*(f.mask if isinstance(f, n.Neg) else f for f in factors))
            return n.Neg(bare) if sum(isinstance(f, n.Neg) for f in factors) % 2 else bare
        case _:
            return None


def lift_scale(m: n.Node) -> n.Node | None:
    """Scales go above everything but a sign; transposing swaps rows and columns, reversing flips them."""
    match m:
        case n.Transpose(n.Scale(x, rows, cols, None)):
            return n.Scale(n.Transpose(x), rows=cols, cols=rows)
        case n.Transpose(n.Scale(x, rows, cols, log_cols)):
            return n.Scale(n.Transpose(x), rows=ops.mul(cols, ops.Exp(log_cols)), cols=rows)  # type: ignore[arg-type]
        case n.Reverse(n.Scale(x, rows, cols, log_cols)):
            return n.Scale(n.Reverse(x), ops.flip(rows), ops.flip(cols), ops.flip(log_cols))
        case n.Strict(n.Scale(x, rows, cols, log_cols)):
            return n.Scale(n.Strict(x), rows, cols, log_cols)
        case n.Shift(n.Scale(x, rows, cols, log_cols), 1):
            return n.Scale(n.Shift(x, 1), None if rows is None else ops.Delay(rows), cols, log_cols)
        case n.Product(factors) if any(isinstance(f, n.Scale) for f in factors):
            scales = [f for f in factors if isinstance(f, n.Scale)]
            bare = n.product_of(*(f.mask if isinstance(f, n.Scale) else f for f in factors))
            rows, cols = (reduce(ops.mul, slot) for slot in ([s.rows for s in scales], [s.cols for s in scales]))
            return n.Scale(bare, rows, cols, reduce(ops.add, [s.log_cols for s in scales]))
        case _:
            return None


def push_through_product(m: n.Node) -> n.Node | None:
    """Transposing, reversing and shifting act on each factor; one strict factor makes a product strict."""
    match m:
        case n.Transpose(n.Product(factors)) | n.Reverse(n.Product(factors)) | n.Shift(n.Product(factors)):
            return n.product_of(*(n.rebuild(m, (f,)) for f in factors))
        case n.Strict(n.Product(factors)):
            return n.product_of(n.Strict(factors[0]), *factors[1:])
        case _:
            return None


def push_to_leaf(m: n.Node) -> n.Node | None:
    """A fixed order above each leaf (strict, then T, then shift), and documents and diagonals flipped in place; a shifted
    diagonal is a band of one entry per row."""
    match m:
        case n.Transpose(n.Strict(x)):
            return n.Strict(n.Transpose(x))
        case n.Reverse(n.Strict(x)):
            return n.Strict(n.Reverse(x))
        case n.Reverse(n.Transpose(x)):
            return n.Transpose(n.Reverse(x))
        case n.Reverse(n.Causal()):
            return n.Transpose(n.Causal())
        case n.Reverse(n.Diagonal(d)):
            return n.Diagonal(ops.Flip(d))
        case n.Shift(n.Diagonal(d), count):
            return n.Scale(n.Window(count, -count), cols=d)
        case n.Reverse(n.Documents(cu, ids, count)):
            return n.Documents(None if cu is None else ops.Mirror(cu), None if ids is None else ops.Mirror(ids, count), count)
        case n.Scale(n.Diagonal(d), rows, cols, log_cols):
            scaled = ops.mul(ops.mul(d, rows), cols)
            return n.Diagonal(scaled if log_cols is None else ops.mul(scaled, ops.Exp(log_cols)))  # type: ignore[arg-type]
        case _:
            return None


def direct_documents(m: n.Node) -> n.Node | None:
    """Documents alone become documents × full, so that a direction is there to scan along."""
    match m:
        case n.Documents():
            return n.Sum((n.Product((n.Causal(), m)), n.Product((n.Strict(n.Transpose(n.Causal())), m))))
        case _:
            return None


EXPAND = Pass("expand", (split_full, split_ranks, split_trapezoid, retention_as_decay, lower_registered))
DISTRIBUTE = Pass("distribute", (*SIMPLIFY.rules, distribute, lift_neg, lift_scale, push_through_product, push_to_leaf))
PASSES = (SIMPLIFY, EXPAND, DISTRIBUTE)


# --- reading terms --------------------------------------------------------------------------------------------------


def normalize(mask: n.Node, on_pass: OnPass | None = None) -> tuple[Term, ...]:
    """The normal form of a mask: terms whose matrices sum to it."""
    tree = run(mask, PASSES, on_pass)
    terms: list[Term] = []
    for part in tree.terms if isinstance(tree, n.Sum) else (tree,):
        # documents that stand alone have two directions
        directed = direct_documents(_core(part))
        parts = (part,) if directed is None else tuple(_with_core(part, t) for t in directed.terms)  # type: ignore[attr-defined]  # a sum
        read = [read_term(p) for p in parts]
        terms.extend([term for term in read if term is not None])
    return tuple(terms)


def _core(part: n.Node) -> n.Node:
    return _core(part.mask) if isinstance(part, n.Neg | n.Scale | n.Strict) else part


def _with_core(part: n.Node, core: n.Node) -> n.Node:
    return n.rebuild(part, (_with_core(part.mask, core),)) if isinstance(part, n.Neg | n.Scale | n.Strict) else core


def read_term(part: n.Node) -> Term | None:
    """The term that a sum-free mask is; None for zero; Quadratic where no scan computes it."""
    read = _read(part)
    if read == "zero":
        return None
    return read if isinstance(read, Linear | Diagonal) else Quadratic(part)


def _read(m: n.Node) -> Linear | Diagonal | str:
    """A Linear or Diagonal, "zero", or "none" where there is no such reading."""
    match m:
        case n.Sum(()):
            return "zero"
        case n.Causal():
            return Linear()
        case n.Decay(log_a):
            return Linear(log_a=log_a)
        case n.ChannelDecay(log_a, dt, big_a):
            channel = log_a if log_a is not None else ops.ChannelLog(dt, big_a)  # type: ignore[arg-type]
            return Linear(channel=channel)
        case n.Diagonal(d):
            return Diagonal(d)
        case n.Neg(x):
            inner = _read(x)
            return inner if isinstance(inner, str) else replace(inner, sign=-inner.sign)
        case n.Scale(x, rows, cols, log_cols):
            return _scaled(_read(x), rows, cols, log_cols)
        case n.Strict(x):
            inner = _read(x)
            if isinstance(inner, Diagonal):
                return "zero"
            return replace(inner, strict=True) if isinstance(inner, Linear) else inner
        case n.Transpose(x):
            inner = _read(x)
            return inner.transpose() if isinstance(inner, Linear) else inner
        case n.Reverse(x):
            return _reversed(_read(x))
        case n.Shift(x, 1):
            return _shifted(_read(x))
        case n.Product(factors):
            return _product(factors)
        case _:
            return "none"


def _scaled(
    inner: Linear | Diagonal | str, rows: ops.Operand | None, cols: ops.Operand | None, log_cols: ops.Operand | None
) -> Linear | Diagonal | str:
    match inner:
        case Linear():
            return replace(
                inner,
                rows=ops.mul(inner.rows, rows),
                cols=ops.mul(inner.cols, cols),
                log_cols=ops.add(inner.log_cols, log_cols),
            )
        case _:
            return _scaled_diagonal(inner, rows, cols, log_cols)


def _scaled_diagonal(
    inner: Diagonal | str, rows: ops.Operand | None, cols: ops.Operand | None, log_cols: ops.Operand | None
) -> Diagonal | str:
    if isinstance(inner, str):
        return inner
    factor = ops.mul(rows, cols)
    factor = factor if log_cols is None else ops.mul(factor, ops.Exp(log_cols))
    return replace(inner, value=ops.mul(inner.value, factor))


def _reversed(inner: Linear | Diagonal | str) -> Linear | Diagonal | str:
    if isinstance(inner, Linear) and inner.documents is None:
        return replace(
            inner,
            causal=not inner.causal,
            log_a=ops.flip(inner.log_a),
            channel=ops.flip(inner.channel),
            rows=ops.flip(inner.rows),
            cols=ops.flip(inner.cols),
            log_cols=ops.flip(inner.log_cols),
        )
    if isinstance(inner, Diagonal):
        return replace(inner, value=ops.flip(inner.value))
    return "none" if isinstance(inner, Linear) else inner


def _shifted(inner: Linear | Diagonal | str) -> Linear | Diagonal | str:
    """A shift of a causal inclusive scan reads the state before this token's decay."""
    if inner == "zero":
        return "zero"
    plain = isinstance(inner, Linear) and inner.causal and not inner.strict and inner.documents is None
    if not plain or not isinstance(inner, Linear) or (inner.decays and not inner.row_inclusive):
        return "none"
    if inner.rows is not None:
        return "none"
    return replace(inner, strict=True, row_inclusive=not inner.decays)


def _product(factors: tuple[n.Node, ...]) -> Linear | Diagonal | str:
    read = [_read(f) for f in factors if not isinstance(f, n.Documents)]
    if "zero" in read:
        return "zero"
    scans = [x for x in read if isinstance(x, Linear)]
    if any(isinstance(x, Diagonal) for x in read) or len({x.causal for x in scans}) > 1:
        return _diagonal_of_product(factors)
    documents = {f for f in factors if isinstance(f, n.Documents)}
    if "none" in read or len(documents) > 1 or not scans:
        return "none"
    out = scans[0]
    for other in scans[1:]:
        if (merged := _merge(out, other)) is None:
            return "none"
        out = merged
    if documents:
        return replace(out, documents=documents.pop()) if out.documents is None else "none"
    return out


def _diagonal_of_product(factors: tuple[n.Node, ...]) -> Diagonal | str:
    """A product with a diagonal, or with scans in both directions, is the product of what its factors have there."""
    parts, out = [_diagonal_of(f) for f in factors], Diagonal()
    if "zero" in parts:
        return "zero"
    for part in parts:
        if isinstance(part, str):
            return "none"
        out = Diagonal(ops.mul(out.value, part.value), out.sign * part.sign)
    return out


def _diagonal_of(m: n.Node) -> Diagonal | str:
    """The diagonal of a sum-free mask, "zero" if nothing is there, "none" where no operand expression says it."""
    match m:
        case n.Window(left, right):
            return Diagonal() if -right <= 0 <= left else "zero"
        case n.Documents():
            return Diagonal()
        case n.Toeplitz(coeffs):
            return Diagonal(ops.Centre(coeffs))
        case n.Dense(matrix):
            return Diagonal(ops.Main(matrix))
        case n.Fenwick(_, levels):
            return Diagonal(ops.Select(levels, 0))
        case n.Neg(x):
            inner = _diagonal_of(x)
            return inner if isinstance(inner, str) else replace(inner, sign=-inner.sign)
        case n.Scale(x, rows, cols, log_cols):
            return _scaled_diagonal(_diagonal_of(x), rows, cols, log_cols)
        case n.Strict():
            return "zero"
        case n.Transpose(x):
            return _diagonal_of(x)
        case n.Reverse(x):
            inner = _diagonal_of(x)
            return inner if isinstance(inner, str) else replace(inner, value=ops.flip(inner.value))
        case n.Shift(n.Window(_, right), count) if right < count:
            return "zero"
        case n.Shift(x, count) if count:
            return "zero" if is_causal(x) else "none"
        case n.Product(factors):
            return _diagonal_of_product(factors)
    read = _read(m)
    if not isinstance(read, Linear):
        return read
    # a decay is 1 there, so only the scales of a scan are left
    return "zero" if read.strict else _scaled_diagonal(Diagonal(sign=read.sign), read.rows, read.cols, read.log_cols)


def _merge(a: Linear, b: Linear) -> Linear | None:
    """Two scans along one direction are one scan whose logs add, if both read their sums alike."""
    alike = (a.row_inclusive, a.col_inclusive) == (b.row_inclusive, b.col_inclusive)
    if a.decays and b.decays and not alike:
        return None
    if None not in (a.documents, b.documents) and a.documents != b.documents:
        return None
    flags = a if a.decays else b
    return Linear(
        causal=a.causal,
        strict=a.strict or b.strict,
        row_inclusive=flags.row_inclusive,
        col_inclusive=flags.col_inclusive,
        log_a=ops.add(a.log_a, b.log_a),
        channel=ops.add(a.channel, b.channel),
        documents=a.documents or b.documents,
        rows=ops.mul(a.rows, b.rows),
        cols=ops.mul(a.cols, b.cols),
        log_cols=ops.add(a.log_cols, b.log_cols),
        sign=a.sign * b.sign,
    )
