"""What the CPU benchmarks run: shapes, inputs drawn as Mamba-2 draws them, the two sides, and a float64 reference."""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import NamedTuple, TypeAlias

import torch
from listing1 import require_opt_einsum, ssd_listing1
from torch import Tensor

from ssdops import ssd
from ssdops.masks import channel_decay, decay

THREADS = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one problem, printed in the order of the fields."""

    batch: int
    seqlen: int
    nheads: int
    headdim: int
    ngroups: int
    dstate: int

    def __str__(self) -> str:
        return str(astuple(self))


SHAPES = (Shape(2, 2048, 24, 64, 1, 128), Shape(1, 8192, 24, 64, 1, 128))
TINY = Shape(1, 4, 2, 4, 1, 4)


class Inputs(NamedTuple):
    """q, k (batch, seqlen, ngroups, dstate), v (batch, seqlen, nheads, headdim), log_a (batch, seqlen, nheads)."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_a: Tensor


Side: TypeAlias = Callable[[Inputs], Tensor]


def set_up() -> None:
    """The settings under which both sides are measured, in this process."""
    torch.set_num_threads(THREADS)
    require_opt_einsum()


def chunked(inputs: Inputs) -> Tensor:
    """Our side: the `chunked` backend, its chunk size left to the planner."""
    q, k, v, log_a = inputs
    y = ssd(q, k, v, decay(log_a), backend="chunked")
    assert isinstance(y, Tensor)  # the pair (y, state) comes only when asked for
    return y


def listing1(inputs: Inputs) -> Tensor:
    """The other side: Listing 1 of the Mamba-2 paper."""
    return ssd_listing1(*inputs)[0]


def tvm(inputs: Inputs) -> Tensor:
    """The same by programs that TVM has compiled."""
    q, k, v, log_a = inputs
    y = ssd(q, k, v, decay(log_a), backend="tvm")
    assert isinstance(y, Tensor)  # the pair (y, state) comes only when asked for
    return y


def per_channel(backend: str) -> Side:
    """A decay of its own for every state channel, as GLA has it: log_a is `(batch, seqlen, nheads, dstate)`."""

    def side(inputs: Inputs) -> Tensor:
        q, k, v, log_a = inputs
        y = ssd(q, k, v, channel_decay(log_a), backend=backend)
        assert isinstance(y, Tensor)  # the pair (y, state) comes only when asked for
        return y

    return side


SIDES: dict[str, Side] = {"chunked": chunked, "listing1": listing1}


def mamba2_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """float32 inputs as a fresh Mamba-2 layer makes them.

    `log_a = -A·dt` and `v = x·dt`, with A uniform in [1, 16] per head and `dt = softplus(noise + bias)`, the bias such
    that softplus(bias) is log-uniform in [0.001, 0.1]; q, k and x are normal.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens, heads = (shape.batch, shape.seqlen), (shape.nheads,)
    q, k = (torch.randn(*tokens, shape.ngroups, shape.dstate, generator=draw) for _ in range(2))
    x = torch.randn(*tokens, shape.nheads, shape.headdim, generator=draw)
    a = torch.empty(heads).uniform_(1, 16, generator=draw)
    usual_dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1), generator=draw).exp()
    bias = usual_dt + torch.log(-torch.expm1(-usual_dt))  # the inverse of softplus
    dt = torch.nn.functional.softplus(torch.randn(*tokens, shape.nheads, generator=draw) + bias)
    return Inputs(q, k, x * dt[..., None], -a * dt)


def gla_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """float32 inputs as a fresh GLA layer makes them: log_a = log σ(noise) / 16, normal q, k and v."""
    draw = torch.Generator().manual_seed(seed)
    tokens = (shape.batch, shape.seqlen)
    q, k = (torch.randn(*tokens, shape.ngroups, shape.dstate, generator=draw) for _ in range(2))
    v = torch.randn(*tokens, shape.nheads, shape.headdim, generator=draw)
    gate = torch.randn(*tokens, shape.nheads, shape.dstate, generator=draw)
    return Inputs(q, k, v, torch.nn.functional.logsigmoid(gate) / 16)


def forward(side: Side, inputs: Inputs) -> Callable[[], Tensor]:
    """A call that runs `side` without recording gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return side(inputs)

    return call


def forward_backward(side: Side, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs `side` and gives the gradients of q, k, v and log_a from a fixed random cotangent."""
    leaves = Inputs(*(t.detach().requires_grad_() for t in inputs))
    cotangent = torch.randn(inputs.v.shape, generator=torch.Generator().manual_seed(1))

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(side(leaves), leaves, cotangent)

    return call


DIRECTIONS = {"forward": forward, "forward + backward": forward_backward}


def recurrence_float64(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """y and the final state by the definition, one token at a time in float64; shares no code with either side."""
    q, k, v, log_a = (t.double() for t in inputs)
    nheads = v.size(2)
    k, q = (t.repeat_interleave(nheads // t.size(2), dim=2) for t in (k, q))
    state = v.new_zeros(v.size(0), nheads, v.size(3), k.size(3))
    y = torch.empty_like(v)
    for t in range(v.size(1)):
        state = log_a[:, t].exp()[..., None, None] * state + v[:, t, :, :, None] * k[:, t, :, None, :]
        y[:, t] = (state @ q[:, t, :, :, None]).squeeze(-1)
    return y, state
