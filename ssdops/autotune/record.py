"""What was measured of one key: every candidate with its seconds, or with why it has none."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..backends.base import Config
from ..errors import TuningError
from .place import Place
from .workload import Workload

SCHEMA = 1
"""Of every file that this room writes; a file of another is not read."""
STATUSES = ("measured", "failed", "skipped")


@dataclass(frozen=True, slots=True)
class Key:
    """Where, and of what: `workload` is that of a bucket."""

    place: Place
    workload: Workload

    @property
    def name(self) -> str:
        """What its file is called, short of the ending."""
        return hashlib.sha256(json.dumps(_key_to_json(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate.

    Attributes:
        status: "measured"; "failed", with the error: it is never chosen; or "skipped", with the reason: nothing is known.
        seconds: of one pass, the fastest sample; None unless measured.
        note: the error, or the reason.
    """

    backend: str
    config: Config
    status: str
    seconds: float | None = None
    note: str = ""

    @property
    def candidate(self) -> tuple[str, Config]:
        """What was tried."""
        return self.backend, self.config


@dataclass(frozen=True, slots=True)
class Record:
    """All that is known of a key.

    Attributes:
        measured_at: when, in seconds since 1970 by the clock of the machine; it orders records, and nothing else.
    """

    key: Key
    trials: tuple[Trial, ...]
    measured_at: float

    def covers(self, backends: Iterable[str]) -> bool:
        """Whether each of these backends was at least considered, and one of them measured."""
        wanted = set(backends)
        measured = any(trial.status == "measured" and trial.backend in wanted for trial in self.trials)
        return measured and wanted <= {trial.backend for trial in self.trials}

    def over(self, older: Record) -> Record:
        """These trials, and those of the older record that these do not know better."""
        known = {trial.candidate: trial for trial in older.trials}
        known |= {t.candidate: t for t in self.trials if t.status != "skipped" or t.candidate not in known}
        return Record(self.key, tuple(known.values()), self.measured_at)


def to_json(record: Record) -> dict[str, Any]:
    """As JSON has it."""
    trials = [
        {"backend": t.backend, "chunk_size": t.config.chunk_size, "segments": t.config.segments, "status": t.status,
         "seconds": t.seconds, "note": t.note}
        for t in record.trials
    ]  # fmt: skip
    return {"schema": SCHEMA, "key": _key_to_json(record.key), "measured_at": record.measured_at, "trials": trials}


def from_json(data: Any) -> Record:
    """The inverse of `to_json`.

    Raises:
        TuningError: what is wrong with it.
    """
    _check(isinstance(data, dict), "a tuned result is an object", data)
    _check(data.get("schema") == SCHEMA, f"this version of ssdops reads schema {SCHEMA}", data.get("schema"))
    key, trials, when = data.get("key"), data.get("trials"), data.get("measured_at")
    _check(isinstance(key, dict), "'key' is an object", key)
    device, versions, sources = (key.get(name) for name in ("device", "versions", "sources"))
    _check(isinstance(device, str) and isinstance(sources, str), "'device' and 'sources' are text", (device, sources))
    _check(isinstance(versions, list) and all(isinstance(x, str) for x in versions), "'versions' is a list of texts", versions)
    _check(isinstance(trials, list), "'trials' is a list", trials)
    _check(_is_number(when), "'measured_at' is a number of seconds from 0 on", when)
    found = Key(Place(device, tuple(versions), sources), Workload.from_json(key.get("workload")))
    return Record(found, tuple(_trial(x) for x in trials), float(when))


def _trial(data: Any) -> Trial:
    _check(isinstance(data, dict), "a trial is an object", data)
    backend, size, segments = (data.get(name) for name in ("backend", "chunk_size", "segments"))
    status, seconds, note = (data.get(name) for name in ("status", "seconds", "note"))
    _check(isinstance(backend, str) and isinstance(note, str), "'backend' and 'note' are text", (backend, note))
    _check(status in STATUSES, f"'status' is one of {', '.join(STATUSES)}", status)
    _check(size is None or _is_count(size), "'chunk_size' is null or a positive integer", size)
    _check(_is_count(segments), "'segments' is a positive integer", segments)
    measured = status == "measured"
    timed = _is_number(seconds) and seconds > 0
    _check(timed if measured else seconds is None, "'seconds' are a positive number where measured, else null", seconds)
    return Trial(backend, Config(size, segments), status, float(seconds) if measured else None, note)


def _key_to_json(key: Key) -> dict[str, Any]:
    place = key.place
    return {
        "device": place.device, "versions": list(place.versions), "sources": place.sources, "workload": key.workload.to_json(),
    }  # fmt: skip


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x) and x >= 0


def _is_count(x: Any) -> bool:
    return type(x) is int and 0 < x < 2**31


def _check(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise TuningError(f"{expected}, got {str(got)[:200]}")
