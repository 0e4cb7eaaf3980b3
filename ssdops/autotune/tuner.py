"""Measuring a key: a search in a process of its own, and its result kept."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Sequence

from . import fleet, policy, store
from .ahead import Job, compile_ahead, processes, worth_compiling
from .choose import Candidate
from .record import Key, Record
from .search import OnTrial, Search
from .worker import Died, Worker
from .workload import Workload

COMPILING = 0.5
"""How much of a budget compiling ahead may take."""

_done: set[tuple[Key, frozenset[str]]] = set()
"""What this process has measured, or tried to: no key twice among the same backends, as bad luck would cost its budget anew."""
_told: set[str] = set()


def tune_once(key: Key, work: Workload, worker: Worker, anew: bool, candidates: Sequence[Candidate]) -> Record | None:
    """Measure a key, unless this process or, since it last looked, another one has; None where nothing could be measured.

    Under torch.distributed one rank of the job does, for all of them.

    Args:
        worker: a process that tries candidates, not started yet.
        anew: whether to measure it although another process has.
    """
    backends = frozenset(c.backend for c in candidates)
    if (key, backends) in _done:
        return store.lookup(key)
    _done.add((key, backends))
    budget = policy.budget(worker.device)

    def found_or_measured() -> Record | None:
        found = None if anew else store.read(key)
        if found is not None and found.covers(backends):
            return store.adopt(found)
        with worker:
            return measure(worker, key, work, candidates, budget)

    try:
        return fleet.once_for_all(f"{key.name}/{','.join(sorted(backends))}", found_or_measured, budget)
    except Died as death:
        if "start" not in _told:
            _told.add("start")
            warnings.warn(f"nothing is tuned, as the process that would try candidates does not start: {death}", stacklevel=2)
        return None


def measure(
    worker: Worker,
    key: Key,
    work: Workload,
    candidates: Sequence[Candidate],
    budget: float,
    on_trial: OnTrial = lambda text: None,
) -> Record:
    """Search among the candidates, and keep what was found. What takes seconds to compile is compiled side by side before.

    Raises:
        Died: no process can be started.
    """
    began, slow = time.monotonic(), worth_compiling(candidates, on_gpu=False)  # on GPUs only of many keys is it worth a start
    if (count := processes(len(slow))) > 0:
        on_trial("compiling")
        workers = [worker.twin() for _ in range(count)]
        compile_ahead([Job(work, (c,)) for c in slow], workers, COMPILING * budget, lambda: None)
    left = budget - (time.monotonic() - began)
    search = Search(worker, work, left, random.SystemRandom().getrandbits(31), on_trial)
    return store.keep(Record(key, search.run(candidates), time.time()))
