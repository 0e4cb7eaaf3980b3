"""The search: every candidate is checked, then timed, and the slower half is dropped until one is left or the time is up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..backends.base import Config
from .choose import Candidate
from .record import Trial
from .worker import Died, Worker
from .workload import Workload

PRUNE = 10.0
"""How many times the least predicted time a prediction may be, for its candidate to be tried."""
PATIENCE = 30.0
"""Seconds to wait for an answer about a candidate, unless it is known to take long to compile: then it has hung."""
EXPECTING = 0.6
"""How much of what is left of a budget the reference's results may take."""
FAR = 2.0
"""How many times the fastest measurement one may be, for its candidate to stay in the race."""
ENTRY_SECONDS, SAMPLE_SECONDS = 0.03, 0.1
"""Of the sample by which a candidate enters the race, and of those of its first round; later ones take twice as long each."""
LAST_ROUNDS, MOST_ROUNDS = 4, 12
"""Rounds of samples for the two that are left, taken in turn so that a slow spell of the machine falls on both; the most
are for two of which neither has CLOSE times the other's time."""
CLOSE = 1.15

OnTrial: TypeAlias = Callable[[str], None]


@dataclass
class Search:
    """One search.

    Attributes:
        work: what to measure, at its own sizes.
        budget: seconds for all of it, the start of processes included.
        seed: of the random inputs.
        on_trial: told what is about to be tried.
        patience: see PATIENCE.
    """

    worker: Worker
    work: Workload
    budget: float
    seed: int
    on_trial: OnTrial = lambda text: None
    patience: float = PATIENCE
    trials: dict[tuple[str, Config], Trial] = field(default_factory=dict)
    _deadline: float = 0.0
    _expecting: int = 0  # the process that has what results are held to, by its number

    def run(self, candidates: Sequence[Candidate]) -> tuple[Trial, ...]:
        """A trial for every candidate.

        Raises:
            Died: no process can be started.
        """
        self._deadline = time.monotonic() + self.budget
        self.worker.start()
        ordered = list(self._worth_trying(candidates))
        for index, candidate in enumerate(ordered):
            self._enter(candidate, len(ordered) - index)
        self._race()
        return tuple(self.trials.values())

    @property
    def remaining(self) -> float:
        """Seconds of the budget."""
        return self._deadline - time.monotonic()

    def _worth_trying(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        """In the order in which to try them: best predicted first, and last those that take long to compile."""
        least = max(min(c.seconds for c in candidates), 1e-9)
        for c in sorted(candidates, key=lambda c: (bool(c.reluctant), c.seconds)):
            if c.seconds > PRUNE * least:
                self._put(c.backend, c.config, "skipped", f"predicted {c.seconds / least:.3g} times slower than the fastest")
            else:
                yield c

    def _enter(self, c: Candidate, left: int) -> None:
        """Check a candidate and time it once. Compiling counts against the budget, and not as time of a pass."""
        self.on_trial(f"{c.backend} {_show(c.config)}".strip())
        if not self._has_time():
            self._put(c.backend, c.config, "skipped", f"the budget of {self.budget:.3g} s was spent")
            return
        if unable := self._expect(c):
            self._put(c.backend, c.config, "skipped", unable)
            return
        # the last may take what there is, short of what the race needs; others leave as much for those to come
        limit = self.remaining * (0.8 if left == 1 else 0.5)
        limit = limit if c.reluctant else min(limit, self.patience)
        try:
            answer = self._ask(c, "check", 0.0, limit)
            if "error" not in answer:
                answer = self._ask(c, "time", ENTRY_SECONDS, limit)
        except Died as death:
            # one that had less time than a hang is given away by may only be slow, or the machine busy
            late = "no answer" in str(death) and (c.reluctant or limit < self.patience or self.remaining < 0.1)
            self._put(c.backend, c.config, "skipped" if late else "failed", str(death))
            return
        if "error" in answer:
            self._put(c.backend, c.config, "failed", str(answer["error"]))
        else:
            self.trials[c.backend, c.config] = Trial(c.backend, c.config, "measured", float(answer["seconds"]))

    def _expect(self, c: Candidate) -> str:
        """Have a new process work out what results are held to, which is no candidate's time; why not, if it cannot."""
        if self.worker.starts == self._expecting:
            return ""
        try:
            answer = self._ask(c, "expect", 0.0, self.remaining * EXPECTING)
        except Died as death:
            return f"the reference was not worked out: {death}"
        if "error" in answer:
            return f"the reference cannot be worked out: {answer['error']}"
        self._expecting = self.worker.starts
        return ""

    def _has_time(self) -> bool:
        """Whether there is time to try one more, in a process that is there or can be started in time."""
        kept = 0.2 * self.budget if any(t.status == "measured" for t in self.trials.values()) else 0.0
        if self.remaining <= kept:
            return False
        try:
            self.worker.start(self.remaining)
        except Died:
            return False
        return True

    def _race(self) -> None:
        """Rounds of longer and longer samples, each with the faster half of those before."""
        seconds = SAMPLE_SECONDS
        racing = self._fastest(len(self.trials))
        while len(racing) > 1 and self.remaining > 0:
            for turn in range(MOST_ROUNDS if len(racing) == 2 else 1):
                if turn >= LAST_ROUNDS and not self._close(racing):
                    break
                for trial in racing:
                    self._sample(trial, seconds)
            if len(racing) == 2:
                return
            racing, seconds = self._fastest(max(math.ceil(len(racing) / 2), 2)), 2 * seconds

    def _close(self, racing: Sequence[Trial]) -> bool:
        """Whether two of them, by what is known now, are too near one another for the faster one to be sure."""
        found = [self.trials[trial.candidate].seconds for trial in racing]
        times = [seconds for seconds in found if seconds is not None]
        return len(times) > 1 and max(times) < CLOSE * min(times)

    def _fastest(self, count: int) -> list[Trial]:
        """That many of those that were measured, without those that are far behind."""
        timed = sorted(
            (t for t in self.trials.values() if t.status == "measured"),
            key=lambda t: math.inf if t.seconds is None else t.seconds,
        )
        best = timed[0].seconds if timed else None
        return [t for t in timed[:count] if best is not None and t.seconds is not None and t.seconds <= FAR * best]

    def _sample(self, trial: Trial, seconds: float) -> None:
        """One more sample, as long as the budget allows; the fastest counts."""
        old = self.trials[trial.candidate]
        if old.seconds is None or self.remaining < 3 * old.seconds:
            return
        self.on_trial(f"{trial.backend} {_show(trial.config)}".strip())
        try:
            answer = self._ask(trial, "time", min(seconds, self.remaining / 4), min(self.remaining, self.patience))
        except Died as death:
            if "no answer" in str(death) and self.remaining < 0.1:
                return  # the time is up, and what was measured stands
            answer = {"error": str(death)}
        if "error" in answer:
            self._put(trial.backend, trial.config, "failed", str(answer["error"]))
        else:
            self.trials[trial.candidate] = replace(old, seconds=min(old.seconds, float(answer["seconds"])))

    def _ask(self, what: Candidate | Trial, do: str, seconds: float, limit: float) -> dict[str, Any]:
        config = {"chunk_size": what.config.chunk_size, "segments": what.config.segments}
        request = {"do": do, "workload": self.work.to_json(), "backend": what.backend, "config": config, "seed": self.seed}
        return self.worker.ask({**request, "seconds": seconds}, min(limit, max(self.remaining, 0.01)))

    def _put(self, backend: str, config: Config, status: str, note: str) -> None:
        self.trials[backend, config] = Trial(backend, config, status, note=note)


def _show(config: Config) -> str:
    size = f"chunk_size {config.chunk_size}" if config.chunk_size else ""
    return f"{size}, segments {config.segments}" if config.segments > 1 else size
