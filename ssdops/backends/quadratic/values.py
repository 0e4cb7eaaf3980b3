"""The factors of a `form.Form` on tensors, and the documents that cut it into tiles.

`values` is plain differentiable torch, so that a backend has to know the gradients of the factors only, whatever operands
they were made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir import nodes as n
from ...ir.evaluate import Scope
from ...ir.operands import Operand, names
from ...ir.problem import Problem
from ...ir.resolve import reduce_to, repeat_heads, resolve, segment_ids
from . import traced
from .form import Axis, Form, View
from .traced import Traced

LIMIT = 1e6
"""Exponents of columns are cut here, so that an infinite one takes part in sums; exp is 0 or inf there anyway."""


@dataclass
class Values:
    """The factors, each `(batch | 1, nheads, seqlen)` but for lags `(nheads, 2·seqlen − 1)` and entries (batch | 1, heads,
    seqlen, seqlen); None where there is none.

    Attributes:
        decay_rows, decay_cols: sums of logs, float64: a decay is exp(decay_rows[i] + decay_cols[j]).
        odd_rows, odd_cols: their sum is how many logs between i and j are not finite.
        log_rows, log_cols: further exponents, float64.
        rows, cols, lags: in the dtype of sums. entries: as given.
        leaf_rows, leaf_cols, leaf_lags: what a formula is of, float64: (batch | 1, nheads, leaves, seqlen) and
            (nheads, leaves, 2·seqlen − 1).
    """

    decay_rows: Tensor | None = None
    decay_cols: Tensor | None = None
    odd_rows: Tensor | None = None
    odd_cols: Tensor | None = None
    log_rows: Tensor | None = None
    log_cols: Tensor | None = None
    rows: Tensor | None = None
    cols: Tensor | None = None
    lags: Tensor | None = None
    entries: Tensor | None = None
    leaf_rows: Tensor | None = None
    leaf_cols: Tensor | None = None
    leaf_lags: Tensor | None = None


def values(form: Form, operands: Mapping[str, Tensor], problem: Problem) -> Values:
    """The factors of a form, differentiably in the operands."""
    out, seqlen, nheads, acc = Values(), problem.seqlen, problem.nheads, problem.accumulate

    tokens = torch.arange(seqlen, device=next((x.device for x in operands.values()), None))
    scope = Scope(operands, problem.batch, seqlen, nheads, tokens, tokens)

    def per_token(x: Operand | Traced, dtype: torch.dtype) -> Tensor:
        if isinstance(x, Traced):
            return traced.per_token(x, scope).to(dtype)
        wide = {name: operands[name].to(dtype) for name in names(x)}  # before any arithmetic on them
        value = repeat_heads(resolve(x, wide, n.TOKEN, seqlen), nheads, 2)
        return value.expand(-1, seqlen, -1).transpose(1, 2)  # [B | 1, H, T]

    for log_a, view in form.decays:
        d = per_token(log_a, torch.float64)
        ends = _ends(form, view, operands, seqlen)
        if ends is not None and len(d) < len(ends):  # logs that rows share, which do not share their documents
            d = d.expand(len(ends), -1, -1)
        finite = d.isfinite()
        sums: Tensor = _Sums.apply(torch.where(finite, d, 0.0), ends)  # type: ignore[no-untyped-call]
        odd = (~finite).cumsum(2).double()
        for name, x in (("decay", sums), ("odd", odd)):
            row, col = view.row.of(x, seqlen), -view.col.of(x, seqlen)
            _add(out, f"{name}_rows", col if view.transposed else row)
            _add(out, f"{name}_cols", row if view.transposed else col)
    for log, axis, on_rows in form.logs:
        exponent = axis.of(per_token(log, torch.float64), seqlen).clamp(-LIMIT, LIMIT)
        _add(out, "log_rows" if on_rows else "log_cols", exponent)
    for scale, axis, on_rows in form.scales:
        _multiply(out, "rows" if on_rows else "cols", axis.of(per_token(scale, acc), seqlen))
    for coeffs, view in form.lags:
        if isinstance(coeffs, Traced):
            c = traced.per_lag(coeffs, scope).to(acc)
        else:
            c = repeat_heads(resolve(coeffs, operands, n.LAG, seqlen).to(acc), nheads, 0)
        _multiply(out, "lags", lag_axis(view, seqlen).of(c, 2 * seqlen - 1))
    for name, found in (("leaf_rows", form.at_rows), ("leaf_cols", form.at_cols)):
        if found:
            leaves = [axis.of(per_token(leaf, torch.float64), seqlen) for leaf, axis in found]
            setattr(out, name, torch.stack(torch.broadcast_tensors(*leaves), 2))
    if form.at_lags:
        leaves = [lag_axis(view, seqlen).of(traced.per_lag(leaf, scope), 2 * seqlen - 1) for leaf, view in form.at_lags]
        out.leaf_lags = torch.stack(leaves, 1)
    for matrix, view in form.entries:
        entries = resolve(matrix, operands, n.MATRIX, seqlen).expand(-1, -1, seqlen, seqlen)
        entries = entries.to(acc) if len(form.entries) > 1 else entries  # products are not rounded to 16 bits
        entries = view.row.of(entries.transpose(2, 3), seqlen).transpose(2, 3)
        entries = view.col.of(entries, seqlen)
        _multiply(out, "entries", entries.transpose(2, 3) if view.transposed else entries, nheads)
    return out


def pull_back(factors: Values, grads: Values, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the factors → gradients of the operands."""
    slots = [(getattr(factors, f.name), getattr(grads, f.name)) for f in fields(Values)]
    kept = [(value, grad) for value, grad in slots if grad is not None and value.requires_grad]
    if not kept:
        return tuple(torch.zeros_like(t) for t in inputs)
    outputs, given = [value for value, _ in kept], [reduce_to(grad, value.shape, 1).to(value.dtype) for value, grad in kept]
    return torch.autograd.grad(outputs, inputs, given, allow_unused=True, materialize_grads=True)


def lag_axis(view: View, seqlen: int) -> Axis:
    """Where in its 2·seqlen − 1 lags a leaf at a view is read."""
    return Axis(view.slope, view.shift + (seqlen - 1) * (1 - view.slope))


class _Sums(torch.autograd.Function):
    """Prefix sums along the tokens [B, H, T]; in the gradient a document is summed by itself: nothing else reads its logs."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor, ends: Tensor | None) -> Tensor:
        """Args: ends: where the document of each token ends, [B | 1, T]; None where it is the end of all."""
        ctx.save_for_backward(ends)
        return logs.cumsum(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Σ_{t ≤ s < end} grad_s."""
        (ends,) = ctx.saved_tensors
        finite = grad.isfinite()
        parts = [F.pad(x.flip(2).cumsum(2).flip(2), (0, 1)) for x in (torch.where(finite, grad, 0.0), (~finite).double())]
        if ends is None:
            sums, odd = (x[..., :-1] for x in parts)
        else:
            at = ends[:, None].expand_as(grad)
            sums, odd = (x[..., :-1] - x.gather(2, at) for x in parts)
        return torch.where(odd == 0.0, sums, torch.nan), None


def _ends(form: Form, view: View, operands: Mapping[str, Tensor], seqlen: int) -> Tensor | None:
    """Where the document of each coordinate of a decay ends; None without documents, or where they are shifted."""
    if len(form.documents) != 1 or form.documents[0][1] != View():
        return None
    ids = segment_ids(form.documents[0][0], operands, seqlen)
    ids = ids if view.row.sign > 0 else -ids.flip(1)
    return torch.searchsorted(ids.contiguous(), ids.contiguous(), right=True)


def _add(out: Values, name: str, x: Tensor) -> None:
    have = getattr(out, name)
    setattr(out, name, x if have is None else have + x)


def _multiply(out: Values, name: str, x: Tensor, heads: int | None = None) -> None:
    """Multiply a factor in; heads are repeated if they differ (only entries come with fewer than all)."""
    have = getattr(out, name)
    if have is not None and heads is not None and have.shape[1] != x.shape[1]:
        have, x = repeat_heads(have, heads, 1), repeat_heads(x, heads, 1)
    setattr(out, name, x if have is None else have * x)


# --- documents ------------------------------------------------------------------------------------------------------


def spans(form: Form, operands: Mapping[str, Tensor], seqlen: int) -> tuple[Tensor, Tensor] | None:
    """The columns [start, stop) that share every document with each row, int32 `(batch | 1, 2, seqlen)`; and so for columns.

    Ids do not decrease, so that documents are intervals.
    """
    of_rows: Tensor | None = None
    of_cols: Tensor | None = None
    for documents, view in form.documents:
        ids = segment_ids(documents, operands, seqlen)
        row, col = (a.sign * a.of(ids, seqlen) for a in (view.row, view.col))
        rows, cols = (col, row) if view.transposed else (row, col)
        of_rows, of_cols = _meet(of_rows, _interval(cols, rows)), _meet(of_cols, _interval(rows, cols))
    return None if of_rows is None or of_cols is None else (of_rows, of_cols)


def _interval(among: Tensor, ids: Tensor) -> Tensor:
    """Where each id stands among sorted ones."""
    among, ids = among.contiguous(), ids.contiguous()
    first = torch.searchsorted(among, ids, out_int32=True)
    return torch.stack([first, torch.searchsorted(among, ids, right=True, out_int32=True)], 1)


def _meet(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.stack([torch.maximum(a[:, 0], b[:, 0]), torch.minimum(a[:, 1], b[:, 1])], 1)


def tile_count(form: Form, operands: Mapping[str, Tensor], seqlen: int, size: int) -> int:
    """At most how many tiles of rows there are, none of which has rows of two documents; known without their values."""
    documents = 0
    for node, _ in form.documents:
        if node.cu_seqlens is not None:
            documents += operands[next(names(node.cu_seqlens))].shape[0] + 1
        else:
            documents += seqlen if node.n_segments is None else node.n_segments + 1
    return min(seqlen, -(-seqlen // size) + documents)


def tile_table(spans: Tensor, size: int, count: int) -> Tensor:
    """Tiles of rows with the columns they see: (first row, row to stop at, first column, column to stop at), int32.

    Args:
        spans: `(batch | 1, 2, seqlen)` of the rows.
        size: rows in a tile.
        count: tiles in the table, those left over being empty.
    """
    seqlen = spans.shape[2]
    t = torch.arange(seqlen, device=spans.device).expand(spans.shape[0], -1)
    first = torch.ones_like(t, dtype=torch.bool)
    first[:, 1:] = (spans[:, :, 1:] != spans[:, :, :-1]).any(1)
    begin = torch.where(first, t, 0).cummax(1).values
    following = torch.where(first, t, seqlen).flip(1).cummin(1).values.flip(1)
    end = torch.cat([following[:, 1:], torch.full_like(t[:, :1], seqlen)], 1)
    tiles = ((t - begin) % size == 0).cumsum(1)  # how many tiles have begun
    wanted = torch.arange(1, count + 1, device=spans.device).expand(spans.shape[0], -1).contiguous()
    at = torch.searchsorted(tiles, wanted)
    row, some = at.clamp_max(seqlen - 1), at < seqlen
    stop = torch.minimum(row + size, end.gather(1, row))
    table = torch.stack([row, torch.where(some, stop, row), *(x.gather(1, row) for x in spans.unbind(1))], 2)
    return table.to(torch.int32)
