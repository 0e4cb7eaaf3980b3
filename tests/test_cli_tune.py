"""`ssdops tune` and `ssdops cache`, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from ssdops import config, masks, ssd, ssd_step
from ssdops.autotune import shape_log, store
from ssdops.autotune.record import Key, Record, Trial
from ssdops.autotune.shape_log import read_log
from ssdops.autotune.workload import Workload
from ssdops.backends import registry
from ssdops.cli import app
from ssdops.ir.problem import Target
from ssdops.nn import Mamba2
from ssdops.plan import candidates

SHAPE = ["--shape", "1,40,2,4,1,4"]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, and two backends that are quick to try."""
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(registry, "BACKENDS", {k: v for k, v in registry.BACKENDS.items() if k in ("chunked", "naive")})
    monkeypatch.setattr(store, "_told", set())
    store.forget()
    yield
    store.forget()


def ssdops(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that take no time: 1 ms for the first candidate, 2 ms for the next, …"""

    def measure(worker: Any, key: Key, work: Workload, tried: list[Any], *_: Any) -> Record:
        trials = (Trial(c.backend, c.config, "measured", (i + 1) * 1e-3) for i, c in enumerate(tried))
        return store.keep(Record(key, tuple(trials), 1.0))

    monkeypatch.setattr("ssdops.cli_tune.measure", measure)


def test_tune_measures_and_calls_find_it() -> None:
    result = ssdops("tune", *SHAPE, "--direction", "forward", "--budget", 600)
    assert result.exit_code == 0, result.output
    assert "decay(log_a) (1, 40, 2, 4, 4)" in result.output and "ms measured, predicted" in result.output
    again = ssdops("tune", *SHAPE, "--direction", "forward")
    assert again.exit_code == 0 and "ms known, predicted" in again.output
    explained = ssdops("explain", *SHAPE, "--mask", "decay(log_a)")
    assert "measured on this device" in explained.output and "measured slower" in explained.output
    listed = ssdops("cache", "list")
    assert "1 results in" in listed.output and "decay(log_a)" in listed.output
    (path, record), *_ = store.every()
    shown = ssdops("cache", "show", path.stem[:6])
    assert shown.exit_code == 0, shown.output
    assert isinstance(record, Record)
    for trial in record.trials:
        assert f" {trial.backend}" in shown.output
    assert "1 results removed" in ssdops("cache", "clear").output
    assert "0 results in" in ssdops("cache", "list").output


def test_tune_a_model_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    result = ssdops("tune", "--model", "mamba2-2.7b", "--batch", 2)
    assert result.exit_code == 0, result.output
    works = {r.key.workload for _, r in store.every() if isinstance(r, Record)}
    assert {(w.direction, w.batch, w.seqlen, w.nheads, w.headdim, w.q_heads, w.dstate) for w in works} == {
        (direction, 2, 2048, 80, 64, 1, 128) for direction in ("forward", "backward")
    }


def test_a_model_is_tuned_as_its_blocks_call_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick(monkeypatch)
    seqlen = 71  # which no other test plans a call of: a call is logged when it is first planned
    result = ssdops("tune", "--model", "mamba2-130m", "--batch", 2, "--seqlen", seqlen, "--direction", "backward")
    assert result.exit_code == 0, result.output
    log = tmp_path / "shapes.jsonl"
    monkeypatch.setattr(config, "shape_log", lambda: log)  # the environment is read once in a process
    Mamba2(768, device=torch.device("cpu"))(torch.randn(2, seqlen, 768)).sum().backward()
    (met,), _ = read_log(log)
    ((_, record),) = store.every()
    assert isinstance(record, Record) and record.key.workload == met.bucket()


def test_a_step_is_tuned_apart_and_found(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ssdops("tune", *SHAPE, "--direction", "step", "--budget", 600)
    assert result.exit_code == 0, result.output
    ((_, record),) = store.every()
    assert isinstance(record, Record) and all(trial.status != "failed" for trial in record.trials)
    work = record.key.workload
    assert (work.direction, work.seqlen) == ("step", 1)
    trials = (Trial(t.backend, t.config, "measured", 1.0 if t.backend == "naive" else 2.0) for t in record.trials)
    store.keep(Record(record.key, tuple(trials), record.measured_at + 1))
    x, log_a = torch.randn(1, 2, 4), -torch.rand(1, 2)
    one, state = torch.randn(1, 1, 4), torch.randn(1, 2, 4, 4)
    calls: list[str] = []
    for name in ("naive", "chunked"):
        kind = type(registry.get(name))

        def spy(self: Any, *args: Any, _f: Any = kind.forward, _n: str = name) -> Any:
            calls.append(_n)
            return _f(self, *args)

        monkeypatch.setattr(kind, "forward", spy)
    ssd_step(one, one, x, masks.decay(log_a), state)
    assert calls == ["naive"]
    ssd(one[:, None], one[:, None], x[:, None], masks.decay(log_a[:, None]), initial_state=state, return_state=True)
    assert calls == ["naive", "chunked"]  # one token that is no step


def test_what_a_run_meets_is_logged_and_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "shapes.jsonl"
    monkeypatch.setattr(config, "shape_log", lambda: log)
    monkeypatch.setattr(shape_log, "_noted", set())
    x, log_a = torch.randn(1, 37, 1, 4), -torch.rand(1, 37, 1)
    for _ in range(2):
        ssd(x, x, x, masks.decay(log_a) + masks.diagonal(log_a), tune="off")
        ssd(x, x, x.clone().requires_grad_(), masks.decay(log_a)).sum().backward()
    assert len(log.read_text().splitlines()) == 3
    works, bad = shape_log.read_log(log)
    assert bad == 0 and {(w.term, w.direction) for w in works} == {
        ("decay(log_a)", "forward"), ("decay(log_a)", "backward"), ("diagonal(value)", "forward"),
    }  # fmt: skip
    with log.open("a") as file:
        file.write('not JSON\n{"term": 3}\n\n[]\n' + json.dumps({**works[0].to_json(), "term": "decay("}) + "\n")
    quick(monkeypatch)
    result = ssdops("tune", "--from-log", log)
    assert result.exit_code == 0, result.output
    assert "3 lines are no workload, and skipped" in result.output and "is no mask" in result.output
    assert len(list(store.every())) == 3


def test_a_log_that_cannot_be_written_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "shape_log", lambda: tmp_path)
    monkeypatch.setattr(shape_log, "_noted", set())
    monkeypatch.setattr(shape_log, "_told", set())
    with pytest.warns(UserWarning, match="shapes are not logged") as caught:
        for seqlen in (38, 39):
            x, log_a = torch.randn(1, seqlen, 1, 4), -torch.rand(1, seqlen, 1)
            ssd(x, x, x, masks.decay(log_a))
    assert len(caught) == 1


def test_results_move_as_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    ssdops("tune", *SHAPE)
    assert "2 results written into" in ssdops("cache", "export", tmp_path / "out.json").output
    assert "0 results are new, 0 replaced older ones, 2 are older" in ssdops("cache", "import", tmp_path / "out.json").output
    ssdops("cache", "clear")
    merged = ssdops("cache", "merge", tmp_path / "out.json", tmp_path / "out.json", "--into", tmp_path / "all.json")
    assert "2 results are new, 0 replaced older ones, 2 are older" in merged.output
    assert "2 results are new" in ssdops("cache", "import", tmp_path / "all.json").output
    data = json.loads((tmp_path / "out.json").read_text())
    for record in data["results"]:
        record["key"]["device"] = "abacus"
    (tmp_path / "out.json").write_text(json.dumps(data))
    result = ssdops("cache", "import", tmp_path / "out.json")
    assert result.exit_code == 2 and "has results of 'abacus', and here is" in result.stderr
    assert "2 results are new" in ssdops("cache", "import", "--any-device", tmp_path / "out.json").output


def test_a_workload_of_a_log_is_what_was_planned() -> None:
    work = Workload("decay(log_a)", "forward", "float32", "float32", 1, 40, 2, 4, 4, 1, 1, 2)
    assert {c.backend for c in candidates(work, Target("cpu"))} == {"chunked", "naive"}
    assert Workload.of(work.term_of, work.problem(Target("cpu")), "forward") == work


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tune"], "give one of --shape, --model and --from-log, or --calibrate"),
        (["tune", *SHAPE, "--model", "mamba2-130m"], "give one of --shape, --model and --from-log"),
        (["tune", *SHAPE, "--budget", "-1"], "budget must be a positive number of seconds, or None, got -1.0"),
        (["tune", *SHAPE, "--direction", "sideways"], "--direction must be forward, backward, both or step, got 'sideways'"),
        (["tune", *SHAPE, "--direction", "step", "--mask", "decay(a).T"], "there is no step of it to tune"),
        (["tune", *SHAPE, "--direction", "step", "--mask", "window(left=3)"], "carries no state between calls"),
        (["tune", *SHAPE, "--mask", "decay("], "is not an expression"),
        (["tune", "--model", "gpt"], "--model must be one of mamba2-130m"),
        (["tune", "--from-log", "no/such/file"], "cannot read no/such/file: No such file"),
        (["tune", *SHAPE, "--device", "abacus"], "--device 'abacus' is not a device"),
        (["cache", "show", "zzz"], "no result has a key that begins with 'zzz'"),
        (["cache", "import", "no/such/file"], "cannot read no/such/file"),
        (["cache", "export", "/dev/null/file"], "cannot write /dev/null/file"),
        (["cache", "export", "."], "--device says which"),
    ],
)
def test_errors_are_one_line_and_exit_2(args: list[str], message: str) -> None:
    result = ssdops(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_budget_that_is_spent_before_anything_is_timed() -> None:
    result = ssdops("tune", *SHAPE, "--budget", 1e-6)
    assert result.exit_code == 0, result.output
    assert "nothing could be measured; the time went into compiling, which is kept: ask again, or" in result.output


def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdops.cli_tune.TRIALS", "no.such.module")
    result = ssdops("tune", *SHAPE)
    assert result.exit_code == 2 and "does not start" in result.stderr
