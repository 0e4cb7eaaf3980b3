"""The threads that programs run on: torch's own, where its OpenMP runtime can be called, or else TVM's."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path
from threading import Lock

import torch

from ...config import tvm_threads

SOURCE = Path(__file__).with_name("threads.c")
"""What is linked into a program, so that it runs on torch's threads."""
FUNCTIONS = {
    "__TVMBackendParallelLaunch": "ssdops_parallel_launch",
    "__TVMBackendAllocWorkspace": "ssdops_alloc_workspace",
    "__TVMBackendFreeWorkspace": "ssdops_free_workspace",
}
"""Where a program looks for functions of a runtime, and those of `SOURCE`."""
_left = False
"""Whether a program of this process could not be linked, and runs on TVM's threads."""


@cache
def of_torch() -> bool:
    """Whether torch's OpenMP runtime is there for others to call."""
    return platform.system() == "Linux" and hasattr(ctypes.CDLL(None), "GOMP_parallel")


def hand_over(library: ctypes.CDLL) -> None:
    """Let a loaded program have torch's threads."""
    for pointer, function in FUNCTIONS.items():
        try:
            place = ctypes.c_void_p.in_dll(library, pointer)
        except ValueError:  # a program asks for what it needs
            continue
        place.value = ctypes.cast(getattr(library, function), ctypes.c_void_p).value


def leave_to_tvm() -> None:
    """A program of this process runs on TVM's threads."""
    global _left
    _left = True


def count() -> int:
    """How many there are."""
    return torch.get_num_threads() if of_torch() else of_tvm()


@cache
def of_tvm() -> int:
    """How many threads TVM has, once they are made."""
    return tvm_threads(torch.get_num_threads())


class Alone:
    """A context in which torch makes its tensors with one thread, if programs run on TVM's.

    Torch's other threads go on looking for work for milliseconds after each operation, on the cores that TVM's threads want:
    that took a forward pass from 44 ms to 98. Calls of several Python threads may overlap: the last one gives them back.
    """

    _lock, _inside, _threads = Lock(), 0, 1

    def __init__(self, device: torch.device) -> None:
        self.needed = device.type == "cpu" and (_left or not of_torch())

    def __enter__(self) -> None:
        if not self.needed:
            return
        with Alone._lock:
            if not Alone._inside:
                Alone._threads = torch.get_num_threads()
                torch.set_num_threads(1)
            Alone._inside += 1

    def __exit__(self, *exception: object) -> None:
        if not self.needed:
            return
        with Alone._lock:
            Alone._inside -= 1
            if not Alone._inside:
                torch.set_num_threads(Alone._threads)
