"""Where results are kept: one small JSON file per key, and a memory of those that this process has read.

A file is written under a temporary name and renamed, so that whoever reads finds a whole one; no locks, so that it holds under
many processes and on network file systems. Whatever cannot be read counts as not there, with one warning of each kind.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import config
from ..errors import TuningError
from .record import Key, Record, from_json, to_json

_known: dict[Key, Record | None] = {}
_told: set[str] = set()
_version = 0


def version() -> int:
    """Counts the changes that this process has made or seen; a plan made before one may be outdated."""
    return _version


def folder() -> Path:
    """Where the files are."""
    return config.cache_dir() / "tuned"


def lookup(key: Key) -> Record | None:
    """What is known of a key: from memory once it was asked for, as this process does not look twice."""
    try:
        return _known[key]
    except KeyError:
        found = _known[key] = read(key)
        return found


def read(key: Key) -> Record | None:
    """What the disk has of a key; None, with a warning, where its file is not what it should be."""
    path = _path(key)
    try:
        found = from_json(load_json(path))
    except FileNotFoundError:
        return None
    except (OSError, TuningError) as error:
        _warn("unreadable", f"{path} is not used, as it cannot be read: {error}. 'ssdops cache clear' removes it")
        return None
    if found.key != key:
        _warn("foreign", f"{path} is not used, as it holds the result of another key. 'ssdops cache clear' removes it")
        return None
    return found


def keep(record: Record) -> Record:
    """Remember a record, on disk too if that can be; what the disk has of its key already is merged into it."""
    older = read(record.key)
    record = adopt(record if older is None else record.over(older))
    path = _path(record.key)
    try:
        write_json(path, to_json(record))
    except OSError as error:
        _warn("unwritable", f"tuned results are kept in this process only, as {path.parent} cannot be written: {error}")
    return record


def adopt(record: Record) -> Record:
    """Remember what another process has written since this one looked."""
    global _version
    _known[record.key] = record
    _version += 1
    return record


def forget() -> None:
    """Read everything again from disk when it is next asked for."""
    global _version
    _known.clear()
    _version += 1


def every() -> Iterator[tuple[Path, Record | TuningError]]:
    """Each file of the folder, with what it holds or what is wrong with it."""
    for path in sorted(folder().glob("*.json")):
        try:
            yield path, from_json(load_json(path))
        except FileNotFoundError:
            continue  # removed by somebody since
        except OSError as error:
            yield path, TuningError(str(error))
        except TuningError as error:
            yield path, error


def clear() -> int:
    """Remove every result, and what killed processes have left; how many results there were.

    Raises:
        TuningError: a file cannot be removed.
    """
    count = 0
    try:
        for path in [*folder().glob("*.json"), *folder().glob("*.tmp")]:
            path.unlink(missing_ok=True)
            count += path.suffix == ".json"
    except OSError as error:
        raise TuningError(f"cannot remove {error.filename}: {error.strerror}") from None
    finally:
        forget()
    return count


def load_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: it cannot be read.
        TuningError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TuningError(f"not JSON: {error}") from None


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".tmp", prefix=f"{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _path(key: Key) -> Path:
    return folder() / f"{key.name}.json"


def _warn(kind: str, text: str) -> None:
    """Once for each kind."""
    if kind not in _told:
        _told.add(kind)
        warnings.warn(text, stacklevel=4)
