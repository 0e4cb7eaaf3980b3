"""Tuning under torch.distributed: of the ranks that meet a key, the first measures it, and the others take its result.

They meet at the job's own key-value store, and not in a collective: ranks need not come by a key at the same time, or at all.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from ..errors import TuningError
from . import store
from .record import Record, from_json, to_json

EXTRA_SECONDS = 120.0
"""How much longer than the budget to wait for another rank: its processes must start."""


def once_for_all(name: str, measure: Callable[[], Record | None], budget: float) -> Record | None:
    """The result of `measure`, called by one rank of the job; None where there is none, or it does not come in time."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return measure()
    shared = dist.distributed_c10d._get_default_store()
    name = f"ssdops/tuned/{name}"
    if shared.add(f"{name}/ranks", 1) == 1:
        record = None
        try:
            record = measure()
        finally:  # the others are not to wait for what will not come
            shared.set(name, "" if record is None else json.dumps(to_json(record)))
        return record
    try:
        shared.wait([name], timedelta(seconds=budget + EXTRA_SECONDS))
        text = shared.get(name).decode()
        return store.keep(from_json(json.loads(text))) if text else None
    except (RuntimeError, TuningError) as error:  # a rank that is gone, or of another version
        warnings.warn(f"the result of the rank that tunes is not used: {str(error).splitlines()[0]}", stacklevel=2)
        return None
