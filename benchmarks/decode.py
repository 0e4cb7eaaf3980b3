"""Time `ssd_step` on a GPU as servers run it: captured in a CUDA graph, in place in a pool of states, beside a plain copy.

python benchmarks/decode.py                  # batches 1 to 256: time per step, bandwidth, and its share of a copy's
python benchmarks/decode.py --sweep 64       # how the state is cut, at one batch
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssdops import masks, ssd_step
from ssdops.backends.triton import step as launcher
from ssdops.backends.triton.step import Tile

ROUNDS = 20


@dataclass(frozen=True)
class Workload:
    """A step; `layers` of them, on a pool each, make a graph, so that no state is left in the L2 cache from its last step."""

    batch: int = 64
    nheads: int = 80
    headdim: int = 64
    dstate: int = 128
    ngroups: int = 1
    tokens: int = 1
    dtype: str = "bfloat16"
    state_dtype: str = "float32"
    pooled: bool = True
    layers: int = 16

    def layer(self) -> Callable[[], object]:
        """A step with inputs and states of its own."""
        dtype, b, t, h = getattr(torch, self.dtype), self.batch, self.tokens, self.nheads

        def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, device="cuda").to(dtype)

        q, k = make(2, b, t, self.ngroups, self.dstate)
        v, log_a = make(b, t, h, self.headdim), -make(b, t, h, dtype=torch.float32).abs()
        state = make(b, h, self.headdim, self.dstate, dtype=getattr(torch, self.state_dtype))
        if self.tokens == 1:
            q, k, v, log_a = (x[:, 0] for x in (q, k, v, log_a))
        slots = torch.randperm(b, device="cuda") if self.pooled else None
        return lambda: ssd_step(q, k, v, masks.decay(log_a), state, state_indices=slots)

    @property
    def state_bytes(self) -> int:
        """What a step reads of the states, and writes again."""
        itemsize = getattr(torch, self.state_dtype).itemsize
        return 2 * self.batch * self.nheads * self.headdim * self.dstate * itemsize


@dataclass(frozen=True)
class Timing:
    """Median seconds of a step, its spread (fastest, slowest round), and bytes of state per second."""

    seconds: float
    fastest: float
    slowest: float
    bandwidth: float


def timed(run: Callable[[], object], count: int) -> tuple[float, float, float]:
    """Median, least and greatest seconds of one of `count` calls that `run` makes, by CUDA events."""
    for _ in range(5):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(ROUNDS)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    each = [start.elapsed_time(stop) * 1e-3 / count for start, stop in events]
    return statistics.median(each), min(each), max(each)


def graph_of(steps: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """The steps, captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:  # compiles
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph


def time_step(workload: Workload, repeats: int = 4) -> Timing:
    """A step within a graph of `repeats` times all layers."""
    steps = [workload.layer() for _ in range(workload.layers)]
    graph = graph_of(steps * repeats)
    median, fastest, slowest = timed(graph.replay, len(steps) * repeats)
    return Timing(median, fastest, slowest, workload.state_bytes / median)


def time_alone(workload: Workload) -> float:
    """Median seconds of a graph of one step, replayed back to back: launch and all."""
    graph = graph_of([workload.layer()])

    def run() -> None:
        for _ in range(200):
            graph.replay()

    return timed(run, 200)[0]


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes read and written per second by torch's copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graph = graph_of([lambda: target.copy_(source)] * 4)
    return 2 * size / timed(graph.replay, 4)[0]


@contextmanager
def cut(tile: Tile) -> Iterator[None]:
    """Steps launched inside are cut like that."""
    kept = launcher.tile_of
    launcher.tile_of = lambda *sizes: tile
    try:
        yield
    finally:
        launcher.tile_of = kept


def sweep(workload: Workload) -> list[tuple[Tile, Timing]]:
    """Every way to cut the state that holds it in registers, the fastest first."""
    block_n, out = max(1 << (workload.dstate - 1).bit_length(), 16), []
    for block_p in (4, 8, 16, 32, 64):
        for warps in (1, 2, 4, 8):
            each = block_p * block_n / (32 * warps)
            if 4 <= each <= 64:
                with cut(tile := Tile(block_p, block_n, warps)):
                    out.append((tile, time_step(workload)))
    return sorted(out, key=lambda item: item[1].seconds)


def rows(copy: float) -> Iterator[dict[str, Any]]:
    """The table: batches, state dtypes, several tokens, and states that are made anew."""
    base = Workload()
    loads = [replace(base, batch=batch, layers=64 if batch == 1 else 16 if batch < 64 else 4) for batch in (1, 4, 16, 64, 256)]
    at_64 = next(load for load in loads if load.batch == 64)
    loads += [replace(at_64, state_dtype="bfloat16"), replace(at_64, tokens=4), replace(at_64, pooled=False)]
    for load in loads:
        timing = time_step(load)
        yield {**asdict(load), **asdict(timing), "of copy": timing.bandwidth / copy, "alone": time_alone(load)}
        torch.cuda.empty_cache()


def main() -> None:
    """Print, and on request write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=int, metavar="BATCH")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    given = parser.parse_args()
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a copy moves {copy / 1e9:.0f} GB/s")
    if given.sweep:
        load = Workload(batch=given.sweep, layers=max(1, 256 // given.sweep))
        for tile, timing in sweep(load):
            print(f"{tile}: {timing.seconds * 1e6:8.2f} us, {timing.bandwidth / copy:6.1%} of a copy")
        return
    results = []
    for row in rows(copy):
        results.append(row)
        kind = f"{row['state_dtype']} states" + ("" if row["pooled"] else ", new ones")
        print(
            f"batch {row['batch']:>3}, {row['tokens']} tokens, {kind}: "
            f"{row['seconds'] * 1e6:8.2f} us a step ({row['fastest'] * 1e6:.2f} to {row['slowest'] * 1e6:.2f}), "
            f"{row['bandwidth'] / 1e9:6.0f} GB/s, {row['of copy']:6.1%} of a copy; alone {row['alone'] * 1e6:.2f} us"
        )
    if given.out:
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy bytes per second": copy}
        given.out.write_text(json.dumps({**facts, "rows": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
