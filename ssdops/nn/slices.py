"""A block on one rank's slice of a sequence: what it agrees on with the others, and the convolution over the slice's start."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import masks
from ..distributed.agree import Saying, Team
from ..distributed.halo import halo
from ..errors import SsdopsError
from ..ir.resolve import segment_ids
from ..masks import Mask
from .checks import check_input
from .packing import documents_node


def agree_on_input(team: Team, u: Tensor, weight: Tensor, d_model: int) -> list[int]:
    """seqlen of every rank's slice, once all have an input that fits their block, of one batch and one dtype.

    Raises:
        RankError: on every rank; on the one whose input does not fit, what is wrong with it.
    """
    error = None
    try:
        check_input(u, ("batch", "seqlen", d_model), weight)
        team.check_device(u.device)
    except SsdopsError as found:  # which the others must hear of before they wait for this rank
        error = found
    learnt = torch.is_grad_enabled() and (u.requires_grad or weight.requires_grad)
    facts = {} if error else {"batch": u.shape[0], "dtype": str(u.dtype), "gradients": learnt, "own": u.shape[1]}
    shape = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
    return [facts["own"] for facts in team.agree(Saying(facts, f"u {shape}", error))]


def conv_on_slice(
    convolve: Callable[..., Tensor], x: Tensor, width: int, documents: Mask | None, team: Team, lengths: Sequence[int]
) -> Tensor:
    """A causal convolution of this rank's tokens, from the last `width` tokens of the slices before.

    Args:
        convolve: of x, and of `window` or `documents`.
        x: `(batch, seqlen of the slice, channels)`.
        documents: how the slice is packed; no tap reaches over a document's start, on whatever rank that is.
    """
    if not width:
        return convolve(x) if documents is None else convolve(x, documents=documents)
    before = halo(x, width, team, lengths)
    if documents is None:
        return convolve(x, window=before.transpose(1, 2))
    ids = segment_ids(documents_node(documents, x), documents.operands, x.shape[1])
    ids = ids.expand(x.shape[0], -1)
    # the tokens before the sequence, which are zeros, are of a document that comes before all
    ids = torch.cat([halo(ids + 1, width, team, lengths) - 1, ids], 1)
    return convolve(torch.cat([before, x], 1), documents=masks.documents(segment_ids=ids))[:, width:]
