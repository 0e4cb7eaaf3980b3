"""What a backend is: it says whether it can run a term, and why not, and runs it forward and backward.

A backend is handed plain data (a term, a problem, a config, tensors) and knows nothing of masks as users write them, of
autograd, or of other backends. Tensors of one term come as `Inputs`; cotangents go in and gradients come out by slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..ir import nodes as n
from ..ir.operands import Operand, names
from ..ir.problem import Problem
from ..ir.resolve import Span, canonical, document_boundaries, document_spans, reduce_to, repeat_heads, resolve
from ..ir.terms import Linear, Term, factored_operands, term_operands


@dataclass(frozen=True, slots=True)
class Support:
    """Whether something can be done; if not, why, and what to do instead."""

    ok: bool
    reason: str = ""

    @staticmethod
    def yes() -> Support:
        """It can."""
        return Support(True)

    @staticmethod
    def no(reason: str) -> Support:
        """It cannot, and this is why."""
        return Support(False, reason)


@dataclass(frozen=True, slots=True)
class Config:
    """A backend's free choices for one term.

    Attributes:
        chunk_size: tokens of a chunk, for backends that have chunks.
        segments: parts of the sequence that are scanned side by side, each from what the ones before it leave.
    """

    chunk_size: int | None = None
    segments: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """What a term costs, for the cost model.

    Attributes:
        matmul_flops, elementwise: arithmetic; bytes: touched; launches: of kernels.
        steps: how many chunks follow one another where each waits for the one before, at dstate 128.
    """

    matmul_flops: float
    elementwise: float
    bytes: float
    launches: float
    steps: float = 0.0

    def times(self, factor: float) -> Work:
        """So many times as much of everything."""
        return Work(*(factor * x for x in astuple(self)))

    def plus(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass  # not frozen, as one is made at every call and freezing costs two microseconds
class Inputs:
    """The tensors of one term.

    Attributes:
        q, k: `(batch, seqlen, heads, dstate)`; v: `(batch, seqlen, heads, headdim)`; heads as given, never repeated.
        values: slot → operand in canonical axes (`ir/resolve.py`); for a backend that is `factored`, `dt` and `A` too.
        operands: name → tensor as the user gave it, for terms that run by entries.
        documents: how rows are packed, or None where every batch row is one document.
        initial: initial states `(n_states, nheads, headdim, dstate)` or None.
        scale: the factor of the whole contraction.
        out: the dtype that Y, and gradients of q, k and v, are needed in; a backend may give a wider one.
        wants_state: whether anyone will read the final states.
        onto: what the terms before have made, `(batch, seqlen, nheads, headdim)` in `out` or in the accumulation dtype: Y is to
            be the sum with this one; None is 0. Only an `Adder` is given it, and may make Y of it in place.
    """

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    values: Mapping[str, Tensor]
    operands: Mapping[str, Tensor]
    documents: n.Documents | None
    initial: Tensor | None
    scale: float
    out: torch.dtype
    wants_state: bool
    onto: Tensor | None = None

    @cached_property
    def spans(self) -> list[Span] | None:
        """The documents, read on the host; None where every batch row is one."""
        if self.documents is None:
            return None
        return document_spans(self.documents, self.operands, self.problem.batch, self.problem.seqlen)

    @cached_property
    def boundaries(self) -> Tensor | None:
        """Where documents begin and end in tokens of the whole batch, `(n_states + 1,)`, on the device; None as above."""
        if self.documents is None:
            return None
        return document_boundaries(self.documents, self.operands, self.problem.batch, self.problem.seqlen)

    def per_head(self, slot: str) -> Tensor | None:
        """The slot as `(batch, seqlen, nheads, …)`, a view wherever heads need not be repeated; None if absent."""
        if slot not in self.values:
            return None
        p, x = self.problem, repeat_heads(self.values[slot], self.problem.nheads, 2)
        return x.expand(p.batch, p.seqlen, *x.shape[2:])

    def empty_output(self) -> Tensor:
        """Room for Y; zeros where documents leave tokens out."""
        p = self.problem
        covered = self.spans is None or sum(s.stop - s.start for s in self.spans) == p.batch * p.seqlen
        make = torch.empty if covered else torch.zeros
        return make((p.batch, p.seqlen, p.nheads, p.headdim), dtype=p.accumulate, device=self.q.device)


@dataclass(slots=True)  # not frozen, as one is made at every call
class Output:
    """What a term gives.

    Attributes:
        y: `(batch, seqlen, nheads, headdim)` in `Inputs.out` or wider.
        state: the final states of a linear term.
        saved: what the backend wants to see again in its backward pass, if it was asked to save.
        every: the states of a linear term after every `Problem.state_every` tokens, `(batch, count, …)`, if that is set.
    """

    y: Tensor
    state: Tensor | None = None
    saved: tuple[Tensor, ...] = ()
    every: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """A forward pass of a linear term, up to where it needs the states that enter.

    Attributes:
        state: what its tokens leave from no state, `(n_states, nheads, headdim, dstate)` in the accumulation dtype.
        decay: the factor on a state that passes all tokens, `(n_states, nheads, 1, 1)`; None: not worked out.
        finish: the rest of the pass, given whether to save and what to call before it reads `Inputs.initial`.
    """

    state: Tensor
    decay: Tensor | None
    finish: Callable[[bool, Callable[[], None]], Output]


@dataclass(frozen=True)
class Cotangents:
    """What a backward pass starts from.

    Attributes:
        y: the cotangent of Y.
        state: the cotangent of the final states; None is 0.
        saved: what `forward` saved, if anything.
        arrive: fills `state`, which is contiguous and in the accumulation dtype then; to be called before it is read. None: it
            is there. Only a `Starter` is given one, and may call it more than once.
        onto: the gradients by the terms before, in the accumulation dtype or in `out`: those of q, k and v are to be the sums
            with this one's, as for `Inputs.onto`, and in place where they can be.
    """

    y: Tensor
    state: Tensor | None = None
    saved: Sequence[Tensor] = ()
    arrive: Callable[[], None] | None = None
    onto: Gradients | None = None


@dataclass
class Gradients:
    """Gradients of one term's inputs.

    Attributes:
        q, k, v: shaped like the inputs, in `Inputs.out` or wider.
        initial: of the initial states, or None where there are none.
        values: slot → gradient, shaped like `Inputs.values`.
        operands: name → gradient, from terms that run by entries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    initial: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    operands: dict[str, Tensor] = field(default_factory=dict)


class Backend(Protocol):
    """A way to run terms. Stateless; one instance serves every call.

    Attributes:
        factored: whether a per-channel decay dt · A comes as its factors, in slots `dt` and `A`, instead of multiplied out;
            absent is False.
        compiles: whether its first calls compile programs, which are kept for other processes; absent is False.
    """

    name: str
    factored: bool
    compiles: bool

    def supports(self, term: Term, problem: Problem) -> Support:
        """Whether this backend runs the term, forward and backward."""
        ...

    def configs(self, term: Term, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """The configurations worth considering, the default first; of the chunk size asked for, or why it has none."""
        ...

    def work(self, term: Term, problem: Problem, config: Config, direction: str = "forward") -> Work:
        """What a forward pass costs; with direction "backward", what it and the backward pass cost together."""
        ...

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """Run the term; with `save`, at liberty to keep what spares the backward pass work."""
        ...

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """Gradients of everything that the term read."""
        ...


@runtime_checkable
class Structured(Protocol):
    """A backend that says more of how it runs terms than that it does."""

    def has_chunks(self, term: Term) -> bool:
        """Whether a term that is no scan runs in chunks, so that a chunk size means something to it."""
        ...

    def growth(self, term: Term) -> str | None:
        """How a term's cost grows with seqlen, "T log T" or the like; None where it is the usual way."""
        ...


@runtime_checkable
class Compiler(Protocol):
    """A backend that compiles for seconds where it finds no programs of earlier calls."""

    def ready(self, term: Term, problem: Problem, config: Config, direction: str) -> Support:
        """Whether a first call would find them, told at once; if not, what compiles them."""
        ...


@runtime_checkable
class Summarizer(Protocol):
    """A backend that has a pass for the final states of a linear term alone, which costs less than `forward`."""

    def final_state(self, term: Linear, x: Inputs, config: Config) -> Tensor:
        """The final states, `(n_states, nheads, headdim, dstate)`."""
        ...


@runtime_checkable
class Starter(Protocol):
    """A backend whose passes begin before the states that enter are there, as do those of a slice of a split sequence."""

    def begin(self, term: Linear, x: Inputs, config: Config) -> Begun | None:
        """A forward pass as far as it goes without `x.initial`; None: not of this term."""
        ...


@runtime_checkable
class Adder(Protocol):
    """A backend that adds to what other terms of a mask have made: a sum apart reads and writes all of it once more."""

    def adds(self, term: Term, problem: Problem, direction: str) -> bool:
        """Whether a pass of the term, "forward" or "backward", takes `Inputs.onto` or `Cotangents.onto`."""
        ...

    def takes_diagonal(self, term: Linear, problem: Problem) -> bool:
        """Whether the backend runs this scan with a diagonal beside it as one term (`Linear.diagonal`)."""
        ...


@dataclass(slots=True)  # not frozen, as one is made at every call and freezing costs two microseconds
class StepInputs:
    """The tensors of a decode step: what a mask's terms read, and room for what they give.

    Attributes:
        q, k: `(batch, tokens, heads, dstate)`; v: `(batch, tokens, heads, headdim)`; heads as given, never repeated.
        values: for each term, slot → operand in canonical axes; a per-channel decay in factors comes as `dt` and `A`.
        before: the state of each scan, `(batch, nheads, headdim, dstate)`; empty is zero. With slots, a pool for each.
        after: room for the new states; with slots, the pools again.
        every: room for the state of each scan after every token, `(batch, tokens, nheads, headdim, dstate)`; empty: not wanted.
        slots: where in its pool the state of each row is, `(batch,)`; a row whose slot is out of range gives 0.
        y: room for Y, `(batch, tokens, nheads, headdim)`, contiguous.
        scale: the factor of the whole contraction.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    values: Sequence[Mapping[str, Tensor]]
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    every: Sequence[Tensor]
    slots: Tensor | None
    y: Tensor
    scale: float


@runtime_checkable
class Stepper(Protocol):
    """A backend that has a kernel for decoding: a few tokens of a whole mask at once, states in place or anew."""

    name: str

    def supports_step(self, terms: tuple[Term, ...], problem: Problem) -> Support:
        """Whether the kernel takes the sum of these terms; `problem.seqlen` counts the tokens of a step."""
        ...

    def step(self, terms: tuple[Term, ...], problem: Problem, x: StepInputs) -> None:
        """Fill the rooms of x."""
        ...


def step_values(term: Term, problem: Problem, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The operand expressions of a term, evaluated for a step: nothing runs for those that are plain names."""
    slots = factored_operands(term).items()
    return {slot: resolve(x, _widened(slot, x, operands, problem), axes, problem.seqlen) for slot, (x, axes) in slots}


def bind(
    term: Term,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Mapping[str, Tensor],
    initial: Tensor | None,
    scale: float,
    out: torch.dtype | None = None,
    wants_state: bool = True,
    factored: bool = False,
) -> Inputs:
    """Evaluate the operand expressions of a term (differentiable in the operands).

    `out` None is the accumulation dtype; `factored` as for `Backend`.
    """
    values = {
        slot: canonical(operands[x], axes)
        if isinstance(x, str)  # which `resolve` knows as well, and gets to later
        else resolve(x, _widened(slot, x, operands, problem), axes, problem.seqlen)
        for slot, (x, axes) in (factored_operands if factored else term_operands)(term).items()
    }
    documents = term.documents if isinstance(term, Linear) else None
    out = problem.accumulate if out is None else out
    return Inputs(problem, q, k, v, values, operands, documents, initial, scale, out, wants_state)


def _widened(slot: str, x: Operand, operands: Mapping[str, Tensor], problem: Problem) -> Mapping[str, Tensor]:
    """The operands of an expression in the dtype to reckon in: a sum of bfloat16 logs is not rounded to bfloat16."""
    if isinstance(x, str):
        return operands
    dtype = exponent_dtype(problem) if slot in ("log_a", "channel", "log_cols") else problem.accumulate
    return {name: operands[name].to(dtype) for name in names(x)}


BOTH = 3.0
"""How many times the work of a forward pass both take together, where nothing is known more exactly."""


def without_chunks(name: str, chunk_size: int | None) -> Support | None:
    """Why a backend that has no chunks cannot run with the chunk size asked for; None if none was."""
    return None if chunk_size is None else Support.no(f"'{name}' has no chunks, and chunk_size={chunk_size} was asked for")


def reduce_value(grad: Tensor, value: Tensor) -> Tensor:
    """A per-head gradient summed to the shape of the value it belongs to."""
    return reduce_to(grad, value.shape, 2)


def share_heads(grad: Tensor, heads: int) -> Tensor:
    """`(batch, seqlen, nheads, dim)` summed over the heads that share an operand."""
    return reduce_to(grad, (*grad.shape[:2], heads, grad.shape[3]), 2)


def exponent_dtype(problem: Problem) -> torch.dtype:
    """The dtype for sums of logs: float64, as differences of float32 sums lose what slow decays are made of."""
    return torch.float32 if problem.target.device == "mps" else torch.float64


def reject_scan(term: Term, name: str) -> Support | None:
    """Why a linear backend cannot run a term that is no scan; None if it is one or a diagonal."""
    if isinstance(term, Linear) or not hasattr(term, "mask"):
        return None
    if (op := next((m.op for m in n.walk(term.mask) if isinstance(m, n.Registered)), None)) is not None:
        return Support.no(
            f"'{name}' runs semiseparable scans, and of {op} only the entries are known; give its class a lower() that "
            "makes it of scans; 'naive' runs it as it is"
        )
    kinds = sorted({type(m).__name__.lower() for m in n.walk(term.mask) if isinstance(m, n.Leaf)})
    return Support.no(f"'{name}' runs semiseparable scans, and {' * '.join(kinds)} is not one here; 'naive' runs any mask")
