"""Decay per channel on a GPU beside fla's chunk_gla: `PYTHONPATH=.:.peers python benchmarks/gpu_channel.py`.

Results are checked against float64 first, at a short length; then both sides are timed on the same operands in one process,
and only ratios within a run mean anything. `--tilings` times each kernel at other tile sizes as well. Exits with status 1 if
a result is wrong or a target is missed. `--device cpu --tiny` tries the script out where there is no GPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import peers
import torch
from device import Machine, Row, relative_error
from measure import environment
from report import Figure, Section, print_figure, write_json
from rich.console import Console
from torch import Tensor
from workload import Shape

from ssdops import masks, ssd
from ssdops.backends.base import Config, bind
from ssdops.backends.triton.channel import ChannelScan, Tiling, tiling
from ssdops.ir.problem import problem_of
from ssdops.plan import terms_of

SHAPE = Shape(8, 4096, 32, 64, 32, 64)
SHORT = Shape(2, 500, 4, 64, 4, 64)
TINY = Shape(1, 70, 2, 16, 2, 16)
AT_LEAST = 1.3
CLOSE = 5e-3  # ‖error‖ / ‖result‖ that rounding operands of products to bfloat16 may give, twice over
Side = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """ssdops."""
    return ssd(q, k, v, masks.channel_decay(log_a), backend="triton")


def theirs(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """fla."""
    return peers.fla_module("ops.gla").chunk_gla(q, k, v, log_a, scale=1.0)[0]


SIDES: dict[str, Side] = {"ssdops": ours, "fla": theirs, "ssdops once more": ours}


def draw(shape: Shape, machine: Machine, logs: torch.dtype) -> list[Tensor]:
    """q, k, v in bfloat16 and log decays as GLA makes them, logsigmoid(normal) / 16, as leaves."""
    options = {"device": machine.device, "generator": machine.generator(0)}
    tokens = shape.batch, shape.seqlen
    q, k, log_a = (torch.randn(*tokens, shape.ngroups, shape.dstate, **options) for _ in range(3))
    v = torch.randn(*tokens, shape.nheads, shape.headdim, **options)
    log_a = torch.nn.functional.logsigmoid(log_a) / 16
    return [x.requires_grad_() for x in (*(x.bfloat16() for x in (q / shape.dstate**0.5, k, v)), log_a.to(logs))]


def results(side: Side, leaves: list[Tensor]) -> list[Tensor]:
    """Y, and gradients of q, k, v and log_a."""
    y = side(*leaves)
    dy = torch.randn(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(1), dtype=torch.float32)
    return [y, *torch.autograd.grad(y, leaves, dy.bfloat16().to(y.dtype))]


def reference(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """In float64, with torch."""
    return ssd(q, k, v, masks.channel_decay(log_a), backend="chunked")


def errors(machine: Machine) -> Iterator[Figure]:
    """Error of Y and of every gradient against float64, of ssdops under decays of several strengths."""
    for strength in (1.0, 1e-3, 30.0, 1e3):
        leaves = draw(TINY if machine.tiny else SHORT, machine, torch.float32)
        leaves[3] = (leaves[3].detach() * strength).requires_grad_()
        wanted = results(reference, [x.detach().double().requires_grad_() for x in leaves])
        row = Row()
        for name, side in list(SIDES.items())[: 2 if strength == 1 else 1]:
            row.measure_all(name, partial(_errors_of, name, side, leaves, wanted))
        worst = max((error for name, error in row.parts.items() if name.startswith("ssdops")), default=None)
        yield Figure(f"error, decays × {strength:g}", worst, "", "at most", CLOSE, row.parts, row.notes)


def _errors_of(name: str, side: Side, leaves: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    found = results(side, leaves)
    return {
        f"{name} {what}": relative_error(x, y) for what, x, y in zip(("y", "q", "k", "v", "log_a"), found, wanted, strict=True)
    }


def passes(machine: Machine) -> Iterator[Figure]:
    """Forward, and forward + backward, against fla: log decays in float32, then in bfloat16."""
    for logs in (torch.float32, torch.bfloat16):
        for what in ("forward", "forward + backward"):
            row = Row()
            for name, side in SIDES.items():
                row.measure(name, "ms", partial(_ms, machine, side, draw(_shape(machine), machine, logs), what))
                machine.free()
            target = AT_LEAST if logs == torch.float32 else None
            title = f"{_shape(machine)} {what}, log decays in {str(logs).removeprefix('torch.')}"
            yield Figure(title, row.ratio("fla ms", "ssdops ms"), "×", "at least", target, row.parts, row.notes)


def _shape(machine: Machine) -> Shape:
    return TINY if machine.tiny else SHAPE


def _ms(machine: Machine, side: Side, leaves: list[Tensor], what: str) -> float:
    if what == "forward":
        with torch.no_grad():
            return machine.ms(lambda: side(*leaves))
    dy = torch.randn_like(leaves[2])
    return machine.ms(lambda: torch.autograd.grad(side(*leaves), leaves, dy))


def tilings(machine: Machine) -> Iterator[Figure]:
    """Milliseconds of each kernel, and of some other choices of its tiles."""
    q, k, v, log_a = (x.detach() for x in draw(_shape(machine), machine, torch.float32))
    mask = masks.channel_decay(log_a)
    problem, (term,) = problem_of(mask.tree, q, k, v, mask.operands), terms_of(mask.tree)
    x = bind(term, problem, q, k, v, mask.operands, None, 1.0, problem.dtype, False)
    for tiles in _choices(tiling(problem, None)):
        row = Row()
        scan = ChannelScan(term, x, Config(), tiles)
        row.measure_all("kernels", partial(kernel_ms, machine, scan, v))
        yield Figure(str(tiles), sum(row.parts.values()), "ms", "at most", None, row.parts, row.notes)
        machine.free()


def _choices(first: Tiling) -> Iterator[Tiling]:
    """The library's own tiles, and changes of them."""
    yield first
    for chunk in (64, 32, 16):
        for warps in (4, 8):
            yield replace(first, chunk=chunk, output=warps, gradients=warps, sums=warps)
    for stages in (2, 3, 4):
        for tile in ((64, 64), (64, 32), (32, 64), (64, 16)):
            yield replace(first, stages=stages, tile=tile)
    yield replace(first, states=8)
    yield replace(first, rows=32)
    yield replace(first, rows_back=64)
    yield replace(first, gradients=16)


def kernel_ms(machine: Machine, scan: ChannelScan, v: Tensor) -> dict[str, float]:
    """Milliseconds of each launch of a forward and a backward pass."""
    from ssdops.backends.triton.channel_backward import ChannelBackward

    p = scan.problem
    back = ChannelBackward(scan.term, scan.x, Config(), scan.tiles)
    states, dstates = (scan.empty(scan.slots, p.nheads, p.headdim, p.dstate, dtype=scan.kept) for _ in range(2))
    y, sums = torch.empty_like(v), scan.sums()
    dq, dk, dlogs = torch.empty_like(scan.q), torch.empty_like(scan.k), scan.empty(*scan.q.shape)
    launches = {
        "sums": scan.sums,
        "states": lambda: scan.walk(sums, states, None),
        "output": lambda: scan.output(sums, v, states, y),
        "both states": lambda: scan.walk(sums, states, None, v, (dstates, None, None)),
        "dv": lambda: scan.output(sums, v, dstates, y, turned=True),
        "gradients": lambda: back.gradients(sums, v, (states, dstates), (dq, dk, dlogs)),
    }
    return {name: machine.ms(launch) for name, launch in launches.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print each figure as it comes, and a short table last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="a shorter look at each figure")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script out; nothing is held to a target")
    parser.add_argument("--tilings", action="store_true", help="each kernel at other tile sizes, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--commit", help="the commit to name in FILE, where the source has no git")
    options = parser.parse_args(argv)
    machine = Machine(torch.device(options.device), options.quick, options.tiny)
    console = Console(width=None if sys.stdout.isatty() else 150)
    facts: dict[str, object] = {**environment(options.commit), **machine.facts(), **peers.versions()}
    facts |= {"quick": options.quick, "tiny": options.tiny}
    console.print(facts)
    sections: list[Section] = []
    for section in (errors, passes, *([tilings] if options.tilings else [])):
        figures: list[Figure] = []
        sections.append(Section(section.__name__, figures))
        for figure in section(machine):
            figures.append(replace(figure, target=None) if machine.tiny else figure)
            print_figure(console, figures[-1])
            if options.json:
                write_json(options.json, facts, sections)
    for figure in (figure for section in sections for figure in section.figures):
        value = "not measured" if figure.value is None else f"{figure.value:.4g} {figure.unit}"
        console.print(f"{value:>14}  {figure.name}", highlight=False)
    return 0 if all(figure.ok for section in sections for figure in section.figures) else 1


if __name__ == "__main__":
    sys.exit(main())
