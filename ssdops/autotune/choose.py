"""The choice among candidates: what was measured here, then what ships, then measuring if the mode says so, then the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..backends.base import Config
from . import exchange, policy, store
from .record import Key, Record, Trial

ORIGINS = {
    "only": "nothing else was possible",
    "tuned": "measured on this device",
    "shipped": "measured on a device of this name, shipped with ssdops",
    "model": "by the cost model",
}
"""Where choices come from."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that can run a term, with a configuration.

    Attributes:
        seconds: what the cost model predicts.
        reluctant: why it is not taken on a prediction alone; empty if it is.
    """

    backend: str
    config: Config
    seconds: float
    reluctant: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        origin: a key of ORIGINS.
        measured: seconds, where they are known.
        record: what is known of the others.
    """

    candidate: Candidate
    origin: str
    measured: float | None = None
    record: Record | None = None


Tuner: TypeAlias = Callable[[Sequence[Candidate]], "Record | None"]
"""Measures candidates; None where nothing could be measured."""


def choose(key: Key | None, candidates: Sequence[Candidate], mode: str, tuner: Tuner | None) -> Choice:
    """One of the candidates, of which there is at least one.

    Args:
        key: what they are candidates for; None is something that cannot be tuned.
        mode: one of `policy.MODES`.
        tuner: what measures them, if the mode says so; None for nothing to be measured.
    """
    record = None
    if key is not None and mode != "off":
        record = store.lookup(key)
        for found, origin in _sources(key, record, candidates, mode, tuner):
            able = candidates if origin == "tuned" else _eager(candidates)  # what ships is not worth compiling for seconds
            if found is not None and (best := _fastest(found, able)) is not None:
                candidate, seconds = best
                return Choice(candidate, "only" if len(candidates) == 1 else origin, seconds, found)
            record = found or record
    return Choice(_predicted(candidates, record), "only" if len(candidates) == 1 else "model", None, record)


def _sources(
    key: Key, known: Record | None, candidates: Sequence[Candidate], mode: str, tuner: Tuner | None
) -> Iterator[tuple[Record | None, str]]:
    """Records to look at, in order, each with what a choice from it is called."""
    able = tuner is not None and len(candidates) > 1 and not policy.obstacle()
    if mode == "force" and able and tuner is not None:
        yield tuner(candidates), "tuned"
    yield known, "tuned"
    yield exchange.shipped(key), "shipped"
    if mode == "on" and able and tuner is not None:
        yield tuner(candidates), "tuned"


def _fastest(record: Record, candidates: Sequence[Candidate]) -> tuple[Candidate, float] | None:
    """The fastest candidate that was measured; None unless every backend that could be taken unmeasured was considered then."""
    if not record.covers(candidate.backend for candidate in _eager(candidates)):
        return None
    trials = {trial.candidate: trial for trial in record.trials}
    timed = [
        (trial.seconds, index)
        for index, c in enumerate(candidates)
        if (trial := trials.get((c.backend, c.config))) is not None and trial.seconds is not None
    ]
    if not timed:
        return None
    seconds, index = min(timed)
    return candidates[index], seconds


def _predicted(candidates: Sequence[Candidate], record: Record | None) -> Candidate:
    """The least predicted time among those that may be taken on a prediction, and have not failed when they were tried."""
    failed = {t.candidate for t in record.trials if t.status == "failed"} if record is not None else set()
    eager = _eager(candidates)
    sound = [c for c in eager if (c.backend, c.config) not in failed] or eager
    return min(sound, key=lambda candidate: candidate.seconds)


def _eager(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Those that are taken on a prediction alone; all, if none is."""
    return [c for c in candidates if not c.reluctant] or candidates


def why_not(choice: Choice, candidates: Sequence[Candidate]) -> Iterator[tuple[str, str]]:
    """(backend, reason) for every other backend among the candidates, the nearest first."""
    others: dict[str, list[Candidate]] = {}
    for c in candidates:
        if c.backend != choice.candidate.backend:
            others.setdefault(c.backend, []).append(c)
    trials = {trial.candidate: trial for trial in choice.record.trials} if choice.record is not None else {}
    reasons = [_reason(choice, of_backend, trials) for of_backend in others.values()]
    for (_, reason), backend in sorted(zip(reasons, others, strict=True)):
        yield backend, reason


def _reason(choice: Choice, candidates: list[Candidate], trials: dict[tuple[str, Config], Trial]) -> tuple[float, str]:
    """Why none of these of one backend, and how far off they are in seconds."""
    known = [trials[c.backend, c.config] for c in candidates if (c.backend, c.config) in trials]
    seconds = [t.seconds for t in known if t.seconds is not None]
    if seconds and choice.measured is not None:
        return min(seconds), f"measured slower: {_ms(min(seconds))} ms against {_ms(choice.measured)}"
    if faults := [t.note for t in known if t.status == "failed"]:
        return float("inf"), f"failed when it was tried: {faults[0]}"
    if choice.measured is not None:
        skipped = [t.note for t in known if t.status == "skipped"]
        return 1e9, f"not measured: {skipped[0] if skipped else 'unknown to the tuner'}"
    eager = _eager(candidates)
    if eager[0].reluctant:
        return float("inf"), eager[0].reluctant
    best = min(c.seconds for c in eager)
    return best, f"predicted slower: {_ms(best)} ms against {_ms(choice.candidate.seconds)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
