"""The sections of the GPU benchmark that sweep a size: attention by length, decoding by batch, and constant tokens."""

import math
from collections.abc import Callable
from functools import partial

import torch
from device import Machine, Row
from gpu_sections import Bench, Mode, Sections, against, both_ms, forward_ms, graph_ms, time_sides
from mamba2_work import draw, ssd_inputs
from peers import CUDNN, FLASH, mamba_step
from report import Figure
from torch import Tensor
from workload import Shape

from ssdops import masks, ssd_step

ATTENTION_SEQLENS = (256, 512, 1024, 2048, 4096)
ATTENTION_MODES: tuple[tuple[str, Mode, int | None], ...] = (
    ("forward, eager", forward_ms, 2048),
    ("forward, CUDA graph", graph_ms, 1024),
    ("forward + backward, eager", both_ms, None),
)
"""Each with the seqlen from which ssdops is to be ahead."""
ATTENTION_STRETCH_FROM = 512
DECODE_BATCHES = (1, 4, 16, 64, 256)
DECODE_SPREAD = 256 * 2**20  # bytes of states that a graph walks through, several times what an L2 cache holds
DECODE_COPY_AT_LEAST, DECODE_COPY_STRETCH, DECODE_COPY_BATCH = 0.85, 0.92, 64
DECODE_US_AT_MOST = 6
CONSTANT_TOKENS = ((64, 4096), (16, 16384), (4, 65536), (1, 262144))
FLAT_AT_MOST, FLAT_STRETCH = 1.25, 1.10


def attention(bench: Bench) -> Sections:
    """Against causal softmax attention with the same heads and headdim: batch 1, 80 heads of 64, dstate 128."""
    for mode_name, mode, ahead_from in ATTENTION_MODES:
        for seqlen in (16, 32) if bench.machine.tiny else ATTENTION_SEQLENS:
            operands = draw(_heads(bench, 1, seqlen), bench.machine)
            row = time_sides(bench, operands, mode, (bench.ours, CUDNN, FLASH))
            target = 1 if ahead_from is not None and seqlen >= ahead_from else None
            stretch = 1 if ahead_from is not None and seqlen >= ATTENTION_STRETCH_FROM else None
            yield against(row, f"seqlen {seqlen} {mode_name}", CUDNN, target, stretch)


def _heads(bench: Bench, batch: int, seqlen: int) -> Shape:
    """The layer of the sweeps, at a trial's size where that is asked for."""
    return Shape(batch, seqlen, 4, 8, 1, 16) if bench.machine.tiny else Shape(batch, seqlen, 80, 64, 1, 128)


def constant_tokens(bench: Bench) -> Sections:
    """The same number of tokens in fewer and longer sequences: the slowest over the fastest."""
    sizes = ((8, 16), (4, 32), (1, 128)) if bench.machine.tiny else CONSTANT_TOKENS
    for name, mode in (("forward", forward_ms), ("forward + backward", both_ms)):
        row = Row()
        for batch, seqlen in sizes:
            measured = partial(_constant, bench, mode, _heads(bench, batch, seqlen))
            row.measure(f"ssdops ({batch}, {seqlen})", "ms", measured)
            bench.machine.free()
        complete = len(row.parts) == len(sizes)
        value = max(row.parts.values()) / min(row.parts.values()) if complete else None
        yield Figure(name, value, "×", "at most", FLAT_AT_MOST, row.parts, row.notes, FLAT_STRETCH)


def _constant(bench: Bench, mode: Mode, shape: Shape) -> float:
    work = bench.ours.prepare(draw(shape, bench.machine))
    return mode(bench.machine, work)


Step = Callable[[], object]
MakeStep = Callable[[Bench, Shape, Tensor], Step]


def decode(bench: Bench) -> Sections:
    """A decoding step with a float32 state.

    The graph holds the steps of many layers, each with its own state, so that none is found in the L2 cache; the time
    is that of one of them. "step" returns a new state, "pool" updates a pool in place (`state_indices`), as mamba_ssm does.
    """
    for batch in (1, 2) if bench.machine.tiny else DECODE_BATCHES:
        shape = _heads(bench, batch, 1)
        row = Row()
        for name, make in DECODE_SIDES.items():
            row.measure(f"{name}, graph", "µs", partial(_step_us, bench, make, shape))
            row.measure(f"{name}, eager", "µs", partial(_eager_us, bench, make, shape))
            bench.machine.free()
        yield from _decode_figures(bench, shape, row)


def _decode_figures(bench: Bench, shape: Shape, row: Row) -> Sections:
    title = f"batch {shape.batch}, CUDA graph"
    at_bandwidth, at_latency = shape.batch == DECODE_COPY_BATCH, shape.batch == 1
    for name in ("ssdops step", "ssdops pool"):
        us, asked = row.parts.get(f"{name}, graph µs"), name == "ssdops step"
        share = None if us is None else _step_bytes(shape) / (us * 1e-6) / bench.ceilings.copy
        target, stretch = (DECODE_COPY_AT_LEAST, DECODE_COPY_STRETCH) if at_bandwidth and asked else (None, None)
        parts, notes = (row.parts, row.notes) if asked else ({}, {})
        yield Figure(f"{title}: {name}, bandwidth", share, "of copy", "at least", target, parts, notes, stretch)
        if at_latency:
            yield Figure(f"{title}: {name}, time", us, "µs", "at most", DECODE_US_AT_MOST if asked else None)
        ratio = row.ratio("mamba_ssm, graph µs", f"{name}, graph µs")
        yield Figure(f"{title}: {name} against mamba_ssm", ratio, "×", "at least", None)


def _step_us(bench: Bench, make: MakeStep, shape: Shape) -> float:
    layers = max(2, min(64, math.ceil(DECODE_SPREAD / _state_bytes(shape))))
    steps = [make(bench, shape, _state(bench.machine, shape, seed)) for seed in range(layers)]
    with torch.no_grad():
        # The results are kept to the end of the call, or each layer would write to the memory of the one before.
        return 1e3 * bench.machine.ms(bench.machine.captured(lambda: [step() for step in steps])) / layers


def _eager_us(bench: Bench, make: MakeStep, shape: Shape) -> float:
    with torch.no_grad():
        return 1e3 * bench.machine.ms(make(bench, shape, _state(bench.machine, shape, seed=0)))


def _state(machine: Machine, shape: Shape, seed: int) -> Tensor:
    sizes = (shape.batch, shape.nheads, shape.headdim, shape.dstate)
    return torch.randn(sizes, device=machine.device, generator=machine.generator(seed))


def _state_bytes(shape: Shape) -> int:
    return 4 * shape.batch * shape.nheads * shape.headdim * shape.dstate


def _step_bytes(shape: Shape) -> int:
    """The state in and out; q, k, v, y and log_a once."""
    token = 2 * 2 * shape.ngroups * shape.dstate + 2 * 2 * shape.nheads * shape.headdim + 4 * shape.nheads
    return 2 * _state_bytes(shape) + shape.batch * token


def _ssdops_step(bench: Bench, shape: Shape, state: Tensor) -> Step:
    q, k, v, log_a = (t[:, 0] for t in ssd_inputs(draw(shape, bench.machine)))
    return lambda: ssd_step(q, k, v, masks.decay(log_a), state, backend=bench.backend)


def _ssdops_pool(bench: Bench, shape: Shape, state: Tensor) -> Step:
    q, k, v, log_a = (t[:, 0] for t in ssd_inputs(draw(shape, bench.machine)))
    slots = torch.arange(shape.batch, device=bench.machine.device)
    return lambda: ssd_step(q, k, v, masks.decay(log_a), state, state_indices=slots, backend=bench.backend)


def _mamba_step(bench: Bench, shape: Shape, state: Tensor) -> Step:
    return mamba_step(draw(shape, bench.machine), state)


DECODE_SIDES: dict[str, MakeStep] = {"ssdops step": _ssdops_step, "ssdops pool": _ssdops_pool, "mamba_ssm": _mamba_step}
