"""One sequence split over 1, 2 and 4 devices: `PYTHONPATH=. torchrun --nproc-per-node=4 benchmarks/distributed.py`.

On GPUs over NCCL (leave NVLink multicast off: NCCL_NVLS_ENABLE=0), elsewhere over gloo with `--tiny`, to try the script out.
All figures are of one run on one machine: the same tokens on one device, on two and on four of those that were started; tokens
per device kept, for weak scaling; and the bytes that a pass moves, as predicted and as the profiler reads them. The slowest
rank counts. Figures go to a JSON file as they come.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from device import Machine, relative_error
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
ROUNDS, CALLS = 7, 5


class Ranks:
    """Groups of the first 1, 2, 4, … ranks of the job."""

    def __init__(self, machine: Machine, backend: str) -> None:
        self.machine, self.backend = machine, backend
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.counts = [count for count in (1, 2, 4, 8) if count <= self.world]
        self.groups = {count: dist.new_group(list(range(count))) for count in self.counts}

    def work(self, shape: Shape, count: int) -> Work:
        """This rank's part of one sequence on so many ranks."""
        at = slice(shape.seqlen * self.rank // count, shape.seqlen * (self.rank + 1) // count)
        leaves = tuple(x[:, at].contiguous() for x in ssd_inputs(draw(shape, self.machine)))
        return Work(leaves, lambda *given: self.ssd(count, *given))

    def ssd(self, count: int, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
        """Y of a plain decay, split over the first ranks."""
        return distributed.ssd(q, k, v, masks.decay(log_a), group=self.groups[count], backend=self.backend)

    def among(self, count: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What is measured on the first ranks, the greatest of each number; known on all ranks when it returns."""
        mine = measure() if self.rank < count else {}
        self.machine.free()
        found: list[dict[str, float]] = [{} for _ in range(self.world)]
        dist.all_gather_object(found, mine)
        return {name: max(one[name] for one in found[:count]) for name in found[0]}

    def ms(self, count: int, call: Callable[[], object]) -> float:
        """Median milliseconds of a call that these ranks make together."""
        for _ in range(3):
            call()
        taken = []
        for _ in range(2 if self.machine.tiny else ROUNDS):
            self.wait()
            dist.barrier(self.groups[count])
            self.wait()
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
        """Milliseconds forward, and forward and backward."""
        work = self.work(shape, count)
        with torch.no_grad():
            forward = self.ms(count, work.forward)
        return {"forward": forward, "forward + backward": self.ms(count, work.forward_backward())}


def scaling(ranks: Ranks, shape: Shape) -> Iterator[Figure]:
    """The same tokens on more devices; then as many tokens on each."""
    whole = {count: ranks.among(count, lambda count=count: ranks.both(shape, count)) for count in ranks.counts}  # type: ignore[misc]
    each = shape.seqlen // ranks.counts[-1]
    weak = {
        count: ranks.among(count, lambda count=count: ranks.both(Shape(1, each * count, *_rest(shape)), count))  # type: ignore[misc]
        for count in ranks.counts
    }
    for count in ranks.counts[1:]:
        for way in ("forward", "forward + backward"):
            parts = {"1 device ms": whole[1][way], f"{count} devices ms": whole[count][way]}
            name = f"{way}, {shape.seqlen} tokens on {count} devices: times as fast as on one"
            target = STRONG_AT_LEAST.get(count)
            yield Figure(name, whole[1][way] / whole[count][way], "", "at least", target, parts)
            parts = {"1 device ms": weak[1][way], f"{count} devices ms": weak[count][way]}
            name = f"{way}, {each} tokens on each of {count} devices: the time on one, over that"
            yield Figure(name, weak[1][way] / weak[count][way], "", "at least", WEAK_AT_LEAST, parts)


def _rest(shape: Shape) -> tuple[int, int, int, int]:
    return shape.nheads, shape.headdim, shape.ngroups, shape.dstate


def agreement(ranks: Ranks, shape: Shape) -> Iterator[Figure]:
    """The split result is that of one device."""
    shorter = Shape(1, min(shape.seqlen, 65536), *_rest(shape))
    for count in ranks.counts[1:]:

        def measure(count: int = count) -> dict[str, float]:
            with torch.no_grad():
                y = ranks.work(shorter, count).forward()
                whole = run_ssd(ranks.backend, *ssd_inputs(draw(shorter, ranks.machine)))
            return {"error": relative_error(y, whole.chunk(count, 1)[ranks.rank])}

        error = ranks.among(count, measure)["error"]
        yield Figure(f"{shorter.seqlen} tokens on {count} devices: ‖y − y₁‖ / ‖y₁‖", error, "", "at most", CLOSE)


def traffic(ranks: Ranks, shape: Shape) -> Iterator[Figure]:
    """Bytes that a rank receives in one pass: as predicted, and as the profiler has them."""
    for count in ranks.counts[1:]:
        state, heads = (1, shape.nheads, shape.headdim, shape.dstate), shape.nheads
        predicted = predicted_bytes(state, heads, 4, count)

        def measure(count: int = count) -> dict[str, float]:
            work = ranks.work(Shape(1, min(shape.seqlen, 65536), *_rest(shape)), count)
            with torch.no_grad():
                forward = received(ranks, work.forward, count)
            return {"forward": forward, "forward + backward": received(ranks, work.forward_backward(), count)}

        found = ranks.among(count, measure)
        for way, times in (("forward", 1), ("forward + backward", 2)):
            name = f"{way} on {count} devices: bytes that a rank receives, over those predicted"
            parts = {"bytes": found[way], "predicted": float(times * predicted)}
            yield Figure(name, found[way] / (times * predicted), "", "at most", 1.0, parts)


SIZES = {"Float": 4, "Double": 8, "BFloat16": 2, "Half": 2, "float": 4, "double": 8}


def received(ranks: Ranks, call: Callable[[], object], count: int) -> float:
    """Bytes that this rank receives from others in the gathers of one call, read from the profiler's trace of them."""
    call()
    ranks.wait()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.machine.cuda else [])]
    with profile(activities=kinds, record_shapes=True) as found:
        call()
        ranks.wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    total = 0.0
    for event in events:
        args = event.get("args", {})
        if event.get("name") == "record_param_comms" and "gather" in str(args.get("Collective name")):
            total += args["In msg nelems"] * SIZES[args["dtype"]] * (count - 1)
        elif event.get("name") == "gloo:all_gather":  # which says no more than the shapes of its inputs
            total += sum(_product(dims) for dims in args["Input Dims"][:1]) * 4 * (count - 1)
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
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script out; nothing is held to a target")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=300))
    machine = Machine(device, tiny=options.tiny)
    ranks, shape = Ranks(machine, options.backend), TINY if options.tiny else SHAPE
    console, path = Console(quiet=ranks.rank > 0, width=150), options.json or (None if options.tiny else RESULTS)
    facts = {**environment(options.commit), **machine.facts(), "devices": ranks.world, "backend": options.backend}
    facts |= {"shape": str(shape), "tiny": options.tiny}
    console.print(facts)
    sections: list[Section] = []
    missed = False
    for run in (agreement, traffic, scaling):
        figures: list[Figure] = []
        sections.append(Section(run.__name__, figures))
        for figure in run(ranks, shape):
            figures.append(figure)
            missed |= not figure.ok
            print_figure(console, figure)
            if path and not ranks.rank:
                write_json(path, facts, sections)
    dist.barrier()
    dist.destroy_process_group()
    return int(missed and not options.tiny)


if __name__ == "__main__":
    sys.exit(main())
