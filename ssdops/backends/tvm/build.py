"""Compiled programs: kept on disk, so that no process compiles what another has, or needs TVM to run it.

A kept program is a shared library, loaded by TVM's FFI and its runtime alone, which takes milliseconds where TVM takes seconds.
It is named by all that it follows from: the sources that make it, versions, the processor, and its `Tile`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...config import cache_dir
from . import threads, toolkit
from .backend import PACKAGES
from .tile import Tile

LIMITS = {"max_shared_memory_per_block": 227 * 1024, "max_threads_per_block": 1024, "thread_warp_size": 32}
"""Of CUDA's architectures, as TVM wants to be told; `machine.py` keeps to those of each."""
SOURCES = (
    "lower.py",
    "walk.py",
    "exchange.py",
    "gradients.py",
    "outputs.py",
    "blocks.py",
    "parts.py",
    "rules.py",
    "rules_cpu.py",
    "rules_cuda.py",
    "tensor_cores.py",
    "tile.py",
    "threads.c",
)


_told: set[Path] = set()
"""Directories of which a warning has said that nothing can be kept there."""


@cache
def program(name: str, tile: Tile) -> Callable[..., None]:
    """One of `lower.py` or `exchange.py`, to be called with tensors that are contiguous, and numbers."""
    kind = "cpu" if tile.target == "cpu" else "cuda"
    path = cache_dir() / "tvm" / f"{name}-{kind}-{_key(tile)}.so"
    if path.exists():
        try:
            return _load(path)
        except (OSError, RuntimeError, AttributeError) as error:
            warnings.warn(f"{path} cannot be loaded, and is made anew: {error}", stacklevel=2)
    return _compile(name, tile, path)


def _compile(name: str, tile: Tile, path: Path) -> Callable[..., None]:
    """Make a program and keep it; where it cannot be kept, this process has it all the same."""
    made = compiled(name, tile)
    addons = [str(threads.SOURCE)] if tile.target == "cpu" and threads.of_torch() else []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as room:
            made.export_library(os.path.join(room, path.name), addons=addons)  # which needs a linker
            os.replace(os.path.join(room, path.name), path)  # at once, so that nobody loads half of it
        return _load(path)
    except (OSError, RuntimeError) as error:
        if path.parent not in _told:
            _told.add(path.parent)
            warnings.warn(
                f"programs of 'tvm' are not kept in {path.parent}, but compiled in every process: {error}", stacklevel=3
            )
    threads.leave_to_tvm()
    run: Callable[..., None] = made["main"]  # looking it up costs more than a call of it
    return run


def compiled(name: str, tile: Tile) -> Any:
    """What TVM makes of a program."""
    import tvm
    from tvm.target import Target, codegen

    from . import exchange, gradients, lower, outputs, rules, walk

    make = {
        "lines": lower.lines,
        "scores": lower.scores,
        "walk": walk.walk,
        "exchange": exchange.exchange,
        "outputs": outputs.outputs,
        "gradients": gradients.gradients,
    }[name]
    scheduled = rules.schedule(make(tile), tile)
    if tile.target == "cpu":
        return tvm.compile(scheduled, target=Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}))
    toolkit.prepare()
    target = Target({"kind": "cuda", "arch": tile.target, **LIMITS}, host="llvm")
    # the program has its own barriers, and its tiles may lie over one another where those allow it
    with target, tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}, disabled_pass=["s_tir.ThreadSync"]):
        return tvm.compile(scheduled, target=target)


def _load(path: Path) -> Callable[..., None]:
    """A program that was kept."""
    import tvm_ffi  # before the runtime, which wants its library

    cuda = "-cuda-" in path.name
    if cuda or not threads.of_torch():
        for library in ("tvm_runtime", *(("tvm_runtime_cuda",) if cuda else ())):
            _runtime(library)
    run: Callable[..., None] = tvm_ffi.load_module(str(path))["main"]
    if not cuda and threads.of_torch():
        threads.hand_over(path)
    return run


@cache
def _runtime(library: str) -> ctypes.CDLL:
    """TVM's runtime, which has the threads, or its part for CUDA, without TVM."""
    spec = find_spec("tvm")
    assert spec is not None and spec.origin is not None  # supports() says so
    name = {"Darwin": f"lib{library}.dylib", "Windows": f"{library}.dll"}.get(platform.system(), f"lib{library}.so")
    return ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), ctypes.RTLD_GLOBAL)


def _key(tile: Tile) -> str:
    """Of everything that a program follows from."""
    processor = f"{_processor()} {threads.of_torch()}" if tile.target == "cpu" else ""  # what calls a GPU is made for any
    return hashlib.sha256(f"{_common()} {processor} {tile}".encode()).hexdigest()[:24]


@cache
def _common() -> str:
    """What all programs of this machine and installation share."""
    sources = b"".join(Path(__file__).with_name(name).read_bytes() for name in SOURCES)
    versions = [version(package) for package in PACKAGES]
    return f"{hashlib.sha256(sources).hexdigest()} {versions} {platform.system()} {platform.machine()}"


@cache
def _processor() -> str:
    """What a processor can do, as far as this platform says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    told = {line.split(":")[0].strip(): line for line in lines if ":" in line}
    return " ".join(told.get(field, "") for field in ("model name", "flags", "Features", "CPU part"))
