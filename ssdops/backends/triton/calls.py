"""Launching kernels: compiled once for what they are called with, and looked up from then on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ...errors import UnsupportedError
from ...ir.problem import Problem

_MAX_KEPT = 4096


class Kernel:
    """A Triton kernel whose run-time parameters come first: tensors, then numbers; its constants after them, by name.

    Triton's own call looks at each argument and builds a key of text, which takes a kernel of sixty arguments longer than the
    GPU takes to run it. What it looks at is in the key here: dtypes, whether pointers are aligned, integers, constants.
    """

    def __init__(self, fn: Any) -> None:
        self._fn = fn
        self._kept: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: Sequence[Tensor], numbers: Sequence[int | float], **constants: Any
    ) -> None:
        """Launch on the current stream of the device that the tensors are on."""
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(grid, tensors, numbers, constants)
        else:
            self._launch(grid, tensors, numbers, constants)

    def _launch(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor],
        numbers: Sequence[int | float],
        constants: dict[str, Any],
    ) -> None:
        key = (
            tensors[0].device, *[x.dtype for x in tensors], *[x.data_ptr() % 16 == 0 for x in tensors],
            *[x for x in numbers if type(x) is int], *constants.values(),
        )  # fmt: skip
        compiled = self._kept.get(key)
        if compiled is not None:
            names = self._fn.arg_names[len(tensors) + len(numbers) :]
            compiled[grid](*tensors, *numbers, *[constants[name] for name in names])
            return
        compiled = self._fn[grid](*tensors, *numbers, **constants)
        if len(self._kept) >= _MAX_KEPT:
            self._kept.clear()
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._kept[key] = compiled


@contextmanager
def explained(problem: Problem) -> Iterator[None]:
    """Say for which sizes memory or a multiprocessor was too small, and what to try."""
    p = problem
    sizes = (
        f"batch {p.batch}, seqlen {p.seqlen}, nheads {p.nheads}, headdim {p.headdim}, dstate {p.dstate}, "
        f"{str(p.dtype).removeprefix('torch.')} on {p.target.name or p.target.device}"
    )
    try:
        yield
    except OutOfResources as error:
        raise UnsupportedError(f"a kernel of 'triton' does not fit ({error}) at {sizes}; try backend='chunked'") from error
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"'triton' ran out of memory at {sizes}; split the batch: {error}") from error
