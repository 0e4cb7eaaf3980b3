"""Whether to tune: the mode and its time budget, and the moments at which nothing is tuned whatever the mode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache

import torch

from .. import config
from ..errors import TuningError

MODES = ("off", "cached", "on", "force")
"""The cost model alone; also what was measured; also measuring what was not; measuring everything once more."""
BUDGETS = {"cpu": 60.0}
"""Seconds that tuning one key may take, by device type; on any other 20."""

_mode: ContextVar[str | None] = ContextVar("ssdops_tuning_mode", default=None)
_budget: ContextVar[float | None] = ContextVar("ssdops_tuning_budget", default=None)


@contextmanager
def mode(name: str, budget: float | None = None) -> Iterator[None]:
    """How calls in this context (of this thread, or task) choose a backend and its configuration.

    Args:
        name: "off", the cost model's choice; "cached", the fastest that was measured, or else the model's; "on", measured at
            the first call of its kind if it never was; "force", measured once more in this process.
        budget: seconds that measuring one kind of call may take; None is 60 on a CPU and 20 elsewhere.

    Raises:
        TuningError: there is no such mode, or the budget is not a positive number.

    >>> with mode("off"):
    ...     current()
    'off'
    """
    name, budget = checked(name), check_budget(budget)
    tokens = _mode.set(name), _budget.set(budget)
    try:
        yield
    finally:
        _mode.reset(tokens[0])
        _budget.reset(tokens[1])


def resume(name: str) -> AbstractContextManager[None]:
    """The mode that held in another thread, such as the one whose forward pass a backward pass belongs to."""
    return nullcontext() if name == current() else mode(name)


def current() -> str:
    """The mode of the innermost context, or else of SSDOPS_TUNE."""
    return _mode.get() or _of_environment()


@lru_cache(maxsize=1)
def _of_environment() -> str:
    return checked(config.tuning_mode(), "SSDOPS_TUNE")


def checked(name: str, what: str = "the tuning mode") -> str:
    """The name, if it is that of a mode.

    Raises:
        TuningError: it is not.
    """
    if name not in MODES:
        raise TuningError(f"{what} must be one of {', '.join(map(repr, MODES))}, got {name!r}")
    return name


def check_budget(seconds: float | None) -> float | None:
    """The budget, if it is one.

    Raises:
        TuningError: it is not.
    """
    if seconds is None or (type(seconds) in (int, float) and seconds > 0 and math.isfinite(seconds)):
        return seconds
    raise TuningError(f"the tuning budget must be a positive number of seconds, or None, got {seconds!r}")


def budget(device: str) -> float:
    """Seconds that tuning one key may take."""
    chosen = _budget.get()
    return BUDGETS.get(device, 20.0) if chosen is None else chosen


def obstacle() -> str:
    """Why nothing may be tuned at this moment; empty if it may."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return ""
