"""The skip connection and the gate of a block without a norm: a Triton kernel on GPUs, plain torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends.base import Support
from .fused import Fused
from .launching import is_plain, on_triton


def gated_skip(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, *, backend: str = "auto") -> Tensor:
    """(y + D · x) · silu(z), in the dtype of x, reckoned in float32 (float64 if an input is).

    Args:
        y, x: `(…, nheads, headdim)`.
        D: `(nheads,)`, or `(nheads, headdim)`; None is 0.
        z: the gate, like x; None is no gate.
        backend: "triton", "torch" or "auto", as of `discretize`.

    Raises:
        UnsupportedError: a backend that does not take it.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 7.1 and figure 6.
    """
    if D is None and z is None:
        return y.to(x.dtype)
    given = (y, x, D, z)
    limits = Support.yes() if is_plain(given) else Support.no("its tensors are traced or wrapped")
    if D is not None and D.ndim == 2:  # one number for all of a head, expanded, is read as that
        D = D[:, 0] if D.stride(1) == 0 or D.shape[1] == 1 else D.flatten()
    run = FUSED if on_triton(y, backend, limits) else plain
    out: Tensor = run(y.flatten(-2), x.flatten(-2), D, None if z is None else z.flatten(-2))
    return out.view(x.shape)


def plain(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """`gated_skip` in plain torch: y, x and z `(…, channels)`, D `(heads,)` of neighbouring channels."""
    dtype = torch.float32
    for tensor in (y, x, D, z):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    out = y.to(dtype)
    if D is not None:
        heads = (D.shape[0], -1)
        out = torch.addcmul(out.unflatten(-1, heads), x.unflatten(-1, heads), D.to(dtype)[:, None]).flatten(-2)
    return (out if z is None else out * F.silu(z.to(dtype))).to(x.dtype)


def _launcher(*args: Any) -> Any:
    from .skip_triton import Skip  # which imports triton

    return Skip(*args)


FUSED = Fused(4, plain, _launcher)
