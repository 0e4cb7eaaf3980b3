"""The block decomposition of Mamba-2 (Dao & Gu 2024, section 6) in plain torch: quadratic inside chunks, recurrent between.

Chunk by chunk, with the state in hand, so that nothing grows with seqlen but the output. Heads of a group share q and k:
their scores are computed once, and their states lie side by side as columns [N, heads · P] of one matrix, so that what
enters and what leaves a chunk are single large matmuls, and gradients of shared q and k are summed over heads inside them.

What needs no state (scores, decays, what is inside a chunk) is done for a *span* of M chunks at once, as on a CPU every torch
call costs microseconds, and in buffers that are used again, as fresh memory costs a page fault.

Decay per channel (`channel.py`) walks the same way, with heads each by itself and what is inside a chunk by halves (`tree.py`).

Shapes: M chunks of a span, R rows still running, C tokens of a chunk, G distinct score heads, r = H/G heads sharing them,
N dstate, P headdim.
"""

from .backend import Chunked

__all__ = ["Chunked"]
