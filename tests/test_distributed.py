"""A sequence, or the heads of a block, split over ranks: jobs of gloo processes on CPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_jobs
import pytest


def failures(found: list[dict[str, str]]) -> str:
    """Every check that failed on some rank, with the reason."""
    return "\n".join(f"rank {rank}, {name}: {why}" for rank, checks in enumerate(found) for name, why in checks.items() if why)


@pytest.mark.parametrize("world", [2, 4])
def test_parts_are_the_whole(tmp_path: Path, world: int) -> None:
    modules = ("distributed_scan", "distributed_mamba2", "distributed_heads", "distributed_sharding")
    found = distributed_jobs.run(modules, world, tmp_path)
    assert not failures(found), failures(found)
    assert all(len(checks) > 60 for checks in found)


@pytest.mark.parametrize("module", ["distributed_dead", "distributed_dead_counted", "distributed_dead_late"])
def test_a_rank_that_dies_is_named(tmp_path: Path, module: str) -> None:
    *living, dead = distributed_jobs.run([module], 2, tmp_path, timeout=5)
    assert not failures(living), failures(living)
    assert all(living) and dead == {"ended": "without a word"}


def test_the_example_learns_alike_on_one_rank_and_on_two() -> None:
    example = Path(__file__).parent.parent / "examples" / "long_context.py"
    said = []
    for ranks in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(example)]
        done = subprocess.run(
            [*command, "--tokens=400", "--steps=4", "--d-model=32", "--layers=1"],
            capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert not done.returncode, done.stderr
        said.append([float(loss) for loss in re.findall(r": ([0-9.]+) nats a byte", done.stdout)])
    (first, last), on_two = said
    assert last < first
    assert on_two == pytest.approx([first, last], abs=2e-3)
