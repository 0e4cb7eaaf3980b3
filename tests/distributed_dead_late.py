"""The same as `distributed_dead.py`, of a rank that dies between its forward pass and its backward pass."""

from __future__ import annotations

from collections.abc import Callable

from distributed_dead import dies

CHECKS: dict[str, Callable[[int, int], None]] = {"dies": lambda rank, world: dies(rank, world, late=True)}
