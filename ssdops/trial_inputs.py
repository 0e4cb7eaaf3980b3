"""Tensors for a workload: normal q, k and v, decays from slow to strong, documents of like lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from .autotune.workload import Workload
from .ir import nodes as n
from .ir import operands as ops
from .ir.problem import fenwick_levels
from .ir.terms import Linear
from .ir.text import parse
from .masks import Mask
from .testing.case import Case

LOGS = ("log_a", "log_gamma", "log_cols", "channel")
UNCOUNTED_DOCUMENTS = 4
"""Per row, where a mask does not say how many there are."""


def case_of(work: Workload, device: torch.device, seed: int) -> Case:
    """A call of the workload on random inputs, drawn where they are to be: large ones take a processor seconds."""
    generator = torch.Generator(device).manual_seed(seed)
    tree = parse(work.term)
    dtype, wide = getattr(torch, work.dtype), getattr(torch, work.accumulate)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(work.batch, work.seqlen, heads, dim, generator=generator, device=device).to(dtype)

    q, k, v = normal(work.q_heads, work.dstate), normal(work.k_heads, work.dstate), normal(work.v_heads, work.headdim)
    operands = {}
    for node in n.walk(tree):
        for slot, axes in n.SLOTS[type(node)]:
            x = getattr(node, slot)
            for name in ops.names(x) if x is not None else ():
                operands[name] = _operand(node, slot, axes, work, generator).to(device)
                if operands[name].is_floating_point():
                    operands[name] = operands[name].to(wide)
    states: tuple[Tensor, ...] = ()
    if work.direction == "step" and isinstance(work.term_of, Linear):
        shape = (work.batch, work.nheads, work.headdim, work.dstate)
        states = (torch.randn(shape, generator=generator, device=device).to(wide),)
    return Case(q, k, v, Mask(tree, operands), 1.0, states, operands=dtype)


def _operand(node: n.Node, slot: str, axes: str, work: Workload, generator: torch.Generator) -> Tensor:
    if axes == n.BOUNDARIES:
        count = max(work.documents, 1)
        return torch.tensor([work.seqlen * i // count for i in range(count + 1)], dtype=torch.int32)
    if axes == n.IDS:
        assert isinstance(node, n.Documents)  # the one node that has ids
        count = node.n_segments or UNCOUNTED_DOCUMENTS
        row = torch.arange(work.seqlen) * count // max(work.seqlen, 1)
        return row.expand(work.batch, -1).contiguous()
    sizes = {
        "batch": work.batch, "seqlen": work.seqlen, "nheads": work.nheads, "dstate": work.dstate,
        "2*seqlen-1": max(2 * work.seqlen - 1, 0), "n_levels": fenwick_levels(work.seqlen), "rank": getattr(node, "rank", 1),
    }  # fmt: skip
    shape = [1 if axes == n.MATRIX and axis == "batch" else sizes[axis] for axis in axes.split()]
    if slot in LOGS or slot == "A" or (slot == "log_a" and isinstance(node, n.ChannelDecay)):
        draws = torch.rand(work.nheads, generator=generator, device=generator.device)
        rate = 10.0 ** (3 * draws - 3)  # from e^-0.001 to e^-1 a token
        rate = rate.view(-1, *(1,) * (len(shape) - 1 - axes.split().index("nheads")))
        return -rate * torch.rand(shape, generator=generator, device=generator.device)
    return torch.randn(shape, generator=generator, device=generator.device)
