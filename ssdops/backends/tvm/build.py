"""Compiled programs: each made once in a process, for the CPU it is on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import torch
import tvm
from tvm.target import codegen

from ...config import tvm_threads
from . import lower, rules
from .lower import Tile

THREADS = tvm_threads(torch.get_num_threads())


class Alone:
    """A context in which torch makes its tensors with one thread.

    Its other threads go on looking for work for milliseconds after each operation, on the cores that TVM's threads want: that
    took a forward pass from 44 ms to 98. Calls of several Python threads may overlap: the last one gives the threads back.
    """

    _lock, _inside, _threads = Lock(), 0, 1

    def __enter__(self) -> None:
        with Alone._lock:
            if not Alone._inside:
                Alone._threads = torch.get_num_threads()
                torch.set_num_threads(1)
            Alone._inside += 1

    def __exit__(self, *exception: object) -> None:
        with Alone._lock:
            Alone._inside -= 1
            if not Alone._inside:
                torch.set_num_threads(Alone._threads)


@cache
def program(make: Callable[[Tile], Any], tile: Tile) -> Callable[..., None]:
    """A program of `lower.py`, to be called with tensors that are contiguous, and numbers."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
    scheduled = rules.schedule(make(tile), getattr(torch, tile.dtype).itemsize)
    run: Callable[..., None] = tvm.compile(scheduled, target=target)["main"]  # looking it up costs more than a call of it
    return run


def scores(tile: Tile) -> Callable[..., None]:
    """`lower.scores`, compiled."""
    return program(lower.scores, tile)


def walk(tile: Tile) -> Callable[..., None]:
    """`lower.walk`, compiled."""
    return program(lower.walk, tile)


def exchange(tile: Tile) -> Callable[..., None]:
    """`lower.exchange`, compiled."""
    return program(lower.exchange, tile)
