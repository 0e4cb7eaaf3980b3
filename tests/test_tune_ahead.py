"""Compiling ahead: everything is run once, side by side, within its time, whatever goes wrong with some of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

import pytest
from faulty_backends import CLASSES

from ssdops.autotune import ahead, tuner
from ssdops.autotune.ahead import Job, compile_ahead, processes, worth_compiling
from ssdops.autotune.choose import Candidate
from ssdops.autotune.place import Place
from ssdops.autotune.record import Key
from ssdops.autotune.worker import Died, Worker
from ssdops.autotune.workload import Workload
from ssdops.backends import registry
from ssdops.backends.base import Config
from ssdops.plan import TRIALS

WORK = Workload("decay(log_a)", "backward", "float32", "float32", 1, 70, 2, 4, 4, 1, 1, 2)
LOCK = Lock()


@dataclass
class Made:
    """Answers like a worker: by what it is told to do with a chunk size."""

    does: Callable[[int], None]
    asked: list[int]
    ended: list[bool] = field(default_factory=list)

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.append(True)

    def start(self, timeout: float = 0.0) -> None:
        pass

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert request["do"] == "compile" and timeout > 0
        size = request["config"]["chunk_size"]
        with LOCK:
            self.asked.append(size)
        self.does(size)
        return {}


def jobs(count: int, each: int = 1) -> list[Job]:
    sizes = iter(range(1, count * each + 1))
    return [Job(WORK, tuple(Candidate("chunked", Config(next(sizes)), 1.0) for _ in range(each))) for _ in range(count)]


def ran(does: Callable[[int], None], wanted: list[Job], workers: int, seconds: float = 60.0) -> tuple[list[int], int]:
    """What was asked for, and how many jobs were over."""
    asked: list[int] = []
    made, done = [Made(does, asked) for _ in range(workers)], []
    compile_ahead(wanted, made, seconds, lambda: done.append(1))  # type: ignore[arg-type]
    assert all(worker.ended for worker in made)
    return asked, len(done)


def test_every_candidate_is_compiled_once() -> None:
    asked, done = ran(lambda size: time.sleep(0.001), jobs(8, 3), 3)
    assert sorted(asked) == list(range(1, 25)) and done == 8


def test_they_run_side_by_side() -> None:
    inside, most = 0, 0

    def slow(_: int) -> None:
        nonlocal inside, most
        with LOCK:
            inside += 1
            most = max(most, inside)
        time.sleep(0.05)
        with LOCK:
            inside -= 1

    ran(slow, jobs(6), 3)
    assert most == 3


def test_an_interrupt_waits_for_no_compiler() -> None:
    killed, going = [], Event()

    class Slow(Made):
        def kill(self) -> None:
            killed.append(1)
            going.set()

    def compiles(_: int) -> None:
        assert going.wait(60)
        raise Died("it was killed")

    def interrupt() -> None:
        raise KeyboardInterrupt

    asked: list[int] = []
    workers = [Slow(lambda _: None, asked), Slow(compiles, asked)]
    with pytest.raises(KeyboardInterrupt):
        compile_ahead(jobs(50), workers, 60.0, interrupt)  # type: ignore[arg-type]
    assert len(killed) == 2 and len(asked) <= 2


def test_one_that_dies_stops_no_other() -> None:
    def dies(size: int) -> None:
        if size % 2:
            raise Died("no answer")

    asked, done = ran(dies, jobs(4), 2)
    assert sorted(asked) == [1, 2, 3, 4] and done == 4


def test_nothing_is_begun_when_the_time_is_up() -> None:
    asked, done = ran(lambda size: time.sleep(0.2), jobs(20), 2, seconds=0.3)
    assert 2 <= len(asked) <= 6 and done == len(asked)


def test_processes_are_for_half_of_the_cores_and_not_for_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {(2, 9): 0, (4, 1): 0, (4, 2): 2, (4, 9): 2, (16, 3): 3, (16, 9): 8, (99, 99): 12, (16, 0): 0}
    for (cores, count), found in expected.items():
        monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        assert processes(count) == found


def test_what_is_compiled_is_what_will_be_tried_and_needs_it() -> None:
    there, slow, far = (
        Candidate("tvm", Config(16), 1.0),
        Candidate("tvm", Config(32), 2.0, "!"),
        Candidate("tvm", Config(64), 99, "!"),
    )
    quick = Candidate("chunked", Config(32), 3.0)
    assert worth_compiling((there, slow, far, quick), on_gpu=False) == (slow,)
    assert worth_compiling((there, slow, far, quick), on_gpu=True) == (there, slow)


def test_compiling_is_over_before_anything_is_timed_and_is_part_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, clock = [], 0.0

    class Timed(Made):
        device = "cpu"
        starts = 1

        def twin(self) -> Timed:
            return Timed(self.does, self.asked)

        def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
            nonlocal clock
            with LOCK:
                asked.append(request["do"])
                clock += 3.0 if request["do"] == "compile" else 0.5
            return {"seconds": 1e-3}

    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(tuner, "processes", lambda jobs: 2 if jobs > 1 else 0)
    monkeypatch.setattr(tuner.store, "keep", lambda record: record)
    slow = tuple(Candidate("tvm", Config(size), 1.0, "it compiles") for size in (16, 32, 64))
    key = Key(Place("a device", (), ""), WORK)
    record = tuner.measure(Timed(lambda _: None, []), key, WORK, slow, 20.0)  # type: ignore[arg-type]
    assert asked.index("expect") == asked.count("compile") == 3
    assert all(trial.status == "measured" for trial in record.trials) and clock <= 1.2 * 20.0


def test_a_process_runs_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sound", "crashing"):
        monkeypatch.setitem(registry.BACKENDS, name, CLASSES[name])
    worker, done = Worker(TRIALS, "cpu"), []
    wanted = [Job(WORK, tuple(Candidate(name, Config(32), 1.0) for name in ("crashing", "sound")))]
    compile_ahead(wanted, [worker], 300.0, lambda: done.append(1))
    assert done == [1] and worker.starts == 2
