"""`ssdops doctor`: what is installed, which devices are here, and which backends run on them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import config, plugins
from .backends import registry
from .backends.base import Support
from .errors import UnsupportedError
from .ir import nodes as n
from .ir.problem import Problem, Target, problem_of
from .ir.terms import Linear

PACKAGES = {
    "torch": "", "numpy": "", "triton": "Linux only",
    "apache-tvm": "extra: ssdops[tvm]", "apache-tvm-ffi": "extra: ssdops[tvm]", "matplotlib": "extra: ssdops[plot]",
}  # fmt: skip


def run(console: Console) -> None:
    """Print the tables."""
    packages = _table("package", "version")
    packages.add_row("python", platform.python_version())
    packages.add_row("ssdops", config.VERSION)
    for name, note in PACKAGES.items():
        packages.add_row(name, Text(_version(name) or f"not installed{f' ({note})' if note else ''}"))
    console.print(packages)
    found = list(devices())
    table = _table("device", "what it is")
    for target, text in found:
        table.add_row(target.device, Text(text))
    console.print(table)
    backends = _table("backend", "device", "usable")
    for name in registry.names():
        for target in dict.fromkeys(target for target, _ in found):
            support = usable(name, target)
            verdict = Text("yes", style="green") if support.ok else Text(f"no: {support.reason}", style="yellow")
            backends.add_row(name, target.device, verdict)
    console.print(backends)
    if any(map(plugins.found, (plugins.MASKS, plugins.BACKENDS))):
        console.print(_entry_points())
    compilers = _table("compiler of 'tvm'", "usable")
    for name, support in tvm_compilers().items():
        compilers.add_row(name, Text("yes", style="green") if support.ok else Text(f"no: {support.reason}", style="yellow"))
    console.print(compilers)
    console.print(f"SSDOPS_DEBUG={config.debug_level()}  SSDOPS_CHECK={int(config.check_values())}", highlight=False)


def _entry_points() -> Table:
    """Every entry point of another package, imported to see whether it can be."""
    table, broken = _table("entry point", "group", "usable"), {(group, name): why for group, name, why in plugins.failures()}
    for group in (plugins.MASKS, plugins.BACKENDS):
        for name, point in plugins.found(group).items():
            why = broken.get((group, name), "")
            if not why and group == plugins.MASKS and n.leaf_named(name) is None:
                why = f"{point.value} registers no mask of that name"
            table.add_row(
                name, group, Text(f"no: {why}", style="yellow") if why else Text(f"yes: {point.value}", style="green")
            )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, no_wrap=i < len(columns) - 1, overflow="fold")
    return table


def _version(package: str) -> str | None:
    """From the package's metadata, so that nothing is imported to ask."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> Iterator[tuple[Target, str]]:
    """The devices that torch can use here, as targets, with a line about each."""
    name = platform.processor() or platform.machine()
    yield Target("cpu"), f"{name}, {torch.get_num_threads()} threads in torch"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            target = Target.of(torch.device("cuda", index))
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            capability = ".".join(map(str, target.capability or ()))
            yield target, f"cuda:{index}: {target.name}, capability {capability}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        yield Target("mps"), "Metal"


def usable(backend: str, target: Target) -> Support:
    """Whether the backend runs the plain case, one causal decay in float32, on the target."""
    try:
        return registry.get(backend).supports(Linear(log_a="log_a"), _plain_problem(target))
    except (ImportError, UnsupportedError) as error:
        return Support.no(str(error) if isinstance(error, UnsupportedError) else f"cannot be imported: {error}")


def tvm_compilers() -> dict[str, Support]:
    """Whether the TVM backend can compile for CPUs and for GPUs here, and why not; TVM is not imported."""
    from .backends.tvm import backend, toolkit

    installed = backend.installed()
    return {"LLVM": installed, "CUDA": toolkit.usable() if installed.ok else installed}


def _plain_problem(target: Target) -> Problem:
    x, log_a = torch.empty(1, 128, 1, 64, device="meta"), torch.empty(1, 128, 1, device="meta")
    return replace(problem_of(n.Decay("log_a"), x, x, x, {"log_a": log_a}), target=target)
