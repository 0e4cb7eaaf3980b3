"""mamba_ssm's functions for Mamba-2: its arguments, layouts and results, computed by `ssd` and `ssd_step`.

In its words x, B and C are v, k and q, and dt is both the step of the decay, `exp(dt · A)`, and the weight of a token. A state
is `(batch, nheads, headdim, dstate)`, as here. Gradients flow to every float argument of the scans, and gradients of
gradients. `chunk_size` and `block_len` are accepted and change nothing: the planner picks its own.
"""

from .block import mamba_split_conv1d_scan_combined
from .scan import mamba_chunk_scan_combined, ssd_minimal_discrete
from .step import selective_state_update

__all__ = [
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "selective_state_update",
    "ssd_minimal_discrete",
]
