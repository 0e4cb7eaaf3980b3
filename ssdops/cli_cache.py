"""`ssdops cache`: what was tuned, seen, moved and removed."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .autotune import exchange, store
from .autotune.place import place_of
from .autotune.record import Record, Trial
from .cli_doctor import devices
from .errors import TuningError

SHORT = 10
"""Characters of a key that are shown."""


def list_results(console: Console) -> None:
    """A line for each result, and one for each file that cannot be read."""
    table = _table("key", "term", "sizes", "dtype", "direction", "fastest", "ms", "device")
    count = 0
    for path, record in store.every():
        if isinstance(record, TuningError):
            table.add_row(path.stem[:SHORT], Text(f"not read: {record}", style="yellow"))
            continue
        count += 1
        work, best = record.key.workload, fastest(record)
        name, ms = ("", "") if best is None else (describe(best), milliseconds(best))
        sizes = f"{work.batch},{work.seqlen},{work.nheads},{work.headdim},{work.dstate}"
        row = (path.stem[:SHORT], work.term, sizes, work.dtype, work.direction, name, ms, record.key.place.device)
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(Text(f"{count} results in {store.folder()}"), soft_wrap=True)


def show_result(prefix: str, console: Console) -> None:
    """Everything that is known of a key.

    Raises:
        TuningError: no key, or more than one, begins like that.
    """
    found = [r for path, r in store.every() if path.stem.startswith(prefix) and isinstance(r, Record)]
    if len(found) != 1:
        many = "no result has a key that begins" if not found else f"{len(found)} results have keys that begin"
        raise TuningError(f"{many} with {prefix!r}; 'ssdops cache list' shows them")
    (record,) = found
    place = record.key.place
    console.print(Text(str(record.key.workload)), soft_wrap=True)
    when = datetime.fromtimestamp(record.measured_at, timezone.utc).isoformat(timespec="seconds")
    versions = dict(zip(("ssdops", "torch", "triton", "tvm"), place.versions, strict=False))
    console.print(Text(f"{place.device}, {versions}, sources {place.sources}, {when}"), soft_wrap=True)
    console.print(trials_of(record))


def clear_results(console: Console) -> None:
    """Remove them all."""
    console.print(f"{store.clear()} results removed")


def export_results(path: Path, device: str | None, console: Console) -> None:
    """Write them into one file."""
    count, written = exchange.export(path, device)
    console.print(Text(f"{count} results written into {written}"), soft_wrap=True)


def import_results(path: Path, any_device: bool, console: Console) -> None:
    """Take them over from one file."""
    _say(exchange.import_(path, [place_of(target).device for target, _ in devices()], any_device), console)


def merge_results(paths: list[Path], into: Path, console: Console) -> None:
    """Write those of several files into one."""
    _say(exchange.merge(paths, into), console)


def _say(merged: exchange.Merged, console: Console) -> None:
    console.print(
        f"{merged.added} results are new, {merged.replaced} replaced older ones, {merged.kept} are older and not taken"
    )


def fastest(record: Record) -> Trial | None:
    """The trial that a choice without restrictions would take."""
    timed = [(t.seconds, index) for index, t in enumerate(record.trials) if t.seconds is not None]
    return record.trials[min(timed)[1]] if timed else None


def trials_of(record: Record) -> Table:
    """A line for each trial, the fastest first."""
    table = _table("backend", "status", "ms", "why")
    for trial in sorted(record.trials, key=lambda t: (t.seconds is None, t.seconds or 0.0, t.status)):
        table.add_row(describe(trial), trial.status, milliseconds(trial), Text(trial.note))
    return table


def describe(trial: Trial) -> str:
    """Backend and configuration."""
    size = f" {trial.config.chunk_size}" if trial.config.chunk_size else ""
    return f"{trial.backend}{size}" + (f" × {trial.config.segments}" if trial.config.segments > 1 else "")


def milliseconds(trial: Trial) -> str:
    """What was measured, if it was."""
    return "" if trial.seconds is None else f"{trial.seconds * 1e3:.3g}"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if name == "ms" else "left")
    return table
