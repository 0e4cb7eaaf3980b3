"""How far the planner's choices are from the best: `python benchmarks/regret.py --seed 0 --count 40 [--tune] [--json FILE]`.

Random workloads are drawn from the seed. Each candidate of each is timed, in turns in one process, and the regret of a choice
is its time over that of the fastest. The cost model chooses among what "auto" takes unmeasured; its regret is given against
those, and against all, `tvm` included. With `--tune` the tuner searches first, within its budget, and is held to all.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import environment
from rich.console import Console
from rich.table import Table

from ssdops.autotune import policy
from ssdops.autotune.choose import Candidate, choose
from ssdops.autotune.place import place_of
from ssdops.autotune.search import Search
from ssdops.autotune.worker import Died, Worker
from ssdops.autotune.workload import DIRECTIONS, Workload
from ssdops.ir.problem import Target
from ssdops.plan import TRIALS, candidates

TERMS = ("decay(log_a)",) * 5 + (
    "causal()", "decay(log_a).T", "decay(log_a).scale(rows=rows, cols=cols)", "channel_decay(channel)",
    "decay(log_a) * documents(documents)", "window(left=64, right=0)", "diagonal(value)",
)  # fmt: skip
ROUNDS, SAMPLE_SECONDS, NEAR = 5, 0.2, 2.0
"""Rounds of samples, seconds of each, and how many times the fastest a candidate may be to be in more than the first."""
ABSURD = 30.0
"""How many times the least predicted time a prediction may be, for its candidate to be timed at all."""
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
    unmeasured: tuple[str, ...]

    def regret(self, name: str | None, among: Sequence[str] = ()) -> float:
        """Of one choice, among those or all."""
        if name not in self.seconds:
            return math.inf
        return self.seconds[name] / min(self.seconds[x] for x in self.seconds if not among or x in among)


def draw(seed: int, count: int, device: str) -> list[Workload]:
    """Workloads of like chances; the sizes are what the device does in seconds at most."""
    random_ = random.Random(seed)
    most = 2e8 if device == "cpu" else 2e10  # elements of states, over all tokens
    out: list[Workload] = []
    while len(out) < count:
        ngroups, per_group = random_.choice((1, 1, 1, 2, 4)), random_.choice((1, 2, 4, 8, 16, 24))
        heads = ngroups * per_group
        term = random_.choice(TERMS)
        work = Workload(
            term, random_.choice(DIRECTIONS), "float32" if device == "cpu" else random_.choice(("bfloat16", "float32")),
            "float32", 1 if "documents" in term else random_.choice((1, 1, 2, 4, 8)), round(2 ** random_.uniform(3, 14)), heads,
            random_.choice((16, 32, 64, 64, 128)), random_.choice((16, 32, 64, 128, 128)), ngroups, ngroups, heads,
            random_.choice((2, 5, 16)) if "documents" in term else 0,
        )  # fmt: skip
        size = work.batch * work.seqlen * heads * work.headdim * work.dstate
        if size <= most * (1 if "channel" in term else 16) and not ("window" in term and work.seqlen > 4096):
            out.append(work)
    return out


def name_of(c: Candidate) -> str:
    """A candidate as text."""
    return f"{c.backend} {c.config.chunk_size or 0} {c.config.segments}"


def study(work: Workload, worker: Worker, target: Target, options: argparse.Namespace) -> Row:
    """Time every candidate of a workload, and let the model and the tuner choose."""
    tried = candidates(work, target)
    model = choose(None, tried, "off", None).candidate
    tuned = None
    if options.tune:
        trials = Search(worker, work, options.budget or policy.budget(target.device), options.seed).run(tried)
        timed = [(t.seconds, t.backend, t.config) for t in trials if t.seconds is not None]
        found = min(timed, key=lambda x: x[0]) if timed else None
        tuned = None if found is None else name_of(Candidate(found[1], found[2], 0.0))
    seconds, failed = exhaustive(work, worker, tried, options.patience)
    predicted = {name_of(c): c.seconds for c in tried}
    eager = tuple(name_of(c) for c in tried if not c.reluctant)
    return Row(work.to_json(), seconds, predicted, failed, name_of(model), tuned, eager)


def exhaustive(
    work: Workload, worker: Worker, tried: list[Candidate], patience: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of every candidate that runs, the near ones in several rounds; and why the others do not."""
    seconds: dict[str, float] = {}
    least = min(c.seconds for c in tried)
    failed = {name_of(c): "not tried: predicted to be far slower" for c in tried if c.seconds > ABSURD * least}
    for turn in range(ROUNDS):
        for c in tried:
            name = name_of(c)
            if name in failed or (turn and seconds[name] > NEAR * min(seconds.values())):
                continue
            config = {"chunk_size": c.config.chunk_size, "segments": c.config.segments}
            request = {"do": "time", "workload": work.to_json(), "backend": c.backend, "config": config, "seed": 0}
            try:
                answer = worker.ask({**request, "seconds": SAMPLE_SECONDS if turn else 0.0}, patience)
            except Died as death:
                answer = {"error": str(death)}
            if "error" in answer:
                failed[name] = str(answer["error"])
                seconds.pop(name, None)
            else:
                seconds[name] = min(seconds.get(name, math.inf), float(answer["seconds"]))
    return seconds, failed


def summary(rows: Sequence[Row], tuned: bool) -> dict[str, dict[str, float]]:
    """Median, 95th percentile and maximum of each regret."""
    kinds = {"model": [r.regret(r.model, r.unmeasured) for r in rows], "model, against all": [r.regret(r.model) for r in rows]}
    if tuned:
        kinds["tuned"] = [r.regret(r.tuned) for r in rows]
    return {kind: {"median": statistics.median(x), "p95": percentile(x, 0.95), "max": max(x)} for kind, x in kinds.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of them does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def main(argv: Sequence[str] | None = None) -> int:
    """Study the workloads one by one, print the table, and say by the exit status whether the targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tune", action="store_true", help="also let the tuner search")
    parser.add_argument("--budget", type=float, help="seconds of the tuner for each workload")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds to wait for one candidate, its compilation included"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    options = parser.parse_args(argv)
    policy.check_budget(options.budget)
    console, target, rows = Console(), Target.of(torch.device(options.device)), []
    table = Table("workload", "fastest", "model", "regret", "tuned", "regret")
    with Worker(TRIALS, options.device) as worker:
        for work in draw(options.seed, options.count, target.device):
            row = study(work, worker, target, options)
            if not row.seconds:
                console.print(f"{work}: nothing runs: {row.failed}")
                continue
            rows.append(row)
            best = min(row.seconds, key=lambda name: row.seconds[name])
            cells = (str(work), best, row.model, f"{row.regret(row.model, row.unmeasured):.3f}", row.tuned or "",
                     f"{row.regret(row.tuned):.3f}" if row.tuned else "")  # fmt: skip
            table.add_row(*cells)
            console.print(" | ".join(cells), highlight=False, soft_wrap=True)
    console.print(table)
    found = summary(rows, options.tune)
    console.print(found)
    if options.json:
        place = {**environment(), "place": asdict(place_of(target)), "seed": options.seed, "count": options.count}
        result = {"environment": place, "summary": found, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    met = all(found[k]["median"] <= m and found[k]["p95"] <= p for k, (m, p) in TARGETS.items() if k in found)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
