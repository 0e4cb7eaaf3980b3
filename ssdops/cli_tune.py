"""`ssdops tune`: workloads from a shape, a model or a log, each measured and kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from .autotune import policy, store
from .autotune.ahead import Job, compile_ahead, processes, worth_compiling
from .autotune.choose import Candidate
from .autotune.place import place_of
from .autotune.record import Key, Record
from .autotune.shape_log import read_log
from .autotune.tuner import COMPILING, measure
from .autotune.worker import Died, Worker
from .autotune.workload import DIRECTIONS, Workload
from .cli_cache import describe, fastest, milliseconds
from .cli_common import present_device
from .cli_explain import Question, ask, read_shape
from .errors import TuningError, UnsupportedError
from .ir import nodes as n
from .ir.problem import Target
from .ir.text import parse
from .ir.verify import verify
from .plan import TRIALS, candidates, state_terms

NHEADS = {"mamba2-130m": 24, "mamba2-370m": 32, "mamba2-780m": 48, "mamba2-1.3b": 64, "mamba2-2.7b": 80}
"""Heads of the models; all have headdim 64, one group and dstate 128."""
MASK, MODEL_MASK = "decay(log_a)", "decay(log_a).scale(cols=dt)"
"""What --shape measures where no mask is given, and what the block of a model has."""


@dataclass(frozen=True)
class Settings:
    """The options of the command, as given."""

    shape: str | None
    mask: str | None
    model: str | None
    from_log: Path | None
    calibrate: bool
    batch: int
    seqlen: int
    direction: str
    budget: float | None
    force: bool
    device: str
    dtype: str


def run(settings: Settings, console: Console) -> None:
    """Measure what was asked for, and say what came out."""
    policy.check_budget(settings.budget)
    if settings.direction not in (*DIRECTIONS, "both"):
        raise TuningError(f"--direction must be forward, backward, both or step, got {settings.direction!r}")
    sources = (settings.shape, settings.model, settings.from_log)
    if sum(x is not None for x in sources) > 1 or not (any(sources) or settings.calibrate):
        raise TuningError("give one of --shape, --model and --from-log, or --calibrate, to say what to measure")
    target = Target.of(present_device(settings.device))
    if settings.calibrate:
        from .cli_calibrate import calibrate

        calibrate(torch.device(settings.device), console)
    if any(sources):
        tune(list(workloads(settings, target, console)), target, settings, console)


def workloads(settings: Settings, target: Target, console: Console) -> Iterator[Workload]:
    """What to measure.

    Raises:
        TuningError: no such model, a log that cannot be read; and what `explain` raises for a shape and a mask.
    """
    if settings.from_log is not None:
        found, bad = read_log(settings.from_log)
        if bad:
            lines = f"{bad} lines are" if bad > 1 else "1 line is"
            console.print(Text(f"{lines} no workload, and skipped", style="yellow"))
        yield from found
        return
    shape, mask = settings.shape, settings.mask or MASK
    if shape is None:
        if settings.model not in NHEADS:
            raise TuningError(f"--model must be one of {', '.join(NHEADS)}, got {settings.model!r}")
        shape = f"{settings.batch},{settings.seqlen},{NHEADS[settings.model]},64,1,128"
        mask = settings.mask or MODEL_MASK
    tree, sizes = verify(parse(mask)), read_shape(shape)
    if settings.direction == "step":
        _check_step(tree)
        sizes = replace(sizes, seqlen=1)
    question = Question(shape, mask, settings.device, settings.dtype, "auto", None)
    found_plan = ask(question, tree, sizes)
    for step in found_plan.plan.steps:
        for direction in ("forward", "backward") if settings.direction == "both" else (settings.direction,):
            work = Workload.of(step.term, found_plan.problem, direction)
            if work is not None:
                yield work


def _check_step(tree: n.Node) -> None:
    """Raise what `ssd_step` would raise for a mask."""
    for term in state_terms(tree):
        if not term.causal:
            raise UnsupportedError(f"{term.node()} reads later tokens, so that there is no step of it to tune")


def tune(works: list[Workload], target: Target, settings: Settings, console: Console) -> None:
    """Measure each that is not known, and print a line about each."""
    budget = policy.budget(target.device) if settings.budget is None else settings.budget
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, Worker(TRIALS, settings.device) as worker:
        todo: list[tuple[Workload, list[Candidate]]] = []
        for work in works:
            key = Key(place_of(target, work.term), work.bucket())
            known = None if settings.force else store.read(key)
            try:
                tried = candidates(work, target)
            except TuningError as error:
                progress.console.print(Text(f"{work}: {error}", style="yellow"), soft_wrap=True)
                continue
            if known is not None and known.covers(c.backend for c in tried):
                report(work, store.adopt(known), tried, "known", progress.console)
            else:
                todo.append((work, tried))
        budget -= _compiled(worker, todo, target, budget, progress)
        overall = progress.add_task("workloads", total=len(todo))
        for work, tried in todo:
            key = Key(place_of(target, work.term), work.bucket())
            report(work, _measured(worker, key, work, tried, budget, progress), tried, "measured", progress.console)
            progress.advance(overall)


def _compiled(
    worker: Worker, todo: list[tuple[Workload, list[Candidate]]], target: Target, budget: float, progress: Progress
) -> float:
    """Compile for several workloads side by side, one of which alone is left to its search; seconds of each budget spent."""
    found = [Job(work, worth_compiling(tried, target.device == "cuda")) for work, tried in todo]
    jobs = [job for job in found if job.candidates]
    count = processes(len(jobs))
    if count == 0:
        return 0.0
    began, task = time.monotonic(), progress.add_task("compiling", total=len(jobs))
    workers = [worker.twin() for _ in range(count)]
    compile_ahead(jobs, workers, COMPILING * budget * len(todo), lambda: progress.advance(task))
    progress.remove_task(task)
    return (time.monotonic() - began) / len(todo)


def _measured(worker: Worker, key: Key, work: Workload, tried: list[Candidate], budget: float, progress: Progress) -> Record:
    """Measure one workload, with a bar of its own."""
    task = progress.add_task(str(work), total=len(tried))
    seen: set[str] = set()

    def on_trial(text: str) -> None:
        seen.add(text)
        progress.update(task, description=f"{work}: {text}", completed=len(seen))

    try:
        return measure(worker, key, work, tried, budget, on_trial)
    except Died as death:
        raise TuningError(f"the process that tries candidates does not start: {death}") from None
    finally:
        progress.remove_task(task)


def report(work: Workload, record: Record, tried: list[Candidate], how: str, console: Console) -> None:
    """The fastest, the cost model's choice beside it, and what has failed."""
    best = fastest(record)
    if best is None:
        spent = any("budget" in trial.note for trial in record.trials if trial.status == "skipped")
        why = "; the time went into compiling, which is kept: ask again, or give a larger --budget" if spent else ""
        console.print(Text(f"{work}: nothing could be measured{why}", style="yellow"), soft_wrap=True)
    else:
        predicted = {(c.backend, c.config): c.seconds for c in tried}.get(best.candidate)
        beside = "" if predicted is None else f", predicted {predicted * 1e3:.3g}"
        console.print(Text(f"{work}: {describe(best)}, {milliseconds(best)} ms {how}{beside}"), soft_wrap=True)
    for trial in record.trials:
        if trial.status == "failed":
            console.print(Text(f"  {describe(trial)} failed: {trial.note}", style="red"), soft_wrap=True)
