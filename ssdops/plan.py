"""The planner: (contraction, problem) → Plan, with every rejection and its reason.

A plan is plain data: for each term of the normal form a backend, a configuration, what it is predicted to cost, and why the
other backends were not taken. Nothing is run here and no tensor is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from .autotune.cost import predict
from .backends import registry
from .backends.base import Backend, Config, Stepper, Support
from .errors import ShapeError, UnsupportedError
from .ir import nodes as n
from .ir.contraction import Contraction
from .ir.passes.normalize import normalize
from .ir.problem import Problem
from .ir.terms import Linear, Quadratic, Term


@dataclass(frozen=True, slots=True)
class Rejection:
    """A backend that was not taken, and why."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """How one term runs.

    Attributes:
        seconds: the cost model's prediction of a forward pass.
        rejected: the other backends, each with its reason.
    """

    term: Term
    backend: str
    config: Config
    seconds: float
    rejected: tuple[Rejection, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A step per term; the output is their sum."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            size = f", chunk_size={step.config.chunk_size}" if step.config.chunk_size else ""
            size += f", segments={step.config.segments}" if step.config.segments > 1 else ""
            lines.append(f"{step.term.node()}: {step.backend}{size}, {step.seconds * 1e3:.3g} ms predicted")
            lines += [f"    not {r.backend}: {r.reason}" for r in step.rejected]
        return "\n".join(lines) or "nothing to run: the mask is zero"


@lru_cache(maxsize=4096)
def terms_of(mask: n.Node) -> tuple[Term, ...]:
    """The normal form of a mask, remembered."""
    return normalize(mask)


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


def plan(contraction: Contraction, problem: Problem) -> Plan:
    """Choose a backend and a configuration for every term.

    Raises:
        UnsupportedError: the backend named by the user cannot run a term; the message says why, and which can.
        UnknownBackendError: no backend has that name.
        ShapeError: chunk_size or state_every is below 1.
    """
    _check_options(contraction)
    return Plan(tuple(_step(term, contraction, problem) for term in terms_of(contraction.mask)))


def stepper(contraction: Contraction, problem: Problem) -> Stepper | None:
    """The backend whose decode kernel takes the whole mask, or None: a step is a short sequence then, and planned as one.

    With "auto" that is the first that can, on GPUs: elsewhere a kernel is only interpreted, for those who name its backend.
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


def _step(term: Term, contraction: Contraction, problem: Problem) -> Step:
    if contraction.backend != "auto":
        return _named(term, contraction, problem)
    candidates, rejected = [], []
    for name in registry.names():
        if (reason := registry.by_name(name)) is not None:
            rejected.append(Rejection(name, reason))
            continue
        found = list(_candidates(term, name, contraction, problem))
        candidates += [step for step in found if isinstance(step, Step)]
        rejected += [r for r in found if isinstance(r, Rejection)]
    if not candidates:
        _refuse(term, contraction, problem)
    best = min(candidates, key=lambda step: step.seconds)
    slower = {
        step.backend: step.seconds
        for step in sorted(candidates, key=lambda step: -step.seconds)
        if step.backend != best.backend
    }
    reasons = [
        Rejection(name, f"predicted slower: {seconds * 1e3:.3g} ms against {best.seconds * 1e3:.3g}")
        for name, seconds in sorted(slower.items(), key=lambda item: item[1])
    ]
    return Step(term, best.backend, best.config, best.seconds, (*reasons, *rejected))


def _named(term: Term, contraction: Contraction, problem: Problem) -> Step:
    """The one backend that the user asked for, or the reason why not and who can."""
    found = list(_candidates(term, contraction.backend, contraction, problem))
    steps = [step for step in found if isinstance(step, Step)]
    if not steps:
        _refuse(term, contraction, problem)
    return min(steps, key=lambda step: step.seconds)


def _candidates(term: Term, name: str, contraction: Contraction, problem: Problem) -> Iterator[Step | Rejection]:
    """Every configuration of one backend as a step with its predicted cost, the default first; or a rejection."""
    for config in _configs(term, name, contraction, problem):
        if isinstance(config, Rejection):
            yield config
        else:
            yield Step(term, name, config, predict(registry.get(name).work(term, problem, config), problem.target.device))


def _configs(term: Term, name: str, contraction: Contraction, problem: Problem) -> Iterator[Config | Rejection]:
    """Every configuration of one backend that fits what the user fixed, the default first; or a rejection."""
    if (rejection := _rejection(term, name, contraction, problem)) is not None:
        yield rejection
        return
    configs = registry.get(name).configs(term, problem, _chunk_size(term, contraction))
    assert not isinstance(configs, Support)  # that would have been a rejection
    yield from configs


def _rejection(term: Term, name: str, contraction: Contraction, problem: Problem) -> Rejection | None:
    """Why a backend cannot do what the user asked; None if it can. No configuration is made, as sizes may be symbolic."""
    if isinstance(backend := _backend(name), Rejection):
        return backend
    support = backend.supports(term, problem)
    if not support.ok:
        return Rejection(name, support.reason)
    size = _chunk_size(term, contraction)
    configs = backend.configs(term, problem, size) if size is not None else ()
    return Rejection(name, configs.reason) if isinstance(configs, Support) else None


def _backend(name: str) -> Backend | Rejection:
    """The backend, or why one from another package cannot be imported; a name that nobody has is the caller's mistake."""
    try:
        return registry.get(name)
    except UnsupportedError as error:
        return Rejection(name, str(error))


def _chunk_size(term: Term, contraction: Contraction) -> int | None:
    """The chunk size that the user fixed, for a term that has chunks."""
    return contraction.chunk_size if isinstance(term, Linear) else None
