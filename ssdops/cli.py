"""The command line: `ssdops demo | explain | export | tune | cache | bench | doctor`.

This module holds the commands' options; what they do lives in `cli_demo`, `cli_explain` and so on, imported when one runs.
Every error that ssdops raises on purpose ends as one line on stderr and exit status 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .config import VERSION
from .errors import SsdopsError


class _Group(TyperGroup):
    """Turns an SsdopsError from any command into one line and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SsdopsError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="State space duality as an operator library: see what a mask becomes, and try it.",
)

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ssdops {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    file: Annotated[Path | None, typer.Argument(help="A text; a chapter of Newton's Opticks if none is given.")] = None,
    seqlen: Annotated[int, typer.Option(help="How many bytes of the text to read.")] = 512,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="Of the projection's weights.")] = 0,
) -> None:
    """Run every backend on a real text and compare each with the float64 oracle.

    Exits 1 if a backend that ran is off by more than its tolerance.
    """
    from .cli_demo import Settings, run

    raise typer.Exit(0 if run(file, Settings(seqlen, device, dtype, seed), Console()) else 1)


@app.command()
def explain(
    shape: Annotated[str, typer.Option(help="B,T,H,P,G,N: batch, seqlen, nheads, headdim, ngroups (of q, k), dstate.")],
    mask: Annotated[str, typer.Option(help='A mask as text: "decay(log_a) + diagonal(d)".')],
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backend: Annotated[str, typer.Option(help='A backend\'s name, or "auto".')] = "auto",
    chunk_size: Annotated[int | None, typer.Option(help="The chunk length, if not the planner's choice.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the mask and its blocks into this PNG.")] = None,
) -> None:
    """Show what a mask becomes and which backend runs it, and why not the others. Nothing is allocated or run."""
    from .cli_explain import Question, run

    run(Question(shape, mask, device, dtype, backend, chunk_size), plot, Console())


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="Where to write the programs.")],
    shape: Annotated[str, typer.Option(help="B,T,H,P,G,N; the programs serve any batch, seqlen and numbers of heads.")],
    mask: Annotated[
        str, typer.Option(help="A mask as text; programs serve any that is made of the same parts.")
    ] = "decay(log_a)",
    dtype: Dtype = "float32",
    backend: Annotated[str, typer.Option(help="A backend that compiles ahead.")] = "tvm",
    cpu: Annotated[
        str | None, typer.Option(help="For whom, as LLVM calls it (x86-64-v3); this processor if not given.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="For a GPU instead, as CUDA calls it (sm_90); wants nvcc.")] = None,
) -> None:
    """Compile a backend's programs ahead into shared libraries that run without its compiler."""
    from .cli_export import Order, run

    run(Order(shape, mask, dtype, backend, cpu, gpu), directory, Console())


@app.command()
def doctor() -> None:
    """Show versions, devices, and which backends can be used here, and why not the others."""
    from .cli_doctor import run

    run(Console())


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="B,T,H,P,G,N: batch, the longest seqlen, nheads, headdim, ngroups, dstate.")],
    mask: Annotated[str, typer.Option(help="A mask as text.")] = "decay(log_a)",
    seqlens: Annotated[str | None, typer.Option(help="Lengths, as 512,1024,…; halves of the longest if not given.")] = None,
    backends: Annotated[str | None, typer.Option(help="Backends, as chunked,tvm,…; all if not given.")] = None,
    direction: Annotated[str, typer.Option(help="forward, or backward (both passes together).")] = "forward",
    plot: Annotated[Path | None, typer.Option(help="Also draw time against seqlen into this PNG.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Time a call on each backend against its length, and show which of them is taken. Nothing is kept."""
    from .cli_bench import Settings, run

    run(Settings(shape, mask, seqlens, backends, direction, device, dtype), plot, Console())


@app.command()
def tune(
    shape: Annotated[str | None, typer.Option(help="B,T,H,P,G,N: batch, seqlen, nheads, headdim, ngroups, dstate.")] = None,
    mask: Annotated[str | None, typer.Option(help="A mask as text; without it a decay, and of a model its own.")] = None,
    model: Annotated[str | None, typer.Option(help="The scans of a model: mamba2-130m to mamba2-2.7b.")] = None,
    from_log: Annotated[Path | None, typer.Option(help="What a run wrote with SSDOPS_LOG_SHAPES.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure the device's rates, for the cost model.")] = False,
    batch: Annotated[int, typer.Option(help="With --model.")] = 1,
    seqlen: Annotated[int, typer.Option(help="With --model.")] = 2048,
    direction: Annotated[str, typer.Option(help="forward, backward (both passes together), both, or step.")] = "both",
    budget: Annotated[float | None, typer.Option(help="Seconds for each term and direction.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what was measured.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Measure which backend and configuration is fastest, and keep it: calls find it from then on."""
    from .cli_tune import Settings, run

    run(Settings(shape, mask, model, from_log, calibrate, batch, seqlen, direction, budget, force, device, dtype), Console())


cache = typer.Typer(cls=_Group, no_args_is_help=True, help="See, move and remove what was tuned.")
app.add_typer(cache, name="cache")


@cache.command("list")
def list_() -> None:
    """List the tuned results."""
    from .cli_cache import list_results

    list_results(Console())


@cache.command()
def show(key: Annotated[str, typer.Argument(help="A key, or how it begins.")]) -> None:
    """Show everything that was tried for a key: times, errors, and what was not tried, and why."""
    from .cli_cache import show_result

    show_result(key, Console())


@cache.command()
def clear() -> None:
    """Remove all tuned results."""
    from .cli_cache import clear_results

    clear_results(Console())


@cache.command("export")
def export_(file: Path, device: Annotated[str | None, typer.Option(help="Only results of this device.")] = None) -> None:
    """Write the tuned results into one file, or those of a device into a folder, named after it."""
    from .cli_cache import export_results

    export_results(file, device, Console())


@cache.command("import")
def import_(
    file: Path,
    any_device: Annotated[bool, typer.Option("--any-device", help="Also take results of devices that are not here.")] = False,
) -> None:
    """Take over tuned results from a file; of two for one key the newer stays."""
    from .cli_cache import import_results

    import_results(file, any_device, Console())


@cache.command()
def merge(
    files: list[Path],
    into: Annotated[Path, typer.Option(help="The file to write.")],
) -> None:
    """Make one file of several that were exported; of two results for one key the newer stays. The cache is left alone."""
    from .cli_cache import merge_results

    merge_results(files, into, Console())


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
