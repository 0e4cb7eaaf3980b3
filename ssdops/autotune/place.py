"""Where a measurement is valid: the device, the versions of what compiles and runs, and the sources of the backends."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from ..backends import registry
from ..config import VERSION
from ..ir.problem import Target
from .formulas import digest

PACKAGES = ("torch", "triton", "apache-tvm")


@dataclass(frozen=True, slots=True)
class Place:
    """What a measurement depends on beside the workload; the driver is left out.

    Attributes:
        device: a GPU's name, or a processor's with the number of threads that torch has.
        versions: of ssdops and of each of PACKAGES, as text; "none" where it is not installed.
        sources: a hash of the source files of all backends, and one of the classes of masks that users registered.
    """

    device: str
    versions: tuple[str, ...]
    sources: str


def place_of(target: Target, term: str = "") -> Place:
    """The place of this process, if it is to run a term, as text, on the target."""
    threads = torch.get_num_threads() if target.device == "cpu" else 0
    place = _place(target.device, target.name, threads, tuple(registry.BACKENDS.values()))
    formulas = digest(term)
    return replace(place, sources=f"{place.sources} {formulas}") if formulas else place


@lru_cache(maxsize=64)
def _place(device: str, name: str, threads: int, backends: tuple[str, ...]) -> Place:
    text = f"{_processor()}, {threads} threads" if device == "cpu" else name or device
    return Place(text, _versions(), _sources(backends))


@lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    return (VERSION, *(_version(package) for package in PACKAGES))


def _version(package: str) -> str:
    """From the package's metadata, so that nothing is imported to ask; torch's own says which CUDA it is for."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@lru_cache(maxsize=8)
def _sources(backends: tuple[str, ...]) -> str:
    """Of every file that a backend of this library may be made of, and of the module of each that comes from outside."""
    ours = Path(registry.__file__).parent
    files = sorted(ours.rglob("*.py"))
    for path in backends:
        spec = find_spec(path.split(":")[0])
        if spec is not None and spec.origin is not None and ours not in Path(spec.origin).parents:
            files.append(Path(spec.origin))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:24]


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
