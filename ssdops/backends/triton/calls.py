"""Launching kernels: compiled once for what they are called with, and looked up from then on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from ...errors import UnsupportedError
from ...ir.problem import Problem

try:
    from triton.knobs import runtime as hooks
except ImportError:  # before Triton 3.4
    from triton.compiler import CompiledKernel as hooks

Grid: TypeAlias = tuple[int, int, int]
_MAX_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Launch:
    """All of a launch but the addresses of its tensors.

    Attributes:
        compiled: the kernel, as Triton compiled it.
        rest: the arguments after the addresses: numbers, then constants in the order of the kernel's parameters.
    """

    compiled: Any
    grid: Grid
    rest: tuple[Any, ...]

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """Launch: Triton's `compiled[grid](…)`, less what that does per tensor, and for hooks that nobody has set.

        An address must be as aligned, and of the dtype, that the kernel was compiled for.
        """
        compiled = self.compiled
        if _hooked():
            compiled[self.grid](*addresses, *self.rest, stream=stream)
            return
        run = compiled.run  # which loads the kernel: `function` is there after it
        run(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *self.rest)


class Kernel:
    """A Triton kernel whose run-time parameters come first: tensors, then numbers; its constants after them, by name.

    Triton's own call looks at each argument and builds a key of text, which takes a kernel of sixty arguments longer than the
    GPU takes to run it. What it looks at is in the key here: dtypes, whether pointers are aligned, integers, constants.
    """

    def __init__(self, fn: Any) -> None:
        self._fn = fn
        self._kept: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, grid: Grid, tensors: Sequence[Tensor], numbers: Sequence[int | float], **constants: Any
    ) -> Launch | None:
        """Launch on the current stream of the current device, where the tensors are (`Launching`).

        Returns:
            What was launched, to be launched again; None where Triton interprets, and compiles nothing.
        """
        device, addresses = tensors[0].device, [x.data_ptr() for x in tensors]
        key = (
            device, *[x.dtype for x in tensors], *[address % 16 == 0 for address in addresses],
            *[x for x in numbers if type(x) is int], *constants.values(),
        )  # fmt: skip
        compiled = self._kept.get(key)
        known = compiled is not None
        if not known:
            compiled = self._fn[grid](*tensors, *numbers, **constants)
            if compiled is None:
                return None
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[key] = compiled
        names = self._fn.arg_names[len(tensors) + len(numbers) :]
        launch = Launch(compiled, grid, (*numbers, *[constants[name] for name in names]))
        if known:
            launch(addresses, stream_of(device))
        return launch


def _hooked() -> bool:
    """Whether someone, a profiler say, wants to know of launches."""
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as Triton takes it."""
    stream: int = driver.active.get_current_stream(device.index)
    return stream


class Launching:
    """A context for launches: on a problem's device, and saying for which sizes memory or a multiprocessor was too small."""

    __slots__ = ("_elsewhere", "_problem")

    def __init__(self, problem: Problem, device: torch.device) -> None:
        here = device.index is None or device.index == torch.cuda.current_device()
        self._problem, self._elsewhere = problem, None if here else torch.cuda.device(device)

    def __enter__(self) -> None:
        if self._elsewhere is not None:  # Triton compiles for the current device, and loads kernels there
            self._elsewhere.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._elsewhere is not None:
            self._elsewhere.__exit__(kind, error, trace)
        if not isinstance(error, OutOfResources | torch.OutOfMemoryError):
            return
        p = self._problem
        sizes = (
            f"batch {p.batch}, seqlen {p.seqlen}, nheads {p.nheads}, headdim {p.headdim}, dstate {p.dstate}, "
            f"{str(p.dtype).removeprefix('torch.')} on {p.target.name or p.target.device}"
        )
        if isinstance(error, OutOfResources):
            raise UnsupportedError(f"a kernel of 'triton' does not fit ({error}) at {sizes}; try backend='chunked'") from error
        raise torch.OutOfMemoryError(f"'triton' ran out of memory at {sizes}; split the batch: {error}") from error
