"""flash-linear-attention's functions: fla-core's arguments, layouts and results, computed by `ssd`.

q and k are `[B, T, H, K]`, v and what comes back `[B, T, H, V]`; gates are logs of decays; scale is `K ** -0.5` if it is
None. A state is `[N, H, K, V]`, the transpose of ours, or `[N, H, V, K]` with `state_v_first`; it comes back if
`output_final_state`, in float32 (float64 for float64 inputs), and is None if not. N is B, or the number of sequences that
`cu_seqlens` `[N + 1]` packs into one row (B is 1 then).

What goes on inside does not depend on a function's name: "chunk", "parallel" and "fused_recurrent" are planned alike, and
`chunk_size` and `cu_seqlens_cpu` are accepted and change nothing. Gradients flow to every float tensor.
"""

from .gated import chunk_gla, chunk_log_linear_attn, fused_recurrent_gla
from .simple import (
    chunk_lightning_attn,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_recurrent_simple_gla,
    parallel_simple_gla,
)

__all__ = [
    "chunk_gla",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_log_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_recurrent_gla",
    "fused_recurrent_simple_gla",
    "parallel_simple_gla",
]
