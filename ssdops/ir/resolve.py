"""Operand expressions on tensors: canonical axes, head alignment, and the arithmetic of `operands.py`.

Canonical axes put seqlen second and heads third: TOKEN and HEAD operands become `(batch | 1, seqlen | 1, heads)`, CHANNEL,
RANK and LEVEL operands have one more axis. Everything here is plain differentiable torch and copies nothing that need
not be copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import lcm

import torch
from torch import Tensor

from . import nodes as n
from . import operands as ops
from .operands import Operand

_CANONICAL_RANK = {n.TOKEN: 3, n.HEAD: 3, n.CHANNEL: 4, n.RANK: 4, n.LEVEL: 4, n.MATRIX: 4, n.HEAD_CHANNEL: 2, n.LAG: 2}


def canonical(x: Tensor, axes: str) -> Tensor:
    """x with leading axes of size 1 up to the rank of its axes (a view)."""
    missing = _CANONICAL_RANK.get(axes, x.ndim) - x.ndim
    return x[(None,) * missing] if missing > 0 else x


def resolve(x: Operand, tensors: Mapping[str, Tensor], axes: str, seqlen: int) -> Tensor:
    """The value of an operand expression, in canonical axes.

    Args:
        x: a name or an expression over names.
        tensors: name → tensor.
        axes: the axes of the slot that x stands in.
        seqlen: the number of tokens, for expressions that move along them.
    """
    match x:
        case str():
            return canonical(tensors[x], axes)
        case ops.Add(a, ops.Advance(b) | ops.Delay(b) as late):
            left, right = _aligned(resolve(a, tensors, axes, seqlen), resolve(b, tensors, axes, seqlen))
            return moved(right, seqlen, -1 if isinstance(late, ops.Advance) else 1, onto=left)
        case ops.Add(a, b):
            left, right = _aligned(resolve(a, tensors, axes, seqlen), resolve(b, tensors, axes, seqlen))
            return left + right
        case ops.Mul(a, b):
            left, right = _aligned(resolve(a, tensors, axes, seqlen), resolve(b, tensors, axes, seqlen))
            return left * right
        case ops.Scaled(a, factor):
            return resolve(a, tensors, axes, seqlen) * factor
        case ops.Exp(a):
            return resolve(a, tensors, axes, seqlen).exp()
        case ops.Flip(a):
            return resolve(a, tensors, axes, seqlen).flip(1)
        case ops.Advance(a):
            return moved(resolve(a, tensors, axes, seqlen), seqlen, -1)
        case ops.Delay(a):
            return moved(resolve(a, tensors, axes, seqlen), seqlen, 1)
        case ops.Select(a, index):
            return resolve(a, tensors, n.RANK, seqlen)[..., index]
        case ops.Centre(a):
            lags = resolve(a, tensors, n.LAG, seqlen)
            return lags[:, max(seqlen - 1, 0) : seqlen].mT[None]  # [1, 1, heads]; of no tokens, none
        case ops.Main(a):
            matrix = resolve(a, tensors, n.MATRIX, seqlen)
            return matrix.expand(-1, -1, seqlen, seqlen).diagonal(dim1=2, dim2=3).transpose(1, 2)
        case ops.Mirror(a, count):
            inner = resolve(a, tensors, axes, seqlen)
            if axes == n.BOUNDARIES:
                return inner[-1] - inner.flip(0)
            return (inner[:, -1:] if count is None else count - 1) - inner.flip(1)
        case ops.ChannelLog(dt, big_a):
            left, right = _aligned(
                resolve(dt, tensors, n.TOKEN, seqlen)[..., None],
                resolve(big_a, tensors, n.HEAD_CHANNEL, seqlen)[None, None],
            )
            return left * right


def moved(x: Tensor, seqlen: int, by: int, onto: Tensor | None = None) -> Tensor:
    """x read a token earlier, or later if `by` is −1, zero where nothing is read; and added to `onto`."""
    x = x.expand(x.shape[0], seqlen, *x.shape[2:])
    if seqlen == 0:
        return x if onto is None else onto + x
    if onto is not None and torch.is_grad_enabled() and (x.requires_grad or onto.requires_grad):
        return onto + moved(x, seqlen, by)
    into, read, rest = (slice(1, None), slice(-1), slice(1)) if by > 0 else (slice(-1), slice(1, None), slice(-1, None))
    if onto is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)  # on a GPU `cat` takes twice as long as a copy
        out[:, into] = x[:, read]
        out[:, rest] = 0
        return out
    shape = torch.broadcast_shapes(x.shape, onto.shape)
    onto, out = onto.expand(shape), torch.empty(shape, dtype=torch.result_type(onto, x), device=x.device)
    torch.add(onto[:, into], x[:, read], out=out[:, into])
    out[:, rest] = onto[:, rest]
    return out


def _aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the least common head count (axis 2), heads repeated in contiguous groups; other axes broadcast."""
    heads = lcm(a.shape[2], b.shape[2])
    if a.ndim < b.ndim:
        a = a[..., None]
    if b.ndim < a.ndim:
        b = b[..., None]
    return repeat_heads(a, heads, 2), repeat_heads(b, heads, 2)


def repeat_heads(x: Tensor, heads: int, axis: int) -> Tensor:
    """x with each head repeated so that there are `heads`: a view where there is one head, else a copy."""
    have = x.shape[axis]
    if have == heads:
        return x
    if have == 1:
        return x.expand(*x.shape[:axis], heads, *x.shape[axis + 1 :])
    return x.repeat_interleave(heads // have, axis)


def reduce_to(grad: Tensor, shape: torch.Size | tuple[int, ...], head_axis: int) -> Tensor:
    """The transpose of broadcasting to `grad.shape`: sums over broadcast axes, and over the heads that share a value."""
    if grad.shape == shape:
        return grad
    have, want = grad.shape[head_axis], shape[head_axis]
    if want not in (have, 1):
        grad = grad.unflatten(head_axis, (want, have // want)).sum(head_axis + 1)
    axes = [axis for axis, (a, b) in enumerate(zip(grad.shape, shape, strict=True)) if a != b]
    return grad.sum(axes, keepdim=True) if axes else grad


def segment_ids(documents: n.Documents, tensors: Mapping[str, Tensor], seqlen: int) -> Tensor:
    """Segment ids `(batch, seqlen)` of a documents node, whichever way it was given."""
    if documents.segment_ids is not None:
        return resolve(documents.segment_ids, tensors, n.IDS, seqlen)
    assert documents.cu_seqlens is not None  # verify() promises one of the two
    cu = resolve(documents.cu_seqlens, tensors, n.BOUNDARIES, seqlen)
    tokens = torch.arange(seqlen, device=cu.device, dtype=cu.dtype)
    return torch.searchsorted(cu[1:].contiguous(), tokens, right=True)[None]


@dataclass(frozen=True, slots=True)
class Span:
    """One document: tokens [start, stop) of a batch row, and the index of its state."""

    row: int
    start: int
    stop: int
    state: int


def document_boundaries(documents: n.Documents, tensors: Mapping[str, Tensor], batch: int, seqlen: int) -> Tensor:
    """Where documents begin and end, in tokens of the whole batch: the boundaries of one packed row, or of all rows in order.

    Reads nothing on the host: without `n_segments` there are as many documents as tokens, most of them empty.
    """
    if documents.cu_seqlens is not None:
        return resolve(documents.cu_seqlens, tensors, n.BOUNDARIES, seqlen)
    ids = segment_ids(documents, tensors, seqlen).expand(batch, -1).contiguous()
    if documents.n_segments is None:
        tokens = torch.arange(seqlen, device=ids.device).expand(batch, -1)
        same = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0), value=False)[:, :seqlen]
        starts = torch.where(same, seqlen, tokens).sort(1).values
    else:
        numbers = torch.arange(documents.n_segments, device=ids.device, dtype=ids.dtype).expand(batch, -1).contiguous()
        starts = torch.searchsorted(ids, numbers)
    starts = starts + torch.arange(batch, device=ids.device)[:, None] * seqlen
    return torch.nn.functional.pad(starts.flatten(), (0, 1), value=batch * seqlen)


def document_spans(documents: n.Documents | None, tensors: Mapping[str, Tensor], batch: int, seqlen: int) -> list[Span]:
    """Every document with its state's index: batch rows without documents, `row · n_segments + segment` with them.

    Reads the boundaries on the host. Ids without `n_segments` give only the documents that occur, numbered in order.
    """
    if documents is None:
        return [Span(row, 0, seqlen, row) for row in range(batch)]
    if documents.cu_seqlens is not None:
        cu = resolve(documents.cu_seqlens, tensors, n.BOUNDARIES, seqlen).tolist()
        return [Span(0, start, stop, s) for s, (start, stop) in enumerate(pairwise(cu))]
    ids = segment_ids(documents, tensors, seqlen)
    spans: list[Span] = []
    for row, line in enumerate(ids.expand(batch, -1).tolist()):
        starts = [t for t in range(seqlen) if t == 0 or line[t] != line[t - 1]]
        found = {line[start]: (start, stop) for start, stop in zip(starts, [*starts[1:], seqlen], strict=False)}
        wanted = sorted(found) if documents.n_segments is None else range(documents.n_segments)
        first = len(spans)
        spans.extend(Span(row, *found.get(s, (0, 0)), first + offset) for offset, s in enumerate(wanted))
    return spans
