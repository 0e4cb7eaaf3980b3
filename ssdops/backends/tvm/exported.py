"""Programs that were compiled ahead, for processors like the one that they are run on, or for a GPU: `ssdops export`.

A directory holds shared libraries and `programs.json`, which says what they are for. They run with TVM's FFI alone.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from ...config import VERSION, tvm_programs
from .tile import Tile

MANIFEST = "programs.json"
SCHEMA = 2
FLAGS = {
    "sse4.1": "sse4_1", "sse4.2": "sse4_2", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi": "bmi1",
    "bmi2": "bmi2", "lzcnt": "abm", "movbe": "movbe", "popcnt": "popcnt", "avx512f": "avx512f", "avx512vl": "avx512vl",
    "avx512bw": "avx512bw", "avx512dq": "avx512dq", "avx512cd": "avx512cd", "neon": "asimd", "sve": "sve",
}  # fmt: skip
"""What LLVM calls the instructions that programs are made of, and what Linux calls them."""


def directory() -> Path | None:
    """The user's directory of exported programs, whatever is in it."""
    return tvm_programs()


def place(name: str, tile: Tile) -> Path | None:
    """Where a program is among those exported; None if there is none, or not for this machine."""
    here = tvm_programs()
    if here is None or not _usable(here, tile.target):
        return None
    path = here / file(name, tile)
    return path if path.exists() else None


def file(name: str, tile: Tile) -> str:
    """A program's file, of these sources; `-cpu-` as in names of those that are kept, or a GPU's architecture."""
    from . import build

    return f"{name}-{tile.target}-{hashlib.sha256(f'{build.sources()} {tile}'.encode()).hexdigest()[:16]}.so"


def describe(here: Path, target: str, features: list[str]) -> None:
    """Write what the programs of a directory are for, those of earlier exports included."""
    told, path = manifest(target, features), here / MANIFEST
    either = {"flags": None, "targets": None}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if before | either == told | either:
            told |= {name: sorted({*before[name], *told[name]}) for name in either}
    except (OSError, ValueError, TypeError):
        pass  # there are none, or they are of other sources and will not be used
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def manifest(target: str, features: list[str]) -> dict[str, Any]:
    """What a machine must be to run programs for "cpu" of these LLVM features, or for a GPU's architecture."""
    from . import build

    return {
        "schema": SCHEMA, "ssdops": VERSION, "sources": build.sources(), "system": platform.system(),
        "machine": platform.machine(), "targets": [target],
        "flags": sorted(FLAGS[feature] for feature in features if feature in FLAGS),
    }  # fmt: skip


@cache
def _usable(here: Path, target: str) -> bool:
    """Whether what is there runs here, on the CPU or a GPU of an architecture; if not, a warning says why, once."""
    from . import build

    try:
        found = json.loads((here / MANIFEST).read_text(encoding="utf-8"))
        reason = _refuse(found, target)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{MANIFEST} cannot be read ({error})"
    if not build.ours(here):
        reason = "they are another user's, or others can write there (chmod go-w)"
    if reason is not None:
        warnings.warn(f"the programs in {here} (SSDOPS_TVM_PROGRAMS) are not used: {reason}", stacklevel=4)
    return reason is None


def _refuse(found: dict[str, Any], target: str) -> str | None:
    """Why programs of a manifest do not run here."""
    wanted = manifest(target, [])
    if found["schema"] != SCHEMA:
        return f"their schema is {found['schema']}, and this version of ssdops reads {SCHEMA}"
    if found["sources"] != wanted["sources"]:
        return f"they were made by ssdops {found['ssdops']} of other sources; export them again with this one"
    machine, here = ((m["system"], m["machine"]) for m in (found, wanted))
    if machine != here:
        return f"they are for {' '.join(map(str, machine))}, and this is {' '.join(map(str, here))}"
    if target != "cpu":
        gpus = [other for other in found["targets"] if other != "cpu"]
        elsewhere = f"they are for {', '.join(gpus)}, and this GPU is {target}; export them with --gpu {target}"
        return elsewhere if gpus and target not in gpus else None
    missing = sorted(set(found["flags"]) - processor_flags())
    return f"this processor has no {', '.join(missing)}; export them with --cpu" if missing else None


@cache
def processor_flags() -> frozenset[str]:
    """What Linux says that this processor has."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    told = (line.partition(":") for line in lines)
    return frozenset(word for name, _, rest in told if name.strip() in ("flags", "Features") for word in rest.split())
