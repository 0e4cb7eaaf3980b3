"""The sections of the GPU benchmark that compare by shape, and their targets: each yields its figures one by one."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from device import Ceilings, Machine, Row, relative_error
from mamba2_work import SHAPES, Operands, Side, Work, draw, floor_ms, reduced, run_ssd, ssd_inputs, ssdops_side, tiny
from peers import CUDNN, FLA, FLASH, MAMBA
from report import Figure
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workload import Shape

FORWARD_AT_LEAST = {"S1": 4, "S2": 8, "S3": 3.5, "S4": 4.5, "S5": 3.5, "S6": 4.3, "S7": 3, "S8": 6}
FLOORS_AT_MOST = 1.7
GRAPH_STRETCH = {"S2": 4, "S8": 4}
BACKWARD_AT_LEAST = {"S1": 3.5, "S2": 8, "S3": 3.5, "S4": 3.5, "S5": 3.5, "S6": 3.5, "S7": 3, "S8": 8}
BACKWARD_STRETCH = {"S1": 4.5, "S2": 12, "S3": 4.5, "S4": 4.5, "S5": 4.5, "S6": 4.5, "S7": 4.5, "S8": 12}
MAMBA1_MS = {"forward": 2.57, "forward + backward": 14.43}
"""Mamba-1's selective scan with N=16 at S1's tokens and channels, read on an H100 80GB HBM3 with torch 2.11."""
MAMBA1_AT_LEAST = {"forward": 6, "forward + backward": 7}
GRADIENTS = {"ssdops": ("q", "k", "v", "log_a"), "mamba_ssm": ("x", "dt", "A", "B", "C"), "fla": ("q", "k", "v", "log_a")}
MIB = 2**20
PROFILED = 5
"""Passes that `kernels` looks at."""
CLOSE = 0.02  # between two sides, each right to a rounding or two of bfloat16


@dataclass(frozen=True)
class Bench:
    """What the sections are given."""

    machine: Machine
    backend: str
    shapes: Mapping[str, Shape]
    ceilings: Ceilings

    @property
    def ours(self) -> Side:
        """ssdops, by the backend asked for."""
        return ssdops_side(self.backend)

    @property
    def others(self) -> tuple[Side, ...]:
        """The Triton backend, beside another."""
        return () if self.backend == TRITON.name else (TRITON,)


TRITON = replace(ssdops_side("triton"), name="triton")
Mode = Callable[[Machine, Work], float]
Sections = Iterator[Figure]


def forward_ms(machine: Machine, work: Work) -> float:
    """Milliseconds of an eager forward pass."""
    with work.context(), torch.no_grad():
        return machine.ms(work.forward)


def graph_ms(machine: Machine, work: Work) -> float:
    """Milliseconds of a forward pass replayed from a CUDA graph."""
    with work.context(), torch.no_grad():
        return machine.ms(machine.captured(work.forward))


def both_ms(machine: Machine, work: Work) -> float:
    """Milliseconds of an eager forward and backward pass."""
    with work.context():
        return machine.ms(work.forward_backward())


def time_sides(bench: Bench, operands: Operands, mode: Mode, sides: tuple[Side, ...]) -> Row:
    """Each side's milliseconds, one after the other, and ours once more at the end, to show how far the device drifts."""
    row = Row()
    for name, side in [*((side.name, side) for side in sides), ("ssdops once more", bench.ours)]:
        row.measure(name, "ms", partial(_prepared, bench.machine, mode, side, operands))
        bench.machine.free()
    return row


def _prepared(machine: Machine, mode: Mode, side: Side, operands: Operands) -> float:
    return mode(machine, side.prepare(operands))


def against(row: Row, name: str, peer: Side, target: float | None, stretch: float | None = None) -> Figure:
    """How many times as fast as a peer."""
    value = row.ratio(f"{peer.name} ms", "ssdops ms")
    return Figure(f"{name} against {peer.name}", value, "×", "at least", target, row.parts, row.notes, stretch)


def beside_triton(bench: Bench, row: Row, name: str) -> Sections:
    """Of another backend, how much of the Triton backend's speed it has."""
    if bench.backend != TRITON.name:
        yield against(row, name, TRITON, 1 / 3, 1 / 1.5)


def forward(bench: Bench) -> Sections:
    """Forward, eager: against mamba_ssm, against the floor, and whether the results agree."""
    for name, shape in bench.shapes.items():
        operands = draw(shape, bench.machine)
        row = time_sides(bench, operands, forward_ms, (bench.ours, *bench.others, MAMBA, FLA, CUDNN, FLASH))
        row.parts["floor ms"] = floor_ms(shape, bench.ceilings)
        row.measure("making v and log_a (not timed with ssdops)", "ms", partial(_preparation_ms, bench, operands))
        row.measure("ssdops", "values not finite", partial(_not_finite, bench.ours, operands))
        for peer in (MAMBA, FLA):
            difference = row.measure(
                f"relative difference to {peer.name}", "", partial(_difference, bench.ours, peer, operands)
            )
            if difference is not None and not difference <= CLOSE:
                row.notes[f"ssdops against {peer.name}"] = f"y differs by {difference:.3g}, more than {CLOSE}"
        yield against(row, f"{name} {shape} forward", MAMBA, FORWARD_AT_LEAST[name] if bench.backend == "triton" else 1.0)
        yield from beside_triton(bench, row, f"{name} {shape} forward")
        floors = row.ratio("ssdops ms", "floor ms")
        yield Figure(f"{name} forward, measured / floor", floors, "×", "at most", None, stretch=FLOORS_AT_MOST)
        if name == "S1":
            yield against_mamba1(bench, row, "forward")


def backward(bench: Bench) -> Sections:
    """Forward and backward, eager: against mamba_ssm."""
    for name, shape in bench.shapes.items():
        sides = (bench.ours, *bench.others, MAMBA, FLA, CUDNN, FLASH)
        row = time_sides(bench, draw(shape, bench.machine), both_ms, sides)
        least, stretch = (BACKWARD_AT_LEAST[name], BACKWARD_STRETCH[name]) if bench.backend == "triton" else (1.0, None)
        yield against(row, f"{name} {shape} forward + backward", MAMBA, least, stretch)
        yield from beside_triton(bench, row, f"{name} {shape} forward + backward")
        if name == "S1":
            yield against_mamba1(bench, row, "forward + backward")


def graphs(bench: Bench) -> Sections:
    """Forward, each side replayed from a CUDA graph."""
    for name, shape in bench.shapes.items():
        row = time_sides(bench, draw(shape, bench.machine), graph_ms, (bench.ours, MAMBA, FLA, CUDNN, FLASH))
        yield against(row, f"{name} {shape} forward in a CUDA graph", MAMBA, None, GRAPH_STRETCH.get(name))


def kernels(bench: Bench) -> Sections:
    """What ssdops launches for a forward and backward pass, by torch's profiler: no gaps between launches are in it."""
    for name, shape in bench.shapes.items():
        row = Row()
        row.measure_all("ssdops", partial(_kernel_us, bench, draw(shape, bench.machine)))
        bench.machine.free()
        total = sum(row.parts.values()) if row.parts else None
        yield Figure(f"{name} {shape} forward + backward, kernels alone", total, "µs", "at most", None, row.parts, row.notes)


def _kernel_us(bench: Bench, operands: Operands) -> dict[str, float]:
    """Microseconds of each kernel in the order of launches, medians over some passes."""
    work = bench.ours.prepare(operands)
    with work.context():
        run = work.forward_backward()
        run()
        with profile(activities=[ProfilerActivity.CUDA if bench.machine.cuda else ProfilerActivity.CPU]) as seen:
            for _ in range(PROFILED):
                run()
            if bench.machine.cuda:
                torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == DeviceType.CUDA]
    if len(events) % PROFILED:
        raise RuntimeError(f"{len(events)} kernels in {PROFILED} passes: not the same ones in each")
    passes = [events[i :: len(events) // PROFILED] for i in range(len(events) // PROFILED)]
    return {
        f"{i + 1} {_short(same[0].name)}": median(event.time_range.elapsed_us() for event in same)
        for i, same in enumerate(passes)
    }


def _short(name: str) -> str:
    """A kernel's own name, without the namespaces and arguments of its template."""
    return re.sub(r"[(<].*", "", name.replace("(anonymous namespace)::", "")).split()[-1].split("::")[-1]


def against_mamba1(bench: Bench, row: Row, direction: str) -> Figure:
    """Against a figure recorded in another run, as Mamba-1 needs compiled parts: no ratio on another device than its own."""
    name, value = torch.cuda.get_device_name() if bench.machine.cuda else "cpu", None
    note = f"recorded in another run on an H100 80GB HBM3, N=16; this is {name}"
    ours = row.parts.get("ssdops ms")
    if ours is not None and "H100" in name:
        value = MAMBA1_MS[direction] / ours
    parts = {"Mamba-1 ms, recorded": MAMBA1_MS[direction]} | ({} if ours is None else {"ssdops ms": ours})
    title = f"S1 {direction} against Mamba-1's scan"
    return Figure(title, value, "×", "at least", MAMBA1_AT_LEAST[direction], parts, {"Mamba-1": note})


def _preparation_ms(bench: Bench, operands: Operands) -> float:
    """What a caller with Mamba-2's operands pays before ssdops; mamba_ssm multiplies by dt inside its kernels."""
    return bench.machine.ms(lambda: ssd_inputs(operands))


def _not_finite(side: Side, operands: Operands) -> float:
    y = _result(side, operands)
    if count := int((~y.isfinite()).sum()):
        raise ArithmeticError(f"{count} of y's {y.numel()} values are not finite")
    return 0


def _difference(ours: Side, peer: Side, operands: Operands) -> float:
    return relative_error(_result(ours, operands), _result(peer, operands))


def _result(side: Side, operands: Operands) -> Tensor:
    work = side.prepare(operands)
    with work.context(), torch.no_grad():
        return work.forward()


def memory(bench: Bench) -> Sections:
    """Peak memory of forward and backward at S1, beyond inputs, the cotangent, y and the gradients."""
    shape = tiny(SHAPES["S1"]) if bench.machine.tiny else SHAPES["S1"]
    operands = draw(shape, bench.machine)
    row = Row()
    for side in (bench.ours, MAMBA, FLA):
        row.measure(side.name, "MiB", partial(_extra_mib, bench.machine, side, operands))
        bench.machine.free()
    value = row.parts.get("ssdops MiB")
    yield Figure(f"S1 {shape} forward + backward", value, "MiB", "at most", 330, row.parts, row.notes, stretch=150)


def _extra_mib(machine: Machine, side: Side, operands: Operands) -> float:
    """y is as large as x, and a gradient as large as its leaf."""
    work = side.prepare(operands)
    results = operands.x.nbytes + sum(leaf.nbytes for leaf in work.leaves)
    return (machine.peak_bytes(work.forward_backward()) - results) / MIB


def error(bench: Bench) -> Sections:
    """Relative error of y and of each gradient, against float64 on the inputs that the side itself reads."""
    for name, shape in bench.shapes.items():
        shape = reduced(shape)
        operands = draw(shape, bench.machine)
        row = Row()
        for side in (bench.ours, MAMBA, FLA):
            row.measure(side.name, "y", partial(_y_error, side, operands))
            row.measure_all(f"{side.name} gradients", partial(_gradient_errors, side, operands))
            bench.machine.free()
        value = row.parts.get("ssdops y")
        yield Figure(f"{name} {shape} ‖y - exact‖ / ‖exact‖", value, "", "at most", None, row.parts, row.notes)


def _y_error(side: Side, operands: Operands) -> float:
    with torch.no_grad():
        work, exact = _with_reference(side, operands)
        return relative_error(work.forward(), exact.forward())


def _gradient_errors(side: Side, operands: Operands) -> dict[str, float]:
    work, exact = _with_reference(side, operands)
    generator = torch.Generator(operands.x.device).manual_seed(1)
    cotangent = torch.randn(operands.x.shape, dtype=operands.x.dtype, device=operands.x.device, generator=generator)
    pairs = zip(work.forward_backward(cotangent)(), exact.forward_backward(cotangent.double())(), strict=True)
    errors = (relative_error(actual, expected) for actual, expected in pairs)
    return {f"{side.name} d{leaf}": error for leaf, error in zip(GRADIENTS[side.name], errors, strict=True)}


def _with_reference(side: Side, operands: Operands) -> tuple[Work, Work]:
    """The side's work, and the same function of the same leaves by the `naive` backend in float64."""
    work = side.prepare(operands)
    run = _mamba2_float64 if side is MAMBA else partial(run_ssd, "naive")
    return work, replace(work, leaves=tuple(leaf.double() for leaf in work.leaves), run=run)


def _mamba2_float64(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return run_ssd("naive", c, b, x * dt[..., None], a * dt)
