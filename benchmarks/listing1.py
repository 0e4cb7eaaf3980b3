"""Listing 1 of the Mamba-2 paper: what the CPU benchmarks are measured against.

Source: Dao & Gu 2024, "Transformers are SSMs", section 6, Listing 1. The paper prints the segment sum as a difference
of cumulative sums; the code its authors publish as that listing (`ssd_minimal.py` in state-spaces/mamba) sums each
segment on its own instead, which is slower and loses no digits. The published code is the default here, and
`segsum_printed` is the paper's page. The operations, their order, the einsum equations and the memory layout are the
listing's; the names are ours. It is a yardstick: leave it as slow as it is.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_LENGTH = 64


def require_opt_einsum() -> None:
    """Let `torch.einsum` reorder the listing's contractions; without that it forms needlessly large products."""
    if not torch.backends.opt_einsum.is_available():
        raise SystemExit("Listing 1 is measured at its best, with opt_einsum, which is missing: pip install opt_einsum")
    torch.backends.opt_einsum.enabled = True


def segsum(x: Tensor) -> Tensor:
    """`out[..., i, j] = Σ_{j<s≤i} x[..., s]` for `i ≥ j`, else -inf; each segment is summed on its own."""
    length = x.size(-1)
    ones = torch.ones(length, length, device=x.device, dtype=torch.bool)
    columns = x[..., None].repeat(*[1] * x.dim(), length)  # columns[..., s, j] = x[..., s]
    columns = columns.masked_fill(~torch.tril(ones, diagonal=-1), 0)
    return torch.cumsum(columns, dim=-2).masked_fill(~torch.tril(ones, diagonal=0), -torch.inf)


def segsum_printed(x: Tensor) -> Tensor:
    """The same sums as the paper prints them, as differences of one cumulative sum, which cancel."""
    length = x.size(-1)
    total = torch.cumsum(x, dim=-1)
    ones = torch.ones(length, length, device=x.device, dtype=torch.bool)
    return (total[..., :, None] - total[..., None, :]).masked_fill(~torch.tril(ones, diagonal=0), -torch.inf)


def ssd_blocks(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, segment_sum: Callable[[Tensor], Tensor] = segsum
) -> tuple[Tensor, Tensor]:
    """The listing itself: `y_i = c_i S_i` with `S_t = exp(log_a_t) S_{t-1} + x_t b_tᵀ`, by blocks of 64 tokens.

    Args:
        x: inputs (batch, seqlen, nheads, headdim); seqlen is a multiple of 64.
        log_a: log decays (batch, seqlen, nheads).
        b: what writes the state, one per head (batch, seqlen, nheads, dstate).
        c: what reads the state, one per head (batch, seqlen, nheads, dstate).
        segment_sum: `segsum` (the published code) or `segsum_printed` (the paper's page).

    Returns:
        y (batch, seqlen, nheads, headdim) and the final state (batch, nheads, headdim, dstate).
    """
    x, log_a, b, c = (t.reshape(t.size(0), -1, BLOCK_LENGTH, *t.shape[2:]) for t in (x, log_a, b, c))
    log_a = log_a.permute(0, 3, 1, 2)  # [b, h, c, l]
    total = torch.cumsum(log_a, dim=-1)

    # 1. Inside each block: masked attention.
    inner = torch.exp(segment_sum(log_a))
    y_inner = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, inner, x)

    # 2. The state each block would end with, had it started from zero.
    to_end = torch.exp(total[..., -1:] - total)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, to_end, x)

    # 3. Between blocks: the recurrence over block states, as one dense lower-triangular product.
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = torch.exp(segment_sum(F.pad(total[..., -1], (1, 0))))
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)
    states, final_state = states[:, :-1], states[:, -1]

    # 4. What each block reads from the state it starts with.
    y_outer = torch.einsum("bclhn,bchpn,bhcl->bclhp", c, states, torch.exp(total))
    return (y_inner + y_outer).flatten(1, 2), final_state


def ssd_listing1(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, segment_sum: Callable[[Tensor], Tensor] = segsum
) -> tuple[Tensor, Tensor]:
    """Listing 1 behind `ssdops.ssd`'s layout: q and k repeated per head as it requires, seqlen padded to whole blocks.

    Args:
        q, k: (batch, seqlen, ngroups, dstate).
        v: (batch, seqlen, nheads, headdim).
        log_a: (batch, seqlen, nheads).
        segment_sum: see `ssd_blocks`.

    Returns:
        y (batch, seqlen, nheads, headdim) and the final state (batch, nheads, headdim, dstate).
    """
    seqlen, nheads = v.shape[1:3]
    k, q = (t.repeat_interleave(nheads // t.size(2), dim=2) for t in (k, q))
    if missing := -seqlen % BLOCK_LENGTH:  # zero inputs and a decay of 1 leave y and the final state as they were
        v, k, q = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (v, k, q))
        log_a = F.pad(log_a, (0, 0, 0, missing))
    y, final_state = ssd_blocks(v, log_a, k, q, segment_sum)
    return y[:, :seqlen], final_state
