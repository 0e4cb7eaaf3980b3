"""The cost model: rates measured, kept and believed only if they are rates; and how predictions follow from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ssdops import cli_calibrate, config, masks
from ssdops.autotune import cost, store
from ssdops.autotune.cost import DEFAULT_RATES, Rates, keep_rates, predict, rates_of, rates_path
from ssdops.autotune.workload import Workload
from ssdops.backends import registry
from ssdops.backends.base import Config, Support, Work
from ssdops.cli import app
from ssdops.ir.problem import Target, problem_of
from ssdops.plan import candidates, terms_of

CPU = Target("cpu")
RATES = Rates(matmul=1e12, elementwise=1e11, bandwidth=1e10, launch=1e-6)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(config, "triton_interpreted", lambda: False)
    monkeypatch.setattr(cost, "_told", set())
    store.forget()
    yield
    store.forget()


def test_a_prediction_is_launches_and_the_largest_of_the_rest() -> None:
    keep_rates(CPU, RATES)
    assert predict(Work(1e12, 0, 0, 0), CPU) == pytest.approx(1.0)
    assert predict(Work(1e12, 1e11, 3e10, 1e6), CPU) == pytest.approx(4.0)
    assert predict(Work(1e12, 1e11, 1e10, 1e6), CPU) == pytest.approx(3.0)


def test_defaults_are_per_thread() -> None:
    threads = torch.get_num_threads()
    assert rates_of(CPU).matmul == DEFAULT_RATES["cpu"].matmul * threads
    assert rates_of(CPU).launch == DEFAULT_RATES["cpu"].launch
    assert rates_of(Target("cuda", "a GPU")) == DEFAULT_RATES["cuda"]


@pytest.mark.parametrize(
    "rates", [{"matmul": 0.0}, {"launch": float("nan")}, {"bandwidth": -1.0}, {"matmul": "fast"}, {"x": 1.0}]
)
def test_what_is_no_rate_is_not_believed(rates: dict[str, object]) -> None:
    keep_rates(CPU, RATES)
    data = json.loads(rates_path(CPU).read_text())
    rates_path(CPU).write_text(json.dumps({**data, "rates": {**data["rates"], **rates}}))
    store.forget()
    with pytest.warns(UserWarning, match="is not used, as it holds no rates") as caught:
        assert rates_of(CPU).matmul == DEFAULT_RATES["cpu"].matmul * torch.get_num_threads()
        store.forget()
        rates_of(CPU)
    assert len(caught) == 1


def test_rates_of_another_device_are_not_believed() -> None:
    path = keep_rates(CPU, RATES)
    path.write_text(path.read_text().replace("threads", "sockets"))
    store.forget()
    with pytest.warns(UserWarning, match="another schema or device"):
        assert rates_of(CPU) != RATES


def test_calibrate_measures_and_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_calibrate, "SECONDS", 0.01)
    result = CliRunner().invoke(app, ["tune", "--calibrate"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    found = rates_of(CPU)
    assert asdict(found) == json.loads(rates_path(CPU).read_text())["rates"]
    assert 1e8 < found.matmul < 1e14 and 1e7 < found.elementwise < 1e13
    assert 1e8 < found.bandwidth < 1e13 and 1e-8 < found.launch < 1e-2


def test_a_step_is_what_a_chain_takes_longer_for_longer_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_calibrate.Target, "of", lambda device: Target("cuda", "a GPU", (9, 0)))

    def seconds(self: object, work: Workload, backend: str, config: Config, *_: object) -> float:
        assert backend == "triton" and config.segments == 1 and config.chunk_size is not None
        return 3e-5 + 1.5e-6 * -(-work.seqlen // config.chunk_size)

    monkeypatch.setattr(cli_calibrate.Session, "seconds", seconds)
    assert cli_calibrate.chain(torch.device("cpu")) == pytest.approx(1.5e-6)
    monkeypatch.setattr(cli_calibrate, "candidates", lambda *_: [])
    assert cli_calibrate.chain(torch.device("cpu")) == DEFAULT_RATES["cuda"].step


def test_long_sequences_are_predicted_to_run_by_chunks() -> None:
    work = Workload("decay(log_a)", "forward", "float32", "float32", 1, 4096, 8, 64, 64, 1, 1, 8)

    def order(work: Workload) -> list[str]:
        found = [c for c in candidates(work, CPU) if not c.reluctant]
        return list(dict.fromkeys(c.backend for c in sorted(found, key=lambda c: c.seconds)))

    for term in ("decay(log_a)", "channel_decay(channel)"):
        assert order(replace(work, term=term)) == ["chunked", "recurrent", "naive"]


@pytest.mark.parametrize(("documents", "cut"), [(64, False), (2, True)])
def test_documents_are_cut_into_segments_where_there_are_few(documents: int, cut: bool) -> None:
    """Many short ones keep a GPU busy side by side; two of any length do not."""
    tokens = 32768
    q, v, log_a = (torch.empty(1, tokens, *rest, device="meta") for rest in ((1, 128), (80, 64), (80,)))
    ends = torch.empty(documents + 1, device="meta", dtype=torch.int32)
    mask = masks.decay(log_a) * masks.documents(ends)
    q, v = q.bfloat16(), v.bfloat16()
    problem = problem_of(mask.tree, q, q, v, mask.operands)
    problem = replace(problem, target=Target("cuda", "", (9, 0), multiprocessors=132))
    (term,), backend = terms_of(mask.tree), registry.get("triton")
    configs = backend.configs(term, problem)
    assert not isinstance(configs, Support)
    best = min(configs, key=lambda config: predict(backend.work(term, problem, config), problem.target))
    assert (best.segments > 1) is cut
