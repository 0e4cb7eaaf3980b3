"""The planner: (contraction, problem) → Plan, with every rejection and its reason.

For each term of the normal form the planner finds what could run it, and takes one of these (`autotune/choose.py`). No tensor
is touched here, and nothing is run but, if the mode says so, the tuner's process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NoReturn

import torch

from . import config as environment
from .autotune import policy, shape_log
from .autotune.choose import Candidate, Choice, choose, why_not
from .autotune.cost import predict
from .autotune.place import place_of
from .autotune.record import Key
from .autotune.tuner import tune_once
from .autotune.worker import Worker
from .autotune.workload import Workload
from .backends import registry
from .backends.base import Adder, Backend, Compiler, Config, Stepper, Structured, Support
from .errors import ShapeError, UnsupportedError
from .ir import nodes as n
from .ir.contraction import Contraction
from .ir.passes.normalize import normalize
from .ir.passes.structure import structure_of
from .ir.problem import Problem, Target
from .ir.terms import Diagonal, Linear, Quadratic, Term
from .steps import Plan, Rejection, Step

TRIALS = "ssdops.trial"
"""The module of the process in which candidates are tried: it stands above this one, and is known by its name alone."""


@lru_cache(maxsize=4096)
def terms_of(mask: n.Node) -> tuple[Term, ...]:
    """The normal form of a mask, remembered."""
    return normalize(mask)


@lru_cache(maxsize=4096)
def state_terms(mask: n.Node) -> tuple[Linear, ...]:
    """The scans of a mask, in the order in which their states are passed to operators (`carry.py` for what users pass).

    Raises:
        UnsupportedError: a part of the mask has no recurrence.
    """
    terms = terms_of(mask)
    if any(isinstance(m, n.Registered) for m in n.walk(mask)) and _holds_trapezoid(n.lowered(mask)):
        raise UnsupportedError(
            f"{mask} is made of trapezoidal(), whose scans run a token ahead; write trapezoidal() itself to carry its state"
        )
    for term in terms:
        if isinstance(term, Quadratic):
            raise UnsupportedError(f"{term.mask} has no recurrence here, so it carries no state between calls")
    return tuple(t for t in terms if isinstance(t, Linear))


def _holds_trapezoid(mask: n.Node) -> bool:
    return any(isinstance(m, n.Trapezoidal) for m in n.walk(mask))


def plan(contraction: Contraction, problem: Problem, direction: str = "forward", dry: bool = False) -> Plan:
    """Choose a backend and a configuration for every term.

    Args:
        direction: one of `autotune.workload.DIRECTIONS`.
        dry: whether to measure nothing, whatever the mode.

    Raises:
        UnsupportedError: the backend named by the user cannot run a term; the message says why, and which can.
        UnknownBackendError: no backend has that name.
        ShapeError: chunk_size or state_every is below 1.
        TuningError: there is no such tuning mode.
    """
    _check_options(contraction)
    question = Question(contraction, problem, direction, dry)
    return Plan(_along(tuple(_step(term, question) for term in terms_of(contraction.mask)), question))


def stepper(contraction: Contraction, problem: Problem) -> Stepper | None:
    """The backend whose decode kernel takes the whole mask, or None: a step is a short sequence then, and planned as one.

    With "auto" that is the first that can, on GPUs: elsewhere a kernel is only interpreted, for those who name its backend.
    Nothing is tuned here: a kernel reads and writes each state once in one launch, and has no configurations. A sequence
    gathers states, and takes several launches.
    """
    auto = contraction.backend == "auto"
    if auto and problem.target.device == "cpu":
        return None
    terms = terms_of(contraction.mask)
    for name in registry.automatic() if auto else (contraction.backend,):
        backend = _backend(name)
        if isinstance(backend, Stepper) and backend.supports_step(terms, problem).ok:
            return backend
    return None


def check(contraction: Contraction, problem: Problem) -> None:
    """Raise what `plan` would raise, without predicting anything: sizes may be symbolic, and are not compared."""
    _check_options(contraction)
    for term in terms_of(contraction.mask):
        names = registry.automatic() if contraction.backend == "auto" else (contraction.backend,)
        if all(_rejection(term, name, contraction, problem) is not None for name in names):
            _refuse(term, contraction, problem)


def _check_options(contraction: Contraction) -> None:
    for name, count in (("chunk_size", contraction.chunk_size), ("state_every", contraction.state_every)):
        if count is not None and count < 1:
            raise ShapeError(f"{name} must be at least 1, got {count}")
    if contraction.state_every is not None:
        _check_prefixes(contraction.mask)


def _check_prefixes(mask: n.Node) -> None:
    """Raise UnsupportedError unless what the scans of a mask hold after a token is the state of the prefix that it ends."""
    for node in n.walk(n.lowered(mask)):
        if isinstance(node, n.Documents):
            raise UnsupportedError(
                "state_every counts the tokens of a batch row, and documents() packs several sequences into one; give each "
                "its own row, padded at its end, and drop documents()"
            )
        if isinstance(node, n.Trapezoidal):
            raise UnsupportedError(
                "the scans of trapezoidal() run a token ahead, so that what they hold is not its state; leave state_every out, "
                "and call ssd on one stretch of tokens after another, each from the state of the last"
            )
    for term in state_terms(mask):
        if not term.causal:
            raise UnsupportedError(
                f"state_every gives the states of prefixes, and {term.node()} reads later tokens, so that a prefix has none; "
                "leave it out, or take the causal part alone"
            )


def _refuse(term: Term, contraction: Contraction, problem: Problem) -> NoReturn:
    """Say why nothing that the user allowed runs the term, and what does."""
    found = {name: _rejection(term, name, contraction, problem) for name in registry.names()}
    reasons = {name: x.reason for name, x in found.items() if x is not None}
    if contraction.backend == "auto":
        listed = "; ".join(reasons.values())
        raise UnsupportedError(f"no backend can run {term.node()}: {listed}")
    able = ", ".join(name for name in found if name not in reasons) or "none"
    raise UnsupportedError(
        f"backend {contraction.backend!r} cannot run {term.node()}: {reasons[contraction.backend]} (able: {able})"
    )


@dataclass(frozen=True, slots=True)
class Question:
    """What `plan` is asked: its arguments."""

    contraction: Contraction
    problem: Problem
    direction: str
    dry: bool

    @property
    def passes(self) -> str:
        """Which passes of a backend run: a step is a forward pass."""
        return "backward" if self.direction == "backward" else "forward"


def candidates(work: Workload, target: Target) -> list[Candidate]:
    """Everything that could run a workload, whatever it takes to compile."""
    question = Question(Contraction(work.term_of.node()), work.problem(target), work.direction, dry=True)
    found = [x for name in registry.weighed() for x in _candidates(work.term_of, name, question)]
    return [x for x in found if isinstance(x, Candidate)]


def _step(term: Term, question: Question) -> Step:
    contraction = question.contraction
    named = contraction.backend != "auto"
    names = (contraction.backend,) if named else registry.weighed()
    found = [x for name in names for x in _candidates(term, name, question)]
    if not named:  # and nothing of the others is imported
        found += [Rejection(name, registry.by_name(name) or "") for name in registry.names() if name not in names]
    candidates = [x for x in found if isinstance(x, Candidate)]
    if not candidates:
        _refuse(term, contraction, question.problem)
    choice = _choice(term, candidates, question)
    reasons = [Rejection(name, reason) for name, reason in why_not(choice, candidates)]
    rejected = (*reasons, *(x for x in found if isinstance(x, Rejection)))
    taken = choice.candidate
    growth = growth_of(term, registry.get(taken.backend))
    return Step(term, taken.backend, taken.config, taken.seconds, rejected, choice.origin, choice.measured, growth)


def _along(steps: tuple[Step, ...], question: Question) -> tuple[Step, ...]:
    """The steps of a plan, each diagonal along with the first scan that takes one and has none yet."""
    out, free = list(steps), [i for i, step in enumerate(steps) if _takes_diagonal(step, question.problem)]
    for i, step in enumerate(steps):
        if not isinstance(step.term, Diagonal) or not free:
            continue
        scan = steps[free[0]]
        assert isinstance(scan.term, Linear)  # others take none
        work = registry.get(scan.backend).work
        with_it, without = (
            predict(work(term, question.problem, scan.config, question.passes), question.problem.target)
            for term in (replace(scan.term, diagonal=step.term), scan.term)
        )
        rejected = tuple(r for r in step.rejected if r.backend != scan.backend)
        out[i] = Step(step.term, scan.backend, scan.config, with_it - without, rejected, growth="T", along=free.pop(0))
    return tuple(out)


def _takes_diagonal(step: Step, problem: Problem) -> bool:
    """Whether a step's scan takes a diagonal along."""
    backend = registry.get(step.backend)
    return isinstance(step.term, Linear) and isinstance(backend, Adder) and backend.takes_diagonal(step.term, problem)


def growth_of(term: Term, backend: Backend) -> str:
    """How a term's cost grows with seqlen T on a backend: what it says, or linearly for scans and inside a band."""
    if isinstance(backend, Structured) and (said := backend.growth(term)) is not None:
        return said
    if not isinstance(term, Quadratic):
        return "T"
    found = structure_of(term.mask)
    return "T · band" if found is not None and found.banded else "T²"


def _choice(term: Term, candidates: list[Candidate], question: Question) -> Choice:
    """One of the candidates, by the mode that holds for the call."""
    mode = policy.current() if question.contraction.tune is None else policy.checked(question.contraction.tune)
    logged = not question.dry and environment.shape_log() is not None
    work = Workload.of(term, question.problem, question.direction) if logged or mode != "off" else None
    if work is not None and logged:
        shape_log.note(work)
    if work is None or mode == "off":
        return choose(None, candidates, mode, None)
    target = question.problem.target
    key = Key(place_of(target, work.term), work.bucket())
    tuner = None if question.dry else partial(tune_once, key, work, Worker(TRIALS, _device(target)), mode == "force")
    return choose(key, candidates, mode, tuner)


def _device(target: Target) -> str:
    """Where candidates are to run, as torch spells it."""
    return f"cuda:{torch.cuda.current_device()}" if target.device == "cuda" else target.device


def _candidates(term: Term, name: str, question: Question) -> Iterator[Candidate | Rejection]:
    """Every configuration of one backend with its predicted cost, the default first; or a rejection."""
    problem, direction = question.problem, question.passes
    for config in _configs(term, name, question.contraction, problem):
        if isinstance(config, Rejection):
            yield config
        else:
            seconds = predict(registry.get(name).work(term, problem, config, direction), problem.target)
            yield Candidate(name, config, seconds, _reluctance(term, name, config, question))


def _reluctance(term: Term, name: str, config: Config, question: Question) -> str:
    """Why "auto" does not take a candidate on a prediction; empty if it does."""
    if question.contraction.backend != "auto" or name not in registry.BY_NAME:
        return ""
    backend = registry.get(name)
    if isinstance(backend, Compiler):
        return backend.ready(term, question.problem, config, question.passes).reason
    return registry.BY_NAME[name]


def _configs(term: Term, name: str, contraction: Contraction, problem: Problem) -> Iterator[Config | Rejection]:
    """Every configuration of one backend that fits what the user fixed, the default first; or a rejection."""
    if (rejection := _rejection(term, name, contraction, problem)) is not None:
        yield rejection
        return
    backend = registry.get(name)
    configs = backend.configs(term, problem, _chunk_size(term, backend, contraction))
    assert not isinstance(configs, Support)  # that would have been a rejection
    yield from configs


def _rejection(term: Term, name: str, contraction: Contraction, problem: Problem) -> Rejection | None:
    """Why a backend cannot do what the user asked; None if it can. No configuration is made, as sizes may be symbolic."""
    if isinstance(backend := _backend(name), Rejection):
        return backend
    support = backend.supports(term, problem)
    if not support.ok:
        return Rejection(name, support.reason)
    size = _chunk_size(term, backend, contraction)
    configs = backend.configs(term, problem, size) if size is not None else ()
    return Rejection(name, configs.reason) if isinstance(configs, Support) else None


def _backend(name: str) -> Backend | Rejection:
    """The backend, or why one from another package cannot be imported; a name that nobody has is the caller's mistake."""
    try:
        return registry.get(name)
    except UnsupportedError as error:
        return Rejection(name, str(error))


def _chunk_size(term: Term, backend: Backend, contraction: Contraction) -> int | None:
    """The chunk size that the user fixed, for a term that has chunks: every scan, and others where the backend says so."""
    chunked = isinstance(term, Linear) or (isinstance(backend, Structured) and backend.has_chunks(term))
    return contraction.chunk_size if chunked else None
