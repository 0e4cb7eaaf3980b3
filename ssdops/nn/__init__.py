"""Blocks made of `ssdops.ssd`: the Mamba-2 block with its cache, Hydra, and what it is made of beside the scan."""

from .cache import Mamba2Cache
from .conv import causal_conv1d
from .hydra import Hydra
from .mamba2 import Mamba2
from .norm import GatedRMSNorm, gated_rms_norm

__all__ = ["GatedRMSNorm", "Hydra", "Mamba2", "Mamba2Cache", "causal_conv1d", "gated_rms_norm"]
