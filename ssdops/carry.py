"""States that are more than one matrix per scan: what users carry between calls, and what the scans inside take.

Mamba-3's trapezoidal rule adds β_t k_{t−1} v_{t−1}ᵀ at token t, so besides S its state holds the last token's k and v. Inside
it runs as one scan, whose column j already has the next token's β/a (what enters is S + (β/a)_0 v_{−1} k_{−1}ᵀ), or as two,
the second of them for β alone (β_0 v_{−1} k_{−1}ᵀ enters that one). β past the end is 0, so what leaves is h as it stands
in the recurrence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import ShapeError, UnsupportedError
from .ir import nodes as n
from .ir.resolve import canonical, repeat_heads


def trapezoid_of(tree: n.Node) -> n.Trapezoidal | None:
    """The trapezoid of a mask that has one, if its state can be carried: alone, or with diagonals beside it.

    Raises:
        UnsupportedError: there is a trapezoid, and other things with it.
    """
    if not any(isinstance(node, n.Trapezoidal) for node in n.walk(tree)):
        return None
    parts = tree.terms if isinstance(tree, n.Sum) else (tree,)
    found = [part for part in parts if isinstance(part, n.Trapezoidal)]
    if len(found) == 1 and all(isinstance(part, n.Trapezoidal | n.Diagonal) for part in parts):
        return found[0]
    raise UnsupportedError(
        "the state of trapezoidal() holds the previous k and v as well, which is carried for a trapezoid alone or with "
        f"diagonals beside it, and {tree} is more; run the whole sequence in one call, or one document a row"
    )


def enter(
    trapezoid: n.Trapezoidal, operands: Mapping[str, Tensor], states: Sequence[Tensor], k: Tensor, v: Tensor
) -> list[Tensor]:
    """(S, previous k, previous v) → the initial states of the scans inside.

    Args:
        states: S `(batch, nheads, headdim, dstate)`, and of the token before k `(batch, heads, dstate)` and v
            `(batch, heads, headdim)`.
        k, v: of the call, which those shapes must match.
    """
    if not states:
        return []
    if len(states) != 3:
        raise ShapeError(f"initial_state of trapezoidal() is (S, previous k, previous v), got {len(states)} tensors")
    state, previous = states[0], {"k": states[1], "v": states[2]}
    for name, x in (("k", k), ("v", v)):
        want = (x.shape[0], *x.shape[2:])
        if previous[name].shape != want:
            raise ShapeError(f"initial_state's previous {name} has shape {tuple(previous[name].shape)}, expected {tuple(want)}")
    if state.ndim != 4:
        raise ShapeError(f"initial_state's S must be (batch, nheads, headdim, dstate), got {tuple(state.shape)}")
    wide = torch.promote_types(state.dtype, torch.float32)
    first = trapezoid.beta if trapezoid.beta is not None else trapezoid.beta_over_a
    assert isinstance(first, str)  # a mask as written names its operands
    nheads = state.shape[1]
    if v.shape[1]:
        beta = repeat_heads(canonical(operands[first], n.TOKEN)[:, 0], nheads, 1)[..., None, None]
        last_k, last_v = (repeat_heads(previous[name].to(wide), nheads, 1) for name in ("k", "v"))
        extra = beta.to(wide) * last_v[..., :, None] * last_k[..., None, :]
    else:
        extra = torch.zeros_like(state, dtype=wide)
    return [state.to(wide), extra] if trapezoid.beta is not None else [state.to(wide) + extra]


def leave(finals: Sequence[Tensor], states: Sequence[Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The final states of the scans inside → (S, last k, last v); `states` are the initial ones as users gave them."""
    total = finals[0] if len(finals) == 1 else finals[0] + finals[1]
    if k.shape[1]:
        return total, k[:, -1], v[:, -1]
    if states:
        return total, states[1], states[2]
    return total, k.new_zeros(k.shape[0], *k.shape[2:]), v.new_zeros(v.shape[0], *v.shape[2:])
