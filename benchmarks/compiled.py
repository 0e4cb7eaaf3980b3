"""TVM's programs on a CPU: how fast they are, what a call costs beside them, and what the first call of a process costs."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch
from measure import median_seconds, paired, spread
from report import Figure, Section
from workload import DIRECTIONS, SHAPES, TINY, Inputs, Shape, chunked, forward_backward, mamba2_inputs, set_up, tvm

from ssdops.backends import registry

FIRST = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from workload import DIRECTIONS, Shape, chunked, mamba2_inputs, set_up, tvm
set_up()
inputs = mamba2_inputs(Shape(1, 64, 24, 64, 1, 128))
taken = []
for name in sys.argv[2:]:
    direction = DIRECTIONS[name]
    direction(chunked, inputs)()  # whatever torch and ssdops do once
    start, busy = time.perf_counter(), time.process_time()
    direction(tvm, inputs)()
    taken += [time.perf_counter() - start, time.process_time() - busy]
print(json.dumps([*taken, "tvm" in sys.modules]))
"""
"""Seconds of first calls, by the clock and of processors. After a forward pass a backward pass wants two programs more."""


def compiled(quick: bool) -> Section:
    """How many times faster TVM's programs are than `chunked`, and what share of sgemm's rate their products reach."""
    figures, square = [], torch.randn(1024, 1024)
    rounds = 3 if quick else 9
    for shape in SHAPES:
        inputs = mamba2_inputs(shape)
        for name, direction in DIRECTIONS.items():
            times = paired(direction(tvm, inputs), direction(chunked, inputs), rounds)
            parts = {"tvm ms": times.first * 1e3, "chunked ms": times.second * 1e3} | spread(times)
            figures.append(Figure(f"{shape} {name}", times.ratio, "×", "at least", 2, parts))
            times, flops = paired(direction(tvm, inputs), lambda: square @ square, rounds), _flops(shape)[name]
            rates = {"tvm GFLOP/s": flops / times.first / 1e9, "sgemm GFLOP/s": 2 * 1024**3 / times.second / 1e9}
            share = statistics.median(flops * sgemm / (2 * 1024**3 * ours) for ours, sgemm in times.rounds)
            figures.append(Figure(f"{shape} {name}, share of sgemm's rate", share, "", "at least", 0.6, rates))
    return Section("TVM's programs against chunked", figures)


def _flops(s: Shape) -> dict[str, float]:
    """What products must take in chunks of 32 tokens: pairs up to the diagonal, those of q or k once per group; states once.

    Not counted is what is worked out again, and what is worked out to be put to 0.
    """
    tokens, pairs = s.batch * s.seqlen, (32 + 1) / 2  # with each token
    by_group, by_head, of_states = 2 * pairs * s.dstate * s.ngroups, 2 * pairs * s.headdim * s.nheads, 2 * s.dstate * s.headdim
    forward = by_group + by_head + 2 * of_states * s.nheads
    backward = 2 * by_group + 2 * by_head + 4 * of_states * s.nheads
    return {"forward": float(tokens * forward), "forward + backward": float(tokens * (forward + backward))}


def calls(quick: bool) -> Section:
    """What a call costs beside its programs, and the first call in a process, with programs on disk and without."""
    torch.set_num_threads(1)
    figures = [_host(name, args, 200 if quick else 2000) for name, args in _passes(mamba2_inputs(TINY)).items()]
    set_up()
    with tempfile.TemporaryDirectory() as room:
        cold, warm = (_first(room, *DIRECTIONS) for _ in range(2))
    with tempfile.TemporaryDirectory() as room:
        both = _first(room, "forward + backward")
    for at, name in enumerate(DIRECTIONS):
        made, kept = cold[2 * at : 2 * at + 2], warm[2 * at : 2 * at + 2]
        figures.append(Figure(f"first {name}, nothing compiled", made[0], "s", "at most", 5, {"of processors s": made[1]}))
        parts = {"of processors ms": kept[1] * 1e3}
        figures.append(Figure(f"first {name}, all compiled", kept[0] * 1e3, "ms", "at most", 100, parts))
    parts = {"of processors s": both[1]}
    figures.append(Figure("forward + backward as the first call, nothing compiled", both[0], "s", "at most", 5, parts))
    figures.append(Figure("TVM imported where all is compiled", warm[-1], "", "at most", 0))
    return Section("TVM: calls beside their programs", figures)


def _passes(inputs: Inputs) -> dict[str, tuple[Any, ...]]:
    """What the backend is called with, of both passes."""
    backend, called = registry.get("tvm"), {}
    for name in ("forward", "backward"):
        method = getattr(backend, name)

        def noted(*args: Any, name: str = name, method: Any = method, **options: Any) -> Any:
            called[name] = (*args, *options.values())
            return method(*args, **options)

        setattr(backend, name, noted)  # on this instance, until it is forgotten
    forward_backward(tvm, inputs)()
    registry.get.cache_clear()
    return called


def _host(name: str, args: tuple[Any, ...], rounds: int) -> Figure:
    """Microseconds of a pass of hardly any tokens without its programs: all else is done, and none of them called."""
    from ssdops.backends.tvm import replay

    method = getattr(registry.get("tvm"), name)
    replay._replays.clear()
    method(*args)
    (known,) = replay._replays.values()
    whole = median_seconds(lambda: method(*args), rounds, sample_seconds=1e-3)
    known.steps.count = 0
    alone = median_seconds(lambda: method(*args), rounds, sample_seconds=1e-3)
    replay._replays.clear()
    made = median_seconds(lambda: torch.empty(1, 4, 2, 4), rounds, sample_seconds=1e-3)
    parts = {"with its programs µs": whole * 1e6, "torch.empty µs": made * 1e6}
    return Figure(f"{name}, beside its programs", alone * 1e6, "µs", "at most", 15, parts)


def _first(room: str, *names: str) -> list[float]:
    """Seconds of the first calls, in directions of these names, in a process that keeps its programs in a directory."""
    command = [sys.executable, "-c", FIRST, os.path.dirname(os.path.abspath(__file__)), *names]
    # bytecode is kept, as it is where nothing says otherwise
    kept = {"SSDOPS_CACHE_DIR": room, "PYTHONPYCACHEPREFIX": os.path.join(room, "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    environment = {**os.environ, **kept}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [float(x) for x in json.loads(done.stdout)]
