"""The tuner's search, with times that are made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from ssdops.autotune import search
from ssdops.autotune.choose import Candidate
from ssdops.autotune.record import Trial
from ssdops.autotune.search import Search
from ssdops.autotune.worker import Died
from ssdops.autotune.workload import Workload
from ssdops.backends.base import Config

WORK = Workload("decay(log_a)", "backward", "float32", "float32", 1, 70, 2, 4, 4, 1, 1, 2)


@dataclass
class Made:
    """Answers like a worker, with given times, which pass on a clock of its own."""

    seconds: dict[int, float]
    checks: float = 0.0
    clock: float = 0.0
    expects: float = 0.0
    starts: int = 1
    asked: list[tuple[str, int]] = field(default_factory=list)

    def start(self, timeout: float = 0.0) -> None:
        pass

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        size = request["config"]["chunk_size"]
        self.asked.append((request["do"], size))
        timed = max(request["seconds"], self.seconds[size])
        takes = {"expect": self.expects, "check": self.checks, "time": timed}[request["do"]]
        self.clock += min(takes, timeout)
        if takes > timeout:
            raise Died(f"no answer within {timeout:.3g} s")
        return {"seconds": self.seconds[size]} if request["do"] == "time" else {}


def searched(made: Made, budget: float = 1e6, predicted: Callable[[int], float] = lambda size: 1.0) -> dict[int | None, Trial]:
    candidates = [Candidate("chunked", Config(size), predicted(size)) for size in made.seconds]
    trials = Search(made, WORK, budget, 0).run(candidates)  # type: ignore[arg-type]  # a made-up worker
    return {t.config.chunk_size: t for t in trials}


def test_the_slower_half_is_dropped_at_every_round() -> None:
    made = Made({size: 1.0 + size / 100 for size in range(1, 9)})
    trials = searched(made)
    assert all(t.status == "measured" for t in trials.values())
    assert min(trials.values(), key=lambda t: t.seconds or 9).config.chunk_size == 1
    samples = {size: sum(asked == ("time", size) for asked in made.asked) for size in made.seconds}
    assert samples[8] == 2 and samples[4] == 3 and samples[2] == samples[1] > samples[4]


@pytest.mark.parametrize(("slower", "rounds"), [(1.05, search.MOST_ROUNDS), (1.5, search.LAST_ROUNDS)])
def test_two_that_are_close_are_sampled_more(slower: float, rounds: int) -> None:
    made = Made({1: 1.0, 2: slower})
    searched(made)
    assert [sum(asked == ("time", size) for asked in made.asked) for size in (1, 2)] == [1 + rounds] * 2


def test_what_is_predicted_to_be_far_slower_is_not_tried() -> None:
    made = Made({1: 1.0, 2: 1.0, 30: 1.0})
    trials = searched(made, predicted=float)
    assert trials[30].status == "skipped" and "30 times slower" in trials[30].note
    assert not any(size == 30 for _, size in made.asked)


@pytest.mark.parametrize("checks", [0.05, 0.5, 10.0])
def test_the_budget_is_honoured(monkeypatch: pytest.MonkeyPatch, checks: float) -> None:
    made = Made(dict.fromkeys(range(1, 9), 0.05), checks)
    monkeypatch.setattr(search.time, "monotonic", lambda: made.clock)
    trials = searched(made, budget=2.0)
    monkeypatch.undo()
    assert made.clock < 1.2 * 2.0 and len(trials) == 8
    assert any(t.status == "measured" for t in trials.values()) == (checks < 1)


def test_what_the_budget_cuts_short_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made({1: 0.05, 2: 0.05, 3: 1.8})
    monkeypatch.setattr(search.time, "monotonic", lambda: made.clock)
    trials = searched(made, budget=2.0, predicted=float)
    assert trials[1].status == "measured"
    assert trials[3].status == "skipped" and "no answer within" in trials[3].note


def test_the_reference_s_time_is_no_candidate_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is left is the most that a first candidate may take; the reference took more, once, and all were tried."""
    made = Made({1: 0.05, 2: 0.05}, checks=0.05, expects=1.1)
    monkeypatch.setattr(search.time, "monotonic", lambda: made.clock)
    trials = searched(made, budget=2.0)
    assert [t.status for t in trials.values()] == ["measured"] * 2
    assert sum(asked == "expect" for asked, _ in made.asked) == 1


def test_a_reference_that_is_too_slow_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made({1: 0.05}, expects=9.0)
    monkeypatch.setattr(search.time, "monotonic", lambda: made.clock)
    (trial,) = searched(made, budget=2.0).values()
    assert trial.status == "skipped" and "the reference was not worked out: no answer within 1.2 s" in trial.note
    assert made.clock < 1.2 * 2.0
