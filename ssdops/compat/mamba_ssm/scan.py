"""mamba_ssm's scans: Mamba-2's, and the listing of its paper."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import masks
from ...api import ssd
from ...nn import discretize
from ...nn.skip import gated_skip
from ..shapes import check_shared, sizes_of
from .packed import by_boundaries, by_ids


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2's scan, `S_t = exp(Δ_t A) S_{t−1} + Δ_t x_t B_tᵀ`, `y_t = (S_t C_t + D x_t) · silu(z_t)`.

        Δ = clamp(softplus(dt + dt_bias), *dt_limit)

    Args:
        x: `(batch, seqlen, nheads, headdim)`.
        dt: `(batch, seqlen, nheads)`.
        A: `(nheads,)`, negative.
        B, C: `(batch, seqlen, ngroups, dstate)`; ngroups divides nheads.
        chunk_size: accepted, and changes nothing.
        D: `(nheads,)` or `(nheads, headdim)`.
        z: a gate, like x.
        dt_bias: `(nheads,)`, added before softplus.
        initial_states: `(batch, nheads, headdim, dstate)`. With seq_idx it enters the sequence whose id is 0, if its row begins
            with that, as in mamba_ssm.
        seq_idx: `(batch, seqlen)`, an integer id per token: the state starts from zero where the id changes. If states are
            given or wanted besides, the number of sequences is read on the host once, which torch.compile does not take in;
            with return_varlen_states it is not.
        cu_seqlens: `(n_sequences + 1,)`, read only for return_varlen_states: where sequences begin, and the end of the last.
        dt_softplus: whether softplus is taken.
        dt_limit: the least and the greatest Δ. As in mamba_ssm, a negative Δ is clamped to 0 by default.
        return_final_states: also return the state after the last token of each row, float32.
        return_varlen_states: also return the state at the end of each sequence, in C's dtype; batch must be 1.

    Returns:
        y, like x in shape and dtype; then, if asked for, the final states `(batch, nheads, headdim, dstate)`; then, if asked
        for, the states of sequences `(n_sequences, nheads, headdim, dstate)`.

    Raises:
        ShapeError, DtypeError: an argument that does not fit; the message names it.
        ValueRangeError: cu_seqlens do not bound the sequences of seq_idx (looked at on the CPU only).
        UnsupportedError: return_varlen_states without seq_idx.

    Source: state-spaces/mamba, `mamba_ssm/ops/triton/ssd_combined.py`; Dao & Gu 2024, "Transformers are SSMs", section 7.

    >>> import torch
    >>> from ssdops.compat.mamba_ssm import mamba_chunk_scan_combined
    >>> x, B, C = torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 1)
    >>> dt, A, ids = torch.ones(1, 4, 1), torch.tensor([0.5]).log(), torch.tensor([[0, 0, 0, 1]])
    >>> y, state = mamba_chunk_scan_combined(x, dt, A, B, C, 64, seq_idx=ids, return_final_states=True)
    >>> y.flatten(), state.item()
    (tensor([1.0000, 1.5000, 1.7500, 1.0000]), 1.0)
    """
    per_head = "nheads headdim" if isinstance(D, Tensor) and D.ndim == 2 else "nheads"
    sizes = sizes_of(
        x=(x, "batch seqlen nheads headdim"), dt=(dt, "batch seqlen nheads"), A=(A, "nheads"),
        B=(B, "batch seqlen ngroups dstate"), C=(C, "batch seqlen ngroups dstate"), D=(D, per_head),
        z=(z, "batch seqlen nheads headdim"), dt_bias=(dt_bias, "nheads"),
        initial_states=(initial_states, "batch nheads headdim dstate"), seq_idx=(seq_idx, "batch seqlen"),
    )  # fmt: skip
    check_shared(sizes["ngroups"], sizes["nheads"], "ngroups", "nheads")
    wide = torch.promote_types(torch.float32, torch.promote_types(x.dtype, dt.dtype))
    steps, logs = discretize(dt, A, dt_bias, softplus=dt_softplus, limit=dt_limit, dtype=wide)
    mask = masks.decay(logs).scale(cols=steps)
    wants_states = return_final_states or return_varlen_states
    packed = None
    if return_varlen_states:
        packed = by_boundaries(seq_idx, cu_seqlens, x)
    elif seq_idx is not None and x.shape[1]:
        packed = by_ids(seq_idx, wants_states or initial_states is not None)
    if packed is not None:
        mask = mask * packed.mask
        initial_states = None if initial_states is None else packed.enter(initial_states)
    if not wants_states:
        return gated_skip(ssd(C, B, x, mask, initial_state=initial_states), x, D, z)
    y, states = ssd(C, B, x, mask, initial_state=initial_states, return_state=True)
    assert isinstance(states, Tensor)  # one scan has one
    out = [gated_skip(y, x, D, z)]
    if return_final_states:
        out.append(states if packed is None else states.index_select(0, packed.last))
    if return_varlen_states:
        out.append(states.to(C.dtype))
    return tuple(out)


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The Mamba-2 paper's Listing 1, `S_t = exp(A_t) S_{t−1} + X_t B_tᵀ`, `Y_t = S_t C_t`; x and A already have dt in them.

    Args:
        X: `(batch, length, n_heads, d_head)`, x · dt.
        A: `(batch, length, n_heads)`, A · dt.
        B, C: `(batch, length, n_heads, d_state)`; fewer heads that divide n_heads are shared.
        block_len: accepted, and changes nothing; it need not divide length.
        initial_states: `(batch, 1, n_heads, d_head, d_state)`, with the listing's axis of chunks.

    Returns:
        Y `(batch, length, n_heads, d_head)` and the final state `(batch, n_heads, d_head, d_state)`, in X's dtype.

    Raises:
        ShapeError, DtypeError: an argument that does not fit; the message names it.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 6.4, Listing 1.

    >>> import torch
    >>> from ssdops.compat.mamba_ssm import ssd_minimal_discrete
    >>> X, A = torch.ones(1, 3, 1, 1), torch.full((1, 3, 1), 0.5).log()
    >>> Y, state = ssd_minimal_discrete(X, A, X, X, 64)
    >>> Y.flatten(), state.item()
    (tensor([1.0000, 1.5000, 1.7500]), 1.75)
    """
    sizes = sizes_of(
        X=(X, "batch length n_heads d_head"), A=(A, "batch length n_heads"), B=(B, "batch length heads_of_B d_state"),
        C=(C, "batch length heads_of_C d_state"), initial_states=(initial_states, "batch 1 n_heads d_head d_state"),
    )  # fmt: skip
    check_shared(sizes["heads_of_B"], sizes["n_heads"], "heads_of_B", "n_heads")
    check_shared(sizes["heads_of_C"], sizes["n_heads"], "heads_of_C", "n_heads")
    first = None if initial_states is None else initial_states[:, 0]
    y, state = ssd(C, B, X, masks.decay(A), initial_state=first, return_state=True)
    assert isinstance(state, Tensor)  # one scan has one
    return y.to(X.dtype), state.to(X.dtype)
