"""Quadratic, from the entries of L: any mask, any direction, in blocks of rows so that no T×T tensor is held.

The documents of a linear term run one by one, so that values never meet across them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from ..ir import nodes as n
from ..ir.evaluate import Scope, entries
from ..ir.problem import Problem, common_heads
from ..ir.resolve import Span, repeat_heads
from ..ir.terms import Diagonal, Linear, Term
from .base import Config, Cotangents, Gradients, Inputs, Output, Support, Work, bind, exponent_dtype, without_chunks
from .scan import Every, diagonal_backward, diagonal_forward, exponents

ROWS = 256
"""Rows of L per block."""


class Naive:
    """The quadratic form of the contraction."""

    name = "naive"
    factored = False

    def supports(self, term: Term, problem: Problem) -> Support:
        """Everything, wherever there is float64."""
        if problem.target.device == "mps":
            return Support.no("'naive' evaluates masks in float64, which mps has not; 'chunked' and 'recurrent' run there")
        return Support.yes()

    def configs(self, term: Term, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """Nothing to choose."""
        return without_chunks(self.name, chunk_size) or (Config(),)

    def has_chunks(self, term: Term) -> bool:
        """Nothing has."""
        return False

    def growth(self, term: Term) -> str | None:
        """Every pair of tokens, whatever the mask."""
        return None if isinstance(term, Diagonal) else "T²"

    def work(self, term: Term, problem: Problem, config: Config, direction: str = "forward") -> Work:
        """T² of everything, in blocks of rows, document by document; a decay per channel has T² entries for each channel."""
        p = problem
        packed = isinstance(term, Linear) and term.documents is not None
        parts = max((p.n_states or p.batch) // max(p.batch, 1), 1) if packed else 1
        length = ceil(p.seqlen / parts)
        pairs, blocks = float(p.batch * p.nheads * parts) * length**2, (p.batch if packed else 1) * parts * ceil(length / ROWS)
        entries = pairs * (p.dstate if isinstance(term, Linear) and term.channel is not None else 1)
        per_token = 12.0 * p.batch * p.seqlen * p.nheads * (p.dstate + p.headdim)
        flops = 2 * pairs * (p.dstate + p.headdim)
        if direction == "forward":
            return Work(flops, 18 * entries + per_token, 150 * entries, 28.0 + 57 * blocks)
        return Work(4 * flops, 54 * entries + 3 * per_token, 450 * entries, 80.0 + 160 * blocks)

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """By entries."""
        if isinstance(term, Diagonal):
            return Output(diagonal_forward(term, x))
        y, state = contract_by_entries(term, x)
        return Output(y, state, every=_of_prefixes(term, x) if isinstance(term, Linear) else None)

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """By differentiating the forward pass, which is plain torch."""
        if isinstance(term, Diagonal):
            return diagonal_backward(term, x, cotangents.y)
        acc = x.problem.accumulate
        with torch.enable_grad():
            q, k, v = (t.detach().to(acc).requires_grad_() for t in (x.q, x.k, x.v))
            floats = {name: t.detach().clone().requires_grad_() for name, t in x.operands.items() if t.is_floating_point()}
            initial = None if x.initial is None else x.initial.detach().clone().requires_grad_()
            fresh = bind(term, x.problem, q, k, v, {**x.operands, **floats}, initial, x.scale)
            out, state = contract_by_entries(term, fresh)
        inputs = [q, k, v, *floats.values(), *([] if initial is None else [initial])]
        outputs, given = [out], [cotangents.y.to(acc)]
        if state is not None and cotangents.state is not None:
            outputs, given = [out, state], [*given, cotangents.state.to(state.dtype)]
        dq, dk, dv, *rest = _pull_back(outputs, given, inputs)
        return Gradients(
            dq, dk, dv,
            initial=None if initial is None else rest[-1],
            operands=dict(zip(floats, rest, strict=False)),
        )  # fmt: skip


def _pull_back(outputs: list[Tensor], cotangents: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of inputs; zeros where nothing reaches them (a mask that is zero, a sequence that is empty)."""
    kept = [(y, dy) for y, dy in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not kept:
        return tuple(torch.zeros_like(x) for x in inputs)
    ys, dys = [y for y, _ in kept], [dy for _, dy in kept]
    return torch.autograd.grad(ys, inputs, dys, allow_unused=True, materialize_grads=True)


def contract_by_entries(term: Term, x: Inputs) -> tuple[Tensor, Tensor | None]:
    """Y in the accumulation dtype and the final states, differentiably, from the entries of the term's mask."""
    p, node = x.problem, term.node()
    spans = x.spans if x.spans is not None else [Span(row, 0, p.seqlen, row) for row in range(p.batch)]
    by_document = isinstance(term, Linear) and term.documents is not None
    y = torch.zeros(p.batch, p.seqlen, p.nheads, p.headdim, dtype=p.accumulate, device=x.q.device)
    if not by_document:
        pieces = [_rows(node, x, slice(None), 0, i0, min(i0 + ROWS, p.seqlen), p.seqlen) for i0 in range(0, p.seqlen, ROWS)]
        y = torch.cat(pieces, 1) if pieces else y
    else:
        for s in spans:
            for i0 in range(s.start, s.stop, ROWS):
                i1 = min(i0 + ROWS, s.stop)
                y[s.row : s.row + 1, i0:i1] = _rows(node, x, slice(s.row, s.row + 1), s.start, i0, i1, s.stop)
    if not isinstance(term, Linear):
        return y, None
    return _with_states(term, x, y, spans)


def _rows(node: n.Node, x: Inputs, batch: slice, start: int, i0: int, i1: int, stop: int) -> Tensor:
    """Rows [i0, i1) of Y against columns [start, stop), for some batch rows: [b, rows, H, P]."""
    p, acc, device = x.problem, x.problem.accumulate, x.q.device
    q, k, v = x.q[batch, i0:i1].to(acc), x.k[batch, start:stop].to(acc), x.v[batch, start:stop].to(acc)
    i, j = torch.arange(i0, i1, device=device), torch.arange(start, stop, device=device)
    value, support = entries(node, Scope(x.operands, p.batch, p.seqlen, p.nheads, i, j))
    value, support = (t[batch] if t.shape[0] > 1 else t for t in (value, support))
    heads = common_heads(p)
    q, k = (repeat_heads(t, heads, 2).transpose(1, 2) for t in (q, k))  # [b, G, rows | cols, N]
    if value.shape[-1] > 1:  # decay inside the sum over state channels
        qh, kh = (repeat_heads(t, p.nheads, 1) for t in (q, k))
        scores = torch.einsum("bhin,bhjn,bhijn->bhij", qh, kh, value.to(acc).expand(*qh.shape[:2], *value.shape[2:]))
    else:
        scores = repeat_heads(q @ k.transpose(2, 3), p.nheads, 1) * value[..., 0].to(acc)
    scores = torch.where(support[..., 0], scores, 0.0) * x.scale
    vh = repeat_heads(v, p.nheads, 2).transpose(1, 2)  # [b, H, cols, P]
    if not _crosses_documents(node) or bool(torch.isfinite(v).all()):
        return (scores @ vh).transpose(1, 2)
    # 0 · NaN is NaN: what lies outside the support is selected away before the sum
    picked = torch.where(support, scores[..., None] * vh[:, :, None], 0.0)
    return picked.sum(3).transpose(1, 2)


def _crosses_documents(node: n.Node) -> bool:
    return any(isinstance(m, n.Documents) for m in n.walk(node))


def _with_states(term: Linear, x: Inputs, y: Tensor, spans: list[Span]) -> tuple[Tensor, Tensor]:
    """Add what the initial states give to y; return the final states."""
    p, acc = x.problem, x.problem.accumulate
    exact = exponent_dtype(p)
    q, k, v = (repeat_heads(t.to(acc), p.nheads, 2) for t in (x.q, x.k, x.v))
    d = _log_decays(x, exact)
    ones = q.new_ones(1, 1, 1).expand(p.batch, p.seqlen, p.nheads)
    slots: Mapping[str, Tensor | None] = {name: x.per_head(name) for name in ("rows", "cols", "log_cols")}
    rows = (ones if slots["rows"] is None else slots["rows"].to(acc)) * (term.sign * x.scale)
    cols = ones if slots["cols"] is None else slots["cols"].to(acc)
    finals, entered = [], torch.zeros_like(y)

    def turn(t: Tensor) -> Tensor:
        return t if term.causal else t.flip(1)

    for s in sorted(spans, key=lambda s: s.state):
        at = (slice(s.row, s.row + 1), slice(s.start, s.stop))
        rho, kappa, total = exponents(term, turn(d[at]))  # [1, t, H, 1 | N]
        kappa = kappa if slots["log_cols"] is None else kappa - turn(slots["log_cols"][at].to(exact))[..., None]
        leave = (total[:, None] - kappa).exp().to(acc)
        final = torch.einsum("bthp,bthn->bhpn", turn(v[at] * cols[at][..., None]), turn(k[at]) * leave)
        if x.initial is not None:
            s0 = x.initial[s.state : s.state + 1].to(acc)
            final = final + total.exp().to(acc)[:, :, None] * s0
            more = torch.einsum("bhpn,bthn->bthp", s0, turn(q[at]) * rho.exp().to(acc))
            entered[at] = turn(more) * rows[at][..., None]
        finals.append(final)
    shape = (0, p.nheads, p.headdim, p.dstate)
    return (y if x.initial is None else y + entered), torch.cat(finals) if finals else y.new_zeros(shape)


def _of_prefixes(term: Linear, x: Inputs) -> Tensor | None:
    """The states after every so many tokens, each from all the tokens before it."""
    p, every = x.problem, Every(x)
    for t in (t for t in range(1, p.seqlen + 1) if every.wants(t)):
        values = {slot: value[:, :t] for slot, value in x.values.items()}
        prefix = replace(x, problem=replace(p, seqlen=t), q=x.q[:, :t], k=x.k[:, :t], v=x.v[:, :t], values=values)
        spans = [Span(row, 0, t, row) for row in range(p.batch)]
        every.put(t, _with_states(term, prefix, prefix.empty_output(), spans)[1])
    return every.states


def _log_decays(x: Inputs, dtype: torch.dtype) -> Tensor:
    """Σ of the scalar and per-channel log decays, [B, T, H, 1 | N]."""
    p = x.problem
    total = torch.zeros(p.batch, p.seqlen, p.nheads, 1, dtype=dtype, device=x.q.device)
    scalar, channel = x.per_head("log_a"), x.per_head("channel")
    total = total if scalar is None else total + scalar.to(dtype)[..., None]
    return total if channel is None else total + channel.to(dtype)
