"""`ssdops explain`: a mask as text and six sizes → what each pass makes of it, and the plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from . import api
from .api import Explanation
from .autotune.choose import ORIGINS
from .cli_common import device_of, dtype_of
from .errors import MaskError, ShapeError
from .ir import nodes as n
from .ir import operands as ops
from .ir.problem import Target, fenwick_levels
from .ir.text import parse, show_operand
from .ir.verify import verify
from .masks import Mask
from .steps import Plan

N_SEGMENTS = 3
"""How many documents a packed row of unknown boundaries is taken to hold."""
OTHER_AXES = (ops.Select, ops.Centre, ops.Main, ops.Mirror, ops.ChannelLog)
"""Expressions of operands whose axes are not those of the slot."""


@dataclass(frozen=True)
class Question:
    """The options of the command, as given."""

    shape: str
    mask: str
    device: str
    dtype: str
    backend: str
    chunk_size: int | None


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call; q and k have `ngroups` heads and v has `nheads`."""

    batch: int
    seqlen: int
    nheads: int
    headdim: int
    ngroups: int
    dstate: int


def run(question: Question, plot: Path | None, console: Console) -> None:
    """Print the explanation, and draw the mask if asked to."""
    sizes = read_shape(question.shape)
    tree = verify(parse(question.mask))
    found = ask(question, tree, sizes)
    for renderable in render(found):
        console.print(renderable)
    if plot is not None:
        from .plot import draw

        draw(tree, sizes.seqlen, plot)
        console.print(Text(f"drawn into {plot}"), soft_wrap=True)


def read_shape(text: str) -> Sizes:
    """The sizes that "B,T,H,P,G,N" spells.

    Raises:
        ShapeError: it is not six positive integers.

    >>> read_shape("1,4096,8,64,1,128")
    Sizes(batch=1, seqlen=4096, nheads=8, headdim=64, ngroups=1, dstate=128)
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 6 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ShapeError(
            f"--shape must be six positive integers B,T,H,P,G,N (batch, seqlen, nheads, headdim, ngroups, dstate), got {text!r}"
        )
    return Sizes(*(int(part) for part in parts))


def ask(question: Question, tree: n.Node, sizes: Sizes) -> Explanation:
    """`ssdops.explain` of the question, on tensors that have shapes and no memory."""
    dtype, device = dtype_of(question.dtype), device_of(question.device)
    here = device.type != "cuda" or torch.cuda.is_available()
    target = Target.of(device) if here else Target(device.type)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    s = sizes
    q, v = empty(s.batch, s.seqlen, s.ngroups, s.dstate), empty(s.batch, s.seqlen, s.nheads, s.headdim)
    operands = {
        name: torch.empty(shape, dtype=torch.int32 if axes in n.INTEGER_AXES else torch.float32, device="meta")
        for name, axes, shape in operand_shapes(tree, s)
    }
    return api.explain(q, q, v, Mask(tree, operands), backend=question.backend, chunk_size=question.chunk_size, target=target)


def operand_shapes(tree: n.Node, sizes: Sizes) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, axes, shape) of every operand, from the axes of its slot.

    Raises:
        MaskError: a name fills slots of different axes, or stands inside an expression that picks its axes apart.
    """
    known = {
        "batch": sizes.batch, "seqlen": sizes.seqlen, "nheads": sizes.nheads, "dstate": sizes.dstate,
        "n_levels": fenwick_levels(sizes.seqlen), "2*seqlen-1": 2 * sizes.seqlen - 1, "n_segments+1": N_SEGMENTS + 1,
    }  # fmt: skip
    seen: dict[str, tuple[str, int]] = {}
    for node in n.walk(tree):
        for slot, axes in n.SLOTS[type(node)]:
            rank = n.rank_of(node) if axes == n.RANK else 1
            x = getattr(node, slot)
            if x is not None and any(isinstance(part, OTHER_AXES) for part in _parts(x)):
                raise MaskError(f"{node}: give {slot} a name; {show_operand(x)} is what passes make of an operand")
            for name in ops.names(x) if x is not None else ():
                if seen.setdefault(name, (axes, rank)) != (axes, rank):
                    first = seen[name][0]
                    raise MaskError(f"{name} is used as ({first}) and as ({axes}); give it two names")
    for name in n.operand_names(tree):
        axes, rank = seen[name]
        yield name, axes, tuple(known.get(axis, rank) for axis in axes.split())


def _parts(x: ops.Operand) -> Iterator[ops.Operand]:
    yield x
    for part in ops.parts(x):
        yield from _parts(part)


# --- printing -------------------------------------------------------------------------------------------------------


def render(found: Explanation) -> Iterator[Table | Text]:
    """What `print(explanation)` says, laid out for a terminal."""
    p = found.problem
    device = " ".join(filter(None, (p.target.device, p.target.name)))
    yield Text(
        f"batch {p.batch}, seqlen {p.seqlen}, nheads {p.nheads} (q {p.q_heads}, k {p.k_heads}, v {p.v_heads}), "
        f"headdim {p.headdim}, dstate {p.dstate}, {str(p.dtype).removeprefix('torch.')} on {device}"
    )
    yield _passes(found)
    yield _plan(found.plan) if found.plan.steps else Text("nothing to run: the mask is zero")


def _passes(found: Explanation) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("after", no_wrap=True)
    table.add_column("mask", overflow="fold")
    table.add_row("as written", Text(found.mask))
    before = found.mask
    for name, text in found.passes:
        table.add_row(name, Text("unchanged", style="dim") if text == before else Text(text))
        before = text
    return table


def _plan(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("term", overflow="fold")
    table.add_column("backend", no_wrap=True)
    table.add_column("cost", no_wrap=True)
    table.add_column("predicted", justify="right", no_wrap=True)
    measured = any(step.measured is not None for step in plan.steps)
    if measured:
        table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for step in plan.steps:
        size = f", chunk_size {step.config.chunk_size}" if step.config.chunk_size else ""
        size += f", segments {step.config.segments}" if step.config.segments > 1 else ""
        times = [f"{step.seconds * 1e3:.3g} ms"]
        if measured:
            times.append("" if step.measured is None else f"{step.measured * 1e3:.3g} ms")
        why = (
            f"taken{size}: {ORIGINS[step.origin]}" if step.along is None else f"along with {plan.steps[step.along].term.node()}"
        )
        taken = Text(why)
        table.add_row(Text(str(step.term.node())), Text(step.backend, style="bold"), f"O({step.growth})", *times, taken)
        for r in step.rejected:
            table.add_row("", Text(r.backend, style="dim"), *("" for _ in ("cost", *times)), Text(r.reason, style="dim"))
        table.add_section()
    return table
