"""What the GPU benchmark runs: the shapes S1 to S8, operands drawn as Mamba-2 has them, a floor, and our side."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from device import Ceilings, Machine
from torch import Tensor
from workload import Inputs, Shape

from ssdops import masks, ssd

SHAPES = {
    "S1": Shape(8, 4096, 80, 64, 1, 128),
    "S2": Shape(1, 2048, 80, 64, 1, 128),
    "S3": Shape(1, 65536, 80, 64, 1, 128),
    "S4": Shape(8, 4096, 24, 64, 1, 128),
    "S5": Shape(4, 4096, 128, 64, 8, 128),
    "S6": Shape(8, 4096, 80, 64, 1, 256),
    "S7": Shape(8, 4096, 80, 64, 1, 16),
    "S8": Shape(1, 16384, 24, 64, 1, 128),
}
FLOOR_CHUNK = 128


def tiny(shape: Shape) -> Shape:
    """The same pattern of heads and groups, at a size that takes a CPU no time."""
    groups = min(shape.ngroups, 2)
    return Shape(min(shape.batch, 2), min(shape.seqlen, 32), 2 * groups, 8, groups, min(shape.dstate, 16))


def reduced(shape: Shape) -> Shape:
    """The same pattern, short enough for a quadratic float64 reference with gradients."""
    return replace(shape, batch=min(shape.batch, 2), seqlen=min(shape.seqlen, 1024))


def floor_ms(shape: Shape, ceilings: Ceilings) -> float:
    """The least that a forward pass can take: its bytes at the copy's rate, or its FLOPs at the matmul's, if that is longer.

    q, k, v and log_a are read once and y is written once. The FLOPs are those of chunks of 128 tokens, of which only
    the causal half of each is counted.
    """
    s, tokens = shape, shape.batch * shape.seqlen
    moved = tokens * (2 * 2 * s.ngroups * s.dstate + 2 * 2 * s.nheads * s.headdim + 4 * s.nheads)
    scores = s.ngroups * FLOOR_CHUNK * s.dstate
    heads = s.nheads * (FLOOR_CHUNK * s.headdim + 4 * s.headdim * s.dstate)
    return 1e3 * max(moved / ceilings.copy, tokens * (scores + heads) / ceilings.matmul)


class Operands(NamedTuple):
    """In Mamba-2's words: x (batch, seqlen, nheads, headdim), dt (batch, seqlen, nheads), a (nheads), B and C
    (batch, seqlen, ngroups, dstate); x, B and C in the machine's dtype, dt and a in float32."""

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


def draw(shape: Shape, machine: Machine, seed: int = 0) -> Operands:
    """Normal x, B and C; a uniform in [-16, -1]; dt log-uniform in [0.001, 0.1] by head, and spread about it by token."""
    generator = machine.generator(seed)
    options = {"device": machine.device, "generator": generator}
    tokens, groups = (shape.batch, shape.seqlen), (shape.ngroups, shape.dstate)
    x = torch.randn(*tokens, shape.nheads, shape.headdim, dtype=machine.dtype, **options)
    b, c = (torch.randn(*tokens, *groups, dtype=machine.dtype, **options) for _ in range(2))
    low, high = math.log(1e-3), math.log(1e-1)
    usual = torch.rand(shape.nheads, **options) * (high - low) + low
    dt = (usual + 0.5 * torch.randn(*tokens, shape.nheads, **options)).clamp(low, high).exp()
    return Operands(x, dt, -1 - 15 * torch.rand(shape.nheads, **options), b, c)


def ssd_inputs(operands: Operands) -> Inputs:
    """The same as ssdops reads it: q = C, k = B, v = x·dt rounded as x is, log_a = a·dt in float32."""
    x, dt, a, b, c = operands
    return Inputs(c, b, (x * dt[..., None]).to(x.dtype), a * dt)


@dataclass(frozen=True)
class Work:
    """A function of some leaves that gives y, and the context in which to run it."""

    leaves: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def forward(self) -> Tensor:
        """y, with whatever gradient mode is on."""
        return self.run(*self.leaves)

    def forward_backward(self, cotangent: Tensor | None = None) -> Callable[[], tuple[Tensor, ...]]:
        """A call that runs forward and gives the leaves' gradients from a cotangent, by default a fixed random one."""
        leaves = tuple(leaf.detach().requires_grad_() for leaf in self.leaves)
        if cotangent is None:
            with torch.no_grad():
                y = self.run(*leaves)
            generator = torch.Generator(y.device).manual_seed(1)
            cotangent = torch.randn(y.shape, device=y.device, dtype=y.dtype, generator=generator)
        return lambda: torch.autograd.grad(self.run(*leaves), leaves, cotangent)


@dataclass(frozen=True)
class Side:
    """One of those compared: `prepare` makes its work from the common operands, or says by an exception why it can't."""

    name: str
    prepare: Callable[[Operands], Work]


def ssdops_side(backend: str) -> Side:
    """Our side, by one backend."""
    return Side("ssdops", lambda operands: Work(tuple(ssd_inputs(operands)), lambda *leaves: run_ssd(backend, *leaves)))


def run_ssd(backend: str, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """y of a plain decay."""
    y = ssd(q, k, v, masks.decay(log_a), backend=backend)
    assert isinstance(y, Tensor)  # the pair (y, state) comes only when asked for
    return y
