"""Bands as scans: a window of W tokens, alone or times a scan, costs two scans over blocks of W tokens, whatever W is.

Cut a row into blocks of W tokens. A token at place r of its block sees, with the lags 0 to W − 1,

    its own block up to itself                     a scan that begins anew in every block
    the block before, from place r + 1 on          a scan of that block from its end back, read at the row's place

and exp(ρ_i − κ_j) is the product of what decays between the block's start and row i and of what decays between column j and
the end of its block: sums of logs between two tokens, so that nothing is subtracted, and nothing grows where decays decay.
The second scan has no decay of its own, only these factors on rows and columns; those of a decay per channel are on q and k.
A window that reaches to both sides is two. In packed rows the first scan's documents end where blocks do, too, and of the
second there is left what lies in the one document, if any, that goes on from block to block.

Shapes: n blocks of B tokens (W, or the row if that is shorter), so a scan has batch · n or batch · (n − 1) rows of B tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ir import nodes as n
from ..ir.passes.structure import Structure, structure_of
from ..ir.problem import Problem
from ..ir.resolve import reduce_to, repeat_heads
from ..ir.terms import Linear, Quadratic, Term
from .base import Adder, Config, Cotangents, Gradients, Inputs, Output, Support, Work, exponent_dtype
from .structured import Values

LEAST = 128
"""Tokens of the narrowest side of a window that scans are quicker for than pairs."""
EXACT = (torch.float64, torch.float32)
"""Dtypes whose digits float32 sums of a block's logs would lose."""
SLOTS = ("log_a", "channel", "rows", "cols", "log_cols")
ALL = slice(None)


class Scans(Protocol):
    """What runs scans: a backend, as `Backend` says."""

    def __hash__(self) -> int:
        """By identity."""
        ...

    def configs(self, term: Linear, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """What it can be run with."""
        ...

    def work(self, term: Linear, problem: Problem, config: Config, direction: str) -> Work:
        """What a scan costs."""
        ...

    def forward(self, term: Linear, x: Inputs, config: Config) -> Output:
        """Its Y."""
        ...

    def backward(self, term: Linear, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """Its gradients."""
        ...


@dataclass(frozen=True, slots=True)
class Side:
    """The part of a band on one side of the diagonal.

    Attributes:
        scan: inside a block, its operands named by their slots; across: of the block before.
        width: W, how many tokens a row sees, itself among them (which a strict scan leaves out).
    """

    scan: Linear
    across: Linear
    width: int

    @staticmethod
    def of(scan: Linear, width: int) -> Side:
        """Of a scan in its direction."""
        rows = "rows" if scan.log_a or scan.rows else None
        cols = "cols" if scan.log_a or scan.cols or scan.log_cols else None
        return Side(scan, Linear(not scan.causal, strict=True, rows=rows, cols=cols, sign=scan.sign), width)

    def blocks(self, seqlen: int) -> tuple[int, int]:
        """B and n."""
        size = max(min(self.width, seqlen), 1)
        return size, -(-seqlen // size)


@lru_cache(maxsize=1024)  # one object for each scan, as passes are known by it
def sides(found: Structure) -> tuple[Side, ...]:
    """The sides of a band that runs as scans; none if it is empty, apart from the diagonal, in documents that nobody counted,
    or narrow, where decays are scalar: per channel there is nothing else."""
    low, high, scan, packing = found.low, found.high, found.scan, found.scan.documents
    if low is None or high is None or found.coeffs is not None:
        return ()
    if packing is not None and packing.cu_seqlens is None and packing.n_segments is None:
        return ()
    if low > high or high < 0 or low > int(found.directed):
        return ()
    slots = {name: name for name in SLOTS if getattr(scan, name) is not None}
    documents = None if packing is None else n.Documents(cu_seqlens="documents")
    scan = replace(scan, strict=scan.strict or low == 1, documents=documents, **slots)  # type: ignore[arg-type]  # of operands
    parts = [Side.of(scan, high + 1)]
    if low < 0:
        parts.append(Side.of(replace(scan, causal=False, strict=True), 1 - low))
    wide = scan.channel is not None or min(side.width for side in parts) >= LEAST
    return tuple(parts) if wide else ()


def band_of(term: Term) -> Structure | None:
    """The structure of a term that is a band and runs as scans; None if it is another."""
    found = structure_of(term.mask) if isinstance(term, Quadratic) else None
    return found if found is not None and sides(found) else None


@lru_cache(maxsize=4096)  # likewise
def _problem(p: Problem, rows: int, size: int, q_heads: int, k_heads: int, dtype: torch.dtype) -> Problem:
    return replace(p, batch=rows, seqlen=size, n_states=rows, has_state=False, q_heads=q_heads, k_heads=k_heads, dtype=dtype)


def _inside(p: Problem, rows: int, size: int) -> Problem:
    """Of a scan of so many blocks."""
    return _problem(p, rows, size, p.q_heads, p.k_heads, p.dtype)


@lru_cache(maxsize=4096)  # likewise
def _packed(p: Problem, segments: int) -> Problem:
    """Of a scan of blocks that are one packed row."""
    return replace(p, batch=1, seqlen=p.batch * p.seqlen, n_states=segments)


def _across(side: Side, p: Problem, rows: int, size: int) -> Problem:
    """Of a scan across: with a decay per channel q and k are what it makes of them, in the dtype of sums."""
    return _inside(p, rows, size) if side.scan.channel is None else _problem(p, rows, size, p.nheads, p.nheads, p.accumulate)


@lru_cache(maxsize=4096)  # likewise
def _across_config(backend: Scans, side: Side, p: Problem, config: Config) -> Config:
    """Of the scan across, which need not have the chunks of a decay per channel: those if it has, or else its own."""
    if side.scan.channel is None:
        return config
    size, count = side.blocks(p.seqlen)
    of_scan = _across(side, p, p.batch * (count - 1), size)
    same = backend.configs(side.across, of_scan, config.chunk_size)
    found = backend.configs(side.across, of_scan) if isinstance(same, Support) else same
    assert not isinstance(found, Support)  # supports() has looked
    return next(iter(found))


def work(backend: Scans, found: Structure, p: Problem, config: Config, direction: str) -> Work:
    """What its scans cost, and beside them factors and sums."""
    total, tokens = Work(0.0, 0.0, 0.0, 0.0), float(p.batch * p.seqlen * p.nheads)
    for side in sides(found):
        size, count = side.blocks(p.seqlen)
        inside = _inside(p, p.batch * count, size)
        if side.scan.documents is not None:
            inside = _packed(inside, p.batch * count + (p.n_states or p.batch))
        total = total.plus(backend.work(side.scan, inside, config, direction))
        if count > 1:
            of_scan, across = _across(side, p, p.batch * (count - 1), size), _across_config(backend, side, p, config)
            total = total.plus(backend.work(side.across, of_scan, across, direction))
            total = total.plus(Work(0.0, tokens * (12 + p.headdim), 12 * tokens * p.headdim, 20.0))
    return total


def forward(backend: Scans, found: Structure, x: Inputs, config: Config) -> Tensor:
    """Y."""
    values = Values(found, x)
    blocks = [Blocks(side, values) for side in sides(found)]
    y = blocks[0].forward(backend, config, alone=len(blocks) == 1)
    for side in blocks[1:]:
        y = y.add_(side.forward(backend, config, alone=False))
    return y


def backward(backend: Scans, found: Structure, x: Inputs, config: Config, dy: Tensor) -> Gradients:
    """Gradients of q, k, v and the operands."""
    values = Values(found, x, learnt=True)
    totals: dict[str, Tensor] = {}
    parts = sides(found)
    for side in parts:
        for name, grad in Blocks(side, values, learnt=True).backward(backend, config, dy, alone=len(parts) == 1).items():
            totals[name] = totals[name] + grad if name in totals else grad
    return Gradients(totals["q"], totals["k"], totals["v"], operands=values.operand_gradients(totals))


class Blocks:
    """A side on its tensors, which are cut into blocks, `(batch, n, B, heads, …)`; `learnt` is for a backward pass."""

    def __init__(self, side: Side, values: Values, learnt: bool = False) -> None:
        self.side, self.x, self.problem = side, values.scan, values.scan.problem
        self.size, self.count = side.blocks(self.problem.seqlen)
        self.filling = self.size * self.count - self.problem.seqlen
        self.slots = {name: values.tensors[name].detach() for name in SLOTS if getattr(side.scan, name) is not None}
        later, earlier = (slice(1, None), slice(None, -1)) if side.scan.causal else (slice(None, -1), slice(1, None))
        # of blocks across: those read, and those before them
        self.pairs = {"rows": later, "q": later, "cols": earlier, "k": earlier}
        self.starts = self._starts() if side.scan.documents is not None else None
        self.going_on = {} if self.starts is None else self._going_on(self.starts)
        self.factors: dict[str, Tensor] = {}
        self.leaves = dict(self.slots)  # what factors are made of
        if self.count > 1:
            if "channel" in self.slots:
                self.leaves |= {"q": self.x.q.detach(), "k": self.x.k.detach()}
            for leaf in self.leaves.values():
                leaf.requires_grad_(learnt)
            with torch.set_grad_enabled(learnt):
                self.factors = {name: x[:, self.pairs[name]] for name, x in self._factors().items()}

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

    def _starts(self) -> Tensor:
        """Where documents begin in tokens of all blocks, and where the last ends, `(documents + 1,)`."""
        found, p, row = self.x.boundaries, self.problem, self.size * self.count
        assert found is not None  # there are documents
        early = 0 if self.side.scan.causal else self.filling
        rows = found.long() // max(p.seqlen, 1)
        return (found + rows * (row - p.seqlen) + early).clamp(max=p.batch * row)

    def _going_on(self, starts: Tensor) -> dict[str, Tensor]:
        """Whether a token, as a row or as a column across, is of the document that its block has in common with the other's,
        `(batch, n, B)` each."""
        p, at = self.problem, torch.arange(self.problem.batch * self.count * self.size, device=starts.device)
        at = at.unflatten(0, (p.batch, self.count, self.size))
        left, right = at[..., 0], at[..., -1] + 1  # ends of blocks: the first and the last of a row have no block beyond them
        last = starts.numel() - 1

        def reach(ends: Tensor) -> tuple[Tensor, Tensor]:
            """The document around the end of a block; none of its tokens where one ends there, too."""
            n_before = torch.searchsorted(starts, ends.contiguous(), right=True)
            within = (n_before > 0) & (n_before <= last)
            begin, stop = starts[(n_before - 1).clamp(min=0)], starts[n_before.clamp(max=last)]
            within = within & (begin < ends)
            return torch.where(within, begin, ends)[..., None], torch.where(within, stop, ends)[..., None]

        behind, before = at < reach(left)[1], at >= reach(right)[0]
        rows, cols = (behind, before) if self.side.scan.causal else (before, behind)
        return {"rows": rows, "q": rows, "y": rows, "cols": cols, "k": cols, "v": cols}

    def across(self, name: str, x: Tensor) -> Tensor:
        """`cut` for the scan across: 0 where documents do not go on, so that what is not finite stays in its own."""
        return self.kept(name, self.cut(x))

    def kept(self, name: str, x: Tensor, blocks: slice = ALL) -> Tensor:
        """The same of what is cut already, those blocks of it: what goes into the scan across, and what comes out."""
        if (on := self.going_on.get(name)) is None:
            return x
        on = on[:, blocks]
        return torch.where(on.reshape(*on.shape, *[1] * (x.ndim - 3)), x, 0)

    def _factors(self) -> dict[str, Tensor]:
        """What the scan across has on rows and on columns, and what a decay per channel makes of q and k."""
        scan, p, logs, out = self.side.scan, self.problem, dict[str, Tensor](), dict[str, Tensor]()
        for slot, (of_row, of_col) in {"log_a": ("rows", "cols"), "channel": ("q", "k")}.items():
            if (log := self.slots.get(slot)) is not None:
                d = self.cut(log.to(exponent_dtype(p) if p.dtype in EXACT else p.accumulate))
                logs[of_row] = self.kept(of_row, _sums(d, scan.causal, scan.row_inclusive))
                logs[of_col] = self.kept(of_col, _sums(d, not scan.causal, not scan.col_inclusive))
        if (late := self.slots.get("log_cols")) is not None:
            logs["cols"] = _joint(torch.add, logs.get("cols"), self.across("cols", late.to(p.accumulate)))
        for name in self.pairs:
            if name in logs:
                out[name] = logs[name].exp().to(p.accumulate)
            if name in self.leaves:
                out[name] = _joint(torch.mul, out.get(name), self.across(name, self.leaves[name].to(p.accumulate)))
        return {name: repeat_heads(x, p.nheads, 3) if name in ("q", "k") else x for name, x in out.items()}

    def adds(self, backend: Scans, direction: str) -> bool:
        """Whether the scan across adds to what that inside blocks has made: not where its q and k are others, as per channel,
        nor where not all of it counts, as in documents."""
        if self.side.scan.channel is not None or self.side.scan.documents is not None:
            return False
        of_blocks = _across(self.side, self.problem, self.problem.batch * (self.count - 1), self.size)
        return self.count > 1 and isinstance(backend, Adder) and backend.adds(self.side.across, of_blocks, direction)

    def _inputs(self, problem: Problem, qkv: Iterable[Tensor], values: Mapping[str, Tensor], out: torch.dtype) -> Inputs:
        """Of a scan whose rows are blocks, from tensors of `(batch, blocks, B, heads, …)`."""
        q, k, v = (t.flatten(0, 1) for t in qkv)
        slots = {name: x.detach().flatten(0, 1) for name, x in values.items()}
        return Inputs(problem, q, k, v, slots, {}, None, None, self.x.scale, out, wants_state=False)

    def inside(self, out: torch.dtype) -> Inputs:
        """Of the scan inside blocks: of documents as one packed row, where they end where blocks do, too."""
        x, rows = self.x, self.problem.batch * self.count
        slots = {name: self.cut(slot) for name, slot in self.slots.items()}
        found = self._inputs(_inside(self.problem, rows, self.size), map(self.cut, (x.q, x.k, x.v)), slots, out)
        if self.starts is None:
            return found
        blocks = torch.arange(0, rows * self.size, self.size, device=self.starts.device)
        starts = torch.cat([self.starts, torch.minimum(torch.maximum(blocks, self.starts[0]), self.starts[-1])]).sort().values
        q, k, v = (t.flatten(0, 1)[None] for t in (found.q, found.k, found.v))
        values = {name: t.flatten(0, 1)[None] for name, t in found.values.items()}
        problem, operands = _packed(found.problem, starts.numel() - 1), {"documents": starts}
        documents = self.side.scan.documents
        return replace(found, problem=problem, q=q, k=k, v=v, values=values, operands=operands, documents=documents)

    def beyond(self, out: torch.dtype) -> Inputs:
        """Of the scan across."""
        x, rows, cols = self.x, self.pairs["rows"], self.pairs["cols"]
        values, v = dict(self.factors), self.across("v", x.v)[:, cols]
        problem = _across(self.side, self.problem, self.problem.batch * (self.count - 1), self.size)
        if "q" in values:
            return self._inputs(problem, (values.pop("q"), values.pop("k"), v.to(problem.dtype)), values, out)
        return self._inputs(problem, (self.across("q", x.q)[:, rows], self.across("k", x.k)[:, cols], v), values, out)

    def scans(self, backend: Scans, config: Config, out: torch.dtype) -> Iterator[tuple[Linear, Inputs, Config, slice, slice]]:
        """The scan inside blocks, and that across, each with its blocks of rows and of columns."""
        yield self.side.scan, self.inside(out), config, ALL, ALL
        if self.count > 1:
            across = _across_config(backend, self.side, self.problem, config)
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

    def forward(self, backend: Scans, config: Config, alone: bool) -> Tensor:
        """Y of this side, the only one or not."""
        adds, total = self.adds(backend, "forward"), None
        for scan, x, run, rows, _ in self.scans(backend, config, self._out(adds, alone)):
            if total is None:
                total = self.apart(backend.forward(scan, x, run).y, rows)
            elif adds:
                self._put(total, rows, backend.forward(scan, replace(x, onto=total[:, rows].flatten(0, 1)), run).y)
            else:
                total[:, rows] += self.kept("y", self.apart(backend.forward(scan, x, run).y, rows), rows)
        assert total is not None  # there is a scan inside blocks
        return self.joined(total)

    def backward(self, backend: Scans, config: Config, dy: Tensor, alone: bool) -> dict[str, Tensor]:
        """Gradients of q, k, v and the slots, by name."""
        adds, cotangent = self.adds(backend, "backward"), self.cut(dy)
        totals, through = dict[str, Tensor](), dict[str, Tensor]()
        for scan, x, run, rows, cols in self.scans(backend, config, self._out(adds, alone)):
            onto, blocks = None, {"q": rows, "k": cols, "v": cols}
            if totals and adds:
                q, k, v = (totals[name][:, there].flatten(0, 1) for name, there in blocks.items())
                onto = Gradients(q, k, v)
            read = self.kept("y", cotangent)[:, rows] if totals else cotangent
            grads = backend.backward(scan, x, run, Cotangents(read.reshape(*x.v.shape[:2], *dy.shape[2:]), onto=onto))
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
            through = self._through_factors({name: self.kept(name, x, self.pairs[name]) for name, x in found.items()})
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
    """Σ d, `(batch, n, B, heads, …)`, over the tokens of a block up to each from one of its ends, itself among them or not."""
    d = d.movedim(2, -1).contiguous()  # tokens last: a GPU sums these ten times as fast
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
