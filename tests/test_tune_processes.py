"""Many processes that keep results of the same and of other keys at once, some of them killed at random moments."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from keep_results import SHARED, key_of

from ssdops import config
from ssdops.autotune import store
from ssdops.autotune.record import Record

PROCESSES = 4


def test_no_bad_file_and_no_finished_result_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, str(Path(__file__).with_name("keep_results.py"))]
    running = [subprocess.Popen([*command, str(i), str(tmp_path)], stdout=subprocess.PIPE, text=True) for i in range(PROCESSES)]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    draw, finished = random.Random(0), []
    for process in running:  # each is killed while the rest write on
        time.sleep(draw.uniform(0.0, 0.2))
        process.kill()
        said, _ = process.communicate()
        finished.append([int(line) for line in said.splitlines(keepends=True) if line.endswith("\n")])
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path)
    store.forget()
    found = list(store.every())
    assert [record for _, record in found if not isinstance(record, Record)] == []
    assert {number for numbers in finished for number in numbers} <= {
        r.key.workload.nheads for _, r in found if isinstance(r, Record)
    }
    assert sum(len(numbers) for numbers in finished) > 20
    for number in range(SHARED):
        record = store.read(key_of(number))
        assert record is not None and any(trial.backend == "chunked" for trial in record.trials)
    assert store.clear() == len(found) and list(store.folder().iterdir()) == []


@pytest.mark.parametrize("how", ["works", "fails"])
def test_one_rank_measures_and_all_run_its_plan(tmp_path: Path, how: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("tune_rank.py"))]
    ranks = [subprocess.Popen([*command, str(i), str(tmp_path), how], stdout=subprocess.PIPE, text=True) for i in range(2)]
    said = [rank.communicate(timeout=300)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert sorted(calls for calls, _, _ in said) == ["0", "1"]
    assert said[0][1:] == said[1][1:]
    assert said[0][2] == ("tuned" if how == "works" else "model")
