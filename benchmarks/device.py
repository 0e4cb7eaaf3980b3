"""Timing, graph capture, peak memory and ceilings on one device, a CUDA GPU or (to try the scripts out) a CPU."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from measure import Call, median_seconds, peak_growth
from torch import Tensor

GRAPH_WARM_UPS = 3


class Ceilings(NamedTuple):
    """What the device reaches in this run: bytes read and written per second by a copy, matmul FLOPs per second."""

    copy: float
    matmul: float


@dataclass(frozen=True, slots=True)
class Machine:
    """A device and how long to look at each figure; `tiny` says that sizes are for a trial, not for figures.

    `dtype` is that of operands, where a benchmark has a choice.
    """

    device: torch.device
    quick: bool = False
    tiny: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers, drawn on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def ms(self, call: Call) -> float:
        """Median milliseconds of a call: on a GPU by events, with the L2 cache flushed before each; else by the wall clock."""
        if not self.cuda:
            return 1e3 * median_seconds(call, rounds=1 if self.quick else 3, sample_seconds=0.01 if self.quick else 0.05)
        from triton.testing import do_bench  # not on every platform

        warmup, rep = (5, 20) if self.quick else (25, 100)
        return float(do_bench(call, warmup=warmup, rep=rep, return_mode="median"))

    def captured(self, call: Call) -> Call:
        """The call as a CUDA graph to replay; on a CPU, which has no graphs, the call itself."""
        if not self.cuda:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARM_UPS):  # compiles and tunes: neither can be captured
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def peak_bytes(self, call: Call) -> int:
        """Bytes held at most at one time during a call, beyond those held before it."""
        if not self.cuda:
            return peak_growth(call, warm_up=call)
        call()
        self.free()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> None:
        """Give back what nothing refers to any more, so that the next row starts from an empty pool."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def ceilings(self) -> Ceilings:
        """A copy of a gigabyte from the device to itself, and a bf16 matmul of 8192³; both small for a trial."""
        elements, side = (2**20, 256) if self.tiny else (2**29, 8192)
        source = torch.randn(elements, device=self.device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        copy_ms = self.ms(lambda: target.copy_(source))
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        matmul_ms = self.ms(lambda: a @ b)
        return Ceilings(copy=2 * source.nbytes / copy_ms * 1e3, matmul=2 * side**3 / matmul_ms * 1e3)

    def facts(self) -> dict[str, str | float]:
        """The device and the software that runs it."""
        if not self.cuda:
            return {"device": "cpu"}
        import triton

        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "device memory GiB": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda or "",
            "cudnn": str(torch.backends.cudnn.version()),
            "triton": triton.__version__,
        }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, in the wider of float32 and expected's dtype."""
    wide = torch.promote_types(torch.float32, expected.dtype)
    difference = torch.linalg.vector_norm(actual.to(wide) - expected.to(wide))
    return (difference / torch.linalg.vector_norm(expected.to(wide))).item()


def reason(error: Exception) -> str:
    """What a refused measurement leaves in its row: one line, of a length that can be read."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


class Row:
    """What one row measured, by name, and why it could not measure the rest."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    def measure(self, name: str, unit: str, measurement: Callable[[], float]) -> float | None:
        """Enter the measurement as a part, or its refusal as a note: one side's failure must not stop the others."""
        try:
            value = measurement()
        except Exception as error:
            self.notes[f"{name} {unit}".strip()] = reason(error)
            return None
        self.parts[f"{name} {unit}".strip()] = value
        return value

    def measure_all(self, name: str, measurement: Callable[[], dict[str, float]]) -> None:
        """Enter several parts of one measurement, or its refusal as one note."""
        try:
            values = measurement()
        except Exception as error:
            self.notes[name] = reason(error)
            return
        self.parts |= values

    def ratio(self, above: str, below: str) -> float | None:
        """One part over another, where both were measured."""
        if above in self.parts and below in self.parts:
            return self.parts[above] / self.parts[below]
        return None
