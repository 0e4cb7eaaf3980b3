"""`ssdops export`: programs of a backend, compiled ahead."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from .api import ssd
from .backends.base import Config, Cotangents, bind
from .cli_common import dtype_of
from .cli_explain import Sizes, operand_shapes, read_shape
from .errors import UnsupportedError
from .ir import nodes as n
from .ir.problem import Target, problem_of
from .ir.text import parse
from .ir.verify import verify
from .masks import Mask
from .plan import terms_of

TOKENS = 40
"""Of the example: programs serve any number."""
LONG = 1 << 14
"""Of a row that a GPU cuts into segments."""
MANY = 1 << 24
"""Rows of which a GPU has no room for the states of all heads, so that a backward pass takes some at a time."""


@dataclass(frozen=True)
class Order:
    """The options of the command, as given."""

    shape: str
    mask: str
    dtype: str
    backend: str
    cpu: str | None
    gpu: str | None = None


def run(order: Order, directory: Path, console: Console) -> None:
    """Write the programs of both passes of a call, and what they are for.

    Raises:
        UnsupportedError: the backend has no programs of its own, cannot run the mask, or compiles for no such device.
    """
    if order.backend != "tvm":
        raise UnsupportedError(f"backend {order.backend!r} has nothing to export; --backend tvm has")
    from .backends.tvm import backend, exported

    if not (support := backend.installed()).ok:
        raise UnsupportedError(support.reason)
    from .backends.tvm import build, compiler  # which import TVM

    if order.cpu is not None and order.gpu is not None:
        raise UnsupportedError("programs are exported for --cpu or for --gpu; a second command adds the others")
    call = verify(parse(order.mask)), read_shape(order.shape), dtype_of(order.dtype)
    with build.collecting() as wanted:
        if order.gpu is None:
            example(*call)
        else:
            example_of_gpu(*call, capability_of(order.gpu))
    if not wanted:
        raise UnsupportedError(f"{order.mask} has no scan that 'tvm' runs, so that there is nothing to export")
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    for name, tile in wanted:
        path = build.export(name, tile, directory, order.cpu)
        console.print(Text(f"{path.name}  {path.stat().st_size // 1024} KiB"), soft_wrap=True)
    exported.describe(directory, order.gpu or "cpu", [] if order.gpu else compiler.features(order.cpu))
    console.print(Text(f"SSDOPS_TVM_PROGRAMS={directory} runs them, with torch and apache-tvm-ffi alone"), soft_wrap=True)


def example(tree: n.Node, sizes: Sizes, dtype: torch.dtype) -> None:
    """Both passes of a call of few tokens, and a forward pass alone, which wants other programs."""
    s = Sizes(1, TOKENS, sizes.nheads, sizes.headdim, sizes.ngroups, sizes.dstate)
    q, v = torch.zeros(1, TOKENS, s.ngroups, s.dstate, dtype=dtype), torch.zeros(1, TOKENS, s.nheads, s.headdim, dtype=dtype)
    mask = Mask(tree, {name: _operand(axes, shape) for name, axes, shape in operand_shapes(tree, s)})
    with torch.no_grad():
        ssd(q, q, v, mask, backend="tvm")
    ssd(q, q.requires_grad_(), v, mask, backend="tvm").sum().backward()


def example_of_gpu(tree: n.Node, sizes: Sizes, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    """The same of a GPU that is not here, on tensors without memory: passes only say which programs they want.

    Raises:
        UnsupportedError: it does not run the mask.
    """
    from .backends.tvm.backend import Tvm, chunks

    backend = Tvm()
    for batch, tokens in ((1, TOKENS), (1, LONG), (MANY, TOKENS)):
        s = Sizes(batch, tokens, sizes.nheads, sizes.headdim, sizes.ngroups, sizes.dstate)
        q, v = (torch.empty(batch, tokens, *shape, dtype=dtype, device="meta")
                for shape in ((s.ngroups, s.dstate), (s.nheads, s.headdim)))  # fmt: skip
        operands = {name: _operand(axes, shape, "meta") for name, axes, shape in operand_shapes(tree, s)}
        problem = replace(problem_of(tree, q, q, v, operands), target=Target("cuda", "", capability))
        for term in terms_of(tree):
            if not (support := backend.supports(term, problem)).ok:
                raise UnsupportedError(support.reason)
            config = Config(chunks(problem)[0])
            x = bind(term, problem, q, q, v, operands, None, 1.0, dtype)
            wide = {name: value.double() if "log" in name else value for name, value in x.values.items()}
            of_sums = problem.accumulate  # which the terms of a mask that is a sum are added up in
            for save, values, out in product((False, True), (x.values, wide), (dtype, of_sums)):
                x = replace(x, values=values, out=out)
                saved = backend.forward(term, x, config, save).saved
                backend.backward(term, x, config, Cotangents(v, None, saved))


def capability_of(gpu: str) -> tuple[int, int]:
    """The compute capability of an architecture, as CUDA calls it.

    Raises:
        UnsupportedError: it is none.

    >>> capability_of("sm_103")
    (10, 3)
    """
    found = re.fullmatch(r"sm_(\d+)(\d)", gpu)
    if found is None:
        raise UnsupportedError(f"--gpu {gpu} is no architecture of CUDA's; one is sm_90")
    return int(found[1]), int(found[2])


def _operand(axes: str, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """Zeros, or documents that are in order."""
    if axes not in n.INTEGER_AXES:
        return torch.zeros(shape, requires_grad=True, device=device)
    if len(shape) == 1:
        return torch.linspace(0, TOKENS, shape[0], device=device).to(torch.int32)
    return torch.zeros(shape, dtype=torch.int32, device=device)
