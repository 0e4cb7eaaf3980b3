"""A rank of tests/test_tune_processes.py: it meets a key whose measurement would come out differently on every rank."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ssdops import config, explain, masks, ssd
from ssdops.autotune import mode, store, tuner
from ssdops.autotune.record import Record, Trial


def main() -> None:
    rank, folder, fails = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "fails"
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    config.cache_dir = lambda: folder / f"cache of {rank}"
    calls = 0

    def measure(worker, key, work, candidates, budget):
        nonlocal calls
        calls += 1
        time.sleep(0.5)
        if fails:
            raise KeyboardInterrupt
        ours = ("recurrent", "naive")[rank]
        return store.keep(
            Record(
                key, tuple(Trial(c.backend, c.config, "measured", 1.0 + (c.backend != ours)) for c in candidates), time.time()
            )
        )

    tuner.measure = measure
    x, log_a = torch.randn(1, 300, 2, 4), -torch.rand(1, 300, 2)
    time.sleep(0.1 * rank)
    try:
        with mode("on"):
            ssd(x, x, x, masks.decay(log_a))
    except KeyboardInterrupt:
        assert fails
    (step,) = explain(x, x, x, masks.decay(log_a)).plan.steps
    print(calls, step.backend, step.origin, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
