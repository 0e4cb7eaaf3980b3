"""What stands in transformers' files for the functions of mamba_ssm and causal_conv1d, called as its mixers call those."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...errors import UnsupportedError
from ..mamba_ssm import mamba_chunk_scan_combined, selective_state_update
from ..mamba_ssm.around import short_convolution

Function = Callable[..., Any]


def called_by_mixers(function: Function) -> Function:
    """The function, without those keywords that a mixer only hands on from the call of its model.

    Raises:
        UnsupportedError: packed sequences of which only the boundaries are given, at which mamba_ssm would not look.
    """
    known = frozenset(inspect.signature(function).parameters)

    def called(*args: Any, **given: Any) -> Any:
        if given.get("seq_idx") is None and given.get("cu_seqlens") is not None:
            raise UnsupportedError("packed sequences are told apart by seq_idx, and only cu_seqlens is given; pass seq_idx too")
        return function(*args, **{name: value for name, value in given.items() if name in known})

    called.__name__ = function.__name__
    return called


def whole_block(*args: Any, **given: Any) -> None:
    """None: the mixer then goes by its parts in training too, whose norm is its own."""


def convolution(own: Function) -> Function:
    """`causal_conv1d`, for which channels stay the last axis in memory; transformers' own for activations that are not ours."""

    def convolved(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:  # x and the result (batch, channels, seqlen)
        if activation not in ("silu", "swish", None):
            if seq_idx is None:
                return own(x, weight, bias, activation=activation)
            raise UnsupportedError(f"packed sequences are convolved with 'silu', 'swish' or None after it, got {activation!r}")
        return short_convolution(x.mT, weight, bias, seq_idx, activation).mT

    return called_by_mixers(convolved)


REPLACEMENTS: dict[str, Callable[[Function], Function]] = {
    "mamba2_chunk_scan": lambda own: called_by_mixers(mamba_chunk_scan_combined),
    "mamba2_selective_state_update": lambda own: called_by_mixers(selective_state_update),
    "mamba2_split_conv1d_scan_combined": lambda own: whole_block,
    "causal_conv1d_fn": convolution,
}
"""By the names of transformers' functions, what makes ours from its own."""
