"""What is chosen: by what was measured, by what ships, or by the model; and plans that are remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tune_records import considered, known, step, tensors

from ssdops import explain, ssd
from ssdops.autotune import exchange, mode, store
from ssdops.autotune.place import place_of
from ssdops.autotune.record import Key, Record, Trial
from ssdops.autotune.workload import Workload
from ssdops.backends import registry
from ssdops.backends.base import Config
from ssdops.ir.problem import Target

pytestmark = pytest.mark.usefixtures("nothing_tuned")


def test_what_was_measured_is_taken_whatever_is_predicted() -> None:
    assert step().backend != "recurrent" and step().origin == "model"
    store.keep(known(*considered(chunked=2e-3, recurrent=1e-3)))
    found = step()
    assert (found.backend, found.origin, found.measured) == ("recurrent", "tuned", 1e-3)
    reasons = {r.backend: r.reason for r in found.rejected}
    assert reasons["chunked"] == "measured slower: 2 ms against 1" and reasons["naive"] == "not measured: not now"
    assert "1 ms measured (measured on this device)" in str(explain(*tensors()))
    assert step(tune="off").origin == "model"


def test_a_backend_measured_to_be_fastest_is_taken_although_it_compiles() -> None:
    pytest.importorskip("tvm")
    assert step().backend != "tvm"
    store.keep(known(*considered(chunked=2e-3, tvm=1e-3)))
    assert step().backend == "tvm"


def test_what_the_user_fixed_stays() -> None:
    store.keep(known(*considered(chunked=2e-3, naive=1e-3)))
    assert step(backend="chunked").config == Config(128) and step(backend="chunked").origin == "tuned"
    assert (step(backend="chunked", chunk_size=32).config, step(chunk_size=32).origin) == (Config(32), "model")
    assert step(backend="recurrent").origin == "only"


def test_a_record_without_some_backend_says_nothing_about_the_best() -> None:
    store.keep(known(Trial("naive", Config(), "measured", 1e-9)))
    assert step().origin == "model" and step(backend="naive").measured == 1e-9


def test_a_configuration_that_does_not_exist_is_not_taken() -> None:
    trials = (*considered(naive=1e-3), Trial("chunked", Config(17), "measured", 1e-6))
    store.keep(known(*trials))
    assert step().backend == "naive"


def test_the_model_takes_nothing_that_has_failed() -> None:
    first = step()
    store.keep(known(Trial(first.backend, first.config, "failed", note="wrong: y is off")))
    second = step()
    assert second.origin == "model" and (second.backend, second.config) != (first.backend, first.config)


def test_a_device_of_the_name_of_a_shipped_file_has_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever versions and sources they were measured with; and another device has none of them."""
    monkeypatch.setattr(exchange, "DATA", tmp_path)
    abacus, other = (Target("cuda", name, (9, 0)) for name in ("Abacus 9000 (1 TB)", "Abacus 9000 1 TB"))
    place = replace(place_of(abacus), versions=("0.0.1", "2.6"), sources="old")
    work = Workload("decay(log_a)", "forward", "float32", "float32", 1, 70, 2, 4, 4, 1, 1, 2)
    names = {r.backend for r in step(target=abacus).rejected} | {step(target=abacus).backend}
    trials = tuple(Trial(name, Config(), "measured", 1.0 if name == "recurrent" else 2.0) for name in sorted(names))
    store.keep(Record(Key(place, work.bucket()), trials, 1.0))
    assert step(target=abacus).origin == "model"  # what was measured with other versions counts only once it ships
    count, path = exchange.export(tmp_path, abacus.name)
    assert (count, path.name) == (1, "abacus-9000-1-tb.json")
    exchange._shipped.cache_clear()
    found = step(target=abacus)
    assert (found.backend, found.origin, found.measured) == ("recurrent", "shipped", 1.0)
    assert "shipped with ssdops" in str(explain(*tensors(), target=abacus))
    assert step(target=other).origin == "model"  # of the same file name


@pytest.mark.parametrize("text", ["{", '{"schema": 99, "results": []}', '{"schema": 1, "results": [{}]}'])
def test_a_shipped_file_that_is_none_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(exchange, "DATA", tmp_path)
    (tmp_path / f"{exchange.file_name(place_of(Target('cpu')).device)}.json").write_text(text)
    with pytest.warns(UserWarning, match="results that ship with ssdops are not used") as caught:
        assert step().origin == "model" == step().origin
    assert len(caught) == 1


def test_what_ships_does_not_make_a_call_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr(exchange, "DATA", tmp_path)
    store.keep(known(*considered(recurrent=2e-3, tvm=1e-3)))
    exchange.export(tmp_path / f"{exchange.file_name(place_of(Target('cpu')).device)}.json")
    store.clear()
    assert (step().backend, step().origin) == ("recurrent", "shipped")
    monkeypatch.setattr("ssdops.backends.tvm.kept._is_kept", lambda name, tile: True)
    assert (step().backend, step().origin) == ("tvm", "shipped")


def test_what_ships_comes_after_what_is_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "DATA", tmp_path)
    store.keep(known(*considered(naive=1e-3)))
    exchange.export(tmp_path / f"{exchange.file_name(place_of(Target('cpu')).device)}.json")
    store.clear()
    assert (step().backend, step().origin) == ("naive", "shipped")
    store.keep(known(*considered(recurrent=1e-3)))
    assert (step().backend, step().origin) == ("recurrent", "tuned")
    assert step(tune="off").origin == "model"


def test_directions_are_chosen_apart() -> None:
    store.keep(known(*considered(naive=1e-3)))
    store.keep(known(*considered(recurrent=1e-3), direction="backward"))
    assert ran(lambda: ssd(*tensors())) == ["naive"]
    assert ran(lambda: ssd(*tensors(learnt=True)).sum().backward()) == ["recurrent", "recurrent backward"]


def ran(call: Callable[[], object]) -> list[str]:
    """The backends that a call runs, in order."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("chunked", "recurrent", "naive"):
            kind = type(registry.get(name))
            forward, backward = kind.forward, kind.backward

            def spy(self: Any, *args: Any, _f: Any = forward, _n: str = name, **kw: Any) -> Any:
                seen.append(_n)
                return _f(self, *args, **kw)

            def spy_back(self: Any, *args: Any, _f: Any = backward, _n: str = name, **kw: Any) -> Any:
                seen.append(f"{_n} backward")
                return _f(self, *args, **kw)

            patch.setattr(kind, "forward", spy)
            patch.setattr(kind, "backward", spy_back)
        call()
    return seen


# --- plans that are remembered ----------------------------------------------------------------------------------------


def test_a_new_result_replaces_remembered_plans() -> None:
    modelled = [step().backend]
    assert ran(lambda: ssd(*tensors())) == modelled != ["recurrent"]
    store.keep(known(*considered(recurrent=1e-3)))
    assert ran(lambda: ssd(*tensors())) == ["recurrent"]
    store.clear()
    assert ran(lambda: ssd(*tensors())) == modelled


def test_the_mode_of_the_context_is_that_of_the_plan() -> None:
    modelled = [step().backend]
    store.keep(known(*considered(recurrent=1e-3)))
    assert ran(lambda: ssd(*tensors())) == ["recurrent"] != modelled
    with mode("off"):
        assert ran(lambda: ssd(*tensors())) == modelled
        assert ran(lambda: ssd(*tensors(), tune="cached")) == ["recurrent"]
    assert ran(lambda: ssd(*tensors(), tune="off")) == modelled


@pytest.mark.parametrize("later", ["naive", "recurrent", "chunked"])
def test_a_backward_pass_has_the_plan_of_its_forward_pass(later: str) -> None:
    q, k, v, mask = tensors(learnt=True)
    expected = torch.autograd.grad(ssd(q, k, v, mask).sum(), v)[0]
    store.keep(known(*considered(chunked=2.0), direction="backward"))
    y = ssd(q, k, v, mask)
    trials = (
        considered(**{later: 1.0}) if later != "chunked" else (*considered(), Trial("chunked", Config(32), "measured", 1.0))
    )
    store.keep(known(*trials, direction="backward"))
    assert ran(lambda: y.sum().backward()) == ["chunked backward"]
    torch.testing.assert_close(v.grad, expected)


def test_a_backward_pass_in_another_thread_has_the_mode_of_its_forward_pass() -> None:
    store.keep(known(*considered(recurrent=1e-3), direction="backward"))
    q, k, v, mask = tensors(learnt=True)
    narrow = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]  # of which nothing is saved
    place, work = place_of(Target("cpu")), Workload.of(step().term, explain(*narrow, mask).problem, "backward")
    assert work is not None
    store.keep(Record(Key(place, work.bucket()), considered(recurrent=1e-3), 1.0))
    with mode("off"):
        y = ssd(*narrow, mask)

    def elsewhere() -> None:
        thread = Thread(target=lambda: y.sum().backward())
        thread.start()
        thread.join()

    (backend,) = ran(elsewhere)
    assert backend != "recurrent backward" and backend.endswith(" backward")
    assert ran(lambda: ssd(*narrow, mask).sum().backward()) == ["recurrent", "recurrent backward"]
