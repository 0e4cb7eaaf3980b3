"""What stands around the scan of a block, on a GPU, against its bytes: `PYTHONPATH=.:.peers python benchmarks/conv.py`.

That is the causal convolution, the gated norm, the skip connection with the gate, and the discretisation of dt. The least that
a pass can take is its bytes over the rate of a copy in the same run: of the convolution forward x and y, backward x, dy and dx.
x is a slice of a projection's output, as a Mamba-2 block has it, in bfloat16; weights are float32; silu and bias are on board.
Kernels are timed in CUDA graphs. Peers are fla's convolution, the package causal_conv1d, which mamba_ssm takes where it is
installed, and `F.conv1d`, which it takes where not. `--sweep` times other tiles instead. Exits with status 1 if a target is
missed or ssdops itself refuses. `--device cpu --tiny` tries the script out where there is no GPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import peers
import torch
from device import Machine, Row, relative_error
from measure import environment
from report import Figure, Section, print_figure, write_json
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from ssdops import masks
from ssdops.nn import causal_conv1d, discretize, gated_rms_norm, skip
from ssdops.nn import rates as discretisation
from ssdops.nn.fused import Fused
from ssdops.nn.skip import gated_skip

RESULTS = Path(__file__).parent / "results" / "gpu_conv.json"
AT_MOST = 1.3
WIDTH = 4
CLOSE = 5e-3  # ‖error‖ / ‖result‖ of one rounding to bfloat16


@dataclass(frozen=True)
class Load:
    """x `(batch, seqlen, channels)`, a slice from `first` of rows of `columns` numbers."""

    batch: int
    seqlen: int
    channels: int
    first: int
    columns: int

    def __str__(self) -> str:
        return f"({self.batch}, {self.seqlen}, {self.channels} of {self.columns})"


LOADS = {
    "130m": Load(8, 4096, 1792, 1536, 3352),
    "2.7b": Load(8, 4096, 5376, 5120, 10576),
    "2.7b, one short row": Load(1, 2048, 5376, 5120, 10576),
}
TINY = Load(2, 40, 20, 12, 40)
Leaves = tuple[Tensor, Tensor, Tensor]
Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw(load: Load, machine: Machine) -> Leaves:
    """x, the taps and the bias; x is a view, whose projection would have the gradient."""
    options = {"device": machine.device, "generator": machine.generator(0)}
    rows = torch.randn(load.batch, load.seqlen, load.columns, dtype=torch.bfloat16, **options)
    taps, bias = torch.randn(load.channels, WIDTH, **options) / 2, torch.randn(load.channels, **options)
    return rows[..., load.first : load.first + load.channels], taps, bias


def sides(machine: Machine) -> dict[str, Side]:
    """Those compared, ours first."""
    ours = partial(causal_conv1d, activation="silu", backend="triton" if machine.cuda else "torch")
    plain = partial(causal_conv1d, activation="silu", backend="torch")
    return {
        "ssdops": ours, "fla": peers.fla_conv, "causal_conv1d": peers.dao_conv, "F.conv1d": library, "plain torch": plain,
        "ssdops once more": ours,
    }  # fmt: skip


def library(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """As mamba_ssm's block has it without compiled parts, in the dtype of x."""
    padded = F.conv1d(x.mT, taps[:, None].to(x.dtype), bias.to(x.dtype), padding=WIDTH - 1, groups=x.shape[2])
    return F.silu(padded[..., : x.shape[1]]).mT


def errors(machine: Machine, copy: float) -> Iterator[Figure]:
    """Error of y and of each gradient against float64."""
    load = TINY if machine.tiny else replace(LOADS["130m"], batch=2, seqlen=500)
    leaves = [x.detach().requires_grad_() for x in draw(load, machine)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted = _results(partial(causal_conv1d, activation="silu", backend="torch"), wide)
    row = Row()
    for name, side in list(sides(machine).items())[:-1]:
        row.measure_all(name, partial(_errors_of, name, side, leaves, wanted))
    worst = max((value for name, value in row.parts.items() if name.startswith("ssdops")), default=None)
    yield Figure(f"error at {load}", worst, "", "at most", CLOSE, row.parts, row.notes)


def _results(side: Side, leaves: list[Tensor]) -> list[Tensor]:
    y = side(*leaves)
    dy = torch.randn(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(1)).bfloat16()
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def _errors_of(name: str, side: Side, leaves: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    named = zip(("y", "dx", "dweight", "dbias"), _results(side, leaves), wanted, strict=True)
    return {f"{name} {what}": relative_error(x, y) for what, x, y in named}


def forward(machine: Machine, copy: float) -> Iterator[Figure]:
    """Forward, each side as a CUDA graph."""
    for name, load in _loads(machine).items():
        row = Row()
        x, *weights = draw(load, machine)
        with torch.no_grad():
            for side, run in sides(machine).items():
                call = partial(run, x, *weights)
                row.measure(side, "ms", lambda call=call: machine.ms(machine.captured(call)))
                if side == "ssdops":
                    row.measure("ssdops, eager", "ms", partial(machine.ms, call))
                machine.free()
        yield _over_bytes(f"{name} {load} forward", row, 2 * _nbytes(x), copy, AT_MOST)


def backward(machine: Machine, copy: float) -> Iterator[Figure]:
    """Backward alone, ours as a CUDA graph; and forward + backward of each side, eager."""
    for name, load in _loads(machine).items():
        x, *weights = draw(load, machine)
        dy, row = torch.randn(x.shape, device=x.device).to(x.dtype), Row()
        if machine.cuda:
            alone = partial(torch.ops.ssdops.conv_backward, dy, x, *weights, None, [], True, False)
            row.measure("ssdops", "ms", lambda alone=alone: machine.ms(machine.captured(alone)))
        yield _over_bytes(f"{name} {load} backward", row, 3 * _nbytes(x), copy, None)
        leaves = [t.detach().requires_grad_() for t in (x, *weights)]
        row = Row()
        for side, run in sides(machine).items():
            row.measure(side, "ms", lambda run=run, given=(leaves, [dy]): machine.ms(_both(run, *given)))
            machine.free()
        yield _over_bytes(f"{name} {load} forward + backward", row, 5 * _nbytes(x), copy, None)


def _both(
    run: Callable[..., Tensor | tuple[Tensor, ...]], leaves: list[Tensor], cotangents: list[Tensor]
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run(*leaves), leaves, cotangents)


def packed(machine: Machine, copy: float) -> Iterator[Figure]:
    """Packed documents, forward: where they lie is worked out on the way, by torch, and timed apart."""
    load = replace(TINY if machine.tiny else LOADS["130m"], batch=1, seqlen=40 if machine.tiny else 32768)
    x, taps, bias = draw(load, machine)
    bounds = torch.arange(0, load.seqlen + 1, max(load.seqlen // 32, 1), device=machine.device)
    documents, ours = masks.documents(bounds), sides(machine)["ssdops"]
    row = Row()
    with torch.no_grad():
        row.measure("ssdops", "ms", lambda: machine.ms(machine.captured(lambda: ours(x, taps, bias, documents=documents))))
    yield _over_bytes(f"{load} in 32 documents, forward", row, 2 * _nbytes(x), copy, None)


def steps(machine: Machine, copy: float) -> Iterator[Figure]:
    """A token of each sequence, with its window."""
    for batch in (2,) if machine.tiny else (1, 64, 256):
        load = replace(TINY if machine.tiny else LOADS["2.7b"], batch=batch, seqlen=1)
        x, taps, bias = draw(load, machine)
        window, row = x.new_zeros(batch, load.channels, WIDTH - 1), Row()
        step = partial(sides(machine)["ssdops"], x, taps, bias, window=window, return_window=True)
        with torch.no_grad():
            row.measure("ssdops", "ms", lambda step=step: machine.ms(machine.captured(step)))
            row.measure("ssdops, eager", "ms", partial(machine.ms, step))
        yield _over_bytes(f"{load} step", row, 2 * (_nbytes(x) + _nbytes(window)) + taps.nbytes, copy, None)


@dataclass(frozen=True)
class Block:
    """What a block's scan gives, y; its x, gate z and dt, slices of the projection's output; all rows of channels or heads."""

    y: Tensor
    dout: Tensor
    x: Tensor
    z: Tensor
    dt: Tensor


def norms(machine: Machine, copy: float) -> Iterator[Figure]:
    """The gated norm with the skip connection before it: forward, and backward, as CUDA graphs, beside plain torch."""
    for name, block in _blocks(machine):
        weight, D = (torch.ones(t.shape[1], device=machine.device) for t in (block.y, block.dt))
        given = (block.y, block.z, weight, D, block.x)
        alone = partial(torch.ops.ssdops.gated_norm_backward, block.dout, *given[:3], block.x, D, 1e-5, 1, False)
        yield from _beside_torch(
            f"norm, {name}", machine, copy, _norm, given, [block.dout], alone, [4 * _nbytes(block.y), 7 * _nbytes(block.y)]
        )


def _norm(backend: str, y: Tensor, z: Tensor, weight: Tensor, D: Tensor, x: Tensor) -> Tensor:
    return gated_rms_norm(y, z, weight, skip=(D, x), backend=backend)


def skips(machine: Machine, copy: float) -> Iterator[Figure]:
    """The skip connection and the gate of a block without a norm, likewise."""
    for name, block in _blocks(machine):
        given = (block.y, block.x, torch.ones(block.dt.shape[1], device=machine.device), block.z)
        alone = partial(_gradients, skip.FUSED, given, [block.dout])
        yield from _beside_torch(
            f"skip and gate, {name}",
            machine,
            copy,
            _skip,
            given,
            [block.dout],
            alone,
            [4 * _nbytes(block.y), 7 * _nbytes(block.y)],
        )


def _skip(backend: str, y: Tensor, x: Tensor, D: Tensor, z: Tensor) -> Tensor:
    heads = [t.unflatten(1, (len(D), -1)) for t in (y, x, z)]
    return gated_skip(heads[0], heads[1], D, heads[2], backend=backend).flatten(1)


def rates(machine: Machine, copy: float) -> Iterator[Figure]:
    """The discretisation of dt, likewise: steps and logs of decays in float32."""
    for name, block in _blocks(machine):
        given = (block.dt, *(torch.ones(block.dt.shape[1], device=machine.device) for _ in range(2)))
        cotangents = [torch.randn(block.dt.shape, device=machine.device) for _ in range(2)]
        options, moved = (0.0, float("inf"), True, True, torch.float32), _nbytes(block.dt) + 2 * _nbytes(cotangents[0])
        alone = partial(_gradients, discretisation.FUSED, (*given, *options), cotangents)
        yield from _beside_torch(
            f"rates, {name}", machine, copy, _rates, given, cotangents, alone, [moved, moved + _nbytes(block.dt)]
        )


def _rates(backend: str, dt: Tensor, A: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return discretize(dt, A, bias, log=True, backend=backend)


def _gradients(fused: Fused, given: tuple[object, ...], cotangents: list[Tensor]) -> object:
    """Its backward kernels alone."""
    return fused.launcher(*given).backward(*cotangents)


def _blocks(machine: Machine) -> Iterator[tuple[str, Block]]:
    for name, channels in {"tiny": 64}.items() if machine.tiny else {"130m": 1536, "2.7b": 5120}.items():
        options = {"device": machine.device, "generator": machine.generator(0)}
        rows, heads = (20 if machine.tiny else 8 * 4096), channels // 64
        wide = torch.randn(rows, 2 * channels + 256 + heads, dtype=torch.bfloat16, **options)
        y, dout = (torch.randn(rows, channels, dtype=torch.bfloat16, **options) for _ in range(2))
        yield (
            f"{name} ({rows}, {channels})",
            Block(y, dout, wide[:, channels : 2 * channels], wide[:, :channels], wide[:, -heads:]),
        )


def _beside_torch(
    name: str,
    machine: Machine,
    copy: float,
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    given: Sequence[Tensor],
    cotangents: list[Tensor],
    alone: Callable[[], object],
    moved: list[int],
) -> Iterator[Figure]:
    """`run(backend, *given)`, and `alone`, its backward pass, which move so many bytes."""
    row, back, leaves = Row(), Row(), [t.detach().requires_grad_() for t in given]
    for side, backend in {"ssdops": "triton" if machine.cuda else "torch", "plain torch": "torch"}.items():
        call = partial(run, backend)
        with torch.no_grad():
            row.measure(side, "ms", lambda call=call: machine.ms(machine.captured(partial(call, *given))))
        back.measure(f"{side}, forward + backward", "ms", partial(machine.ms, _both(call, leaves, cotangents)))
        machine.free()
    if machine.cuda:
        back.measure("ssdops", "ms", lambda: machine.ms(machine.captured(alone)))
    yield _over_bytes(f"{name} forward", row, moved[0], copy, None)
    yield _over_bytes(f"{name} backward", back, moved[1], copy, None)


def sweep(machine: Machine, copy: float) -> Iterator[Figure]:
    """Other tiles: forward and backward kernels over their bytes."""
    from ssdops.nn import conv_triton

    for name, load in list(_loads(machine).items())[:2]:
        x, *weights = draw(load, machine)
        dy, chosen = torch.randn(x.shape, device=x.device).to(x.dtype), conv_triton.tile_of
        for tokens, per_thread, block, span in product((8, 16), (4, 8), (256, 512), (32, 64, 128, 256)):
            tile, row = conv_triton.Tile(block, tokens, span, max(block // (32 * per_thread), 1)), Row()
            conv_triton.tile_of = lambda *sizes, tile=tile: tile
            run = partial(torch.ops.ssdops.conv, x, *weights, None, [], True)
            row.measure("forward", "ms", lambda run=run: machine.ms(machine.captured(run)))
            run = partial(torch.ops.ssdops.conv_backward, dy, x, *weights, None, [], True, False)
            row.measure("backward", "ms", lambda run=run: machine.ms(machine.captured(run)))
            floor = 1e3 * 5 * _nbytes(x) / copy
            value = sum(row.parts.values()) / floor if len(row.parts) == 2 else None
            yield Figure(f"{name}, {tile}", value, "× bytes", "at most", None, row.parts, row.notes)
        conv_triton.tile_of = chosen


def _loads(machine: Machine) -> dict[str, Load]:
    return {"tiny": TINY} if machine.tiny else LOADS


def _nbytes(x: Tensor) -> int:
    """Of a view, what it shows."""
    return x.numel() * x.element_size()


def _over_bytes(name: str, row: Row, moved: int, copy: float, target: float | None) -> Figure:
    row.parts["bytes ms"] = 1e3 * moved / copy
    ratio = row.ratio("ssdops ms", "bytes ms")
    return Figure(name, ratio, "× bytes / copy", "at most", target, row.parts, row.notes, stretch=None if target else AT_MOST)


SECTIONS = {run.__name__: run for run in (errors, forward, backward, packed, steps, norms, skips, rates)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print each figure as it comes, and say by the exit status whether all is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out (default: cuda)")
    parser.add_argument("--only", metavar="A,B", default=",".join(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--sweep", action="store_true", help="time other tiles instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write; results/gpu_conv.json if the run is whole")
    parser.add_argument("--commit", help="the commit to name in FILE, where the source has no git")
    parser.add_argument("--quick", action="store_true", help="a shorter look at each figure")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script out; nothing is held to a target")
    options = parser.parse_args(argv)
    machine = Machine(torch.device(options.device), options.quick, options.tiny)
    copy, console = machine.ceilings().copy, Console(width=None if sys.stdout.isatty() else 150)
    facts: dict[str, object] = {**environment(options.commit), **machine.facts(), **peers.versions()}
    facts |= {"quick": machine.quick, "tiny": machine.tiny, "copy TB/s": round(copy / 1e12, 4)}
    console.print(facts)
    whole = options.only == ",".join(SECTIONS) and machine.cuda and not (machine.quick or machine.tiny or options.sweep)
    path = options.json or (RESULTS if whole else None)
    chosen = {"sweep": sweep} if options.sweep else {name: SECTIONS[name] for name in options.only.split(",")}
    sections: list[Section] = []
    for name, run in chosen.items():
        figures: list[Figure] = []
        sections.append(Section(name, figures))
        console.print(f"\n[bold]{name}[/] {(run.__doc__ or '').splitlines()[0]}", highlight=False)
        for figure in run(machine, copy):
            figures.append(replace(figure, target=None, stretch=None) if machine.tiny else figure)
            print_figure(console, figures[-1])
            if path:
                write_json(path, facts, sections)
    good = all(f.ok and not any(n.startswith("ssdops") for n in f.notes) for s in sections for f in s.figures)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
