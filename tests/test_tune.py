"""The tuner: what it refuses, and when it keeps still."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from faulty_backends import CLASSES, FAULTS
from registered import TheirPowers
from tune_records import considered, step, tensors

from ssdops import config, explain, masks, ssd
from ssdops.autotune import formulas, mode, policy, store, tuner
from ssdops.autotune.choose import Candidate
from ssdops.autotune.place import place_of
from ssdops.autotune.record import Key, Record
from ssdops.autotune.search import Search
from ssdops.autotune.worker import Died, Worker
from ssdops.autotune.workload import Workload
from ssdops.backends import registry
from ssdops.backends.base import Config
from ssdops.backends.tvm.backend import installed
from ssdops.errors import TuningError
from ssdops.ir.problem import Target
from ssdops.plan import TRIALS

pytestmark = pytest.mark.usefixtures("nothing_tuned")
WORK = Workload("decay(log_a)", "backward", "float32", "float32", 1, 70, 2, 4, 4, 1, 1, 2)


def register(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(registry.BACKENDS, name, CLASSES[name])


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


@pytest.mark.tvm
@pytest.mark.skipif(not installed().ok, reason="no TVM, and 'naive' alone leaves nothing to tune")
def test_a_mask_from_outside_is_tuned_where_its_module_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its formula alone: its class has no lower(). What was measured holds for the class as it is written."""
    monkeypatch.setattr(registry, "BACKENDS", {name: registry.BACKENDS[name] for name in ("naive", "tvm")})
    q, k, v, _ = tensors()
    seqlen, nheads = v.shape[1], v.shape[2]
    mask = TheirPowers(torch.ones(1, seqlen, nheads), power=2)
    with mode("on", budget=900):
        ssd(q, k, v, mask)
    (record,) = (record for _, record in store.every() if isinstance(record, Record))
    assert any(t.status == "measured" for t in record.trials), record.trials
    assert not any("cannot be worked out" in t.note for t in record.trials), record.trials
    term = record.key.workload.term
    assert term.startswith("their_powers(") and place_of(Target("cpu"), term) == record.key.place
    monkeypatch.setattr(formulas, "_source", lambda cls: "written anew")
    assert place_of(Target("cpu"), term).sources != record.key.place.sources
    assert place_of(Target("cpu"), "decay(x0)") == place_of(Target("cpu"))


def test_masks_of_scripts_and_of_broken_modules_are_not_tuned_and_say_so() -> None:
    with pytest.raises(TuningError, match=r"registered by the script that runs.*a module that can be imported"):
        formulas.load({"typed_in": "__main__"})
    with pytest.raises(TuningError, match="registered by json"):
        formulas.load({"typed_in": "json"})


def test_a_process_that_does_not_start_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdops.plan.TRIALS", "no.such.module")
    with pytest.warns(UserWarning, match="nothing is tuned.*No module named 'no'") as caught, mode("on", budget=30):
        ssd(*tensors())
        ssd(*tensors(200))
    assert len(caught) == 1


def test_a_device_that_is_not_there() -> None:
    with Worker(TRIALS, "cuda:7") as worker, pytest.raises(Died, match="cuda:7 cannot be used"):
        worker.start()


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
