"""A plan as plain data: for each term a backend, a configuration, what it costs, and why the other backends were not taken."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .autotune.choose import ORIGINS
from .backends.base import Config
from .ir.terms import Diagonal, Linear, Term


@dataclass(frozen=True, slots=True)
class Rejection:
    """A backend that was not taken, and why."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """How one term runs.

    Attributes:
        seconds: the cost model's prediction.
        rejected: the other backends, each with its reason.
        origin: where the choice comes from (`autotune.choose.ORIGINS`).
        measured: the seconds that were measured, if any were.
        growth: how the cost grows with seqlen T: "T", "T · band", "T log T", "T log² T" or "T²".
        along: of a diagonal, which step of the plan takes it along with its scan, at the cost of `seconds` more; None: it runs
            by itself.
    """

    term: Term
    backend: str
    config: Config
    seconds: float
    rejected: tuple[Rejection, ...] = ()
    origin: str = "only"
    measured: float | None = None
    growth: str = ""
    along: int | None = None

    @property
    def times(self) -> str:
        """The prediction, and the measurement if there is one."""
        known = "" if self.measured is None else f", {self.measured * 1e3:.3g} ms measured"
        return f"{self.seconds * 1e3:.3g} ms predicted{known}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A step per term; the output is their sum."""

    steps: tuple[Step, ...]

    def joined(self) -> tuple[Step, ...]:
        """The steps as they run: scans with the diagonals that they take along."""
        taken = {step.along: step.term for step in self.steps if step.along is not None}
        return tuple(_with(step, taken.get(i)) for i, step in enumerate(self.steps) if step.along is None)

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            size = f", chunk_size={step.config.chunk_size}" if step.config.chunk_size else ""
            size += f", segments={step.config.segments}" if step.config.segments > 1 else ""
            grows = f", O({step.growth})" if step.growth else ""
            how = ORIGINS[step.origin] if step.along is None else f"along with {self.steps[step.along].term.node()}"
            lines.append(f"{step.term.node()}: {step.backend}{size}{grows}, {step.times} ({how})")
            lines += [f"    not {r.backend}: {r.reason}" for r in step.rejected]
        return "\n".join(lines) or "nothing to run: the mask is zero"


def _with(step: Step, diagonal: Term | None) -> Step:
    """A step whose scan has a diagonal, if one is given."""
    if diagonal is None:
        return step
    assert isinstance(step.term, Linear) and isinstance(diagonal, Diagonal)  # nothing else is taken along by anything else
    return replace(step, term=replace(step.term, diagonal=diagonal))
