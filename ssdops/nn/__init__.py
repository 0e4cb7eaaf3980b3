"""Blocks made of `ssdops.ssd`: the Mamba-2 block with its cache, Hydra, what they are made of, and the scan as a layer."""

from typing import TYPE_CHECKING, Any

from .cache import Mamba2Cache
from .conv import causal_conv1d
from .hydra import Hydra
from .mamba2 import Mamba2
from .norm import GatedRMSNorm, gated_rms_norm
from .rates import discretize
from .ssd import SSD

if TYPE_CHECKING:
    from .heads import HeadsParallel

__all__ = [
    "SSD", "GatedRMSNorm", "HeadsParallel", "Hydra", "Mamba2", "Mamba2Cache", "causal_conv1d", "discretize", "gated_rms_norm",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name != "HeadsParallel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .heads import HeadsParallel  # it imports torch's tensor parallelism, which takes time

    return HeadsParallel
