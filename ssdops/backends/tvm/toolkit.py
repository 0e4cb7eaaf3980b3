"""What compiles CUDA for TVM here: nvcc, which compiles programs side by side, or NVRTC, which makes one wait for the other.

Neither TVM nor CUDA is imported to say it.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from ...config import cuda_homes, tell_tvm
from ...errors import UnsupportedError
from ..base import Support


def usable() -> Support:
    """Whether there is a compiler and CUDA's headers; if not, what to install."""
    if home() is None:
        return Support.no("found no CUDA toolkit: set CUDA_PATH to one, or install the CUDA build of torch")
    if not nvrtc() and shutil.which("nvcc") is None:
        return Support.no("found neither NVRTC nor nvcc: pip install cuda-bindings")
    return Support.yes()


def prepare() -> None:
    """Tell TVM which compiler to use.

    Raises:
        UnsupportedError: there is none; what to install.
    """
    support, found = usable(), home()
    if found is None or not support.ok:
        raise UnsupportedError(f"'tvm' compiles for CUDA with NVRTC or nvcc, and {support.reason}; 'triton' needs neither")
    nvcc = shutil.which("nvcc")
    of_home = nvcc is not None and Path(nvcc).resolve().parents[1] == found.resolve()  # another's may not know the GPU
    tell_tvm(found, nvrtc() and not of_home)


def make_library(text: str, architecture: str, path: Path) -> None:
    """Compile CUDA's text of a program and of what calls it, into a library that needs TVM's FFI and a driver.

    Raises:
        UnsupportedError: there is no nvcc, or it knows no such architecture.
    """
    import tvm_ffi.libinfo

    nvcc = shutil.which("nvcc") or (shutil.which("nvcc", path=str(found / "bin")) if (found := home()) else None)
    if nvcc is None:
        raise UnsupportedError("programs for GPUs are exported by nvcc, and it is not here: install a CUDA toolkit")
    command = [nvcc, f"-arch={architecture}", "-std=c++17", "-O3", "--use_fast_math", "-w", "-shared", "-Xcompiler=-fPIC"]
    with tempfile.TemporaryDirectory() as room:
        source = Path(room) / "program.cu"
        source.write_text(text, encoding="utf-8")
        includes = f"-I{tvm_ffi.libinfo.find_include_path()}"
        done = subprocess.run([*command, includes, "-o", str(path), str(source)], capture_output=True, text=True)
    if done.returncode:
        raise UnsupportedError(f"nvcc made no program for {architecture}: {done.stderr.strip()[-500:]}")


def nvrtc() -> bool:
    """Whether NVRTC can be called from Python."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


@cache
def home() -> Path | None:
    """Where CUDA's headers are: as said, at the usual place, beside nvcc, or in NVIDIA's packages."""
    nvcc, nvidia = shutil.which("nvcc"), find_spec("nvidia")
    places = [*cuda_homes(), "/usr/local/cuda"]
    places += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    if torch.version.cuda and nvidia:
        major = torch.version.cuda.split(".")[0]
        places += [f"{place}/cu{major}" for place in nvidia.submodule_search_locations or []]
    return next((Path(place) for place in places if (Path(place) / "include" / "cuda_runtime.h").exists()), None)
