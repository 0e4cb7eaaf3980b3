"""What fla's functions share: one scan, whose states and packed sequences are laid out as fla has them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ... import masks
from ...api import ssd
from ...errors import ShapeError, UnsupportedError
from ...masks import Mask
from ..shapes import sizes_of


class Gates(NamedTuple):
    """Log decays, one of: per token and head `[B, T, H]`, per token and key channel `[B, T, H, K]`, per head `[H]`, none."""

    heads: Tensor | None = None
    channels: Tensor | None = None
    gamma: Tensor | None = None

    def mask(self) -> Mask:
        """The mask of these decays."""
        if self.heads is not None:
            return masks.decay(self.heads)
        if self.channels is not None:
            return masks.channel_decay(self.channels)
        return masks.causal() if self.gamma is None else masks.retention(self.gamma)


class Options(NamedTuple):
    """What is no operand; the states are those of fla."""

    scale: float | None = None
    initial_state: Tensor | None = None
    output_final_state: bool = False
    cu_seqlens: Tensor | None = None
    state_v_first: bool = False
    reverse: bool = False


def scan(q: Tensor, k: Tensor, v: Tensor, gates: Gates, options: Options) -> tuple[Tensor, Tensor | None]:
    """`S_t = exp(g_t) S_{t−1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`: o in q's dtype, and the final state or None.

    Raises:
        ShapeError, DtypeError: an argument that does not fit; the message names it.
    """
    scale, state, wants_state, cu_seqlens, v_first, reverse = options
    rows = "B" if cu_seqlens is None else "N"
    sizes = sizes_of(
        q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T H V"), g=(gates.heads, "B T H"), gk=(gates.channels, "B T H K"),
        g_gamma=(gates.gamma, "H"), cu_seqlens=(cu_seqlens, "boundaries"),
        initial_state=(state, f"{rows} H V K" if v_first else f"{rows} H K V"),
    )  # fmt: skip
    if cu_seqlens is not None and sizes["B"] != 1:
        raise ShapeError(f"cu_seqlens packs sequences into one row, and q has B = {sizes['B']}; flatten it into B = 1")
    if "N" in sizes and sizes["N"] != sizes["boundaries"] - 1:
        raise ShapeError(
            f"initial_state has N={sizes['N']}, and cu_seqlens bounds {sizes['boundaries'] - 1} sequences; give a state to each"
        )
    if reverse:
        q, k, v, gates, state, cu_seqlens = _flipped(q, k, v, gates, state, cu_seqlens)
    mask = gates.mask() if cu_seqlens is None else gates.mask() * masks.documents(cu_seqlens)
    if state is not None and not v_first:
        state = state.transpose(-1, -2)
    factor = sizes["K"] ** -0.5 if scale is None else scale
    final = None
    if wants_state:
        o, left = ssd(q, k, v, mask, scale=factor, initial_state=state, return_state=True)
        assert isinstance(left, Tensor)  # one scan has one
        final = left if v_first else left.transpose(-1, -2)
        final = final.flip(0) if reverse and cu_seqlens is not None else final
    else:
        o = ssd(q, k, v, mask, scale=factor, initial_state=state)
    return (o.flip(1) if reverse else o).to(q.dtype), final


def _flipped(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Gates, Tensor | None, Tensor | None]:
    """The last token first: on fla's way back, too, a token's own gate decays the state before the token enters it."""
    heads, channels = (x if x is None else x.flip(1) for x in gates[:2])
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens[-1] - cu_seqlens.flip(0)
        state = state if state is None else state.flip(0)
    return q.flip(1), k.flip(1), v.flip(1), Gates(heads, channels, gates.gamma), state, cu_seqlens


def refuse_head_first(head_first: bool | None) -> None:
    """fla itself refuses the argument, whatever its value."""
    if head_first is not None:
        raise UnsupportedError(
            f"head_first={head_first}: inputs are [B, T, H, ...] now, in fla too; transpose them, and leave this out"
        )
