"""ssdops on a CPU, each figure held to its target: `python benchmarks/cpu.py [--json FILE] [--quick]`.

Two threads, float32. Both sides of a ratio run in turn in one process, and a ratio is the median over rounds. Exits
with status 1 if a target is missed. `--quick` takes fewer rounds of the same cases: a look, not a figure to quote.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from compiled import calls, compiled
from measure import Call, environment, in_fresh_process, paired, peak_growth, spread
from report import Figure, Section, print_section, write_json
from rich.console import Console
from structures import structures
from workload import (
    DIRECTIONS,
    SHAPES,
    SIDES,
    TINY,
    Inputs,
    Shape,
    chunked,
    forward,
    forward_backward,
    gla_inputs,
    listing1,
    mamba2_inputs,
    per_channel,
    recurrence_float64,
    set_up,
)

from ssdops.autotune import exchange, store
from ssdops.backends import registry
from ssdops.backends.base import Output

CHANNEL_SHAPES = (Shape(1, 2048, 8, 64, 8, 64), Shape(2, 512, 4, 64, 1, 16))
LONG = Shape(1, 16384, 24, 64, 1, 128)
SHORT = replace(LONG, seqlen=2048)
ACCURACY = Shape(1, 2048, 4, 64, 1, 128)
EXTREME = Shape(1, 65536, 2, 16, 1, 16)
WARM_UP = Shape(1, 128, 2, 16, 1, 16)

IMPORT_PROBE = """
import json, sys, time, torch
start = time.perf_counter()
import ssdops
seconds = time.perf_counter() - start
unwanted = sum(name in sys.modules for name in ("triton", "tvm")) + torch.cuda.is_initialized()
print(json.dumps([seconds, unwanted]))
"""


def speed(quick: bool) -> Section:
    """How many times faster than Listing 1."""
    figures = []
    for shape in SHAPES:
        inputs = mamba2_inputs(shape)
        for name, direction in DIRECTIONS.items():
            times = paired(direction(chunked, inputs), direction(listing1, inputs), rounds=3 if quick else 9)
            parts = {"chunked ms": times.first * 1e3, "Listing 1 ms": times.second * 1e3} | spread(times)
            figures.append(Figure(f"{shape} {name}", times.ratio, "×", "at least", 3, parts))
    return Section("Speed against Listing 1", figures)


def channels(quick: bool) -> Section:
    """How many times faster chunks are than token by token where every state channel has its own decay."""
    figures = []
    for shape in CHANNEL_SHAPES:
        inputs = gla_inputs(shape)
        for name, direction in DIRECTIONS.items():
            sides = (direction(per_channel(backend), inputs) for backend in ("chunked", "recurrent"))
            times = paired(*sides, rounds=1 if quick else 3)
            parts = {"chunked ms": times.first * 1e3, "recurrent ms": times.second * 1e3} | spread(times)
            figures.append(Figure(f"{shape} {name}", times.ratio, "×", "at least", 5, parts))
    return Section("Decay per channel, against token by token", figures)


def memory(quick: bool) -> Section:
    """Peak memory beyond the inputs, as a share of Listing 1's."""
    figures = []
    for shape in SHAPES:
        for direction in DIRECTIONS:
            peak = {side: _peak_mib(side, shape, direction, processes=1 if quick else 5) for side in SIDES}
            parts = {"chunked MiB": peak["chunked"], "Listing 1 MiB": peak["listing1"]}
            share = peak["chunked"] / peak["listing1"]
            figures.append(Figure(f"{shape} {direction}", share, "×", "at most", 0.5, parts))
    return Section("Peak memory against Listing 1", figures)


def _peak_mib(side: str, shape: Shape, direction: str, processes: int) -> float:
    peaks = [in_fresh_process(_peak_in_this_process, side, shape, direction) for _ in range(processes)]
    return statistics.median(peaks) / 2**20


def _peak_in_this_process(side: str, shape: Shape, direction: str) -> int:
    set_up()
    warm_up, call = (DIRECTIONS[direction](SIDES[side], mamba2_inputs(s)) for s in (WARM_UP, shape))
    return peak_growth(call, warm_up)


def linearity(quick: bool) -> Section:
    """Eight times the tokens in little more than eight times the time."""
    short, long = mamba2_inputs(SHORT), mamba2_inputs(LONG)
    figures = []
    for name, direction in DIRECTIONS.items():
        times = paired(direction(chunked, short), direction(chunked, long), rounds=3 if quick else 9, sample_seconds=1)
        parts = {f"{t.seqlen} tokens ms": s * 1e3 for t, s in ((SHORT, times.first), (LONG, times.second))}
        parts |= spread(times)
        figures.append(Figure(f"{LONG} {name}", times.ratio, "×", "at most", 9, parts))
    return Section(f"Time at {LONG.seqlen} tokens against {SHORT.seqlen}", figures)


def overhead(quick: bool) -> Section:
    """What a planned call and an import cost before any work is done."""
    inputs = mamba2_inputs(TINY)
    torch.set_num_threads(1)  # Python needs one, and waiting for a second on a busy machine takes milliseconds
    rounds = 200 if quick else 2000  # of samples too short to be interrupted often, so that the median is clean
    with torch.no_grad():
        times = paired(call_without_work(inputs), lambda: None, rounds, sample_seconds=1e-3)
    registry.get.cache_clear()
    set_up()
    parts = {"empty loop µs": times.second * 1e6}
    probes = [_probe_import() for _ in range(8)][1:]  # the first compiles bytecode
    seconds = statistics.median(seconds for seconds, _ in probes)
    unwanted = max(unwanted for _, unwanted in probes)
    return Section(
        "Overhead",
        [
            Figure("planned call, Python only", times.difference * 1e6, "µs", "at most", 60, parts),
            *lookups(rounds),
            Figure("import ssdops beyond torch", seconds * 1e3, "ms", "at most", 50),
            Figure("triton, tvm or CUDA loaded by import", unwanted, "of 3", "at most", 0),
        ],
    )


def lookups(rounds: int) -> list[Figure]:
    """What it takes to find a tuned result: in memory, and on disk. It is the largest that ships."""
    shipped = [r for path in exchange.DATA.iterdir() for r in exchange.read_export(path)]
    record = max(shipped, key=lambda record: len(record.trials))
    with TemporaryDirectory() as folder, patch.dict(os.environ, SSDOPS_CACHE_DIR=folder):
        store.keep(record)
        kept, read = (
            paired(partial(find, record.key), lambda: None, rounds, sample_seconds=1e-3) for find in (store.lookup, store.read)
        )
        store.forget()
    return [
        Figure("a tuned result, from memory", kept.difference * 1e6, "µs", "at most", 10),
        Figure("a tuned result, from disk", read.difference * 1e3, "ms", "at most", 2, {"trials": len(record.trials)}),
    ]


def call_without_work(inputs: Inputs) -> Call:
    """A planned call of `ssd` whose backend has nothing to do: its output is there already."""
    ready = Output(torch.zeros_like(inputs.v))
    backend = registry.get("chunked")
    backend.forward = lambda *_, **__: ready  # type: ignore[method-assign]  # on this instance, until it is forgotten
    return lambda: chunked(inputs)


def _probe_import() -> tuple[float, int]:
    """Seconds that `import ssdops` takes after torch in a fresh interpreter, and how much it loaded unasked."""
    probe = subprocess.run([sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, check=True)
    seconds, unwanted = json.loads(probe.stdout)
    return float(seconds), int(unwanted)


def accuracy(quick: bool) -> Section:
    """Largest float32 error of y against a float64 recurrence, next to Listing 1's.

    The two largest errors are often the same number: where blocks are alike, so are the roundings of q·k, and one of
    them is the largest. The root mean squares tell the sides apart.
    """
    figures = []
    for seed in range(1 if quick else 5):
        inputs = mamba2_inputs(ACCURACY, seed)
        exact = recurrence_float64(inputs)[0]
        ours, theirs = (forward(side, inputs)().double() - exact for side in (chunked, listing1))
        parts = {"Listing 1": _largest(theirs), "rms": _rms(ours), "Listing 1 rms": _rms(theirs), "y": _largest(exact)}
        figures.append(Figure(f"{ACCURACY} seed {seed}", _largest(ours), "", "at most", _largest(theirs), parts))
    return Section("Largest error of y against float64", figures)


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def extremes(_quick: bool) -> Section:
    """Long sequences whose decays mix 1 - 1e-6 and e^-20 stay finite, in outputs and in gradients."""
    inputs = extreme_inputs()
    results = {"y": forward(chunked, inputs)()}
    results |= zip((f"gradient of {name}" for name in Inputs._fields), forward_backward(chunked, inputs)(), strict=True)
    figures = [
        Figure(f"{EXTREME} {name}", int((~t.isfinite()).sum()), "not finite", "at most", 0, {"of": t.numel()})
        for name, t in results.items()
    ]
    return Section("Extreme decays", figures)


def extreme_inputs() -> Inputs:
    """Each decay is 1 - 1e-6 or e^-20: by the toss of a coin in one head, one time in 1,000 e^-20 in the other."""
    inputs = mamba2_inputs(EXTREME)
    coin = torch.rand(inputs.log_a.shape, generator=torch.Generator().manual_seed(2))
    slow = torch.log1p(torch.tensor(-1e-6))
    return inputs._replace(log_a=torch.where(coin < torch.tensor([0.5, 0.001]), -20.0, slow))


SECTIONS: dict[str, Callable[[bool], Section]] = {
    run.__name__: run for run in (speed, compiled, calls, channels, structures, memory, linearity, overhead, accuracy, extremes)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, print each as it is done, and say by the exit status whether all targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--quick", action="store_true", help="fewer rounds of the same cases")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="run these sections alone")
    options = parser.parse_args(argv)
    set_up()
    machine = environment()
    console = Console()
    console.print(machine)
    sections = []
    for name in options.only:
        sections.append(SECTIONS[name](options.quick))
        print_section(console, sections[-1])
    if options.json:
        write_json(options.json, machine, sections)
    return 0 if all(figure.ok for section in sections for figure in section.figures) else 1


if __name__ == "__main__":
    sys.exit(main())
