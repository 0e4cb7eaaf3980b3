"""`ssdops bench`: what a call takes on each backend against its length, and which of them "auto" takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .autotune.worker import Died, Worker
from .autotune.workload import Workload
from .backends import registry
from .cli_common import present_device
from .cli_explain import Question, Sizes, ask, read_shape
from .errors import ShapeError, TuningError, UnsupportedError
from .ir import nodes as n
from .ir.contraction import Contraction
from .ir.problem import Problem
from .ir.text import parse
from .ir.verify import verify
from .plan import TRIALS, plan
from .steps import Plan, Step

LENGTHS, SHORTEST = 7, 128
"""How many lengths there are if none are given, each twice the one before, and the least of these."""
SAMPLE_SECONDS, PATIENCE = 0.2, 120.0
"""Of samples of one length, and how long to wait for one backend, which may compile."""
SLOW = 2.0
"""Seconds of a call after which a backend is not tried on longer sequences."""


@dataclass(frozen=True)
class Settings:
    """The options of the command, as given."""

    shape: str
    mask: str
    seqlens: str | None
    backends: str | None
    direction: str
    device: str
    dtype: str


@dataclass
class Bench:
    """Seconds by backend and length, and for each length what "auto" takes: None where its terms run on several."""

    title: str
    seqlens: list[int]
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    chosen: dict[int, str | None] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def run(settings: Settings, picture: Path | None, console: Console) -> None:
    """Print a table of milliseconds, and draw it if asked to.

    Raises:
        TuningError: no such direction, a term that cannot be measured apart, or no process to measure in.
        What `plot_bench.require` raises, where a picture is wanted, before anything is measured; and what `explain` raises.
    """
    if picture is not None:
        from .plot_bench import require

        require(picture)
    if settings.direction not in ("forward", "backward"):
        raise TuningError(f"--direction must be forward or backward (both passes together), got {settings.direction!r}")
    present_device(settings.device)
    tree, sizes = verify(parse(settings.mask)), read_shape(settings.shape)
    found = measured(settings, tree, sizes, console)
    console.print(table(found))
    for name, note in found.notes.items():
        console.print(Text(f"{name}: {note}", style="dim"), soft_wrap=True)
    if picture is not None:
        from .plot_bench import draw

        draw(found, picture)
        console.print(Text(f"drawn into {picture}"), soft_wrap=True)


def lengths(text: str | None, longest: int) -> list[int]:
    """The lengths that were asked for, or doubles up to the longest.

    Raises:
        ShapeError: they are not positive integers.

    >>> lengths(None, 1024), lengths("512,64", 1)
    ([128, 256, 512, 1024], [64, 512])
    """
    if text is None:
        halves = [longest >> i for i in range(LENGTHS)]
        return sorted({longest, *(half for half in halves if half >= SHORTEST)})
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ShapeError(f"--seqlens must be positive integers, as 512,1024,…, got {text!r}")
    return sorted({int(part) for part in parts})


def measured(settings: Settings, tree: n.Node, sizes: Sizes, console: Console) -> Bench:
    """Every backend at every length, each in the configuration that is chosen for it."""
    names = registry.weighed() if settings.backends is None else tuple(settings.backends.split(","))
    problems = {}
    for seqlen in lengths(settings.seqlens, sizes.seqlen):
        shape = ",".join(map(str, vars(replace(sizes, seqlen=seqlen)).values()))
        question = Question(shape, settings.mask, settings.device, settings.dtype, "auto", None)
        problems[seqlen] = ask(question, tree, replace(sizes, seqlen=seqlen)).problem
    batch, heads = f"batch {sizes.batch}", f"{sizes.nheads} heads of {sizes.headdim}, {sizes.ngroups} of dstate {sizes.dstate}"
    found = Bench(f"{settings.mask}, {settings.direction}: {batch}, {heads}, {settings.dtype}", list(problems))
    with Worker(TRIALS, settings.device) as worker, console.status("") as status:
        for name in (*names, "auto"):
            for seqlen, problem in problems.items():
                status.update(f"{name} {seqlen}")
                try:
                    steps = plan(Contraction(tree, backend=name), problem, settings.direction, dry=True)
                    if name == "auto":
                        taken = {step.backend for step in steps.steps}
                        found.chosen[seqlen] = taken.pop() if len(taken) == 1 else None
                    if name != "auto" or found.chosen[seqlen] is None:
                        found.seconds.setdefault(name, {})[seqlen] = seconds(steps, problem, settings.direction, worker)
                except (UnsupportedError, Died) as error:
                    found.notes[name] = f"at {seqlen} tokens: {error}"
                    break
                if found.seconds.get(name, {}).get(seqlen, 0.0) > SLOW:
                    break
    return found


def seconds(steps: Plan, problem: Problem, direction: str, worker: Worker) -> float:
    """Of a plan: of its terms, one by one.

    Raises:
        UnsupportedError: a term fails where it is measured.
        Died: the process ended, or does not answer.
    """
    return sum(_seconds_of(step, problem, direction, worker) for step in steps.steps)


def _seconds_of(step: Step, problem: Problem, direction: str, worker: Worker) -> float:
    work = Workload.of(step.term, problem, direction)
    if work is None:
        raise TuningError(f"{step.term.node()} cannot be measured apart from its mask")
    config = {"chunk_size": step.config.chunk_size, "segments": step.config.segments}
    request = {"do": "time", "workload": work.to_json(), "backend": step.backend, "config": config, "seed": 0}
    answer = worker.ask({**request, "seconds": SAMPLE_SECONDS}, PATIENCE)
    if "error" in answer:
        raise UnsupportedError(str(answer["error"]))
    return float(answer["seconds"])


def table(found: Bench) -> Table:
    """A row for each length; what "auto" takes is marked."""
    out = Table(
        title=Text(f"{found.title}; ms, what auto takes marked *"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in ("seqlen", *found.seconds):
        out.add_column(name, justify="right", no_wrap=True)
    for seqlen in found.seqlens:
        out.add_row(str(seqlen), *_cells(found, seqlen))
    return out


def _cells(found: Bench, seqlen: int) -> Iterator[Text]:
    for name, by_length in found.seconds.items():
        if seqlen not in by_length:
            yield Text("")
            continue
        taken = name in (found.chosen.get(seqlen), "auto")
        yield Text(f"{by_length[seqlen] * 1e3:.3g}{'*' if taken else ' '}", style="bold" if taken else "")
