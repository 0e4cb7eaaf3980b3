"""Figures with targets: how the benchmarks print them and write them down."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Bound = Literal["at least", "at most"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value and the bound it is held to; `parts` are the measurements it was made from.

    A value of None was not measured, and a target of None asks for nothing; `notes` say what could not be measured, and
    why; `stretch` is a further target that nothing depends on.
    """

    name: str
    value: float | None
    unit: str
    bound: Bound
    target: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    stretch: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the target is met; never for NaN, nor for a target whose value was not measured."""
        return self.target is None or self._meets(self.target)

    @property
    def stretch_ok(self) -> bool:
        """Whether there is a stretch target, and it is met."""
        return self.stretch is not None and self._meets(self.stretch)

    def _meets(self, target: float) -> bool:
        if self.value is None:
            return False
        return self.value >= target if self.bound == "at least" else self.value <= target


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
        table.add_row(_description(figure), _measured(figure), _targets(figure), _verdict(figure))
    console.print(table)


def print_figure(console: Console, figure: Figure) -> None:
    """One figure as lines, for those that take long to come."""
    targets = _targets(figure).replace("\n", ", ")
    ends = [f"[bold]{_measured(figure)}[/]", f"({targets})" if targets else "", _verdict(figure)]
    name, *rest = _description(figure).split("\n")
    console.print(" ".join([f"{name}:", *filter(None, ends)]), *(f"    {line}" for line in rest), sep="\n", highlight=False)


def _measured(figure: Figure) -> str:
    return "not measured" if figure.value is None else f"{_number(figure.value)} {figure.unit}".strip()


def _description(figure: Figure) -> str:
    lines = [escape(figure.name)]
    if figure.parts:
        lines.append(f"[dim]{escape(', '.join(f'{name} {_number(value)}' for name, value in figure.parts.items()))}[/]")
    for reason in dict.fromkeys(figure.notes.values()):
        names = ", ".join(name for name, given in figure.notes.items() if given == reason)
        lines.append(f"[yellow]{escape(f'{names}: {reason}')}[/]")
    return "\n".join(lines)


def _targets(figure: Figure) -> str:
    wanted = [] if figure.target is None else [f"{figure.bound} {_number(figure.target)}"]
    wanted += [] if figure.stretch is None else [f"stretch {_number(figure.stretch)}"]
    return "\n".join(wanted)


def _verdict(figure: Figure) -> str:
    if figure.stretch_ok:
        return "[green]stretch[/]"
    if figure.target is None:
        return ""
    return "[green]ok[/]" if figure.ok else "[red]miss[/]"


def write_json(path: Path, environment: Mapping[str, object], sections: Sequence[Section]) -> None:
    """Everything that was printed, for machines."""
    figures = {s.title: [_record(figure) for figure in s.figures] for s in sections}
    path.write_text(json.dumps({"environment": dict(environment), "sections": figures}, indent=2) + "\n")


def _record(figure: Figure) -> dict[str, object]:
    """The figure's fields, without those that say nothing, and its verdict where something was asked for."""
    record = {name: value for name, value in asdict(figure).items() if value is not None and value != {}}
    record |= {"value": figure.value, "parts": dict(figure.parts)}
    record |= {} if figure.target is None else {"ok": figure.ok}
    return record | ({} if figure.stretch is None else {"stretch_ok": figure.stretch_ok})


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
