"""The same as `distributed_dead.py`, of a rank that dies once calls like its last one are only counted."""

from __future__ import annotations

from collections.abc import Callable

from distributed_dead import dies

CHECKS: dict[str, Callable[[int, int], None]] = {"dies": lambda rank, world: dies(rank, world, late=False, calls=3)}
