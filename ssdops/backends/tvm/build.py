"""Compiled programs: kept on disk, so that no process compiles what another has, or needs TVM to run it.

A kept program is a shared library, loaded by TVM's FFI and its runtime alone, which takes milliseconds where TVM takes seconds.
It is named by all that it follows from: the sources that make it, versions, the processor or the user's target, and its `Tile`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

from ...config import cache_dir, tvm_target
from ...errors import UnsupportedError
from . import backend, exported, threads, toolkit
from .backend import PACKAGES
from .tile import Tile

SOURCES = (
    "compiler.py",
    "lower.py",
    "walk.py",
    "group.py",
    "settle.py",
    "between.py",
    "exchange.py",
    "gradients.py",
    "outputs.py",
    "pairs.py",
    "pairs_gpu.py",
    "products.py",
    "formula.py",
    "blocks.py",
    "parts.py",
    "rules.py",
    "rules_cpu.py",
    "rules_cuda.py",
    "tensor_cores.py",
    "targets.py",
    "tile.py",
    "threads.c",
)


OPTIONS = ["-O2"]
"""Of the compiler that makes a library of a program and `threads.c`."""
_collected: ContextVar[dict[tuple[str, Tile], None] | None] = ContextVar("_collected", default=None)
"""Programs that passes have wanted, where they are to be exported and not run."""
_told: set[Path] = set()
"""Directories of which a warning has said that nothing can be kept there."""


MADE: dict[tuple[str, Tile], Callable[..., None]] = {}
"""The programs of this process, to be called with tensors that are contiguous, and numbers."""


_libraries: dict[Callable[..., None], ctypes.CDLL] = {}
"""Where programs are that C can call, with `threads.c`."""


@contextmanager
def collecting() -> Iterator[dict[tuple[str, Tile], None]]:
    """A context in which passes only say which programs they want."""
    found: dict[tuple[str, Tile], None] = {}
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def collected() -> dict[tuple[str, Tile], None] | None:
    """What has been wanted in such a context; None outside one."""
    return _collected.get()


def known(name: str, tile: Tile) -> Callable[..., None] | None:
    """One of `lower.py`, `walk.py`, … that was made before, by this process or another; None if it must be compiled."""
    if (name, tile) in MADE:
        return MADE[name, tile]
    path = exported.place(name, tile) or place(name, tile)
    if not path.exists() or not ours(path.parent):
        return None
    try:
        MADE[name, tile] = _load(path)
    except (OSError, RuntimeError, AttributeError) as error:
        warnings.warn(f"{path} cannot be loaded, and is made anew: {error}", stacklevel=2)
        return None
    return MADE[name, tile]


def make(wanted: Iterable[tuple[str, Tile]]) -> None:
    """Compile programs side by side, but for their lowering, which is Python's.

    Raises:
        UnsupportedError: TVM is not installed, and what was exported has not all of them.
    """
    try:
        compiler = _compiler()
    except ImportError as error:
        missing = ", ".join(f"{name} ({tile})" for name, tile in wanted)
        raise UnsupportedError(
            f"what was exported to {exported.directory()} has not {missing}, and apache-tvm is not installed to compile it: "
            "export for these sizes, this dtype and this device too, or pip install 'ssdops[tvm]'"
        ) from error

    def finish(lowered: Any, name: str, tile: Tile) -> Callable[..., None]:
        return _keep(compiler.compiled(name, lowered, tile), place(name, tile))

    first = {name: at for at, name in enumerate(compiler.LONGEST)}
    longest_first = sorted(dict.fromkeys(wanted), key=lambda program: first.get(program[0], len(first)))
    with ThreadPoolExecutor() as pool:
        made = {key: pool.submit(finish, compiler.lowered(*key), *key) for key in longest_first}
    MADE.update({key: future.result() for key, future in made.items()})


def _compiler() -> Any:
    """The module, with TVM, which takes a second and a half to import; half of it is another thread's.

    TVM raises errors in its import, and catches them. The first of a process reads the symbols of all its libraries, torch's
    too, for a trace that nobody sees: by then they are read, or nearly.
    """
    if platform.system() == "Linux" and "tvm" not in sys.modules and find_spec("tvm") is not None:
        from tvm_ffi import libinfo

        with suppress(OSError, RuntimeError, AttributeError):  # then TVM says what is wrong, or takes its time
            _runtime("tvm_runtime")
            _runtime("tvm_compiler", ctypes.RTLD_LOCAL)  # as TVM has them; none can be loaded while symbols are read
            trace = ctypes.CDLL(libinfo.find_libtvm_ffi()).TVMFFIBacktrace  # called so, it leaves Python to others
            Thread(target=trace, args=(None, 0, None, 0), daemon=True).start()
    from . import compiler

    return compiler


def export(name: str, tile: Tile, directory: Path, cpu: str | None) -> Path:
    """Compile a program into a directory, for this processor, one that LLVM has a name for, or the tile's GPU.

    Raises:
        UnsupportedError: it would need TVM's runtime, or there is no nvcc.
    """
    compiler = _compiler()
    lowered, path = compiler.lowered(name, tile), directory / exported.file(name, tile)
    if tile.target != "cpu":
        toolkit.make_library(compiler.cuda_text(lowered, tile), tile.target, path)
        return path
    if not threads.of_torch():
        raise UnsupportedError("programs are exported for the OpenMP runtime of torch on Linux, and it is not here")
    compiler.compiled(name, lowered, tile, cpu).export_library(str(path), addons=[str(threads.SOURCE)], options=OPTIONS)
    return path


def place(name: str, tile: Tile) -> Path:
    """Where a program is kept."""
    kind = "cpu" if tile.target == "cpu" else "cuda"
    return cache_dir() / "tvm" / f"{name}-{kind}-{_key(tile)}.so"


def _keep(made: Any, path: Path) -> Callable[..., None]:
    """Keep a program and load it; where it cannot be kept, this process has it all the same."""
    addons = [str(threads.SOURCE)] if threads.of_torch() else []
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not ours(path.parent):
            raise PermissionError("it is another user's, or others can write there (chmod go-w)")
        with tempfile.TemporaryDirectory(dir=path.parent) as room:
            made.export_library(
                os.path.join(room, path.name), addons=addons, options=OPTIONS if addons else None
            )  # which needs a linker
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


def ours(directory: Path) -> bool:
    """Whether nobody else can have put a program there: what is loaded runs with all that the user may do."""
    if platform.system() == "Windows":  # whose owners and modes say nothing of it
        return True
    found = directory.stat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)  # root may do it all


def _load(path: Path) -> Callable[..., None]:
    """A program that was kept."""
    import tvm_ffi  # before the runtime, which wants its library

    _, kind, _ = path.name.split("-")  # what was exported for a GPU has its architecture there, and needs no runtime
    if kind == "cuda" or (kind == "cpu" and not threads.of_torch()):
        for library in ("tvm_runtime", *(("tvm_runtime_cuda",) if kind == "cuda" else ())):
            _runtime(library)
    run: Callable[..., None] = tvm_ffi.load_module(str(path))["main"]
    if threads.of_torch():
        library = ctypes.CDLL(str(path))  # the one that is loaded
        threads.hand_over(library)
        if hasattr(library, "ssdops_replay"):  # what was exported for a GPU has none
            _libraries[run] = library
    return run


def entry(run: Callable[..., None]) -> int | None:
    """Where the code of a program that is linked with `threads.c` begins, for C to call; None for others."""
    library = _libraries.get(run)
    return None if library is None else ctypes.cast(library.__tvm_ffi_main, ctypes.c_void_p).value


def replayer(run: Callable[..., None]) -> Any:
    """`ssdops_replay` of `threads.c`, which each such program has; addresses as bytes."""
    replay = _libraries[run].ssdops_replay
    replay.argtypes = ctypes.c_void_p, ctypes.c_char_p
    return replay


def setter_of_streams() -> int | None:
    """Where TVM's FFI has the function that says on which stream programs run."""
    from tvm_ffi import libinfo

    return ctypes.cast(ctypes.CDLL(libinfo.find_libtvm_ffi()).TVMFFIEnvSetStream, ctypes.c_void_p).value


def widener(run: Callable[..., None]) -> int | None:
    """Where `ssdops_widen` of `threads.c` begins, likewise."""
    return ctypes.cast(_libraries[run].ssdops_widen, ctypes.c_void_p).value


@cache
def _runtime(library: str, mode: int = ctypes.RTLD_GLOBAL) -> ctypes.CDLL:
    """TVM's runtime, which has the threads, or its part for CUDA, or its compiler, without TVM."""
    spec = find_spec("tvm")
    assert spec is not None and spec.origin is not None  # supports() says so
    name = {"Darwin": f"lib{library}.dylib", "Windows": f"{library}.dll"}.get(platform.system(), f"lib{library}.so")
    return ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), mode)


def _key(tile: Tile) -> str:
    """Of everything that a program follows from."""
    processor = f"{_processor()} {tvm_target()}" if tile.target == "cpu" else ""  # what calls a GPU is made for any
    return hashlib.sha256(f"{_common()} {threads.of_torch()} {processor} {tile}".encode()).hexdigest()[:24]


@cache
def _common() -> str:
    """What all programs of this machine and installation share."""
    versions = [version(package) for package in PACKAGES if backend.is_installed(package)]
    return f"{sources()} {versions} {platform.system()} {platform.machine()}"


@cache
def sources() -> str:
    """A hash of all that programs are made from."""
    return hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in SOURCES)).hexdigest()


@cache
def _processor() -> str:
    """What a processor can do, as far as this platform says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    told = {line.split(":")[0].strip(): line for line in lines if ":" in line}
    return " ".join(told.get(field, "") for field in ("model name", "flags", "Features", "CPU part"))
