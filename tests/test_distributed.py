"""A sequence split over ranks is the sequence: jobs of gloo processes on CPUs."""

from __future__ import annotations

from pathlib import Path

import distributed_jobs
import pytest


def failures(found: list[dict[str, str]]) -> str:
    """Every check that failed on some rank, with the reason."""
    return "\n".join(f"rank {rank}, {name}: {why}" for rank, checks in enumerate(found) for name, why in checks.items() if why)


@pytest.mark.parametrize("world", [2, 4])
def test_slices_are_the_whole(tmp_path: Path, world: int) -> None:
    found = distributed_jobs.run("distributed_scan", world, tmp_path)
    assert not failures(found), failures(found)
    assert all(len(checks) > 50 for checks in found)
