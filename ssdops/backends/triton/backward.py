"""The backward pass of a linear term: states and their cotangents by blocks, then dQ, dK, dV and the gradients of operands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from ...ir.terms import Linear
from ..base import Config, Cotangents, Gradients, Inputs, reduce_value, share_heads
from .calls import Kernel
from .kernels.diagonal import diagonal_gradients
from .kernels.gradients import KINDS, finish, gradients
from .kernels.tokens import token_gradients
from .launch import Lines, Scan, Side, Sums, alike, ceil_div, contiguous, dense_last, or_else, strides
from .sizes import hopper_stages, padded
from .tile_mask import LEAST

if (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8):  # as far as it has been tried
    from .kernels.hopper import hopper_gradients
else:
    hopper_gradients = None

GRADIENTS, FINISH, TOKENS, HOPPER = Kernel(gradients), Kernel(finish), Kernel(token_gradients), Kernel(hopper_gradients)
DIAGONAL = Kernel(diagonal_gradients)
WHOLE = 16
"""Elements that sizes and strides are multiples of: what Triton looks at to load sixteen bytes at a time."""
ROOM = 2 << 30
"""Bytes of states and their cotangents to keep at once: what takes more comes in turns, by rows of the batch."""
FULL = 2
"""Programs that a multiprocessor gets before the heads of a group are no longer split among more."""


class Results(NamedTuple):
    """What launches leave, by heads: sums over heads and axes that operands share come after. None where none is wanted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    initial: Tensor | None
    log_a: Tensor | None
    rows: Tensor | None
    cols: Tensor | None
    diagonal: Tensor | None

    def gradients(self, x: Inputs, onto: Gradients | None) -> Gradients:
        """Of the tensors that they are results for; those of v have in them what they were to be added to."""
        assert self.q is not None and self.k is not None and self.v is not None  # they always are
        p, values = x.problem, {"log_a": self.log_a, "rows": self.rows, "cols": self.cols, "diagonal": self.diagonal}
        if "log_cols" in x.values:
            assert self.cols is not None  # it is wanted then
            w = x.per_head("cols")
            values["log_cols"] = self.cols if w is None else self.cols * w
        given = {name: grad for name, grad in values.items() if grad is not None and name in x.values}
        q, k = share_heads(self.q, p.q_heads), share_heads(self.k, p.k_heads)
        q, k = (q, k) if onto is None else (q + onto.q, k + onto.k)
        return Gradients(
            q, k, share_heads(self.v, p.v_heads), self.initial,
            {name: reduce_value(grad, x.values[name]) for name, grad in given.items()},
        )  # fmt: skip


def in_whole(x: Inputs, cotangents: Cotangents) -> tuple[Inputs, Cotangents]:
    """Both as they load sixteen bytes at a time: copied, and of odd sizes filled up, unless they do.

    Loads of two bytes are slow, and Triton 3.6 was seen to compile them to stores past the end of shared memory.
    """
    p = x.problem
    headdim, dstate = (ceil_div(size, WHOLE) * WHOLE for size in (p.headdim, p.dstate))
    q, k, v, dy = filled(x.q, dstate), filled(x.k, dstate), filled(x.v, headdim), filled(cotangents.y, headdim)
    if dy is cotangents.y and q is x.q and k is x.k and v is x.v:
        return x, cotangents
    if cotangents.arrive is not None:
        cotangents.arrive()
    initial, final = (
        None if state is None else pad(state, (0, dstate - p.dstate, 0, headdim - p.headdim))
        for state in (x.initial, cotangents.state)
    )
    onto = None if cotangents.onto is None else replace(cotangents.onto, v=filled(cotangents.onto.v, headdim))
    whole = replace(x, problem=replace(p, headdim=headdim, dstate=dstate), q=q, k=k, v=v, initial=initial)
    return whole, Cotangents(dy, final, onto=onto)


def filled(x: Tensor, size: int) -> Tensor:
    """x with its last axis filled up to a size by zeros, and laid out so that it loads sixteen bytes at a time."""
    loads = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step % WHOLE == 0 for step in x.stride()[:-1])
    if x.shape[-1] == size:
        return x if loads else x.clone(memory_format=torch.contiguous_format)
    return pad(x, (0, size - x.shape[-1]))


def in_turns(term: Linear, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
    """Gradients of everything, from any tensors, of as many rows of the batch at a time as there is room for states."""
    if cotangents.arrive is not None:
        cotangents.arrive()
    (whole, given), p = in_whole(x, cotangents), x.problem
    every = Backward(term, whole, config)
    rows = every.rows_at_once
    if rows >= p.batch:
        out = every.backward(given)
    else:
        turns, dv, parts = [slice(first, first + rows) for first in range(0, p.batch, rows)], every.room_for_dv(), []
        for turn in turns:
            y = given.y[turn]
            some = replace(
                whole, problem=replace(whole.problem, batch=len(y)), q=whole.q[turn], k=whole.k[turn], v=whole.v[turn],
                values={name: every.per_token(name)[turn] for name in x.values},
                initial=None if whole.initial is None else whole.initial[turn],
            )  # fmt: skip
            final = None if given.state is None else given.state[turn]
            onto = None if given.onto is None else replace(given.onto, v=given.onto.v[turn])
            parts.append(Backward(term, some, config).backward(Cotangents(y, final, onto=onto), dv[turn])._replace(v=None))
        out = Results(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))._replace(v=dv)
    grads = out.gradients(x, None)
    dq, dk = grads.q[..., : p.dstate], grads.k[..., : p.dstate]
    if cotangents.onto is not None:
        dq, dk = dq + cotangents.onto.q, dk + cotangents.onto.k
    return replace(
        grads, q=dq, k=dk, v=grads.v[..., : p.headdim],
        initial=None if grads.initial is None else grads.initial[..., : p.headdim, : p.dstate],
    )  # fmt: skip


class Backward(Scan):
    """A linear term on its tensors, in reverse."""

    @property
    def kept(self) -> torch.dtype:
        """Of the states of blocks: float16 does not hold them."""
        return torch.bfloat16 if self.dot == torch.bfloat16 else torch.float32

    @property
    def rows_at_once(self) -> int:
        """As many rows of the batch as there is room for states and their cotangents, in even turns; packed rows are one."""
        p = self.problem
        needed = 2 * self.slots_of(self.sizes.block) * p.nheads * p.headdim * p.dstate * self.kept.itemsize
        if self.cu is not None or needed <= ROOM:
            return p.batch
        turns = ceil_div(p.batch, max(ROOM * p.batch // needed, 1))
        return ceil_div(p.batch, turns)

    @property
    def exchanges(self) -> bool:
        """Whether a gradient is wanted that is made of what tokens exchange."""
        return not {"log_a", "rows", "cols", "log_cols"}.isdisjoint(self.x.values)

    def per_token(self, name: str) -> Tensor:
        """An operand that is there."""
        x = self.slot(name)
        assert x is not None
        return x

    def room_for_dv(self, onto: Gradients | None = None) -> Tensor:
        """dV by heads, that of the sum so far where it can be; in float32 if heads share V, as theirs are summed."""
        p = self.problem
        dtype = torch.float32 if p.v_heads < p.nheads else self.x.out
        if onto is not None and onto.v.dtype == dtype and onto.v.is_contiguous():
            return onto.v
        return self.empty(p.batch, p.seqlen, p.nheads, p.headdim, dtype=dtype)

    def backward(self, cotangents: Cotangents, dv: Tensor | None = None) -> Results:
        """Gradients of everything, from tensors that load in whole; dV goes where it is told to."""
        p, x, slots = self.problem, self.x, self.slots_of(self.sizes.block)
        dy, onto = dense_last(cotangents.y), cotangents.onto
        dv = self.room_for_dv(onto) if dv is None else dv
        states, dstates = (self.empty(slots, p.nheads, p.headdim, p.dstate, dtype=self.kept) for _ in range(2))
        dinitial = None if x.initial is None else self.empty(*x.initial.shape)
        prepared = self.prepare(chunks=False, blocks=True, lines=self._kernel()[0] is HOPPER)
        logs = prepared.blocks
        if self.rows and (self.tokens or dinitial is not None):
            v, dout = alike(self.v, dy, p.dtype)
            entering, leaving = contiguous(x.initial), contiguous(cotangents.state)
            if entering is not None and leaving is not None:
                entering, leaving = alike(entering, leaving, torch.float32)
            self.walk(logs, Side(v, entering, None, states), Side(dout, leaving, dinitial, dstates))
        dd = self.empty(p.batch, p.seqlen, p.nheads) if self.slot("diagonal") is not None else None
        apart = self.diagonal and not self._takes_diagonal  # by a kernel of its own
        made, narrow = self.empty(*dv.shape) if apart else dv, onto is None and not apart
        dq, dk, *exchanged = self._gradients(
            logs, prepared.lines, dy, states, dstates, made, None if onto is None else contiguous(onto.v), narrow, dd
        )
        by_token = self._by_token(*exchanged) if self.exchanges else (None, None, None)
        dq, dk = self._with_diagonal(dq, dk, made, dv, dy, onto is None, dd) if apart else (dq, dk)
        return Results(dq, dk, dv, dinitial, *by_token, dd)

    def _gradients(
        self, logs: Sums, lines: Lines, dy: Tensor, states: Tensor, dstates: Tensor, dv: Tensor, onto: Tensor | None,
        narrow: bool, dd: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """dQ and dK by groups of heads that share them, what tokens exchange, ⟨dS, exp(E) S⟩ of blocks; dV on the way.

        Args:
            onto: what dV is added to; narrow: whether nothing is added to dQ and dK any more.
            dd: gradients of a diagonal's values, where the kernel is one that takes the diagonal along.
        """
        p, t, z, x, nothing, slots = self.problem, self.term, self.sizes, self.x, self.q, len(states)
        u, w, wanted = self.slot("rows"), self.slot("cols"), self.exchanges
        scales = not {"rows", "cols", "log_cols"}.isdisjoint(x.values)
        kernel, parts, switches = self._kernel()
        in_place = onto is not None and kernel is HOPPER and dv.dtype == torch.bfloat16 and onto.data_ptr() == dv.data_ptr()
        least = LEAST[self.dot]
        splits = split_heads(p.nheads // self.groups, parts * slots * self.groups, p.target.multiprocessors)
        tokens = (p.batch, p.seqlen)
        dq_states, dk_states = (self.empty(splits, *tokens, self.groups, p.dstate) for _ in range(2))
        dg = self.empty(splits, slots, self.groups, z.block, z.block, dtype=self.dot if splits == 1 else torch.float32)
        dq, dk = (self._by_group(heads, narrow) for heads in (p.q_heads, p.k_heads))
        kinds = 0 if not wanted else KINDS.value if scales else KINDS.value // 2
        sums, through = self.empty(kinds, 2, slots, p.nheads, z.block), self.empty(slots if wanted else 0, p.nheads)
        shares = (p.nheads // p.q_heads, p.nheads // p.k_heads, p.nheads // p.v_heads)
        beside: tuple[Tensor, ...] = ()
        weights: tuple[Tensor, ...] = (or_else(u, nothing), or_else(w, nothing))
        strided: tuple[Tensor | None, ...] = (self.q, self.k, self.v, dy, u, w)
        factors: tuple[float, ...] = ()
        taken, d = self.diagonal and self._takes_diagonal, self.slot("diagonal")
        met = self.empty(splits, slots, self.groups, z.block) if taken else nothing
        if kernel is HOPPER:
            weights, strided, beside = lines[:2], strided[:4], (lines.diagonal, or_else(dd, nothing), met)
            factors = (self.diagonal_scale,)
            switches |= {"DIAGONAL": taken, "VALUES": taken and d is not None}
        if self.tokens and slots:
            self.run(
                kernel, (parts * slots, self.groups, splits),
                (
                    self.q, self.k, self.v, dy, *weights, or_else(self.cu, nothing), *logs,
                    states, dstates, dq_states, dk_states, dv, dg, sums, through, or_else(onto, nothing),
                    *beside,
                ),
                (
                    *self.packing, self.groups, *shares, self.scale, ceil_div(p.nheads, self.groups * splits),
                    *(n for x in strided for n in strides(x)), *factors,
                ),
                BLOCK=z.block, P=p.headdim, BP=max(z.rows_back, least), BN=max(padded(p.dstate), least),
                CAUSAL=t.causal, STRICT=int(t.strict), ROWS=u is not None, COLS=w is not None, SUMS=wanted, ALL_SUMS=scales,
                ONTO=0 if onto is None else 2 if in_place else 1, **switches, num_warps=8,
            )  # fmt: skip
            columns = min(max(padded(p.dstate), least), 64)
            self.run(
                FINISH, (slots, self.groups * ceil_div(p.dstate, columns), 2),
                (self.q, self.k, or_else(self.cu, nothing), dg, dq_states, dk_states, met, dq, dk),
                (*self.packing, self.groups, *shares[:2], splits, *strides(self.q), *strides(self.k)),
                BLOCK=z.block, BN=columns, DIAGONAL=taken, num_warps=8,
                **{name: self.common[name] for name in ("N", "PACKED", "DOT", "PRECISION")},
            )  # fmt: skip
        return dq, dk, sums, through

    def _by_group(self, heads: int, narrow: bool) -> Tensor:
        """Room for dQ or dK by groups of heads, of an operand with so many; in float32 if anything is added to it yet."""
        p = self.problem
        dtype = self.x.out if narrow and heads == self.groups else torch.float32
        return self.empty(p.batch, p.seqlen, self.groups, p.dstate, dtype=dtype)

    def _with_diagonal(
        self, dq: Tensor, dk: Tensor, dv_scan: Tensor, dv: Tensor, dy: Tensor, narrow: bool, dd: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """dQ and dK with what the diagonal adds; dV, of what the scan makes, and the gradient of its values on the way."""
        p, d = self.problem, self.slot("diagonal")
        out = [self._by_group(heads, narrow) for heads in (p.q_heads, p.k_heads)]
        columns = padded(max(p.headdim, p.dstate))
        tile = max(16, min(32, 4096 // columns))
        if self.tokens:
            self.run(
                DIAGONAL, (ceil_div(self.tokens, tile), self.groups, 1),
                (self.q, self.k, self.v, dy, or_else(d, self.q), dq, dk, dv_scan, *out, dv, or_else(dd, self.q)),
                (
                    *self.packing[1:], self.groups, p.nheads // p.q_heads, p.nheads // p.k_heads, p.nheads // p.v_heads,
                    self.diagonal_scale, *(n for x in (self.q, self.k, self.v, dy, d) for n in strides(x)),
                ),
                TILE=tile, P=p.headdim, BP=padded(p.headdim), N=p.dstate, BN=padded(p.dstate), VALUES=d is not None, STAGES=2,
                num_warps=4,
            )  # fmt: skip
        return out[0], out[1]

    @property
    def _takes_diagonal(self) -> bool:
        """Whether the kernel by blocks has the diagonal's gradients in it: where a program has both dQ and dK."""
        kernel, parts, _ = self._kernel()
        return kernel is HOPPER and parts == 2

    def _kernel(self) -> tuple[Kernel, int, dict[str, Any]]:
        """What makes gradients by blocks, into how many parts it takes a block, and the switches that are its own."""
        z, t, c = self.sizes, self.term, self.common
        skips, apart = t.col_inclusive and not t.row_inclusive, self.decays and self.apart
        lines = self.decays + apart + sum(self.slot(name) is not None for name in ("rows", "cols", "diagonal"))
        stages = 0 if hopper_gradients is None or skips else hopper_stages(self.problem, self.dot, lines)
        if stages:
            switches = {name: c[name] for name in ("N", "DECAY", "PACKED")}
            switches |= {"APART": apart, "STAGES": stages}
            return HOPPER, 3 if self.problem.dstate > 128 else 2, switches
        ahead = dict(zip(("STATE_STAGES", "VALUE_STAGES", "PAIR_STAGES"), z.stages_back, strict=True))
        return GRADIENTS, 3 * (z.block // z.tile) + 1, {
            **c, **ahead, "TILE": z.tile, "SKIP": int(skips), "NORMALIZE": self.dot == torch.float16,
        }  # fmt: skip

    def _by_token(self, sums: Tensor, through: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of log_a, rows and cols, of which log_cols has one too."""
        p, x, t, z, nothing, slots = self.problem, self.x, self.term, self.sizes, self.q, len(through)
        shape = (p.batch, p.seqlen, p.nheads)
        log_a = self.empty(*shape) if "log_a" in x.values else None
        rows = self.empty(*shape) if "rows" in x.values else None
        cols = None if {"cols", "log_cols"}.isdisjoint(x.values) else self.empty(*shape)
        heads = min(32, padded(p.nheads))
        if self.tokens and slots:
            self.run(
                TOKENS, (slots, ceil_div(p.nheads, heads), 1),
                (
                    sums, through, or_else(self.cu, nothing),
                    or_else(log_a, nothing), or_else(rows, nothing), or_else(cols, nothing),
                ),
                self.packing, BLOCK=z.block, HEADS=heads, CAUSAL=t.causal, ROW_INCLUSIVE=t.row_inclusive,
                COL_INCLUSIVE=t.col_inclusive, DLOG_A=log_a is not None, DU=rows is not None, DW=cols is not None,
                PACKED=self.cu is not None, JOINT=self._kernel()[0] is HOPPER, num_warps=4,
            )  # fmt: skip
        return log_a, rows, cols


def split_heads(heads: int, programs: int, multiprocessors: int) -> int:
    """Into how many parts heads are taken, each by as many programs, so that these fill the device; no part is empty."""
    wanted = min(max(FULL * multiprocessors // max(programs, 1), 1), heads)
    return ceil_div(heads, ceil_div(heads, wanted))
