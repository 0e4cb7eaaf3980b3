"""Compile the launches of scans for GPUs that are not here, and say what they take: a script, run by a test.

`python tests/compile_scan.py > tests/triton_resources.txt` writes the table of them all; with architectures (`80 90`), their
rows, of as many setups as are asked for (`80:3`). Launches are recorded instead of run, so that tiles, switches and types are
the library's own; the tensors are on the meta device and hold nothing.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # pytest imports this file too, to look for doctests
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from compiled import TENSOR_CORES, Compiled, compiled
from torch import Tensor

from ssdops import masks as m
from ssdops.backends.base import Config, Cotangents, Gradients, bind
from ssdops.backends.triton import band, fenwick
from ssdops.backends.triton.backward import Backward
from ssdops.backends.triton.calls import Kernel
from ssdops.backends.triton.channel import ChannelScan
from ssdops.backends.triton.channel_backward import ChannelBackward
from ssdops.backends.triton.launch import Scan
from ssdops.ir.problem import Target, fenwick_levels
from ssdops.ir.terms import Diagonal, Linear
from ssdops.plan import terms_of
from ssdops.testing.structures import Make

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shapes(Make):
    """Makes operands that hold nothing."""

    def normal(self, *shape: int) -> Tensor:
        """Of a shape."""
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def state(self) -> Tensor:
        """A state of each document."""
        return torch.empty(3, self.nheads, self.headdim, self.dstate, device="meta")


def plain(s: Make) -> m.Mask:
    """A decay."""
    return m.decay(s.log())


def undecayed(s: Make) -> m.Mask:
    """What the second scan of a window has: factors, and no decay."""
    return m.causal().T.strict().scale(s.factor(), s.factor())


def documents(s: Make) -> m.Mask:
    """A decay in packed documents."""
    return plain(s) * s.cu


def diagonal(s: Make) -> m.Mask:
    """What a trapezoidal mask is made of: a scan with a diagonal beside it."""
    return m.decay(s.log()).strict().scale(cols=s.factor()) + m.diagonal(s.factor())


def everything(s: Make) -> m.Mask:
    """All that a scan can have."""
    return m.decay(s.log()).shift(1).scale(s.factor(), s.factor(), s.log()) * s.cu


def scaled(s: Make) -> m.Mask:
    """All that gradients can have while every pair of tokens has a decay between it."""
    return m.decay(s.log()).scale(s.factor(), s.factor(), s.log()) * s.cu


def channel(s: Make) -> m.Mask:
    """A decay per channel."""
    return m.channel_decay(s.ranked(s.dstate))


def channels(s: Make) -> m.Mask:
    """All that kernels of decay per channel can have."""
    return (channel(s) * m.decay(s.log())).shift(1) * s.cu


def log_linear(s: Make) -> m.Mask:
    """A Fenwick mask."""
    return m.fenwick(s.log(), s.ranked(fenwick_levels(s.seqlen)))


def log_linear_scaled(s: Make) -> m.Mask:
    """One that gives all that its kernels can have."""
    return log_linear(s).strict().reverse().scale(log_cols=s.log())


MASKS = {
    "channel": channel,
    "channels": channels,
    "decay": plain,
    "documents": documents,
    "scaled": scaled,
    "everything": everything,
    "one": everything,
    "undecayed": undecayed,
    "onto_undecayed": undecayed,
    "relay": plain,
    "onto": plain,
    "onto_documents": documents,
    "onto_everything": everything,
    "diagonal": diagonal,
    "diagonal_onto": diagonal,
    "fenwick": log_linear,
    "fenwicks": log_linear_scaled,
}


@dataclass(frozen=True)
class Setup:
    """What is run: `chunk` None is the backend's choice, and `only` the kernels to look at, if not all.

    With `seqlen` and `nheads` of 1, integers are constants of the kernel, as its compiler has it; with many heads, programs
    of the scan hand states on. A mask named "…onto…" is added to what other terms have made.
    """

    dtype: str
    headdim: int
    dstate: int
    chunk: int | None = None
    mask: str = "decay"
    passes: tuple[str, ...] = ("forward", "backward")
    seqlen: int = 4096
    nheads: int = 24
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is called with; `what` tells it from the others of its setup."""

    what: str
    fn: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def compiled(self, arch: int, **constants: Any) -> Compiled:
        """For sm_{arch}, with other constants if any are given."""
        return compiled(self.fn, self.arguments, {**self.constants, **constants}, arch)


BLOCKWISE: dict[str, Any] = {"passes": ("backward",), "only": ("states", "gradients", "hopper_gradients")}
WINDOW = 512
"""Tokens, of the pass "band"."""
FENWICK = ("fenwick_tree", "fenwick_output", "fenwick_cotangents", "fenwick_inner", "fenwick_across")
CHANNEL = ("channel_states", "channel_output", "channel_gradients")
SETUPS = (
    Setup("bf16", 64, 128, passes=("forward", "segments", "every", "backward")),
    Setup("bf16", 64, 64, mask="channel"),
    Setup("bf16", 64, 128, mask="fenwick"),
    Setup("bf16", 64, 256, passes=("forward",)),
    Setup("bf16", 64, 128, 16, passes=("forward",)),
    Setup("bf16", 64, 128, 64, passes=("forward",)),
    Setup("bf16", 64, 128, mask="undecayed", only=("scan", "gradients", "hopper_gradients")),
    Setup("bf16", 64, 128, mask="relay", passes=("forward",), nheads=512, only=("scan",)),
    Setup("bf16", 64, 16, mask="relay", passes=("forward",), nheads=512, only=("scan",)),
    Setup("bf16", 64, 128, passes=("band",), only=("hopper_band",)),
    Setup("bf16", 64, 128, mask="documents", passes=("forward", "segments"), only=("scan",)),
    Setup("bf16", 64, 128, mask="onto", only=("scan", "gradients", "hopper_gradients")),
    Setup("bf16", 64, 128, mask="onto_documents", passes=("forward", "segments"), only=("scan",)),
    Setup("bf16", 64, 128, mask="onto_everything", **BLOCKWISE),
    Setup("bf16", 64, 128, mask="diagonal"),
    Setup("bf16", 64, 128, mask="diagonal_onto", only=("scan", "hopper_gradients")),
    Setup("bf16", 64, 128, mask="onto_undecayed", only=("scan", "hopper_gradients")),
    Setup("bf16", 64, 128, mask="everything"),
    Setup("bf16", 64, 128, mask="one", seqlen=1, nheads=1),
    Setup("bf16", 64, 128, mask="scaled", **BLOCKWISE),
    Setup("bf16", 64, 256, mask="scaled", **BLOCKWISE),
    Setup("bf16", 16, 16, mask="scaled", passes=("backward",), only=("hopper_gradients",)),
    Setup("bf16", 64, 16, **BLOCKWISE),
    Setup("bf16", 64, 256, **BLOCKWISE),
    Setup("bf16", 128, 128, **BLOCKWISE),
    Setup("bf16", 256, 256, **BLOCKWISE),
    Setup("fp16", 64, 128, passes=("forward",)),
    Setup("fp16", 64, 128, mask="diagonal_onto", passes=("forward",), only=("scan",)),
    Setup("fp16", 64, 128, mask="onto", **BLOCKWISE),
    Setup("fp16", 64, 16, **BLOCKWISE),
    Setup("fp16", 128, 128, **BLOCKWISE),
    Setup("fp16", 256, 256, **BLOCKWISE),
    Setup("fp32", 64, 128, passes=("forward",)),
    Setup("fp32", 64, 128, 64, passes=("forward",)),
    Setup("fp32", 64, 128, mask="diagonal_onto", passes=("forward",), only=("scan",)),
    Setup("fp32", 128, 128, **BLOCKWISE),
    Setup("bf16", 64, 64, mask="channels"),
    Setup("bf16", 64, 128, mask="channel", only=CHANNEL),
    Setup("bf16", 256, 256, mask="channel", only=CHANNEL),
    Setup("fp16", 64, 64, mask="channel", only=CHANNEL),
    Setup("bf16", 64, 128, mask="fenwicks", only=FENWICK),
    Setup("bf16", 256, 256, mask="fenwick", only=FENWICK),
    Setup("fp16", 64, 64, mask="fenwick", only=FENWICK),
    Setup("fp32", 128, 128, mask="fenwick", only=FENWICK),
)


def launches(setup: Setup, arch: int) -> Iterator[Launch]:
    """All that the library launches for a setup."""
    made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, grid: Any, tensors: Sequence[Tensor], numbers: Sequence[float], **constants: Any) -> None:
        made.append((kernel._fn, (*tensors, *numbers), constants))

    Kernel.__call__ = record
    per_channel = setup.mask.startswith("channel")
    full = MASKS[setup.mask] not in (plain, undecayed, diagonal, channel, log_linear, log_linear_scaled)
    make = Shapes(setup.seqlen, setup.nheads, setup.dstate, setup.headdim, DTYPES[setup.dtype], "meta")
    case = make.case(MASKS[setup.mask](make))
    problem = replace(case.problem, target=Target("cuda", "", (arch // 10, arch % 10)))
    term, *beside = terms_of(case.mask.tree)
    for other in beside:
        assert isinstance(term, Linear) and isinstance(other, Diagonal)
        term = replace(term, diagonal=other)
    initial = make.state() if full else None
    x = bind(term, problem, case.q, case.k, case.v, case.mask.operands, initial, 1.0, problem.dtype, full)
    onto = None
    if "onto" in setup.mask:
        like_q = torch.empty(case.q.shape, device="meta")
        like_v = torch.empty(case.v.shape, device="meta", dtype=torch.bfloat16 if setup.dtype == "bf16" else torch.float32)
        x, onto = replace(x, onto=like_v), Gradients(like_q, like_q, like_v)
    for name in setup.passes:
        if name == "band":
            if band.takes(term, problem, WINDOW):
                band.forward(term, x, WINDOW)
        elif (found := fenwick.structure(term)) is not None:
            if name == "backward":
                fenwick.backward(found, x, Config(setup.chunk), Cotangents(case.v))
            else:
                fenwick.forward(found, x, Config(setup.chunk))
        elif name == "backward":
            (ChannelBackward if per_channel else Backward)(term, x, Config(setup.chunk)).backward(
                Cotangents(case.v, initial, onto=onto)
            )
        elif per_channel:
            ChannelScan(term, x, Config(setup.chunk)).forward()
        else:
            given = replace(x, problem=replace(problem, state_every=256), wants_state=True) if name == "every" else x
            Scan(term, given, Config(setup.chunk, 4 if name == "segments" else 1)).forward()
        of = Counter[str]()
        for fn, arguments, constants in made:
            of[fn.__name__] += 1
            what = f"{fn.__name__}:{of[fn.__name__]}"
            if not setup.only or fn.__name__ in setup.only:
                yield Launch(f"{name}:{what}", fn, arguments, constants)
        made.clear()


HEADER = f"""\
# What the kernels of scans take on GPUs. Written by: python tests/compile_scan.py > tests/triton_resources.txt
# launch: pass, kernel, which of that kernel's launches; free: compiled with no limit on registers. tokens: of a chunk, or of
# a block. shared, tensor: a program's bytes of shared memory and columns of tensor memory. stack: a thread's bytes of memory
# for registers that it does not have; reloads: instructions that read them, in loops around products. instructions: those
# of tensor cores. Numbers are one compiler's:
# triton {triton.__version__}
"""
RESOURCES = ("shared", "tensor", "stack", "reloads", "instructions")
COLUMNS = ("sm", "dtype", "headdim", "dstate", "tokens", "mask", "launch", *RESOURCES)


def rows(arch: int, setups: int | None) -> Iterator[tuple[object, ...]]:
    """Those of an architecture, of the first setups or all: launches that differ, each once."""
    seen = set()
    for setup in SETUPS[:setups]:
        for launch in launches(setup, arch):
            limited = launch.constants.get("maxnreg") is not None and launch.what.startswith("forward")
            limited = limited and setup.mask == "decay"
            for suffix, changed in (("", {}), (":free", {"maxnreg": None}))[: 2 if limited else 1]:
                kernel = launch.compiled(arch, **changed)
                if kernel.kernel.hash in seen:
                    continue
                seen.add(kernel.kernel.hash)
                tokens = next(launch.constants[name] for name in ("L", "C", "BLOCK", "TILE") if launch.constants.get(name))
                yield (
                    arch, setup.dtype, setup.headdim, setup.dstate, tokens,
                    setup.mask, launch.what + suffix, kernel.shared, kernel.tensor_memory, kernel.stack, kernel.reloads,
                    kernel.tensor_cores,
                )  # fmt: skip


def main() -> None:
    """Print the table, or the rows of some architectures."""
    if len(sys.argv) == 1:
        print(HEADER + "  ".join(COLUMNS))
    for wanted in sys.argv[1:] or map(str, TENSOR_CORES):
        arch, _, setups = wanted.partition(":")
        for row in rows(int(arch), int(setups) if setups else None):
            print(*row, sep="  ")


if __name__ == "__main__":
    main()
