"""The cost model: predicted seconds from a candidate's work and a device's rates.

The rates are those that `ssdops tune --calibrate` has measured on the device and kept, or else defaults for a device type.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .. import config
from ..backends.base import Work
from ..errors import TuningError
from ..ir.problem import Target
from . import store
from .exchange import file_name
from .place import place_of
from .record import SCHEMA


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second, and what a launch costs on it.

    Attributes:
        matmul: float32 matmul FLOP/s, at the tile sizes backends use.
        elementwise: elementwise operations per second.
        bandwidth: bytes per second.
        launch: seconds of host time per torch operation.
        step: seconds of one chunk in a chain of them, at dstate 128.
    """

    matmul: float
    elementwise: float
    bandwidth: float
    launch: float
    step: float = 0.0


DEFAULT_RATES = {
    "cpu": Rates(matmul=6e10, elementwise=2.4e9, bandwidth=1e10, launch=4.5e-6),
    "cuda": Rates(matmul=3e13, elementwise=1e12, bandwidth=2e12, launch=8e-6, step=1.2e-6),
}
"""Of one core of a CPU, of which matmuls and elementwise operations take as many as torch has threads; and of a GPU."""


_told: set[Path] = set()
"""Files of which a warning has said that they hold no rates."""


def rates_of(target: Target) -> Rates:
    """The rates of a target: measured, if they were."""
    threads = torch.get_num_threads() if target.device == "cpu" else 1
    return _rates(target, threads, store.version())


@lru_cache(maxsize=64)
def _rates(target: Target, threads: int, _version: int) -> Rates:
    path = rates_path(target)
    try:
        return _from_json(store.load_json(path), place_of(target).device)
    except FileNotFoundError:
        pass
    except (OSError, TuningError) as error:
        if path not in _told:
            _told.add(path)
            text = f"{path} is not used, as it holds no rates: {error}; 'ssdops tune --calibrate' writes it anew"
            warnings.warn(text, stacklevel=4)
    found = DEFAULT_RATES.get(target.device, DEFAULT_RATES["cuda"])
    return replace(found, matmul=found.matmul * threads, elementwise=found.elementwise * threads)


def rates_path(target: Target) -> Path:
    """Where the rates of a target are kept."""
    return config.cache_dir() / "rates" / f"{file_name(place_of(target).device)}.json"


def keep_rates(target: Target, rates: Rates) -> Path:
    """Keep measured rates; where.

    Raises:
        TuningError: they cannot be written.
    """
    path = rates_path(target)
    try:
        store.write_json(path, {"schema": SCHEMA, "device": place_of(target).device, "rates": asdict(rates)})
    except OSError as error:
        raise TuningError(f"cannot write {path}: {error.strerror or error}") from None
    store.forget()
    return path


def _from_json(data: Any, device: str) -> Rates:
    names = [f.name for f in fields(Rates)]
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("device") != device:
        raise TuningError(f"it is of another schema or device than {SCHEMA} and {device!r}")
    rates = data.get("rates")
    if not isinstance(rates, dict) or sorted(rates) != sorted(names):
        raise TuningError(f"it should have {', '.join(names)}")
    if not all(type(x) is float and math.isfinite(x) and (x > 0 or name == "step") for name, x in rates.items()):
        raise TuningError(f"a rate is no positive number: {json.dumps(rates)[:200]}")
    return Rates(**rates)


def predict(work: Work, target: Target) -> float:
    """Predicted seconds: the host's launches, then the largest of arithmetic, traffic and the longest chain of chunks."""
    rates = rates_of(target)
    arithmetic = work.matmul_flops / rates.matmul + work.elementwise / rates.elementwise
    return work.launches * rates.launch + max(arithmetic, work.bytes / rates.bandwidth, work.steps * rates.step)
