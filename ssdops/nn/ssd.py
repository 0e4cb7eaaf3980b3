"""The scan as a layer: `ssdops.ssd` over one mask, whose operands are the layer's or come with each call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import api
from ..arguments import State
from ..errors import DtypeError, MaskError
from ..ir import nodes as n
from ..ir.text import parse
from ..ir.verify import verify
from ..masks import Mask


class SSD(nn.Module):
    """Structured masked attention as a layer, `Y = scale · (L ∘ Q Kᵀ) V`, for a mask L of any structure.

    What the mask is made of is said once, by its text or by a mask. Operands that the layer holds are parameters if they are
    given as such, and are learnt; else they are buffers, and go with it from device to device. All others come with each call,
    by name: those that the tokens decide.

    Args:
        mask: an expression as masks print it, like "decay(log_a) * documents(cu)"; or a `Mask`, whose tensors the layer holds.
        operands: name → tensor or `nn.Parameter`, of the operands of a text that the layer holds.
        scale, backend, chunk_size: of `ssdops.ssd`.

    Raises:
        ParseError, MaskError: the text is no mask, or has no such operand.
        DtypeError: what is given as an operand is no tensor.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 3 (equation 16).

    >>> import torch
    >>> from ssdops import masks
    >>> from ssdops.nn import SSD
    >>> scan = SSD("decay(log_a) * retention(log_gamma)", {"log_gamma": torch.nn.Parameter(torch.full((4,), -0.1))})
    >>> q, k, v, log_a = (torch.randn(2, 10, 1, 8), *torch.randn(2, 2, 10, 4, 8), -torch.rand(2, 10, 4))
    >>> y, state = scan(q, k, v, log_a=log_a, return_state=True)
    >>> y.shape, state.shape, [name for name, _ in scan.named_parameters()]
    (torch.Size([2, 10, 4, 8]), torch.Size([2, 4, 8, 8]), ['operands.log_gamma'])
    >>> y, state = scan.step(q[:, 0], k[:, 0], v[:, 0], state, log_a=log_a[:, 0])
    >>> SSD(masks.retnet(4) + masks.window(2))(q, k, v).shape
    torch.Size([2, 10, 4, 8])
    """

    def __init__(
        self,
        mask: Mask | str,
        operands: Mapping[str, Tensor] | None = None,
        *,
        scale: float = 1.0,
        backend: str = "auto",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(mask, Mask) and operands is not None:
            raise MaskError("operands go with the text of a mask; a Mask has its own")
        if not isinstance(mask, Mask | str):
            raise MaskError(f"mask must be a Mask or its text, got {type(mask).__name__}")
        self.tree = mask.tree if isinstance(mask, Mask) else verify(parse(mask))
        self.names = n.operand_names(self.tree)
        self.scale, self.backend, self.chunk_size = scale, backend, chunk_size
        self.operands = nn.Module()
        held = mask.operands if isinstance(mask, Mask) else operands or {}
        self._check(held, self.names)
        for name, x in held.items():
            if hasattr(self.operands, name):
                raise MaskError(
                    f"an operand that a layer holds cannot be called {name!r}, as modules have a {name!r}; rename it"
                )
            if isinstance(x, nn.Parameter):
                self.operands.register_parameter(name, x)
            else:
                self.operands.register_buffer(name, x)
        self.given = tuple(name for name in self.names if name not in held)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        initial_state: State | None = None,
        return_state: bool = False,
        **operands: Tensor,
    ) -> Tensor | tuple[Tensor, State]:
        """`ssdops.ssd` of q, k and v.

        Args:
            q, k: `(batch, seqlen, heads, dstate)`.
            v: `(batch, seqlen, heads, headdim)`.
            initial_state, return_state: of `ssdops.ssd`.
            operands: those of the mask that the layer does not hold, all of them.

        Returns:
            Y `(batch, seqlen, nheads, headdim)`; with `return_state`, (Y, state).

        Raises:
            MaskError: operands that are missing, or that the mask does not have; the message names them.
            What `ssdops.ssd` raises.
        """
        return api.ssd(  # type: ignore[return-value]  # three only where state_every is given
            q, k, v, self.mask(**operands), scale=self.scale, initial_state=initial_state, return_state=return_state,
            backend=self.backend, chunk_size=self.chunk_size,
        )  # fmt: skip

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: State | None, **operands: Tensor) -> tuple[Tensor, State]:
        """`ssdops.ssd_step` of a token of each sequence, for masks that run forward in time.

        Args:
            q, k: `(batch, heads, dstate)`.
            v: `(batch, heads, headdim)`.
            state: from `forward(…, return_state=True)` or another step; None is zero.
            operands: those that the layer does not hold, `(batch, nheads)` where `forward` takes one per token.

        Returns:
            y `(batch, nheads, headdim)`, and the state after the token.

        Raises:
            MaskError: operands that are missing, or that the mask does not have; the message names them.
            What `ssdops.ssd_step` raises.
        """
        return api.ssd_step(q, k, v, self.mask(**operands), state, scale=self.scale, backend=self.backend)

    def mask(self, **operands: Tensor) -> Mask:
        """The mask of a call, for `ssdops.explain` too.

        Raises:
            MaskError, DtypeError: operands that are missing, that the mask does not have, or that are no tensors.
        """
        self._check(operands, self.given)
        if missing := [name for name in self.given if name not in operands]:
            raise MaskError(
                f"{self.tree} needs {', '.join(missing)} with each call, as the layer does not hold them; give them by name"
            )
        return Mask(
            self.tree, {name: operands[name] if name in operands else getattr(self.operands, name) for name in self.names}
        )

    def _check(self, operands: Mapping[str, Any], expected: tuple[str, ...]) -> None:
        if unknown := [name for name in operands if name not in expected]:
            known = ", ".join(expected) or "none"
            raise MaskError(f"{', '.join(unknown)}: no operands of {self.tree} that are to be given here; those are: {known}")
        for name, x in operands.items():
            if not isinstance(x, Tensor):
                raise DtypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.tree}, scale={self.scale}, backend={self.backend!r}"
