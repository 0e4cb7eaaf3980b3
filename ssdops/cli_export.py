"""`ssdops export`: programs of a backend, compiled ahead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from .api import ssd
from .cli_common import dtype_of
from .cli_explain import Sizes, operand_shapes, read_shape
from .errors import UnsupportedError
from .ir import nodes as n
from .ir.text import parse
from .ir.verify import verify
from .masks import Mask

TOKENS = 40
"""Of the example: programs serve any number."""


@dataclass(frozen=True)
class Order:
    """The options of the command, as given."""

    shape: str
    mask: str
    dtype: str
    backend: str
    cpu: str | None


def run(order: Order, directory: Path, console: Console) -> None:
    """Write the programs of both passes of a call, and what they are for.

    Raises:
        UnsupportedError: the backend has no programs of its own, or cannot run the mask.
    """
    if order.backend != "tvm":
        raise UnsupportedError(f"backend {order.backend!r} has nothing to export; --backend tvm has")
    from .backends.tvm import backend, exported

    if not (support := backend.installed()).ok:
        raise UnsupportedError(support.reason)
    from .backends.tvm import build, compiler  # which import TVM

    with build.collecting() as wanted:
        example(verify(parse(order.mask)), read_shape(order.shape), dtype_of(order.dtype))
    if not wanted:
        raise UnsupportedError(f"{order.mask} has no scan that 'tvm' runs, so that there is nothing to export")
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    for name, tile in wanted:
        path = build.export(name, tile, directory, order.cpu)
        console.print(Text(f"{path.name}  {path.stat().st_size // 1024} KiB"), soft_wrap=True)
    exported.describe(directory, compiler.features(order.cpu))
    console.print(Text(f"SSDOPS_TVM_PROGRAMS={directory} runs them, with torch and apache-tvm-ffi alone"), soft_wrap=True)


def example(tree: n.Node, sizes: Sizes, dtype: torch.dtype) -> None:
    """Both passes of a call of few tokens, and a forward pass alone, which wants other programs."""
    s = Sizes(1, TOKENS, sizes.nheads, sizes.headdim, sizes.ngroups, sizes.dstate)
    q, v = torch.zeros(1, TOKENS, s.ngroups, s.dstate, dtype=dtype), torch.zeros(1, TOKENS, s.nheads, s.headdim, dtype=dtype)
    mask = Mask(tree, {name: _operand(axes, shape) for name, axes, shape in operand_shapes(tree, s)})
    with torch.no_grad():
        ssd(q, q, v, mask, backend="tvm")
    ssd(q, q.requires_grad_(), v, mask, backend="tvm").sum().backward()


def _operand(axes: str, shape: tuple[int, ...]) -> Tensor:
    """Zeros, or documents that are in order."""
    if axes not in n.INTEGER_AXES:
        return torch.zeros(shape, requires_grad=True)
    return torch.linspace(0, TOKENS, shape[0]).to(torch.int32) if len(shape) == 1 else torch.zeros(shape, dtype=torch.int32)
