"""The command line: `ssdops demo | explain | export | doctor`.

This module holds the commands' options; what they do lives in `cli_demo`, `cli_explain` and `cli_doctor`, imported
when one runs. Every error that ssdops raises on purpose ends as one line on stderr and exit status 2.
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
) -> None:
    """Compile a backend's programs ahead, for CPUs, into shared libraries that run without its compiler."""
    from .cli_export import Order, run

    run(Order(shape, mask, dtype, backend, cpu), directory, Console())


@app.command()
def doctor() -> None:
    """Show versions, devices, and which backends can be used here, and why not the others."""
    from .cli_doctor import run

    run(Console())


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
