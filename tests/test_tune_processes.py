"""Many processes that tune the same and other keys at once, some of them killed at random moments; and ranks of one job."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tune_keys import Made, tune

from ssdops import config
from ssdops.autotune import store, tuner
from ssdops.autotune.record import Record

PROCESSES, KILLED = 16, 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that are made at once come by fork")
def test_no_bad_file_and_no_finished_result_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, str(Path(__file__).with_name("tune_keys.py")), str(PROCESSES), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        draw = random.Random(0)
        for pid in draw.sample(pids, KILLED):  # while the rest write on
            time.sleep(draw.uniform(0.0, 0.2))
            os.kill(pid, signal.SIGKILL)
        (tmp_path / "stop").touch()
        statuses = [int(word) for word in parent.communicate(timeout=120)[0].split()]
    assert sorted(statuses) == [0] * (PROCESSES - KILLED) + [signal.SIGKILL] * KILLED
    finished = [line.split() for line in (tmp_path / "finished").read_text().splitlines()]
    assert {process for process, _, _ in finished} == {str(i) for i in range(PROCESSES)}
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path)
    store.forget()
    found = list(store.every())
    assert [record for _, record in found if not isinstance(record, Record)] == []
    whole = {r.key.workload.nheads for _, r in found if isinstance(r, Record) and r.covers(["chunked", "naive"])}
    assert {int(number) for _, number, _ in finished} <= whole
    monkeypatch.setattr(tuner, "_done", set())
    assert all(how == "found" for how in (tune(number, Made()) for number in sorted(whole)[:20]))  # by one that comes later
    assert any(how == "found" for _, _, how in finished)  # as well as by those that were there
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
