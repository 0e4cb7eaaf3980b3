"""One sequence split over 1, 2 and 4 devices: `PYTHONPATH=. torchrun --nproc-per-node=4 benchmarks/distributed.py`.

On GPUs over NCCL (leave NVLink multicast off: NCCL_NVLS_ENABLE=0), elsewhere over gloo with `--tiny`, to try the script out.
All figures are of one run on one machine: the same tokens on one device, on two and on four of those that were started; tokens
per device kept, for weak scaling; the bytes that a pass moves, as predicted and as the profiler reads them; and how long a
device does nothing else while it moves them. The slowest rank counts. Figures go to a JSON file as they come. What fails is
noted in its figure; a run that takes longer than `--limit` ends with the traceback of every rank.
"""

import argparse
import faulthandler
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from device import Machine, reason, relative_error
from mamba2_work import Work, draw, run_ssd, ssd_inputs
from measure import environment
from report import Figure, Section, print_figure, write_json
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from workload import Shape

from ssdops import distributed, masks
from ssdops.distributed.exchange import predicted_bytes

SHAPE = Shape(1, 1_048_576, 24, 64, 1, 128)
TINY = Shape(1, 2048, 4, 16, 1, 16)
STRONG_AT_LEAST = {2: 1.8, 4: 3.4}
WEAK_AT_LEAST = 0.9
CLOSE = 0.02  # between two results in bfloat16, each right to a rounding or two
RESULTS = Path(__file__).parent / "results" / "distributed.json"
WAYS = ("forward", "forward + backward")
WARM_UPS, ROUNDS, CALLS = 3, 7, 10
TIMEOUT = timedelta(seconds=120)  # in which a rank may compile what others wait for


@dataclass(frozen=True)
class Measured:
    """What some ranks measured: by name a number of each; or why there is none."""

    numbers: dict[str, list[float]]
    notes: dict[str, str]

    def most(self, name: str) -> float | None:
        """The greatest of the ranks'."""
        return max(self.numbers[name]) if name in self.numbers else None


class Ranks:
    """Groups of the first 1, 2, 4, … ranks of the job."""

    def __init__(self, machine: Machine, backend: str) -> None:
        self.machine, self.backend = machine, backend
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.counts = [count for count in (1, 2, 4, 8) if count <= self.world]
        self.groups = {count: dist.new_group(list(range(count)), timeout=TIMEOUT) for count in self.counts}

    def slice(self, seqlen: int, count: int) -> slice:
        """This rank's tokens of so many, split over so many ranks."""
        return slice(seqlen * self.rank // count, seqlen * (self.rank + 1) // count)

    def work(self, shape: Shape, count: int) -> Work:
        """This rank's part of one sequence on so many ranks."""
        at = self.slice(shape.seqlen, count)
        leaves = tuple(x[:, at].contiguous() for x in ssd_inputs(draw(shape, self.machine)))
        return Work(leaves, lambda *given: self.ssd(count, *given))

    def alone(self, work: Work) -> Work:
        """The same tokens as a sequence of their own."""
        return replace(work, run=lambda *given: run_ssd(self.backend, *given))

    def ssd(self, count: int, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
        """Y of a plain decay, split over the first ranks."""
        return distributed.ssd(q, k, v, masks.decay(log_a), group=self.groups[count], backend=self.backend)

    def among(self, count: int, measure: Callable[[], dict[str, float]]) -> Measured:
        """What is measured on the first ranks; known on all ranks when it returns."""
        mine: tuple[dict[str, float], dict[str, str]] = {}, {}
        try:
            mine = (measure() if self.rank < count else {}), {}
        except Exception as error:  # the failure of one figure must not stop the others
            mine = {}, {f"rank {self.rank}": reason(error)}
        self.machine.free()
        found = [mine] * self.world
        dist.all_gather_object(found, mine)
        notes = {name: why for _, some in found for name, why in some.items()}
        names = [] if notes else list(found[0][0])
        return Measured({name: [numbers[name] for numbers, _ in found[:count]] for name in names}, notes)

    def ms(self, count: int, call: Callable[[], object]) -> float:
        """Median milliseconds of a call that these ranks make together."""
        for _ in range(WARM_UPS):
            call()
        taken = []
        for _ in range(2 if self.machine.tiny else ROUNDS):
            self.wait()
            dist.all_reduce(torch.zeros(1), group=self.groups[count])  # they begin together: on the host, where it is certain
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            self.wait()
            taken.append((time.perf_counter() - start) * 1e3 / CALLS)
        return statistics.median(taken)

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.machine.cuda:
            torch.cuda.synchronize()

    def both(self, shape: Shape, count: int) -> dict[str, float]:
        """Milliseconds forward, and forward and backward; and so of the slice alone."""
        split, out = self.work(shape, count), {}
        for name, work in (("", split), ("alone, ", self.alone(split))):
            with torch.no_grad():
                out[name + WAYS[0]] = self.ms(count, work.forward)
            out[name + WAYS[1]] = self.ms(count, work.forward_backward())
        return out


def agreement(ranks: Ranks, shape: Shape) -> Iterator[Figure]:
    """The split result, and its gradients, are those of one device."""
    shorter = replace(shape, seqlen=min(shape.seqlen, 65536))
    for count in reversed(ranks.counts[1:]):

        def measure(count: int = count) -> dict[str, float]:
            at, inputs = ranks.slice(shorter.seqlen, count), ssd_inputs(draw(shorter, ranks.machine))
            whole, split = ranks.alone(Work(inputs, run_ssd)), ranks.work(shorter, count)
            with torch.no_grad():
                y, expected = split.forward(), whole.forward()
            dy = torch.randn(expected.shape, dtype=y.dtype, device=y.device, generator=ranks.machine.generator(1))
            grads = zip(split.forward_backward(dy[:, at])(), whole.forward_backward(dy)(), strict=True)
            return {
                "y": relative_error(y, expected[:, at]),
                "gradients": max(relative_error(mine, grad[:, at]) for mine, grad in grads),
            }

        found = ranks.among(count, measure)
        for what in ("y", "gradients"):
            name = f"{shorter.seqlen} tokens on {count} devices, {what}: ‖x − x₁‖ / ‖x₁‖"
            yield Figure(name, found.most(what), "", "at most", CLOSE, notes=found.notes)


def scaling(ranks: Ranks, shape: Shape) -> Iterator[Figure]:
    """The same tokens on more devices; then as many tokens on each."""
    each = shape.seqlen // ranks.counts[-1]
    found: dict[tuple[int, int], Measured] = {}

    def times(way: str, count: int, one: int, many: int) -> tuple[float | None, dict[str, float], dict[str, str]]:
        """The time of so many tokens on one device over that of so many on all, what it is made of, and why it is not."""
        before, after = found[1, one], found[count, many]
        below, above = after.most(way), before.most(way)
        if below is None or above is None:
            return None, {}, {**before.notes, **after.notes}
        alone = after.most(f"alone, {way}") or 0.0
        return above / below, {"1 device ms": above, f"{count} devices ms": below, "a slice alone ms": alone}, {}

    for count in ranks.counts:
        for seqlen in {shape.seqlen, each * count}:
            found[count, seqlen] = ranks.among(
                count,
                lambda seqlen=seqlen, count=count: ranks.both(replace(shape, seqlen=seqlen), count),  # type: ignore[misc]
            )
        for way in WAYS if count > 1 else ():
            value, parts, notes = times(way, count, shape.seqlen, shape.seqlen)
            name = f"{way}, {shape.seqlen} tokens on {count} devices: times as fast as on one"
            yield Figure(name, value, "", "at least", STRONG_AT_LEAST.get(count), parts, notes)
            value, parts, notes = times(way, count, each, each * count)
            name = f"{way}, {each} tokens on each of {count} devices: the time on one, over that"
            yield Figure(name, value, "", "at least", WEAK_AT_LEAST, parts, notes)


def traffic(ranks: Ranks, shape: Shape) -> Iterator[Figure]:
    """Bytes that a rank receives in one pass, as predicted and as the profiler has them; what of their time is exposed."""
    for count in ranks.counts[1:]:
        state, heads = (1, shape.nheads, shape.headdim, shape.dstate), shape.nheads
        predicted = predicted_bytes(state, heads, 4, count)

        def measure(count: int = count) -> dict[str, float]:
            work, out = ranks.work(shape, count), {}
            for way, call in zip(WAYS, (work.forward, work.forward_backward()), strict=True):
                with torch.set_grad_enabled(way != WAYS[0]):
                    events = trace(ranks, call)
                out[f"bytes, {way}"] = received(events, count)
                out |= {f"{name}, {way}": ms for name, ms in exposed(events).items()}
            return out

        found = ranks.among(count, measure)
        for way, times in zip(WAYS, (1, 2), strict=True):
            name = f"{way} on {count} devices: bytes that a rank receives, over those predicted"
            moved = found.most(f"bytes, {way}")
            parts = {} if moved is None else {"bytes": moved, "predicted": float(times * predicted)}
            value = None if moved is None else moved / (times * predicted)
            yield Figure(name, value, "", "at most", 1.0, parts, found.notes)
            parts = {
                f"{kind} ms, rank {rank}": ms
                for kind in ("collective", "exposed", "idle")
                for rank, ms in enumerate(found.numbers.get(f"{kind}, {way}", []))
            }
            if parts:  # a CPU has no streams; the rank that comes last waits for no other
                name = f"{way}, {shape.seqlen} tokens on {count} devices: collectives beside which nothing runs"
                yield Figure(name, min(found.numbers[f"exposed, {way}"]), "ms", "at most", None, parts)


SIZES = {"Float": 4, "Double": 8, "BFloat16": 2, "Half": 2, "float": 4, "double": 8}
TRACED = 5


def trace(ranks: Ranks, call: Callable[[], object]) -> list[dict[str, Any]]:
    """What the profiler has of a few calls."""
    call()
    ranks.wait()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.machine.cuda else [])]
    with profile(activities=kinds, record_shapes=True) as found:
        for _ in range(TRACED):
            call()
        ranks.wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def received(events: Sequence[dict[str, Any]], count: int) -> float:
    """Bytes that a rank receives from others in the gathers of one call."""
    total = 0.0
    for event in events:
        args = event.get("args", {})
        if event.get("name") == "record_param_comms" and "gather" in str(args.get("Collective name")):
            total += args["In msg nelems"] * SIZES[args["dtype"]] * (count - 1)
        elif event.get("name") == "gloo:all_gather":  # which says no more than the shapes of its inputs
            total += sum(_product(dims) for dims in args["Input Dims"][:1]) * 4 * (count - 1)
    return total / TRACED


def exposed(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of a call on the device: in collectives, in these while nothing else runs, and in nothing. Empty on a CPU.

    A collective's kernel runs from when its own rank has come until all have.
    """
    runs = [
        (event["ts"], event["ts"] + event["dur"], "nccl" in event["name"]) for event in events if event.get("cat") == "kernel"
    ]
    if not runs:
        return {}
    collectives = _length([(start, stop) for start, stop, moves in runs if moves])
    others, everything = _length([(a, b) for a, b, moves in runs if not moves]), _length([(a, b) for a, b, _ in runs])
    span = max(stop for _, stop, _ in runs) - min(start for start, _, _ in runs)
    parts = {"collective": collectives, "exposed": everything - others, "idle": span - everything}
    return {name: us / 1e3 / TRACED for name, us in parts.items()}


def _length(intervals: Sequence[tuple[float, float]]) -> float:
    """Of their union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total


def _product(dims: Sequence[int]) -> int:
    out = 1
    for dim in dims:
        out *= dim
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run on every rank; the first prints, and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out (default: cuda)")
    parser.add_argument("--backend", default="auto", help="the ssdops backend to measure (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where figures go (default: results/distributed.json)")
    parser.add_argument("--commit", help="the commit to name in FILE, where the source has no git")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which to give up (default: 300)")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script out; nothing is held to a target")
    options = parser.parse_args(argv)
    faulthandler.dump_traceback_later(options.limit, exit=True)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    machine = Machine(device, tiny=options.tiny)
    ranks, shape = Ranks(machine, options.backend), TINY if options.tiny else SHAPE
    console, path = Console(quiet=ranks.rank > 0, width=150), options.json or (None if options.tiny else RESULTS)
    facts = {**environment(options.commit), **machine.facts(), "devices": ranks.world, "backend": options.backend}
    facts |= {"shape": str(shape), "tiny": options.tiny}
    facts |= {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "TORCH_NCCL_"))}
    console.print(facts)
    sections: list[Section] = []
    missed = False
    for run in (agreement, scaling, traffic):
        figures: list[Figure] = []
        sections.append(Section(run.__name__, figures))
        for figure in run(ranks, shape):
            figures.append(figure)
            missed |= not figure.ok
            print_figure(console, figure)
            if path and not ranks.rank:
                write_json(path, facts, sections)
    dist.all_gather_object([None] * ranks.world, None)  # ranks leave together
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
    return int(missed and not options.tiny)


if __name__ == "__main__":
    sys.exit(main())
