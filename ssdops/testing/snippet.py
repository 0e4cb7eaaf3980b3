"""A failing call as a program: everything that it takes to see the failure again, to be pasted into a file."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir import nodes as n
from ..register import registered
from .case import Case

LIMIT = 400
"""Elements up to which a tensor is written out."""


def program(case: Case, check: str) -> str:
    """The call as Python, then a line that fails.

    Args:
        case: the call.
        check: a statement over `case`, `laws` and `mask_laws`.
    """
    modules = {registered(node.op).__module__ for node in n.walk(case.mask.tree) if isinstance(node, n.Registered)}
    lines = ["import torch", *(f"import {module}  # which registers the mask" for module in sorted(modules - {"__main__"}))]
    if "__main__" in modules:
        lines.append("# first the class with its @register_mask(…)")
    lines += [
        "from ssdops import Mask",
        "from ssdops.ir.text import parse",
        "from ssdops.testing import Case, laws, mask_laws",
        "",
    ]
    tensors = {"q": case.q, "k": case.k, "v": case.v, **case.mask.operands}
    lines += [f"{name} = {literal(x)}" for name, x in tensors.items()]
    operands = ", ".join(f'"{name}": {name}' for name in case.mask.operands)
    lines += [
        f'mask = Mask(parse("{case.mask.tree}"), {{{operands}}})',
        f"case = Case(q, k, v, mask, {case.scale})",
        check,
    ]
    return "\n".join(lines)


def literal(x: Tensor) -> str:
    """A tensor as the expression that makes it; a big one by its shape alone, which the reader is told."""
    dtype = f"dtype={x.dtype}"
    if x.numel() > LIMIT:
        return f"torch.randn({tuple(x.shape)}, {dtype})  # its values were others: {x.numel()} of them"
    values = x.detach().cpu().tolist()
    if x.numel() == 0:
        return f"torch.empty({tuple(x.shape)}, {dtype})"
    text = repr(values).replace("inf", "float('inf')").replace("nan", "float('nan')")
    made = f"torch.tensor({text}, {dtype})"
    if x.is_contiguous() or 0 in x.stride():
        return made
    return f"torch.empty_strided({tuple(x.shape)}, {x.stride()}, {dtype}).copy_({made})"


def rounded(case: Case) -> Case:
    """The call with values of one decimal, which are easier to read."""
    return case.map(lambda _, x: torch.round(x.double(), decimals=1).to(x.dtype) if x.is_floating_point() else x)
