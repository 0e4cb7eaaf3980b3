"""How far the planner's choices are from the best: `python benchmarks/regret.py --seed 0 --count 40 [--tune] [--json FILE]`.

Random workloads are drawn from the seed. Each candidate of each is timed, in turns in one process, and the regret of a choice
is its time over that of the fastest. The cost model chooses among what "auto" takes unmeasured; its regret is given against
those, and against all, with what would have to be compiled first; and that of what it would choose had all been compiled. With
`--tune` the tuner measures each workload first, within its budget, keeps the result, and what is chosen by it is held to all.

On a GPU, as many workloads as the limit has time for; the same call with `--go-on` goes on with the others:

    python benchmarks/regret.py --device cuda --calibrate --tune --budget 8 --backends triton,chunked,recurrent,naive \\
        --ahead 12 --limit 360 --cache CACHE --json regret_h100.json --export tuned_h100.json --commit COMMIT

`--cache` is where rates, programs and results are kept; without it, where calls look (SSDOPS_CACHE_DIR).
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from device import Machine
from measure import environment
from regret_draw import draw
from rich.console import Console
from rich.table import Table

from ssdops.autotune import exchange, policy
from ssdops.autotune.ahead import Job, compile_ahead, worth_compiling
from ssdops.autotune.choose import Candidate, choose
from ssdops.autotune.cost import rates_of
from ssdops.autotune.place import place_of
from ssdops.autotune.record import Key
from ssdops.autotune.tuner import measure
from ssdops.autotune.worker import Died, Worker
from ssdops.autotune.workload import Workload
from ssdops.backends import registry
from ssdops.cli_calibrate import calibrate
from ssdops.ir.problem import Target
from ssdops.plan import TRIALS, candidates

ROUNDS, NEAR = 8, 2.0
"""Rounds of samples, and how many times the fastest a candidate may be to be in more than the first."""
SAMPLE_SECONDS = {"cpu": 0.2, "cuda": 0.1}
FIRST = 0.2
"""How much of that the first sample takes, by which those that are not near are left out."""
ABSURD, BRIEF = 30.0, 0.1
"""How many times the least predicted time a prediction may be, or else how many seconds, for its candidate to be timed."""
TARGETS = {"model": (1.15, 1.6), "tuned": (1.02, 1.10)}
"""Median and 95th percentile of the regret that is asked for."""


@dataclass(frozen=True)
class Row:
    """One workload: seconds of each candidate ("backend chunk_size segments"), and what was chosen."""

    workload: dict[str, Any]
    seconds: dict[str, float]
    predicted: dict[str, float]
    failed: dict[str, str]
    model: str
    tuned: str | None
    tuned_in: float | None
    unmeasured: tuple[str, ...]

    @property
    def compiled(self) -> str:
        """What the model would choose, had everything been compiled before."""
        return min(self.seconds, key=lambda name: self.predicted[name])

    def regret(self, name: str | None, among: Sequence[str] = ()) -> float:
        """Of one choice, among those or all."""
        if name not in self.seconds:
            return math.inf
        return self.seconds[name] / min(self.seconds[x] for x in self.seconds if not among or x in among)


def name_of(c: Candidate) -> str:
    """A candidate as text."""
    return f"{c.backend} {c.config.chunk_size or 0} {c.config.segments}"


def study(work: Workload, worker: Worker, target: Target, options: argparse.Namespace) -> Row:
    """Time every candidate of a workload, and let the model and the tuner choose."""
    tried = candidates(work, target)
    model = choose(None, tried, "off", None).candidate  # before the tuner has compiled anything
    eager = tuple(name_of(c) for c in tried if not c.reluctant)
    tuned = took = None
    if options.tune:
        key, begin = Key(place_of(target), work.bucket()), time.monotonic()
        measure(worker, key, work, tried, options.budget or policy.budget(target.device))
        took = time.monotonic() - begin
        choice = choose(key, tried, "cached", None)
        tuned = name_of(choice.candidate) if choice.measured is not None else None
    seconds, failed = exhaustive(work, worker, tried, options)
    return Row(work.to_json(), seconds, {name_of(c): c.seconds for c in tried}, failed, name_of(model), tuned, took, eager)


def exhaustive(
    work: Workload, worker: Worker, tried: list[Candidate], options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of every candidate that runs, by one sample, and of the near ones by several; and why the others do not."""
    seconds: dict[str, float] = {}
    least = min(c.seconds for c in tried)
    failed = {name_of(c): "not tried: predicted to be far slower" for c in tried if c.seconds > max(ABSURD * least, BRIEF)}
    sample = SAMPLE_SECONDS[torch.device(options.device).type]
    for turn in range(ROUNDS):
        for c in sorted(tried, key=lambda c: c.seconds):
            name = name_of(c)
            if name in failed or (turn and seconds[name] > NEAR * min(seconds.values())):
                continue
            config = {"chunk_size": c.config.chunk_size, "segments": c.config.segments}
            request = {"do": "time", "workload": work.to_json(), "backend": c.backend, "config": config, "seed": 0}
            try:
                answer = worker.ask({**request, "seconds": sample * (1.0 if turn else FIRST)}, options.patience)
            except Died as death:
                answer = {"error": str(death)}
            if "error" in answer:
                failed[name] = str(answer["error"])
                seconds.pop(name, None)
            else:
                seconds[name] = min(seconds.get(name, math.inf), float(answer["seconds"]))
    return seconds, failed


def ahead(works: Sequence[Workload], target: Target, options: argparse.Namespace) -> None:
    """Have everything compiled by processes side by side, in half of the time that there is."""
    found = [Job(work, worth_compiling(candidates(work, target), target.device == "cuda")) for work in works]
    jobs = [job for job in found if job.candidates]
    workers = [Worker(TRIALS, options.device) for _ in range(min(options.ahead, len(jobs)))]
    compile_ahead(jobs, workers, min(options.limit / 2, 600.0), lambda: None)


def kept_rows(file: Path, place: dict[str, Any]) -> dict[str, Row]:
    """The rows of an earlier call that ended early, by their workloads.

    Raises:
        SystemExit: they are of another draw, or of other sources or versions.
    """
    found = json.loads(file.read_text())
    for what in ("place", "backends", "seed"):
        if (then := found["environment"][what]) != json.loads(json.dumps(place[what])):
            raise SystemExit(f"{file} is of another {what}: {then}, not {place[what]}")
    rows = [Row(**{**row, "unmeasured": tuple(row["unmeasured"])}) for row in found["rows"]]
    return {json.dumps(row.workload): row for row in rows}


def summary(rows: Sequence[Row], tuned: bool) -> dict[str, dict[str, float]]:
    """Median, 95th percentile and maximum of each regret."""
    kinds = {
        "model": [r.regret(r.model, r.unmeasured) for r in rows],
        "model, against all": [r.regret(r.model) for r in rows],
        "model, all compiled": [r.regret(r.compiled) for r in rows],
    }
    if tuned:
        kinds["tuned"] = [r.regret(r.tuned) for r in rows]
        kinds["seconds of the tuner"] = [r.tuned_in or 0.0 for r in rows]
    return {kind: {"median": statistics.median(x), "p95": percentile(x, 0.95), "max": max(x)} for kind, x in kinds.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of them does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", help="only these, as A,B,…")
    parser.add_argument("--calibrate", action="store_true", help="measure the device's rates first")
    parser.add_argument("--tune", action="store_true", help="also let the tuner measure, and keep what it finds")
    parser.add_argument("--budget", type=float, help="seconds of the tuner for each workload")
    parser.add_argument("--ahead", type=int, default=0, metavar="N", help="compile everything first, by N processes")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no further workload is begun")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds to wait for one candidate, its compilation included"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where rates, programs and results are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE, after every workload")
    parser.add_argument("--go-on", action="store_true", help="keep the rows that --json's file has")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the tuner's results to FILE, to be shipped")
    parser.add_argument("--commit", help="the commit to name in FILE, where the source has no git")
    options = parser.parse_args(argv)
    policy.check_budget(options.budget)
    if options.backends:
        wanted = options.backends.split(",")
        if unknown := set(wanted) - set(registry.BACKENDS):
            parser.error(f"no backend is called {', '.join(sorted(unknown))}")
        for name in set(registry.BACKENDS) - set(wanted):
            del registry.BACKENDS[name]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Study the workloads one by one, print the table, and say by the exit status whether the targets are met."""
    options, begin = parse(argv), time.monotonic()
    if options.cache:
        os.environ["SSDOPS_CACHE_DIR"] = str(options.cache)  # before anything looks; processes of the tuner inherit it
    console, target, rows = Console(), Target.of(torch.device(options.device)), []
    if options.calibrate:
        calibrate(torch.device(options.device), console)
    works = draw(options.seed, options.count, target.device)
    if options.ahead and not options.go_on:
        ahead(works, target, options)
        console.print(f"compiled ahead in {time.monotonic() - begin:.0f} s")
    place = {
        **environment(options.commit), **Machine(torch.device(options.device)).facts(), "place": asdict(place_of(target)),
        "rates": asdict(rates_of(target)), "backends": list(registry.BACKENDS), "seed": options.seed, "count": options.count,
    }  # fmt: skip
    done = kept_rows(options.json, place) if options.go_on else {}
    with Worker(TRIALS, options.device) as worker:
        for number, work in enumerate(works):
            if row := done.get(json.dumps(work.to_json())):
                rows.append(row)
                continue
            if time.monotonic() - begin > options.limit:
                console.print(f"{options.limit:.0f} s are over: {number} of {len(works)} workloads were studied")
                break
            row = study(work, worker, target, options)
            if not row.seconds:
                console.print(f"{work}: nothing runs: {row.failed}")
                continue
            rows.append(row)
            console.print(" | ".join(cells(row, work)), highlight=False, soft_wrap=True)
            if options.json:
                result = {"environment": place, "summary": summary(rows, options.tune), "rows": [asdict(r) for r in rows]}
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    if not rows:
        return 1
    table = Table("workload", "fastest", "model", "regret", "tuned", "regret")
    for row in rows:
        table.add_row(*cells(row, Workload.from_json(row.workload)))
    console.print(table)
    console.print(found := summary(rows, options.tune))
    if options.export:
        console.print("{} results written into {}".format(*exchange.export(options.export, place_of(target).device)))
    met = all(found[k]["median"] <= m and found[k]["p95"] <= p for k, (m, p) in TARGETS.items() if k in found)
    return 0 if met and len(rows) == len(works) else 1


def cells(row: Row, work: Workload) -> tuple[str, ...]:
    """A row of the table."""
    best = min(row.seconds, key=lambda name: row.seconds[name])
    model = f"{row.regret(row.model, row.unmeasured):.3f}"
    return str(work), best, row.model, model, row.tuned or "", f"{row.regret(row.tuned):.3f}" if row.tuned else ""


if __name__ == "__main__":
    sys.exit(main())
