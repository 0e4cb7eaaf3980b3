"""From a tensor program to one for a machine."""

from __future__ import annotations

from typing import Any

import torch

from .tile import Tile


def schedule(program: Any, tile: Tile) -> Any:
    """By the rules of the machine's kind."""
    from . import rules_cpu, rules_cuda

    if tile.target == "cpu":
        return rules_cpu.schedule(program, getattr(torch, tile.acc).itemsize)
    return rules_cuda.schedule(program, tile)
