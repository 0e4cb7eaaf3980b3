"""The version, and the only reads of the environment.

SSDOPS_DEBUG   0 (default) quiet; 1 prints plans; 2 also the mask after each pass; 3 also generated source
SSDOPS_CHECK   1 also checks values that live on a GPU (`cu_seqlens`, segment ids), at the price of a host sync
SSDOPS_CACHE_DIR  where compiled programs and tuned results are kept; by default the platform's cache directory
SSDOPS_TUNE    off, cached (default), on or force: how backends are chosen where no argument and no context says it
SSDOPS_LOG_SHAPES  a file to which every kind of call is appended when it is first met, for `ssdops tune --from-log`
SSDOPS_TVM_PROGRAMS  a directory that `ssdops export` wrote: its programs run without TVM's compiler
SSDOPS_TVM_TARGET  what the TVM backend compiles for on a CPU, if not for this processor: `llvm -mcpu=NAME`, or TVM's JSON
TRITON_INTERPRET  1 (Triton's own) runs Triton kernels on the CPU, in its interpreter
CUDA_PATH, CUDA_HOME  where TVM finds CUDA's headers, if not at a usual place
TVM_CUDA_COMPILE_MODE  (TVM's own) nvrtc or nvcc; by default nvcc if it is the toolkit's, or nvrtc where cuda-bindings is
TVM_NUM_THREADS   (TVM's own) threads of the TVM backend; by default as many as torch has when that backend first runs
"""

import os
from functools import lru_cache
from pathlib import Path

VERSION = "0.1.0"


@lru_cache(maxsize=1)
def debug_level() -> int:
    """The level that SSDOPS_DEBUG asks for; text that is not a number counts as 0."""
    text = os.environ.get("SSDOPS_DEBUG", "0")
    return int(text) if text.isdigit() else 0


@lru_cache(maxsize=1)
def check_values() -> bool:
    """Whether values on a GPU are to be checked too (SSDOPS_CHECK=1)."""
    return os.environ.get("SSDOPS_CHECK", "0") == "1"


@lru_cache(maxsize=1)
def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter; Triton itself looks when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def cache_dir() -> Path:
    """Where to keep what is worth keeping (SSDOPS_CACHE_DIR)."""
    if chosen := os.environ.get("SSDOPS_CACHE_DIR"):
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("ssdops")


@lru_cache(maxsize=1)
def tvm_programs() -> Path | None:
    """Where programs of TVM are that were exported (SSDOPS_TVM_PROGRAMS)."""
    chosen = os.environ.get("SSDOPS_TVM_PROGRAMS")
    return Path(chosen) if chosen else None


@lru_cache(maxsize=1)
def tvm_target() -> str:
    """What to compile for on a CPU (SSDOPS_TVM_TARGET), as it stands there."""
    return os.environ.get("SSDOPS_TVM_TARGET", "").strip()


@lru_cache(maxsize=1)
def tuning_mode() -> str:
    """The mode that SSDOPS_TUNE asks for, as it stands there."""
    return os.environ.get("SSDOPS_TUNE") or "cached"


@lru_cache(maxsize=1)
def shape_log() -> Path | None:
    """Where to log what calls there are (SSDOPS_LOG_SHAPES); None for nowhere."""
    chosen = os.environ.get("SSDOPS_LOG_SHAPES")
    return Path(chosen) if chosen else None


@lru_cache(maxsize=1)
def tvm_threads(default: int) -> int:
    """How many threads TVM is to have: it looks when it makes them. Left alone it takes one, and binds the process to cores."""
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    return int(os.environ.setdefault("TVM_NUM_THREADS", str(default)))


def cuda_homes() -> list[str]:
    """Where the user says that CUDA is."""
    return [place for name in ("CUDA_PATH", "CUDA_HOME") if (place := os.environ.get(name))]


def tell_tvm(cuda: Path, nvrtc: bool) -> None:
    """Where CUDA is and what compiles it, unless the user has said so: TVM looks when it compiles."""
    os.environ.setdefault("CUDA_PATH", str(cuda))
    if not nvrtc:
        os.environ.setdefault("TVM_CUDA_COMPILE_MODE", "nvcc")
