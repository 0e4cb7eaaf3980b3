"""What other packages bring through entry points: found by name without importing anything, imported when first asked for.

    [project.entry-points."ssdops.masks"]
    alibi = "their_package.masks:Alibi"

An entry point that cannot be imported is skipped: whoever asks for its name is told why, and `ssdops doctor` lists it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

MASKS, BACKENDS = "ssdops.masks", "ssdops.backends"
"""The groups: names of masks, to the module or class that registers them; names of backends, to their classes."""


@dataclass(frozen=True)
class Loaded:
    """What an entry point led to, or why it led nowhere."""

    value: Any = None
    error: str = ""


@lru_cache(maxsize=2)
def found(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name; of two with one name, the first that is installed."""
    by_name: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        by_name.setdefault(point.name, point)
    return by_name


@lru_cache(maxsize=1024)
def load(group: str, name: str) -> Loaded | None:
    """Import an entry point, once; None if there is no such name."""
    point = found(group).get(name)
    if point is None:
        return None
    try:
        return Loaded(point.load())
    except Exception as error:  # whatever a foreign module may raise as it is imported
        return Loaded(error=f"{type(error).__name__}: {error}")


def failures() -> Iterator[tuple[str, str, str]]:
    """(group, name, what went wrong) of every entry point that cannot be imported; imports them all to find out."""
    for group in (MASKS, BACKENDS):
        for name, point in found(group).items():
            loaded = load(group, name)
            if loaded is not None and loaded.error:
                yield group, name, f"{point.value}: {loaded.error}"


def forget() -> None:
    """Look for entry points anew, as after an installation."""
    found.cache_clear()
    load.cache_clear()
