"""Compiling ahead: processes side by side run each candidate once, and what is compiled is kept for the one that measures.

It is over before anything is timed, so that no measurement shares the machine with a compiler.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from ..backends import registry
from .choose import Candidate
from .search import PRUNE
from .worker import Died, Worker
from .workload import Workload

MOST_PROCESSES = 12
"""Each takes seconds to start, and hundreds of megabytes of memory, on a GPU as well."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one process compiles without a pause: candidates of one workload, which may share programs."""

    work: Workload
    candidates: tuple[Candidate, ...]


def worth_compiling(candidates: Sequence[Candidate], on_gpu: bool) -> tuple[Candidate, ...]:
    """Those that the search will try and that are known to need it; on a GPU, all of backends that compile."""
    least = max(min(c.seconds for c in candidates), 1e-9)
    near = [c for c in candidates if c.seconds <= PRUNE * least]
    return tuple(c for c in near if c.reluctant or (on_gpu and registry.compiles(c.backend)))


def processes(jobs: int) -> int:
    """How many are worth their start: compiling keeps two cores busy, and the process that measures could do it as well."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(jobs, cores // 2, MOST_PROCESSES)
    return count if count > 1 else 0


def compile_ahead(jobs: Sequence[Job], workers: Sequence[Worker], seconds: float, on_done: Callable[[], None]) -> None:
    """Compile what candidates need. Whatever goes wrong does so again when the candidate is checked, and is recorded then.

    Args:
        workers: processes of their own, ended when there is nothing left for them.
        seconds: for all of it.
        on_done: told of each job that is over.
    """
    waiting, deadline = deque(jobs), time.monotonic() + seconds

    def work_off(worker: Worker) -> None:
        with worker, suppress(IndexError):  # which says that nothing is waiting
            while time.monotonic() < deadline:
                _run(waiting.popleft(), worker, deadline)
                on_done()

    with ThreadPoolExecutor(max(len(workers), 1)) as pool:
        try:
            for future in [pool.submit(work_off, worker) for worker in workers]:
                future.result()
        except BaseException:  # an interrupt, which is not to wait for compilers
            waiting.clear()
            for worker in workers:
                worker.kill()
            raise


def _run(job: Job, worker: Worker, deadline: float) -> None:
    for c in job.candidates:
        config = {"chunk_size": c.config.chunk_size, "segments": c.config.segments}
        request = {"do": "compile", "workload": job.work.to_json(), "backend": c.backend, "config": config, "seed": 0}
        with suppress(Died):
            worker.start(max(deadline - time.monotonic(), 0.01))
            worker.ask(request, deadline - time.monotonic())
