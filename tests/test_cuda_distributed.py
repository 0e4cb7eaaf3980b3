"""A sequence split over GPUs: jobs of NCCL processes. `test_distributed.py` has the same over gloo, on CPUs."""

from __future__ import annotations

from pathlib import Path

import distributed_jobs
import pytest
import torch
import torch.distributed as dist
from test_distributed import failures

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices; gloo splits the same calls on CPUs"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_nccl_available()), reason="this torch has no NCCL"),
]


@pytest.mark.parametrize("world", [2, 4])
def test_slices_on_gpus_are_the_whole(tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"{world} processes take a CUDA device each, and {torch.cuda.device_count()} are here")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")  # multicast, which not every machine lends
    found = distributed_jobs.run(["distributed_cuda"], world, tmp_path, timeout=120, backend="nccl")
    assert not failures(found), failures(found)
    assert all(len(checks) > 20 for checks in found)
