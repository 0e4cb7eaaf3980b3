"""`ssdops bench`: what it times, what it marks, what it draws, and how it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ssdops import cli_bench, config
from ssdops.autotune import store
from ssdops.autotune.worker import Died
from ssdops.autotune.workload import Workload
from ssdops.backends import registry
from ssdops.cli import app

SHAPE = ["--shape", "1,1024,2,4,1,4"]
TAKES = {"chunked": 1e-6, "naive": 4e-3, "recurrent": 1e-5}
"""Seconds of a token."""


class Made:
    """A worker that answers with times in proportion to the length."""

    asked: list[tuple[str, int]]

    def __init__(self, module: str, device: str) -> None:
        assert device == "cpu"

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        work, name = Workload.from_json(request["workload"]), request["backend"]
        Made.asked.append((name, work.seqlen))
        if name == "recurrent" and work.seqlen > 256:
            raise Died("the process ended: SIGSEGV")
        return {"seconds": work.seqlen * TAKES[name]}


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(registry, "BACKENDS", {k: v for k, v in registry.BACKENDS.items() if k in TAKES})
    monkeypatch.setattr(cli_bench, "Worker", Made)
    monkeypatch.setattr(Made, "asked", [], raising=False)
    store.forget()


def bench(*args: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, args)], env={"COLUMNS": "160"})


def cells(result: Result) -> dict[str, list[str]]:
    """The rows of the table that begin with a length."""
    rows = (line.split() for line in result.output.splitlines())
    return {row[0]: row[1:] for row in rows if row and row[0].isdigit()}


def test_every_backend_at_every_length_and_what_is_taken_is_marked() -> None:
    result = bench(*SHAPE)
    assert result.exit_code == 0, result.output
    assert cells(result) == {
        "128": ["0.128*", "1.28", "512"],
        "256": ["0.256*", "2.56", "1.02e+03"],
        "512": ["0.512*", "2.05e+03"],
        "1024": ["1.02*"],  # 'naive' took more than two seconds before
    }
    assert "recurrent: at 512 tokens: the process ended: SIGSEGV" in result.output
    assert ("recurrent", 1024) not in Made.asked and ("naive", 1024) not in Made.asked
    assert len(list(store.every())) == 0


def test_a_mask_whose_terms_run_apart_has_a_column_for_auto() -> None:
    result = bench(*SHAPE, "--mask", "decay(log_a) + dense(entries)", "--seqlens", "64,32", "--backends", "naive,chunked")
    assert result.exit_code == 0, result.output
    assert cells(result) == {"32": ["256", "128*"], "64": ["512", "256*"]}  # of auto, one term runs on 'chunked'
    assert "chunked: at 32 tokens:" in result.output


def test_the_picture_has_a_line_for_each_backend_and_rings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    seen: list[Any] = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k)))
    result = bench(*SHAPE, "--direction", "backward", "--plot", tmp_path / "bench.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = seen[0].axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert lines == {"chunked": [128, 256, 512, 1024], "recurrent": [128, 256], "naive": [128, 256, 512]}
    (rings,) = axes.collections
    assert [tuple(at) for at in rings.get_offsets()] == [(t, pytest.approx(t * 1e-3)) for t in (128, 256, 512, 1024)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "1,2"], "--shape must be six positive integers"),
        ([*SHAPE, "--seqlens", "64,x"], "--seqlens must be positive integers"),
        ([*SHAPE, "--direction", "both"], "--direction must be forward or backward"),
        ([*SHAPE, "--backends", "abacus"], "unknown backend 'abacus'"),
        ([*SHAPE, "--plot", "bench.jpg"], "must end in .png"),
        ([*SHAPE, "--seqlens", "8", "--plot", "no/such/folder/bench.png"], "cannot write no/such/folder/bench.png"),
    ],
)
def test_errors_are_one_line_and_exit_2(args: list[str], message: str) -> None:
    result = bench(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_without_matplotlib_it_says_what_to_install_before_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    result = bench(*SHAPE, "--plot", "bench.png")
    assert result.exit_code == 2 and "pip install 'ssdops[plot]'" in result.stderr
    assert Made.asked == []
