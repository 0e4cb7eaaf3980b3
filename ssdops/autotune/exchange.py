"""Results as one file: exported, imported, and shipped with the library in `data/<device>.json`.

A file that ships is an export of what was measured on one device, and nothing else, written into its place by

    ssdops tune --model mamba2-2.7b --device cuda --dtype bfloat16    # likewise other models, shapes and dtypes
    ssdops cache export ssdops/autotune/data --device "NVIDIA H100 80GB HBM3"
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import TuningError
from . import store
from .record import SCHEMA, Key, Record, from_json, to_json
from .workload import Workload

DATA: Any = files(__package__).joinpath("data")
"""Where shipped results are: a path, or what stands for one in an archive."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What an import or a merge did: keys that were new, whose older result was replaced, and whose newer one stays."""

    added: int
    replaced: int
    kept: int


def export(path: Path, device: str | None = None) -> tuple[int, Path]:
    """Write every result that can be read, or those of one device, into one file; how many they are, and where.

    Args:
        path: the file; or a folder, in which a device's file is named after it.

    Raises:
        TuningError: the file cannot be written, or has no name.
    """
    if path.is_dir():
        if device is None:
            raise TuningError(f"{path} is a folder, in which files are named after devices: --device says which")
        path = path / f"{file_name(device)}.json"
    found = [r for _, r in store.every() if isinstance(r, Record) and device in (None, r.key.place.device)]
    _write(path, found)
    return len(found), path


def merge(paths: Iterable[Path], into: Path) -> Merged:
    """Write the results of several exported files into one; where there are two of one key, the newer measurement stays.

    Raises:
        TuningError: a file cannot be read or written, or is of another schema.
    """
    found: dict[Key, Record] = {}
    added = replaced = kept = 0
    for record in (record for path in paths for record in read_export(path)):
        older = found.get(record.key)
        if older is not None and older.measured_at >= record.measured_at:
            kept += 1
            continue
        found[record.key] = record
        added, replaced = added + (older is None), replaced + (older is not None)
    _write(into, found.values())
    return Merged(added, replaced, kept)


def _write(path: Path, records: Iterable[Record]) -> None:
    try:
        store.write_json(path, {"schema": SCHEMA, "results": [to_json(record) for record in records]})
    except OSError as error:
        raise TuningError(f"cannot write {path}: {error.strerror or error}") from None


def import_(path: Path, devices: Iterable[str], any_device: bool = False) -> Merged:
    """Take over the results of an exported file; where there are two of one key, the newer measurement stays.

    Args:
        devices: the names of those that are here.
        any_device: also take results of other devices.

    Raises:
        TuningError: the file cannot be read, is of another schema, or holds results of a device that is not here.
    """
    records, here = read_export(path), set(devices)
    others = sorted({r.key.place.device for r in records} - here)
    if others and not any_device:
        raise TuningError(
            f"{path} has results of {', '.join(map(repr, others))}, and here is {', '.join(map(repr, sorted(here)))}; "
            "--any-device takes them over all the same"
        )
    added = replaced = kept = 0
    for record in records:
        older = store.read(record.key)
        if older is not None and older.measured_at >= record.measured_at:
            kept += 1
            continue
        store.keep(record)
        added, replaced = added + (older is None), replaced + (older is not None)
    return Merged(added, replaced, kept)


def read_export(path: Path) -> list[Record]:
    """The results in an exported file.

    Raises:
        TuningError: it cannot be read, or is of another schema.
    """
    try:
        data: Any = store.load_json(path)
    except OSError as error:
        raise TuningError(f"cannot read {path}: {error.strerror or error}") from None
    except TuningError as error:
        raise TuningError(f"{path} is no export of tuned results: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("results"), list):
        raise TuningError(f"{path} is no export of tuned results: 'ssdops cache export' writes one")
    if data.get("schema") != SCHEMA:
        raise TuningError(f"{path} is of schema {data.get('schema')!r}, and this version of ssdops reads schema {SCHEMA}")
    try:
        return [from_json(x) for x in data["results"]]
    except TuningError as error:
        raise TuningError(f"{path} holds what is no tuned result: {error}") from None


def shipped(key: Key) -> Record | None:
    """What the library ships for a key. Versions and sources need not be those of the measurement: a shipped choice may be
    slower than it was, and is checked like any other for whether it can run."""
    return _shipped(DATA, key.place.device).get(key.workload)


@lru_cache(maxsize=8)
def _shipped(folder: Any, device: str) -> dict[Workload, Record]:
    path = folder / f"{file_name(device)}.json"
    if not path.is_file():
        return {}
    try:
        return {r.key.workload: r for r in read_export(path) if r.key.place.device == device}
    except TuningError as error:  # an installation that is broken can still plan
        warnings.warn(f"results that ship with ssdops are not used: {error}", stacklevel=2)
        return {}


def file_name(device: str) -> str:
    """A device's name as that of a file.

    >>> file_name("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
