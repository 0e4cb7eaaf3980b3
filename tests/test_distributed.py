"""A sequence, or the heads of a block, split over ranks: jobs of gloo processes on CPUs."""

from __future__ import annotations

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
@pytest.mark.parametrize(
    ("module", "least"),
    [("distributed_scan", 45), ("distributed_mamba2", 8), ("distributed_heads", 10), ("distributed_sharding", 9)],
)
def test_parts_are_the_whole(tmp_path: Path, module: str, least: int, world: int) -> None:
    found = distributed_jobs.run(module, world, tmp_path)
    assert not failures(found), failures(found)
    assert all(len(checks) >= least for checks in found)


@pytest.mark.parametrize("module", ["distributed_dead", "distributed_dead_late"])
def test_a_rank_that_dies_is_named(tmp_path: Path, module: str) -> None:
    *living, dead = distributed_jobs.run(module, 3, tmp_path, timeout=5)
    assert not failures(living), failures(living)
    assert all(living) and "dies" not in dead


def test_the_example_learns_alike_on_one_rank_and_on_two() -> None:
    example = Path(__file__).parent.parent / "examples" / "long_context.py"
    said = []
    for ranks in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(example)]
        out = subprocess.run(
            [*command, "--tokens=1000", "--steps=4"], capture_output=True, text=True, timeout=300, check=True
        ).stdout
        said.append([float(loss) for loss in re.findall(r": ([0-9.]+) nats a byte", out)])
    (first, last), on_two = said
    assert last < first
    assert on_two == pytest.approx([first, last], abs=2e-3)
