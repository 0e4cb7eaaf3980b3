"""Processes of tests/test_tune_processes.py: each tunes key after key, half of them keys of all, until it is told to stop."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from ssdops import config
from ssdops.autotune import tuner
from ssdops.autotune.choose import Candidate
from ssdops.autotune.place import Place
from ssdops.autotune.record import Key
from ssdops.autotune.workload import Workload
from ssdops.backends.base import Config

CANDIDATES = (Candidate("chunked", Config(64), 1.0), Candidate("chunked", Config(32), 1.0), Candidate("naive", Config(), 2.0))


class Made:
    """A worker whose measurements take no time, and differ from process to process."""

    device, starts, asked = "cpu", 1, 0

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, timeout: float = 0.0) -> None:
        pass

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.asked += 1
        return {"seconds": 1e-3 + os.getpid() * 1e-9} if request["do"] == "time" else {}


def key_of(number: int) -> Key:
    """Keys that differ in a number alone."""
    work = Workload("decay(log_a)", "forward", "float32", "float32", 1, 64, number, 4, 4, 1, 1, 1)
    return Key(Place("a device", ("0.1.0",), "0123"), work)


def tune(number: int, worker: Made) -> str:
    """Have a key measured, unless it was found to be; which of the two."""
    key, before = key_of(number), worker.asked
    tuner.tune_once(key, key.workload, worker, False, CANDIDATES)  # type: ignore[arg-type]  # as much of one as is used
    return "found" if worker.asked == before else "measured"


def run(process: int, folder: Path) -> None:
    """Tune until told to stop; a line for every key that is done."""
    finished, turn = os.open(folder / "finished", os.O_WRONLY | os.O_APPEND | os.O_CREAT), 0
    while not (folder / "stop").exists():
        number = turn // 2 + 1 if turn % 2 else 10**6 * (process + 1) + turn
        os.write(finished, f"{process} {number} {tune(number, Made())}\n".encode())  # one call, so that it is a whole line
        turn += 1


def main() -> None:
    """Processes by fork, as each would import torch for seconds; their ids, then how each has ended."""
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    config.cache_dir = lambda: folder
    pids = []
    for process in range(count):
        if (pid := os.fork()) == 0:
            run(process, folder)
            os._exit(0)
        pids.append(pid)
    while len({line.split()[0] for line in _lines(folder)}) < count:  # each has done something
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            (folder / "stop").touch()
            raise SystemExit(f"process {ended} ended before it was to, with status {status}")
        time.sleep(0.01)
    print(*pids, flush=True)
    print(*(os.waitpid(pid, 0)[1] for pid in pids), flush=True)


def _lines(folder: Path) -> list[str]:
    path = folder / "finished"
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
