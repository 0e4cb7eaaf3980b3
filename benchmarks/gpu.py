"""ssdops on a GPU beside mamba_ssm, fla and torch's attention: `PYTHONPATH=.:.peers python benchmarks/gpu.py`.

All sides run in one process on the same operands, in bfloat16 unless `--dtype` says otherwise; times are medians, and only
ratios within a run mean anything. A side that is missing or refuses says so in its row. The figures go to a JSON file after
every row, so that a run that is cut short leaves what it had. Exits with status 1 if a target is missed or ssdops itself
refuses.

The peers tune their kernels at first use, mamba_ssm for about three minutes at each dstate: the sections in which they do
come last, `--only` and `--shapes` split a run, and compiled kernels stay in Triton's cache for the next. `--quick` looks
at each figure for a shorter time: not for quoting.
`--device cpu --tiny` tries the script out where there is no GPU.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import peers
import torch
from device import Machine
from gpu_sections import Bench, Sections, backward, error, forward, graphs, kernels, memory
from gpu_sweeps import attention, constant_tokens, decode
from mamba2_work import SHAPES, floor_ms, tiny
from measure import environment
from report import Figure, Section, print_figure, write_json
from rich.console import Console

SECTIONS: dict[str, Callable[[Bench], Sections]] = {
    run.__name__: run for run in (kernels, attention, decode, constant_tokens, error, forward, graphs, backward, memory)
}
RESULTS = Path(__file__).parent / "results" / "gpu.json"
WIDTH = 150  # of lines that no terminal shows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, print each figure as it comes, and say by the exit status whether all is well."""
    options = parse(argv)
    machine = Machine(torch.device(options.device), options.quick, options.tiny, getattr(torch, options.dtype))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    shapes = {name: tiny(SHAPES[name]) if machine.tiny else SHAPES[name] for name in options.shapes}
    bench = Bench(machine, options.backend, shapes, machine.ceilings())
    facts = describe(bench, options)
    console.print(facts)
    sections: list[Section] = []
    path = options.json or (RESULTS if complete(options) else None)
    save = partial(write_json, path, facts, sections) if path else lambda: None
    save()  # a path that cannot be written is better known before than after
    for name in options.only:
        figures: list[Figure] = []
        sections.append(Section(name, figures))
        console.print(f"\n[bold]{name}[/] {(SECTIONS[name].__doc__ or '').splitlines()[0]}", highlight=False)
        for figure in SECTIONS[name](bench):
            figures.append(replace(figure, target=None, stretch=None) if machine.tiny else figure)
            print_figure(console, figures[-1])
            save()
    return 0 if all(good(figure) for section in sections for figure in section.figures) else 1


def complete(options: argparse.Namespace) -> bool:
    """Whether the run makes every figure, at the length at which it may be quoted."""
    whole = (options.only, options.shapes, options.dtype) == (list(SECTIONS), list(SHAPES), "bfloat16")
    return whole and options.device == "cuda" and not options.quick and not options.tiny


def good(figure: Figure) -> bool:
    """Whether its target is met, and ssdops ran."""
    return figure.ok and not any(name.startswith("ssdops") for name in figure.notes)


def describe(bench: Bench, options: argparse.Namespace) -> dict[str, object]:
    """The device, the versions of everything, the ceilings, and the floor of each shape."""
    facts: dict[str, object] = {**environment(options.commit), **bench.machine.facts(), **peers.versions()}
    facts |= {"backend": bench.backend, "dtype": options.dtype, "quick": bench.machine.quick, "tiny": bench.machine.tiny}
    facts["copy TB/s"] = round(bench.ceilings.copy / 1e12, 4)
    facts["bf16 matmul TFLOP/s"] = round(bench.ceilings.matmul / 1e12, 2)
    floors = {f"{name} {shape}": round(floor_ms(shape, bench.ceilings), 4) for name, shape in bench.shapes.items()}
    return facts | {"floor ms": floors}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="triton", help="the ssdops backend to measure (default: triton)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out (default: cuda)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="of the operands")
    parser.add_argument("--only", type=_names(SECTIONS), default=list(SECTIONS), metavar="A,B", help=", ".join(SECTIONS))
    parser.add_argument("--shapes", type=_names(SHAPES), default=list(SHAPES), metavar="S1,S2", help="these alone")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write every figure to FILE; a complete run writes results/gpu.json by default",
    )
    parser.add_argument("--commit", help="the commit to name in FILE, where the source has no git")
    parser.add_argument("--quick", action="store_true", help="a shorter look at each figure")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script out; nothing is held to a target")
    return parser.parse_args(argv)


def _names(table: dict[str, object]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names that are all in a table."""

    def names(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := [name for name in wanted if name not in table]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} not among {', '.join(table)}")
        return wanted

    return names


if __name__ == "__main__":
    sys.exit(main())
