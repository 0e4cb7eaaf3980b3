"""What compiles CUDA for TVM here: NVRTC, or nvcc. Neither TVM nor CUDA is imported to say it."""

from __future__ import annotations

import shutil
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
    tell_tvm(found, nvrtc())


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
