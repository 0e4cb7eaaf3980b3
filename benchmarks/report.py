"""Figures with targets: how the benchmarks print them and write them down."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

Bound = Literal["at least", "at most"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value and the bound it is held to; `parts` are the measurements it was made from."""

    name: str
    value: float
    unit: str
    bound: Bound
    target: float
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the target is met; never for NaN."""
        return self.value >= self.target if self.bound == "at least" else self.value <= self.target


@dataclass(frozen=True, slots=True)
class Section:
    """The figures of one table."""

    title: str
    figures: Sequence[Figure]


def print_section(console: Console, section: Section) -> None:
    """One table: what was measured (and below it, from what), what was asked for, and whether it holds."""
    table = Table(title=section.title, title_justify="left", show_lines=True)
    table.add_column("figure")
    for heading in ("measured", "target", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in section.figures:
        parts = ", ".join(f"{name} {_number(value)}" for name, value in figure.parts.items())
        table.add_row(
            f"{figure.name}\n[dim]{parts}[/]" if parts else figure.name,
            f"{_number(figure.value)} {figure.unit}",
            f"{figure.bound} {_number(figure.target)}",
            "[green]ok[/]" if figure.ok else "[red]miss[/]",
        )
    console.print(table)


def write_json(path: Path, environment: Mapping[str, str | float], sections: Sequence[Section]) -> None:
    """Everything that was printed, for machines."""
    figures = {s.title: [asdict(figure) | {"ok": figure.ok} for figure in s.figures] for s in sections}
    path.write_text(json.dumps({"environment": dict(environment), "sections": figures}, indent=2) + "\n")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
