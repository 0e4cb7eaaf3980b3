"""A process of tests/test_tune_processes.py: it keeps result after result, of keys that others keep too, until it is killed."""

import sys
from pathlib import Path

from ssdops import config
from ssdops.autotune import store
from ssdops.autotune.place import Place
from ssdops.autotune.record import Key, Record, Trial
from ssdops.autotune.workload import Workload
from ssdops.backends.base import Config

SHARED = 4
"""Keys that all processes write; every other key is of one process alone."""


def key_of(number: int) -> Key:
    work = Workload("decay(log_a)", "forward", "float32", "float32", 1, 64, number, 4, 4, 1, 1, 1)
    return Key(Place("a device", ("0.1.0",), "0123"), work)


def main() -> None:
    process, folder = int(sys.argv[1]), Path(sys.argv[2])
    config.cache_dir = lambda: folder
    print("ready", flush=True)
    for turn in range(100_000):
        number = turn // 2 % SHARED if turn % 2 else 1000 * (process + 1) + turn % 50
        trials = (Trial("chunked", Config(64), "measured", 1.0 + turn), Trial(f"backend {process}", Config(), "measured", 2.0))
        store.keep(Record(key_of(number), trials, float(turn)))
        print(number, flush=True)


if __name__ == "__main__":
    main()
