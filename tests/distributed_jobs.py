"""Jobs of a few ranks on one machine, of gloo on CPUs or of NCCL with a GPU each; what they run are modules here, by name."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 60.0
"""Seconds that a rank waits for another, where a test does not ask for less."""


def run(
    modules: Sequence[str], world: int, folder: Path, timeout: float = TIMEOUT, backend: str = "gloo"
) -> list[dict[str, str]]:
    """What each rank of a job found: for every check of some modules the reason why it failed, or nothing.

    A module has `CHECKS`, functions of (rank, world) by name; every rank runs all of them in order. One job runs many modules,
    as starting a process costs more than most checks.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = [folder / f"rank{rank}.json" for rank in range(world)]
    command = [sys.executable, __file__, ",".join(modules), str(world), str(store.port), str(timeout), backend]
    ranks = [subprocess.Popen([*command, str(rank), str(place)]) for rank, place in enumerate(places)]
    try:
        for rank in ranks:
            rank.wait(timeout=300)
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads(place.read_text()) if place.exists() else {"ended": "without a word"} for place in places]


def main() -> None:
    modules, world, port, timeout, backend, rank, place = sys.argv[1:]
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(int(rank))
    store = dist.TCPStore("127.0.0.1", int(port), is_master=False)
    dist.init_process_group(
        backend, store=store, rank=int(rank), world_size=int(world), timeout=timedelta(seconds=float(timeout))
    )
    found = {}
    for module in modules.split(","):
        checks: dict[str, Callable[[int, int], None]] = import_module(module).CHECKS
        for name, check in checks.items():
            try:
                check(int(rank), int(world))
                found[f"{module}: {name}"] = ""
            except Exception:
                found[f"{module}: {name}"] = traceback.format_exc(limit=-4)
    Path(place).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
