"""One side of a band on its tensors: cut into blocks, run by two scans, and put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import lcm

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ir.problem import Problem
from ...ir.resolve import reduce_to, repeat_heads
from ...ir.terms import Linear
from ..base import Adder, Config, Cotangents, Gradients, Inputs, exponent_dtype
from ..structured import Values
from .packing import Packing
from .side import ALL, SLOTS, Factoring, Scans, Side, across_config, across_of, inside_of

EXACT = (torch.float64, torch.float32)
"""Dtypes whose digits float32 sums of a block's logs would lose."""


class Blocks:
    """A side on its tensors, which are cut into blocks, `(batch, n, B, heads, …)`; `learnt` is for a backward pass."""

    def __init__(self, backend: Scans, side: Side, values: Values, learnt: bool = False) -> None:
        self.backend, self.side, self.x, self.problem = backend, side, values.scan, values.scan.problem
        self.size, self.count = side.blocks(self.problem.seqlen)
        self.filling = self.size * self.count - self.problem.seqlen
        self.slots = {name: values.tensors[name].detach() for name in SLOTS if getattr(side.scan, name) is not None}
        later, earlier = (slice(1, None), slice(None, -1)) if side.scan.causal else (slice(None, -1), slice(1, None))
        # of blocks across: those read, and those before them
        self.pairs = {"rows": later, "q": later, "cols": earlier, "k": earlier}
        p, at, causal = self.problem, self.x.boundaries, side.scan.causal
        self.packing = None if at is None else Packing(at, p.batch, p.seqlen, self.size, self.count, causal)
        self.factors: dict[str, Tensor] = {}
        self.leaves = dict(self.slots)  # what factors are made of
        if self.count > 1:
            if "channel" in self.slots:
                self.leaves |= {"q": self.x.q.detach(), "k": self.x.k.detach()}
            for leaf in self.leaves.values():
                leaf.requires_grad_(learnt)
            with torch.set_grad_enabled(learnt):
                self.factors = self._factors()

    def cut(self, x: Tensor) -> Tensor:
        """`(batch | 1, seqlen | 1, heads, …)` in blocks; zeros, which change nothing, fill the last in the scan's direction."""
        p, fill = self.problem, (0, self.filling) if self.side.scan.causal else (self.filling, 0)
        x = x.expand(p.batch, p.seqlen, *x.shape[2:])
        return (pad(x, (0, 0) * (x.ndim - 2) + fill) if self.filling else x).unflatten(1, (self.count, self.size))

    def joined(self, x: Tensor) -> Tensor:
        """The inverse of `cut`."""
        return x.flatten(1, 2).narrow(1, 0 if self.side.scan.causal else self.filling, self.problem.seqlen)

    def apart(self, x: Tensor, blocks: slice) -> Tensor:
        """`(batch · n, …)` of those blocks as `(batch, n, …)`."""
        return x.reshape(self.problem.batch, len(range(self.count)[blocks]), self.size, *x.shape[2:])

    def across(self, name: str, x: Tensor) -> Tensor:
        """`cut` for the scan across."""
        return self.kept(name, self.cut(x))

    def kept(self, name: str, x: Tensor, blocks: slice = ALL) -> Tensor:
        """What goes into the scan across, or has come out of it: what counts of those blocks."""
        return x if self.packing is None else self.packing.kept(name, x, blocks)

    def _factors(self) -> dict[str, Tensor]:
        """What the scan across has on rows and on columns, and what a decay per channel makes of q and k."""
        scan, p, logs, out = self.side.scan, self.problem, dict[str, Tensor](), dict[str, Tensor]()
        if isinstance(self.backend, Factoring) and self.packing is None and self.slots.keys() == {"log_a"}:
            rows, cols = self.backend.block_factors(self.cut(self.slots["log_a"]), scan, p, exact=p.dtype in EXACT)
            return {"rows": rows, "cols": cols}
        for slot, (of_row, of_col) in {"log_a": ("rows", "cols"), "channel": ("q", "k")}.items():
            if (log := self.slots.get(slot)) is not None:
                d = self.cut(log.to(exponent_dtype(p) if p.dtype in EXACT else p.accumulate))
                d = d.movedim(2, -1).contiguous()  # tokens last: a GPU sums these ten times as fast
                logs[of_row] = self.kept(of_row, _sums(d, scan.causal, scan.row_inclusive))
                logs[of_col] = self.kept(of_col, _sums(d, not scan.causal, not scan.col_inclusive))
        if (late := self.slots.get("log_cols")) is not None:
            logs["cols"] = _joint(torch.add, logs.get("cols"), self.across("cols", late.to(p.accumulate)))
        for name in self.pairs:
            if name in logs:
                out[name] = logs[name].exp().to(p.accumulate)
            if name in self.leaves:
                out[name] = _joint(torch.mul, out.get(name), self.across(name, self.leaves[name].to(p.accumulate)))
        out = {name: repeat_heads(x, p.nheads, 3) if name in ("q", "k") else x for name, x in out.items()}
        return {name: x[:, self.pairs[name]] for name, x in out.items()}

    def adds(self, direction: str) -> bool:
        """Whether the scan across adds to what that inside blocks has made: not where its q and k are others, as per channel,
        nor where not all of it counts, as in documents."""
        if self.side.scan.channel is not None or self.side.scan.documents is not None:
            return False
        of_blocks = across_of(self.side, self.problem, self.problem.batch * (self.count - 1), self.size)
        return self.count > 1 and isinstance(self.backend, Adder) and self.backend.adds(self.side.across, of_blocks, direction)

    def _inputs(self, problem: Problem, qkv: Iterable[Tensor], values: Mapping[str, Tensor], out: torch.dtype) -> Inputs:
        """Of a scan whose rows are blocks, from tensors of `(batch, blocks, B, heads, …)`."""
        q, k, v = (t.flatten(0, 1) for t in qkv)
        slots = {name: x.detach().flatten(0, 1) for name, x in values.items()}
        return Inputs(problem, q, k, v, slots, {}, None, None, self.x.scale, out, wants_state=False)

    def inside(self, out: torch.dtype) -> Inputs:
        """Of the scan inside blocks."""
        x, rows = self.x, self.problem.batch * self.count
        slots = {name: self.cut(slot) for name, slot in self.slots.items()}
        found = self._inputs(inside_of(self.problem, rows, self.size), map(self.cut, (x.q, x.k, x.v)), slots, out)
        documents = self.side.scan.documents
        return found if self.packing is None or documents is None else self.packing.in_one_row(found, documents)

    def beyond(self, out: torch.dtype) -> Inputs:
        """Of the scan across."""
        x, rows, cols = self.x, self.pairs["rows"], self.pairs["cols"]
        values, v = dict(self.factors), self.across("v", x.v)[:, cols]
        problem = across_of(self.side, self.problem, self.problem.batch * (self.count - 1), self.size)
        if "q" in values:
            return self._inputs(problem, (values.pop("q"), values.pop("k"), v.to(problem.dtype)), values, out)
        return self._inputs(problem, (self.across("q", x.q)[:, rows], self.across("k", x.k)[:, cols], v), values, out)

    def scans(self, config: Config, out: torch.dtype) -> Iterator[tuple[Linear, Inputs, Config, slice, slice]]:
        """The scan inside blocks, and that across, each with its blocks of rows and of columns."""
        yield self.side.scan, self.inside(out), config, ALL, ALL
        if self.count > 1:
            across = across_config(self.backend, self.side, self.problem, config)
            yield self.side.across, self.beyond(out), across, self.pairs["rows"], self.pairs["cols"]

    def _out(self, adds: bool, alone: bool) -> torch.dtype:
        """What scans are to give: rounded, as sums of two terms are (`run.py`), where there is nothing else to be added."""
        rounded = alone and (self.count == 1 or (adds and self.x.out == torch.bfloat16))
        return self.x.out if rounded else self.problem.accumulate

    def _put(self, total: Tensor, blocks: slice, sums: Tensor) -> None:
        """Some blocks of a total, in place of what they were: nothing to do if that is where the sums were made."""
        there = total[:, blocks]
        if sums.data_ptr() != there.data_ptr():
            there.copy_(self.apart(sums, blocks))

    def forward(self, config: Config, alone: bool) -> Tensor:
        """Y of this side, the only one or not."""
        adds, total = self.adds("forward"), None
        for scan, x, run, rows, _ in self.scans(config, self._out(adds, alone)):
            if total is None:
                total = self.apart(self.backend.forward(scan, x, run).y, rows)
            elif adds:
                self._put(total, rows, self.backend.forward(scan, replace(x, onto=total[:, rows].flatten(0, 1)), run).y)
            else:
                total[:, rows] += self.kept("y", self.apart(self.backend.forward(scan, x, run).y, rows), rows)
        assert total is not None  # there is a scan inside blocks
        return self.joined(total)

    def backward(self, config: Config, dy: Tensor, alone: bool) -> dict[str, Tensor]:
        """Gradients of q, k, v and the slots, by name."""
        adds, cotangent = self.adds("backward"), self.cut(dy)
        totals, through = dict[str, Tensor](), dict[str, Tensor]()
        for scan, x, run, rows, cols in self.scans(config, self._out(adds, alone)):
            onto, blocks = None, {"q": rows, "k": cols, "v": cols}
            if totals and adds:
                q, k, v = (totals[name][:, there].flatten(0, 1) for name, there in blocks.items())
                onto = Gradients(q, k, v)
            read = self.kept("y", cotangent)[:, rows] if totals else cotangent
            grads = self.backend.backward(scan, x, run, Cotangents(read.reshape(*x.v.shape[:2], *dy.shape[2:]), onto=onto))
            of_inputs = {"q": grads.q, "k": grads.k, "v": grads.v}
            found = {name: self.apart(grad, rows) for name, grad in grads.values.items()}
            if not totals:
                totals = {name: self.apart(grad, rows) for name, grad in of_inputs.items()} | found
                continue
            for name, there in blocks.items():
                if adds:
                    self._put(totals[name], there, of_inputs[name])
                elif name in self.factors:
                    found[name] = self.apart(of_inputs[name], there)
                else:
                    totals[name][:, there] += self.kept(name, self.apart(of_inputs[name], there), there)
            through = self._through_factors(found)
        totals = {name: self.joined(grad) for name, grad in totals.items()}
        for name in self.leaves.keys() - self.slots.keys():
            totals[name] = totals[name] + through[name]
        for name, slot in self.slots.items():
            own = reduce_to(totals[name], slot.shape, 2)
            totals[name] = own + through[name] if name in through else own
        return totals

    def _through_factors(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the factors → of what they are made of."""
        factors = {name: x for name, x in self.factors.items() if x.requires_grad}
        if not factors:
            return {}
        given = [grads[name].to(x.dtype) for name, x in factors.items()]
        found = torch.autograd.grad(list(factors.values()), list(self.leaves.values()), given)
        return dict(zip(self.leaves, found, strict=True))


def _sums(d: Tensor, from_left: bool, inclusive: bool) -> Tensor:
    """Σ d over tokens of a block up to each from one of its ends, itself among them or not: of `(batch, n, heads, …, B)`, as
    `(batch, n, B, heads, …)`."""
    sums = d.cumsum(-1) if from_left else d.flip(-1).cumsum(-1).flip(-1)
    if not inclusive:
        sums = pad(sums[..., :-1], (1, 0)) if from_left else pad(sums[..., 1:], (0, 1))
    return sums.movedim(-1, 2)


def _joint(both: Callable[[Tensor, Tensor], Tensor], a: Tensor | None, b: Tensor) -> Tensor:
    """Both, for as many heads as either needs, in the wider dtype; b where there is no a."""
    if a is None:
        return b
    heads = lcm(a.shape[3], b.shape[3])
    return both(repeat_heads(a, heads, 3), repeat_heads(b, heads, 3))
