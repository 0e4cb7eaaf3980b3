"""`ssdops.distributed.ssd`: one sequence split over ranks, with one exchange of states in each pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .. import api, arguments, masks, run
from ..arguments import State
from ..autotune import policy
from ..errors import ShapeError, SsdopsError, UnsupportedError
from ..ir import nodes as n
from ..ir.contraction import Contraction
from ..ir.problem import Problem, check_states, problem_of
from ..masks import Mask
from ..plan import state_terms
from .agree import Saying, Team, team_of
from .decays import Slice
from .settle import is_plain, settled
from .split import Context, Split, forward


@overload
def ssd(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = ..., *, group: dist.ProcessGroup | None = ..., scale: float = ...,
    initial_state: State | None = ..., return_state: Literal[False] = ..., state_dtype: torch.dtype | None = ...,
    backend: str = ..., chunk_size: int | None = ..., tune: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def ssd(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = ..., *, group: dist.ProcessGroup | None = ..., scale: float = ...,
    initial_state: State | None = ..., return_state: Literal[True], state_dtype: torch.dtype | None = ...,
    backend: str = ..., chunk_size: int | None = ..., tune: str | None = ...,
) -> tuple[Tensor, State]: ...  # fmt: skip
def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float = 1.0,
    initial_state: State | None = None,
    return_state: bool = False,
    state_dtype: torch.dtype | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    tune: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    """`ssdops.ssd` of one sequence whose tokens are split over the ranks of a group, each rank with its own slice.

        S_in(r) = A(r−1) ⊙ S_in(r−1) + s(r−1)         A(r) = exp(Σ log_a over the slice),  s(r) = what its tokens leave from 0
        y(r) = ssd(q(r), k(r), v(r), mask(r), initial_state=S_in(r))

    The ranks' slices follow one another, rank 0 first, and need not be of one length. A pass over the slice gives s; one
    collective moves the pairs (A, s), whose size does not depend on seqlen, beside what of y needs no state; a scan over ranks
    combines them. The backward pass does the same from the other end. An anticausal term runs from the last rank to the first.

    Args:
        q, k: `(batch, seqlen of the slice, heads, dstate)`, as for `ssdops.ssd`.
        v: `(batch, seqlen of the slice, heads, headdim)`.
        mask: the slice's: operands per token are those of its tokens (of a mask under `reverse()`, whose operands are read from
            the end, those of the tokens that it is read at); `segment_ids` keep their numbers, with `n_segments` of the whole;
            `cu_seqlens` are those of the whole, less the slice's start, clamped to the slice: `(cu − start).clamp(0, seqlen)`.
        group: the process group; None is that of the whole job. Of one rank, or outside a job, this is `ssdops.ssd`.
        scale, state_dtype, backend, chunk_size, tune: as for `ssdops.ssd`.
        initial_state: of the whole sequence, given on all ranks or on none. Where it enters, it is read: a causal term's on the
            first rank, an anticausal one's on the last. On other ranks its values do not matter, and its gradient is 0.
        return_state: also return the final states of the whole sequence, on every rank.

    Returns:
        The slice of Y; with `return_state`, (Y, state). What is differentiated is the sum of the ranks' losses: run the
        backward pass on every rank, as that exchanges too. Of an operand that ranks share (`retention`'s) each has the part of
        its own tokens, to be summed like the gradients of parameters. There are no second derivatives.

    Raises:
        RankError: on every rank, if one has tensors that do not fit those of the others, cannot go on, or does not come within
            the group's timeout; the message names it and the shapes.
        UnsupportedError: a term that carries no state (window, toeplitz, dense, fenwick, a product with one of them), packed
            documents that do not say how many they are, initial or final states of `trapezoidal`.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 8.2 (sequence parallelism).

    >>> import torch
    >>> from ssdops import distributed, masks
    >>> q, k, v = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 1)
    >>> distributed.ssd(q, k, v, masks.decay(torch.full((1, 3, 1), 0.5).log())).flatten()  # outside a job
    tensor([2.0000, 3.0000, 3.5000])
    """
    mask = masks.causal() if mask is None else mask
    options = Options(scale, state_dtype, backend, chunk_size, tune)
    team = team_of(group)
    if team is None:
        found = options.ssd(q, k, v, mask, initial_state, return_state)
        return found if return_state else found[0]
    given = Given(q, k, v, mask, initial_state, return_state)
    part, lengths, learnt = _agreed(team, given, options)
    mask = settled(mask, part.problem, team, lengths)
    y, states = _run(team, part, given, mask, options, learnt)
    return (y, states) if return_state else y


@dataclass(frozen=True)
class Options:
    """What is no tensor among the arguments of `ssd`."""

    scale: float
    state_dtype: torch.dtype | None
    backend: str
    chunk_size: int | None
    tune: str | None

    def ssd(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, initial: State | None, return_state: bool
    ) -> tuple[Tensor, State]:
        """`ssdops.ssd` with these; the state is empty if it is not wanted."""
        found = api.ssd(
            q, k, v, mask, scale=self.scale, initial_state=initial, return_state=return_state, state_dtype=self.state_dtype,
            backend=self.backend, chunk_size=self.chunk_size, tune=self.tune,
        )  # fmt: skip
        return (found, ()) if isinstance(found, Tensor) else (found[0], found[1])

    @property
    def state_name(self) -> str | None:
        """The dtype of final states, by name."""
        return None if self.state_dtype is None else str(self.state_dtype).removeprefix("torch.")

    def program(self, tree: n.Node) -> tuple[str, tuple[str, ...]]:
        """Of a slice, whose states are in the accumulation dtype, as text; and the names of its operands in order."""
        return arguments.text(tree, True, None, self.backend, self.chunk_size, None, self.tune)

    def of_states(self, tree: n.Node) -> Contraction:
        """Those of a pass that only makes states: no call of the user's, and not worth measuring."""
        return Contraction(
            tree, backend=self.backend, chunk_size=self.chunk_size, tune="off" if self.tune == "off" else "cached"
        )


@dataclass(frozen=True)
class Given:
    """One rank's tensors, as they came."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    initial: State | None
    return_state: bool


def _agreed(team: Team, given: Given, options: Options) -> tuple[Slice, list[int], bool]:
    """Once all ranks have found theirs to be in order and of one call: this rank's part, seqlen of every rank's, and whether
    gradients are wanted."""
    part = None
    try:
        part, saying = _described(team, given, options)
    except SsdopsError as found:  # which the others must hear of before they wait for this rank
        saying = Saying({}, _shapes(given), found)
    exchanges = part is not None and bool(state_terms(given.mask.tree))
    everyone = team.agree(saying, later=exchanges and is_plain(given.mask.tree))
    assert part is not None  # or else all have raised
    return part, [one["own"] for one in everyone], saying.facts["whether gradients are wanted"]


def _shapes(given: Given) -> str:
    operands = given.mask.operands if isinstance(given.mask, Mask) else {}
    named = {"q": given.q, "k": given.k, "v": given.v, **operands}
    return ", ".join(f"{name} {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}" for name, x in named.items())


_known: dict[tuple[Any, ...], tuple[Problem, Saying]] = {}
"""Of calls whose tensors have been found to fit, and what ranks say of them: to work it out takes a fifth of a millisecond."""
_MAX_KNOWN = 4096


def _described(team: Team, given: Given, options: Options) -> tuple[Slice, Saying]:
    """This rank's part of the call, checked, and what must be the same on all ranks."""
    mask = given.mask
    arguments.check_types(given.q, given.k, given.v, mask)
    arguments.check_options(options.scale, given.return_state, options.state_dtype, options.backend)
    arguments.check_counts(options.chunk_size, None)
    if options.tune is not None:
        policy.checked(options.tune, "tune")
    team.check_device(given.q.device)
    q, k, v = arguments.autocast(given.q, given.k, given.v)
    states = arguments.states(given.initial, "initial_state")
    program, names = options.program(mask.tree)
    operands = {name: mask.operands[name] for name in names}
    learnt = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *operands.values(), *states))
    call = run.Call(q, k, v, list(operands.values()), states, program, 1.0)
    key = (call.signature(), options.state_name, given.initial is not None, given.return_state, learnt)
    if key not in _known:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[key] = _checked(given, call, options.state_name, learnt)
    problem, saying = _known[key]
    return Slice(q, k, v, operands, problem, options.of_states(mask.tree), float(options.scale)), saying


def _checked(given: Given, call: run.Call, state_name: str | None, learnt: bool) -> tuple[Problem, Saying]:
    """The call's sizes, if the tensors fit one another and the mask can be split, and what to say of it."""
    tree, terms = given.mask.tree, state_terms(given.mask.tree)
    if (given.initial is not None or given.return_state) and any(isinstance(x, n.Trapezoidal) for x in n.walk(tree)):
        raise UnsupportedError(
            "the state of trapezoidal() holds the last token's k and v, and is not passed into or out of a split sequence; "
            "split the whole of it, or write it as decays with scaled columns"
        )
    p = problem_of(tree, call.q, call.k, call.v, given.mask.operands, call.states, state_name)
    if terms and p.n_states is None:
        raise UnsupportedError(
            "documents that are split over ranks pass states on by their number: documents(segment_ids=…, n_segments=…)"
        )
    if given.initial is not None and len(call.states) != len(terms):
        raise ShapeError(f"initial_state has {len(call.states)} states; this mask carries {len(terms)}, one per linear term")
    check_states(call.states, len(terms), p, given=given.initial is not None and bool(terms))
    return p, Saying(
        {
            "mask": str(tree), "batch": p.batch, "nheads": p.nheads, "headdim": p.headdim, "dstate": p.dstate,
            "states": p.n_states, "accumulation dtype": str(p.accumulate), "device": call.q.device.type,
            "initial_state": given.initial is not None, "return_state": given.return_state,
            "whether gradients are wanted": learnt, "own": p.seqlen,
        },
        _shapes(given),
    )  # fmt: skip


def _run(team: Team, part: Slice, given: Given, mask: Mask, options: Options, learnt: bool) -> tuple[Tensor, State]:
    """State pass, exchange, output pass."""
    terms = state_terms(mask.tree)
    if not terms:  # diagonals alone: tokens do not see one another
        return options.ssd(part.q, part.k, part.v, mask, None, False)
    program, names = options.program(mask.tree)
    initial = arguments.states(given.initial, "initial_state")
    if mask is not given.mask:
        part = replace(part, operands={name: mask.operands[name] for name in names})
    if learnt:
        context = Context(team, part.without_tensors(), terms, program, len(initial), given.return_state, learnt)
        tensors = (part.q, part.k, part.v, *part.operands.values(), *initial)
        y, *finals = Split.apply(context, *tensors)  # type: ignore[no-untyped-call]  # as torch has it
    else:
        y, finals, *_ = forward(Context(team, part, terms, program, len(initial), given.return_state, learnt), part, initial)
    return y, finals[0] if len(finals) == 1 else tuple(finals)
