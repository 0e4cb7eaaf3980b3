"""How the benchmarks measure on a shared, noisy machine: paired timings, peak memory, and which machine it was."""

import ctypes
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Paired:
    """Two calls timed in turn: one pair of seconds per call for each round."""

    rounds: tuple[tuple[float, float], ...]

    @property
    def first(self) -> float:
        """Median seconds of the first call."""
        return statistics.median(a for a, _ in self.rounds)

    @property
    def second(self) -> float:
        """Median seconds of the second call."""
        return statistics.median(b for _, b in self.rounds)

    @property
    def ratio(self) -> float:
        """Median over the rounds of second / first: each round saw one state of the machine."""
        return statistics.median(b / a for a, b in self.rounds)

    @property
    def fastest_ratio(self) -> float:
        """The second call's fastest round over the first's: what to look at when the machine was busy."""
        return min(b for _, b in self.rounds) / min(a for a, _ in self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest of the rounds' ratios."""
        ratios = [b / a for a, b in self.rounds]
        return min(ratios), max(ratios)

    @property
    def difference(self) -> float:
        """Median over the rounds of first - second, in seconds."""
        return statistics.median(a - b for a, b in self.rounds)


def spread(times: Paired) -> dict[str, float]:
    """How far the machine's noise moved a ratio."""
    low, high = times.spread
    return {"lowest ratio": low, "highest": high, "of the fastest rounds": times.fastest_ratio}


def paired(first: Call, second: Call, rounds: int, sample_seconds: float = 0.25) -> Paired:
    """Time two calls in turn, A B then B A, so that a slow spell of the machine falls on both.

    A sample repeats its call until it lasts about `sample_seconds`, or once if the call is longer.
    """
    calls = (first, second)
    repeats = [_repeats_for(call, sample_seconds) for call in calls]
    taken = []
    for turn in range(rounds):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        seconds = {side: _seconds_per_call(calls[side], repeats[side]) for side in order}
        taken.append((seconds[0], seconds[1]))
    return Paired(tuple(taken))


def median_seconds(call: Call, rounds: int, sample_seconds: float = 0.25) -> float:
    """Median over the rounds of the seconds that one call takes, by the wall clock."""
    repeats = _repeats_for(call, sample_seconds)
    return statistics.median(_seconds_per_call(call, repeats) for _ in range(rounds))


def _seconds_per_call(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats_for(call: Call, sample_seconds: float) -> int:
    """How often `call` fits into a sample; the tries are its warm-up."""
    call()
    repeats = 1
    while (seconds := _seconds_per_call(call, repeats)) * repeats < sample_seconds / 4:
        repeats *= 4
    return max(1, round(sample_seconds / seconds))


def peak_growth(call: Call, warm_up: Call) -> int:
    """Bytes by which the resident set rose at most above its size before `call`. Linux only.

    `warm_up` runs first, so that thread pools and library buffers are not counted. The high-water mark is VmHWM, reset
    through clear_refs: `ru_maxrss` keeps the highest value ever and even starts from the parent's across fork and exec.
    """
    warm_up()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed but kept would be reused, and not seen
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; peak memory is measured on Linux only")
    return int(found[1]) * 1024


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function(*args)` in a newly started interpreter that shares no memory with this one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def environment(commit: str | None = None) -> dict[str, str | float]:
    """What a reader needs to know to judge the figures; `commit` is for a copy of the source that has no git."""
    return {
        "device": "cpu",
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or _git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _git_commit() -> str:
    """The commit of the checkout that holds this file, marked when tracked files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:  # figures without a commit are better than none
        return f"unknown: {error}"
