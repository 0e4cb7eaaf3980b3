"""`benchmarks/regret.py` on made-up times: what it draws, times, leaves out, sums up and writes down."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ssdops import config
from ssdops.autotune import exchange, store
from ssdops.autotune.workload import Workload
from ssdops.backends import registry
from ssdops.ir.problem import Target
from ssdops.plan import candidates

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BACKENDS = "chunked,recurrent,naive"


@pytest.fixture
def regret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, in whose process times are those that are predicted, but for chunks of 64 tokens, which take half."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(registry, "BACKENDS", dict(registry.BACKENDS))
    monkeypatch.setitem(os.environ, "SSDOPS_CACHE_DIR", os.environ["SSDOPS_CACHE_DIR"])  # which an option sets
    store.forget()
    import regret

    class Made:
        device, module, starts, asked = "cpu", "", 1, []

        def __init__(self, *_: str) -> None:
            Made.asked = []

        def __enter__(self) -> Made:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def start(self, timeout: float = 0.0) -> None:
            pass

        def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
            work, size = Workload.from_json(request["workload"]), request["config"]["chunk_size"]
            Made.asked.append((request["backend"], size))
            found = candidates(work, Target("cpu"))
            (c,) = [c for c in found if c.backend == request["backend"] and c.config.chunk_size == size]
            return {"seconds": c.seconds * (0.5 if size == 64 else 1.0)}

    monkeypatch.setattr(regret, "Worker", Made)
    return regret


def test_the_model_and_the_tuner_are_held_to_the_fastest(regret: Any, tmp_path: Path) -> None:
    out, shipped = tmp_path / "regret.json", tmp_path / "tuned.json"
    args = ["--count", "8", "--seed", "1", "--tune", "--backends", BACKENDS, "--cache", str(tmp_path), "--commit", "abc"]
    regret.main([*args, "--json", str(out), "--export", str(shipped)])
    found = json.loads(out.read_text())
    assert found["environment"]["commit"] == "abc" and found["environment"]["backends"] == BACKENDS.split(",")
    assert found["environment"]["seed"] == 1 and found["environment"]["place"]["versions"]
    rows = found["rows"]
    assert len(rows) == 8 and all(row["tuned_in"] >= 0 for row in rows)
    assert all(row["seconds"][row["tuned"]] == min(row["seconds"].values()) for row in rows)
    assert found["summary"]["tuned"] == {"median": 1.0, "p95": 1.0, "max": 1.0}
    regrets = sorted(row["seconds"][row["model"]] / min(row["seconds"].values()) for row in rows)
    assert found["summary"]["model"]["max"] == regrets[-1] > 1.0
    assert len(exchange.read_export(shipped)) == len(
        {json.dumps(Workload.from_json(r["workload"]).bucket().to_json()) for r in rows}
    )


def test_what_is_far_behind_is_timed_once_or_not_at_all(regret: Any, tmp_path: Path) -> None:
    work = Workload("decay(log_a)", "forward", "float32", "float32", 1, 4096, 8, 64, 64, 1, 1, 8)
    options = regret.parse(["--backends", BACKENDS])
    tried, worker = candidates(work, Target("cpu")), regret.Worker()
    seconds, failed = regret.exhaustive(work, worker, tried, options)
    counts = {asked: worker.asked.count(asked) for asked in worker.asked}
    assert counts["chunked", 64] == regret.ROUNDS and counts["recurrent", None] == 1
    assert ("naive", None) not in counts and failed["naive 0 1"].startswith("not tried")
    assert set(seconds) | set(failed) == {regret.name_of(c) for c in tried}


def test_no_workload_is_begun_after_the_limit(regret: Any, tmp_path: Path) -> None:
    out = tmp_path / "regret.json"
    clock = iter(range(0, 10**6, 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regret.time, "monotonic", lambda: float(next(clock)))
        assert regret.main(["--count", "9", "--limit", "25", "--backends", BACKENDS, "--json", str(out)]) == 1
    assert len(json.loads(out.read_text())["rows"]) == 2


def test_a_study_goes_on_where_it_ended(regret: Any, tmp_path: Path) -> None:
    """Rows that are there are kept as they are, the others measured; what is of another draw is refused."""
    out = tmp_path / "regret.json"
    args = ["--seed", "1", "--backends", BACKENDS, "--json", str(out)]
    regret.main(["--count", "2", *args])
    found = json.loads(out.read_text())
    for row in found["rows"]:
        row["tuned_in"] = 77.0  # which nothing measures
    out.write_text(json.dumps(found))
    regret.main(["--count", "4", "--go-on", *args])
    rows = json.loads(out.read_text())["rows"]
    assert [row["tuned_in"] for row in rows] == [77.0, 77.0, None, None]
    with pytest.raises(SystemExit, match="another seed: 1, not 2"):
        regret.main(["--count", "4", "--go-on", *args[2:], "--seed", "2"])


def test_what_is_drawn_for_a_gpu_fits_it(regret: Any) -> None:
    import regret_draw

    works = regret_draw.draw(0, 60, "cuda")
    assert works == regret_draw.draw(0, 60, "cuda") != regret_draw.draw(1, 60, "cuda")
    assert {w.dtype for w in works} == {"bfloat16", "float32"} and {w.direction for w in works} == {"forward", "backward"}
    assert max(w.batch * w.seqlen * w.nheads * w.headdim for w in works) <= 2**27
    assert regret.percentile([3.0, 1.0, 2.0, 4.0], 0.75) == 3.0


def test_a_backend_that_is_none_is_an_error(regret: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        regret.parse(["--backends", "chunked,abacus"])
    assert "no backend is called abacus" in capsys.readouterr().err
