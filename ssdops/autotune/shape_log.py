"""A log of what calls a real run makes: one workload a line, as JSON, each once in a process."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from .. import config
from ..errors import TuningError
from .workload import Workload

_noted: set[Workload] = set()
_told: set[Path] = set()


def note(work: Workload) -> None:
    """Append a workload to the file that SSDOPS_LOG_SHAPES names, if it does, and this process has not done so."""
    path = config.shape_log()
    if path is None or work in _noted:
        return
    _noted.add(work)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(work.to_json()) + "\n")
    except OSError as error:
        if path not in _told:
            _told.add(path)
            warnings.warn(f"shapes are not logged, as {path} cannot be written: {error.strerror or error}", stacklevel=2)


def read_log(path: Path) -> tuple[list[Workload], int]:
    """The workloads of a log, each once, and how many lines are none.

    Raises:
        TuningError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise TuningError(f"cannot read {path}: {error.strerror or error}") from None
    found: dict[Workload, None] = {}
    bad = 0
    for line in filter(str.strip, lines):
        try:
            found[Workload.from_json(json.loads(line))] = None
        except (ValueError, RecursionError):  # TuningError is one
            bad += 1
    return list(found), bad
