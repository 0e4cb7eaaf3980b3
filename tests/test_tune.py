"""The tuner: what it believes, what it refuses, and when it keeps still."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from faulty_backends import CLASSES, FAULTS
from torch import Tensor

from ssdops import config, explain, masks, ssd
from ssdops.autotune import exchange, mode, policy, search, store, tuner
from ssdops.autotune.choose import Candidate
from ssdops.autotune.place import place_of
from ssdops.autotune.record import Key, Record, Trial
from ssdops.autotune.search import Search
from ssdops.autotune.worker import Died, Worker
from ssdops.autotune.workload import Workload
from ssdops.backends import registry
from ssdops.backends.base import Config
from ssdops.errors import TuningError
from ssdops.ir.problem import Target
from ssdops.plan import TRIALS
from ssdops.steps import Step

WORK = Workload("decay(log_a)", "backward", "float32", "float32", 1, 70, 2, 4, 4, 1, 1, 2)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, nothing tuned, and no warning given yet."""
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(config, "triton_interpreted", lambda: False)
    for module in (store, tuner):
        monkeypatch.setattr(module, "_told", set())
    monkeypatch.setattr(tuner, "_done", set())
    store.forget()
    yield
    store.forget()
    registry.get.cache_clear()


def register(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(registry.BACKENDS, name, CLASSES[name])


def tensors(seqlen: int = 70, learnt: bool = False) -> tuple[Tensor, Tensor, Tensor, masks.Mask]:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, seqlen, 1, 4, generator=draw)
    v = torch.randn(1, seqlen, 2, 4, generator=draw)
    log_a = -torch.rand(1, seqlen, 2, generator=draw)
    return q, k, v.requires_grad_(learnt), masks.decay(log_a)


def step(**options: Any) -> Step:
    (found,) = explain(*tensors(), **options).plan.steps
    return found


def known(*trials: Trial, direction: str = "forward", device: str | None = None) -> Record:
    """A record of the workload of `tensors()` on this device."""
    place = place_of(Target("cpu"))
    work = Workload("decay(log_a)", direction, "float32", "float32", 1, 70, 2, 4, 4, 1, 1, 2)
    return Record(Key(place, work.bucket()), trials, 1.0)


def considered(**seconds: float) -> tuple[Trial, ...]:
    """Trials of every backend that runs `tensors()`: of the given ones measured, of the rest skipped."""
    names = ("chunked", "recurrent", "naive", "tvm")
    sizes: dict[str, int | None] = {"chunked": 128, "tvm": 32}
    return tuple(
        Trial(name, Config(sizes.get(name)), "measured", seconds[name])
        if name in seconds
        else Trial(name, Config(sizes.get(name)), "skipped", note="not now")
        for name in names
    )


# --- faults -----------------------------------------------------------------------------------------------------------


def test_every_planted_fault_is_recorded_by_name_and_none_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, *CLASSES)
    candidates = [Candidate(name, Config(32), i * 1e-9 + 1e-9) for i, name in enumerate([*FAULTS, "printing", "sound"])]
    with Worker(TRIALS, "cpu") as worker:
        found = Search(worker, WORK, budget=900.0, seed=1, patience=10.0).run(candidates)
        trials = {t.backend: t for t in found}
        assert worker.starts == 3  # anew after the crash, and after the hang
    for name, error in FAULTS.items():
        assert trials[name].status == "failed" and re.match(error, trials[name].note), trials[name]
    for name in ("sound", "printing"):
        assert trials[name].status == "measured" and (trials[name].seconds or 0) > 1e-6, trials[name]


def test_a_backend_from_outside_is_tuned_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "sound", "nan gradient")
    monkeypatch.setattr(
        registry, "BACKENDS", {k: v for k, v in registry.BACKENDS.items() if k in ("sound", "nan gradient", "naive")}
    )
    q, k, v, mask = tensors(learnt=True)
    with mode("on", budget=900):
        y = ssd(q, k, v, mask)
    y.sum().backward()
    (record,) = (record for _, record in store.every() if isinstance(record, Record))
    status = {t.backend: t.status for t in record.trials}
    assert status["sound"] == "measured" and status["nan gradient"] == "failed"
    assert record.key.workload.direction == "backward"
    torch.testing.assert_close(y, ssd(q, k, v, mask, backend="naive"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it is measured already")

    monkeypatch.setattr(Worker, "start", refuse)
    store.forget()
    tuner._done.clear()
    with mode("on"):
        ssd(q, k, v, mask).sum().backward()


def test_a_process_that_does_not_start_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdops.plan.TRIALS", "no.such.module")
    with pytest.warns(UserWarning, match="nothing is tuned.*No module named 'no'") as caught, mode("on", budget=30):
        ssd(*tensors())
        ssd(*tensors(200))
    assert len(caught) == 1


def test_a_device_that_is_not_there() -> None:
    with Worker(TRIALS, "cuda:7") as worker, pytest.raises(Died, match="cuda:7 cannot be used"):
        worker.start()


# --- the search, with times that are made up ---------------------------------------------------------------------------


@dataclass
class Made:
    """Answers like a worker, with given times, which pass on a clock of its own."""

    seconds: dict[int, float]
    checks: float = 0.0
    clock: float = 0.0
    expects: float = 0.0
    starts: int = 1
    asked: list[tuple[str, int]] = field(default_factory=list)

    def start(self, timeout: float = 0.0) -> None:
        pass

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        size = request["config"]["chunk_size"]
        self.asked.append((request["do"], size))
        timed = max(request["seconds"], self.seconds[size])
        takes = {"expect": self.expects, "check": self.checks, "time": timed}[request["do"]]
        self.clock += min(takes, timeout)
        if takes > timeout:
            raise Died(f"no answer within {timeout:.3g} s")
        return {"seconds": self.seconds[size]} if request["do"] == "time" else {}


def searched(made: Made, budget: float = 1e6, predicted: Callable[[int], float] = lambda size: 1.0) -> dict[int | None, Trial]:
    candidates = [Candidate("chunked", Config(size), predicted(size)) for size in made.seconds]
    trials = Search(made, WORK, budget, 0).run(candidates)  # type: ignore[arg-type]
    return {t.config.chunk_size: t for t in trials}


def test_the_slower_half_is_dropped_at_every_round() -> None:
    made = Made({size: 1.0 + size / 100 for size in range(1, 9)})
    trials = searched(made)
    assert all(t.status == "measured" for t in trials.values())
    assert min(trials.values(), key=lambda t: t.seconds or 9).config.chunk_size == 1
    samples = {size: sum(asked == ("time", size) for asked in made.asked) for size in made.seconds}
    assert samples[8] == 2 and samples[4] == 3 and samples[2] == samples[1] > samples[4]


def test_what_is_predicted_to_be_far_slower_is_not_tried() -> None:
    made = Made({1: 1.0, 2: 1.0, 30: 1.0})
    trials = searched(made, predicted=float)
    assert trials[30].status == "skipped" and "30 times slower" in trials[30].note
    assert not any(size == 30 for _, size in made.asked)


@pytest.mark.parametrize("checks", [0.05, 0.5, 10.0])
def test_the_budget_is_honoured(monkeypatch: pytest.MonkeyPatch, checks: float) -> None:
    made = Made(dict.fromkeys(range(1, 9), 0.05), checks)
    monkeypatch.setattr(search.time, "monotonic", lambda: made.clock)
    trials = searched(made, budget=2.0)
    monkeypatch.undo()
    assert made.clock < 1.2 * 2.0 and len(trials) == 8
    assert any(t.status == "measured" for t in trials.values()) == (checks < 1)


def test_what_the_budget_cuts_short_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made({1: 0.05, 2: 0.05, 3: 1.8})
    monkeypatch.setattr(search.time, "monotonic", lambda: made.clock)
    trials = searched(made, budget=2.0, predicted=float)
    assert trials[1].status == "measured"
    assert trials[3].status == "skipped" and "no answer within" in trials[3].note


def test_the_reference_s_time_is_no_candidate_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is left is the most that a first candidate may take; the reference took more, once, and all were tried."""
    made = Made({1: 0.05, 2: 0.05}, checks=0.05, expects=1.1)
    monkeypatch.setattr(search.time, "monotonic", lambda: made.clock)
    trials = searched(made, budget=2.0)
    assert [t.status for t in trials.values()] == ["measured"] * 2
    assert sum(asked == "expect" for asked, _ in made.asked) == 1


def test_a_reference_that_is_too_slow_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made({1: 0.05}, expects=9.0)
    monkeypatch.setattr(search.time, "monotonic", lambda: made.clock)
    (trial,) = searched(made, budget=2.0).values()
    assert trial.status == "skipped" and "the reference was not worked out: no answer within 1.2 s" in trial.note
    assert made.clock < 1.2 * 2.0


# --- what is chosen ---------------------------------------------------------------------------------------------------


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


# --- modes ------------------------------------------------------------------------------------------------------------


def tuned(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> int:
    """How many searches a call makes; each finds that 'naive' is the fastest."""
    count = 0

    def found(worker: Worker, key: Key, *_: object) -> Record:
        nonlocal count
        count += 1
        return store.keep(Record(key, considered(naive=1e-3), 1.0))

    monkeypatch.setattr(tuner, "measure", found)
    call()
    return count


def test_modes_say_when_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(name: str) -> int:
        def call() -> None:
            for _ in range(2):
                ssd(*tensors(), tune=name)
                ssd(*tensors(72), tune=name)  # of the same bucket

        return tuned(monkeypatch, call)

    assert calls("off") == calls("cached") == 0
    assert calls("on") == 1
    tuner._done.clear()
    assert calls("on") == calls("cached") == 0 and calls("force") == 1
    assert step().origin == "tuned"


def test_argument_context_environment_in_that_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSDOPS_TUNE", "on")
    config.tuning_mode.cache_clear()
    policy._of_environment.cache_clear()
    try:
        assert policy.current() == "on"
        with mode("off"):
            assert policy.current() == "off"
            assert tuned(monkeypatch, lambda: ssd(*tensors())) == 0
            assert tuned(monkeypatch, lambda: ssd(*tensors(), tune="on")) == 1
        assert tuned(monkeypatch, lambda: ssd(*tensors(500))) == 1
        monkeypatch.setenv("SSDOPS_TUNE", "always")
        config.tuning_mode.cache_clear()
        policy._of_environment.cache_clear()
        with pytest.raises(TuningError, match="SSDOPS_TUNE must be one of 'off', 'cached', 'on', 'force', got 'always'"):
            ssd(*tensors())
    finally:
        monkeypatch.undo()
        config.tuning_mode.cache_clear()
        policy._of_environment.cache_clear()


def test_modes_and_budgets_that_are_none() -> None:
    with pytest.raises(TuningError, match="tune must be one of 'off', 'cached', 'on', 'force', got 'fast'"):
        ssd(*tensors(), tune="fast")
    with pytest.raises(TuningError, match="got 'fast'"):
        explain(*tensors(), tune="fast")
    with pytest.raises(TuningError, match="the tuning mode must be one of"), mode("fast"):
        pass
    for budget in (-1.0, 0, float("nan"), float("inf"), "20"):
        with pytest.raises(TuningError, match="budget must be a positive number of seconds"), mode("on", budget):  # type: ignore[arg-type]
            pass
    assert policy.current() == "cached"


def test_explain_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned(monkeypatch, lambda: step(tune="force")) == 0


@pytest.mark.parametrize("moment", ["deterministic", "capture", "tracing"])
def test_nothing_is_measured_at_a_bad_moment(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    match moment:
        case "deterministic":
            monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        case "capture":
            monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        case "tracing":
            monkeypatch.setattr(policy.torch.compiler, "is_compiling", lambda: True)
    assert policy.obstacle()
    with mode("force"):
        assert tuned(monkeypatch, lambda: ssd(*tensors())) == 0
    monkeypatch.undo()


def test_tracing_measures_nothing_and_running_does(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(lambda *args: ssd(*args[:3], masks.decay(args[3])), backend="aot_eager", fullgraph=True)
    q, k, v, mask = tensors()
    seen: list[bool] = []
    monkeypatch.setattr(tuner, "measure", lambda *_: seen.append(torch.compiler.is_compiling()))
    with mode("on"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(q, k, v, *mask.operands.values())
    assert seen == [False]
