"""The adjoint program: gradients as contractions, differentiable to any order (DESIGN.md, decision 1).

What a backend's `backward` computes in one go is written here from contractions and elementwise torch alone, so that it can be
differentiated again. It runs where someone asks for a graph of the gradient (`create_graph=True`), and is what the fused
backward passes are tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from .backends.base import Inputs, bind, reduce_value, share_heads
from .backends.naive import contract_by_entries
from .backends.scan import diagonal_forward, exponent_gradient
from .ir import nodes as n
from .ir.contraction import Contraction
from .ir.passes.adjoint import ADJOINTS
from .ir.resolve import document_spans, repeat_heads, resolve, segment_ids
from .ir.terms import Diagonal, Linear
from .plan import terms_of
from .run import Call

Runner: TypeAlias = Callable[[Call], list[Tensor]]


def differentiable_backward(run: Runner, call: Call, cotangents: list[Tensor]) -> list[Tensor | None]:
    """Gradients of q, k, v, the operands and the states, as a differentiable function of all of them.

    A mask that is one bare scan is differentiated by the adjoint contractions; any other is first written as bare scans with
    elementwise torch around them, which autograd takes apart.

    Args:
        run: `ssdops::forward`, differentiable.
    """
    if call.contraction.state_every is not None:  # the states between take no gradient
        call = replace(call, program=str(replace(call.contraction, state_every=None)))
    terms = terms_of(call.contraction.mask)
    if len(terms) == 1 and isinstance(terms[0], Linear) and _is_bare(terms[0]):
        return _Bare(run, call, terms[0]).gradients(cotangents)
    with torch.enable_grad():
        # views, so that a tensor passed twice is two inputs
        tensors = (call.q, call.k, call.v, *call.operands, *call.states)
        inputs = [x.view_as(x) if x.is_floating_point() else x for x in tensors]
        q, k, v, *rest = inputs
        count = len(call.operands)
        out = _composed(run, replace(call, q=q, k=k, v=v, operands=rest[:count], states=rest[count:]))
    wanted = [x for x in inputs if x.requires_grad]
    pairs = [(y, dy) for y, dy in zip(out, cotangents, strict=True) if y.requires_grad]
    grads = torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], create_graph=True, allow_unused=True)
    found = {id(x): grad for x, grad in zip(wanted, grads, strict=True)}
    return [found.get(id(x)) for x in inputs]


def _is_bare(term: Linear) -> bool:
    """One scan over named operands, without scales: what the adjoint contractions are written for."""
    plain = all(isinstance(x, str | None) for x in (term.log_a, term.log_cols))
    documents = term.documents
    plain = plain and (documents is None or isinstance(documents.cu_seqlens or documents.segment_ids, str))
    return plain and term.channel is None and term.rows is None and term.cols is None and term.sign == 1


# --- any mask, as bare scans ----------------------------------------------------------------------------------------


def _composed(run: Runner, call: Call) -> list[Tensor]:
    """The outputs of `ssdops::forward`, from bare scans and differentiable torch."""
    problem, contraction = call.problem(), call.contraction
    shape = (problem.batch, problem.seqlen, problem.nheads, problem.headdim)
    total = torch.zeros(shape, dtype=problem.accumulate, device=call.q.device)
    finals: list[Tensor] = []
    remaining, named = list(call.states), call.named
    for term in terms_of(contraction.mask):
        initial = remaining.pop(0) if isinstance(term, Linear) and remaining else None
        x = bind(term, problem, call.q, call.k, call.v, named, initial, call.scale)
        if isinstance(term, Linear) and term.channel is None:
            y, *final = _scanned(run, contraction, term, x)
        elif isinstance(term, Diagonal):
            y, final = diagonal_forward(term, x), []
        else:
            y, state = contract_by_entries(term, x)
            final = [] if state is None or not contraction.return_state else [state]
        total = total + y.to(problem.accumulate)
        finals += [state.to(problem.state_dtype) for state in final]
    return [total.to(problem.dtype), *finals]


def _scanned(run: Runner, contraction: Contraction, term: Linear, x: Inputs) -> list[Tensor]:
    """One linear term: its bare scan, with the column scale folded into v and the row scale into y."""
    operands = {slot: value for slot, value in x.values.items() if slot in ("log_a", "log_cols")}
    documents = None
    if term.documents is not None:
        if term.documents.cu_seqlens is not None:
            operands["cu_seqlens"] = resolve(term.documents.cu_seqlens, x.operands, n.BOUNDARIES, x.problem.seqlen)
            documents = n.Documents(cu_seqlens="cu_seqlens")
        else:
            operands["segment_ids"] = segment_ids(term.documents, x.operands, x.problem.seqlen)
            documents = n.Documents(segment_ids="segment_ids", n_segments=term.documents.n_segments)
    bare = replace(
        term, rows=None, cols=None, sign=1, documents=documents,
        log_a=None if term.log_a is None else "log_a", log_cols=None if term.log_cols is None else "log_cols",
    )  # fmt: skip
    tree = bare.node()
    v, cols, rows = x.v, x.per_head("cols"), x.per_head("rows")
    if cols is not None:
        v = (repeat_heads(v, x.problem.nheads, 2) * cols[..., None]).to(v.dtype)
    program = str(replace(contraction, mask=tree))
    initial = [] if x.initial is None else [x.initial]
    y, *final = run(Call(x.q, x.k, v, [operands[name] for name in n.operand_names(tree)], initial, program, x.scale))
    y = y if rows is None else y * rows[..., None]
    y = repeat_heads(y, x.problem.nheads, 2)  # the bare scan may have fewer heads than the scales around it
    states = [repeat_heads(s, x.problem.nheads, 1) for s in final]
    return [y if term.sign == 1 else -y, *states]


# --- one bare scan, by the adjoint contractions ---------------------------------------------------------------------


class _Bare:
    """Y = scale · (L ∘ QKᵀ)V with L one bare scan, and its gradients."""

    def __init__(self, run: Runner, call: Call, term: Linear) -> None:
        self.run, self.contraction, self.term = run, call.contraction, term
        self.inputs = {"q": call.q, "k": call.k, "v": call.v}
        self.named, self.states, self.scale = call.named, call.states, call.scale
        self.problem = call.problem()

    def contract(
        self, mask: n.Node, q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, return_state: bool
    ) -> list[Tensor]:
        """A contraction with another mask over the same operands."""
        program = str(replace(self.contraction, mask=mask, return_state=return_state, state_dtype=None))
        operands = [self.named[name] for name in n.operand_names(mask)]
        return self.run(Call(q, k, v, operands, [] if initial is None else [initial], program, 1.0))

    def gradients(self, cotangents: list[Tensor]) -> list[Tensor | None]:
        """Of q, k, v, the operands and the states."""
        p, acc = self.problem, self.problem.accumulate
        dy = (cotangents[0] * self.scale).to(cotangents[0].dtype)
        dfinal = cotangents[1].to(acc) if len(cotangents) > 1 else None
        initial = self.states[0].to(acc) if self.states else None
        parts, heads = {**self.inputs, "dy": dy}, {"q": p.q_heads, "k": p.k_heads, "v": p.v_heads}
        grads: dict[str, Tensor] = {}
        dinitial = None
        for a in ADJOINTS:
            entering = dfinal if a.transposed else initial
            if entering is not None and a.of != "v":
                entering = entering.transpose(-1, -2)
            leaves = a.of == "v" and bool(self.states)
            out = self.contract(a.mask(self.contraction.mask), parts[a.q], parts[a.k], parts[a.v], entering, leaves)
            grads[a.of] = out[0]
            dinitial = out[1] if leaves else dinitial
        doperands = self._operand_gradients(dy.to(acc), grads["v"].to(acc), dfinal, initial)
        inputs = [share_heads(grads[name], heads[name]).to(x.dtype) for name, x in self.inputs.items()]
        dstates = [] if dinitial is None else [dinitial.to(self.states[0].dtype)]
        return [*inputs, *(doperands.get(name) for name in self.named), *dstates]

    def _operand_gradients(self, dy: Tensor, dv: Tensor, dfinal: Tensor | None, initial: Tensor | None) -> dict[str, Tensor]:
        """d ρ_t = ⟨dY_t, Y_t⟩, d κ_t = −⟨V_t, dV_t⟩, dE = ⟨dS, S⟩ at the end: with this term's own Y and dV."""
        term, p = self.term, self.problem
        out: dict[str, Tensor] = {}
        along = (repeat_heads(self.inputs["v"].to(p.accumulate), p.nheads, 2) * dv).sum(-1)  # [B, T, H]
        if isinstance(term.log_cols, str):
            out[term.log_cols] = self._to_operand(along, term.log_cols)
        if isinstance(term.log_a, str):
            q, k, v = self.inputs.values()
            y, *final = self.contract(self.contraction.mask, q, k, v, initial, dfinal is not None)
            across = (dy * y).sum(-1)
            total = None if dfinal is None else (dfinal * final[0]).sum((-1, -2))  # [states, H]
            grad = self._to_operand(self._log_decay_gradient(across, along, total), term.log_a)
            out[term.log_a] = out[term.log_a] + grad if term.log_a in out else grad
        return out

    def _log_decay_gradient(self, across: Tensor, along: Tensor, total: Tensor | None) -> Tensor:
        """Reversed cumulative sums inside each document, in local time; [B, T, H]."""
        p = self.problem
        spans = document_spans(self.term.documents, self.named, p.batch, p.seqlen)
        rows: list[list[Tensor]] = [[] for _ in range(p.batch)]
        for s in sorted(spans, key=lambda s: (s.row, s.start, s.stop)):
            if s.start == s.stop:
                continue
            drho, dkappa = across[s.row, s.start : s.stop][None], -along[s.row, s.start : s.stop][None]
            dtotal = torch.zeros_like(drho[:, 0]) if total is None else total[s.state][None]
            if self.term.causal:
                rows[s.row].append(exponent_gradient(self.term, drho, dkappa, dtotal))
            else:
                local = exponent_gradient(self.term, drho.flip(1), dkappa.flip(1), dtotal)
                rows[s.row].append(local.flip(1))
        return torch.cat([torch.cat(row, 1) for row in rows]) if p.seqlen and p.batch else across

    def _to_operand(self, grad: Tensor, name: str) -> Tensor:
        value = resolve(name, self.named, n.TOKEN, self.problem.seqlen)
        return reduce_value(grad, value).reshape(self.named[name].shape).to(self.named[name].dtype)
