"""What blocks are made of beside the scan: the causal convolution and the gated norm."""

from .conv import causal_conv1d
from .norm import GatedRMSNorm, gated_rms_norm

__all__ = ["GatedRMSNorm", "causal_conv1d", "gated_rms_norm"]
