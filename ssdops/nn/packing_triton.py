"""Launching the kernel that says where documents lie: its grid and its strides. No arithmetic on tensors happens here."""

from __future__ import annotations

from torch import Tensor

from ..backends.triton.calls import Kernel
from ..backends.triton.launch import ceil_div
from .kernels import packing as kernels
from .launching import on
from .packing_ops import Places

PLACES = Kernel(kernels.places)
BLOCK = 256
"""Tokens, and documents, of a program."""


def places(given: Tensor, position: Tensor, rows: Tensor, starts: Tensor, stops: Tensor) -> Places:
    """Fill these of `packing_ops.places`, and return them."""
    (batch, seqlen), n_rows = position.shape, len(starts)
    per_row, boundaries = n_rows // max(batch, 1), given.ndim == 1
    blocks = ceil_div(max(seqlen, per_row), BLOCK)
    if batch * blocks:
        searched = per_row if boundaries else seqlen
        given = given.contiguous()
        with on(given.device):
            PLACES(
                (batch * blocks, 1, 1),
                (given, position, rows, starts, stops),
                (0 if len(given) < batch or boundaries else seqlen, seqlen, per_row, n_rows, searched.bit_length()),
                BOUNDARIES=boundaries, BLOCK=BLOCK,
            )  # fmt: skip
    return position, rows, starts, stops
