"""What a block is built of, and given: sizes that divide, ranges that are some, tokens that fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DeviceError, DtypeError, ShapeError, ValueRangeError


def check_sizes(block: Any) -> None:
    """Whether a block's sizes are positive and divide as they should."""
    for name in ("d_model", "d_state", "d_conv", "d_inner", "headdim", "ngroups"):
        if getattr(block, name) < 1:
            raise ShapeError(f"{name} must be at least 1, got {getattr(block, name)}")
    if block.d_inner % block.headdim:
        raise ShapeError(f"headdim must divide d_inner = expand · d_model = {block.d_inner}, got {block.headdim}")
    if block.nheads % block.ngroups:
        raise ShapeError(f"ngroups must divide nheads = d_inner / headdim = {block.nheads}, got {block.ngroups}")


def check_ranges(A_init: tuple[float, float], dt_init: tuple[float, float], dt_limit: tuple[float, float]) -> None:
    """Whether the ranges of initial values lie above 0, and the limit is a range."""
    for name, (low, high) in (("A_init_range", A_init), ("(dt_min, dt_max)", dt_init)):
        if not 0 < low <= high:
            raise ValueRangeError(f"{name} must be two numbers above 0, the lower first, got {(low, high)}")
    if not dt_limit[0] <= dt_limit[1]:
        raise ValueRangeError(f"dt_limit must be two numbers, the lower first, got {dt_limit}")


def check_input(u: Tensor, axes: tuple[str | int, ...], weight: Tensor) -> None:
    """Whether u has these axes, the last of that size, and goes with the block's weights."""
    if not isinstance(u, Tensor):
        raise DtypeError(f"u must be a torch.Tensor, got {type(u).__name__}")
    if u.ndim != len(axes) or u.shape[-1] != axes[-1]:
        names = ", ".join([*map(str, axes[:-1]), f"d_model={axes[-1]}"])
        raise ShapeError(f"u must be ({names}), got {tuple(u.shape)}")
    if u.device != weight.device:
        raise DeviceError(f"u is on {u.device}, but the block is on {weight.device}; move one of them")
    if u.dtype != weight.dtype and not torch.is_autocast_enabled(u.device.type):
        raise DtypeError(f"u is {u.dtype}, but the block's weights are {weight.dtype}; convert one of them, or use autocast")
