"""From a name and a tile to a compiled program. Importing it imports TVM, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tvm
from tvm.backend import cuda
from tvm.target import Target, codegen

from ...config import tvm_target
from ...errors import UnsupportedError
from . import between, exchange, gradients, group, lower, outputs, pairs, pairs_gpu, rules, settle, targets, toolkit, walk
from .tile import Tile

PROGRAMS = {
    "lines": lower.lines,
    "scores": lower.scores,
    "exchange": exchange.exchange,
    "outputs": outputs.outputs,
    "gradients": gradients.gradients,
    "walk": walk.walk,
    "group": group.group,
    "settle": settle.settle,
    "between": between.between,
    "collect": settle.collect,
    "pairs": pairs.pairs,
    "pairs_gpu": pairs_gpu.pairs_gpu,
}
WRITTEN_OUT = ("gradients", "outputs")
"""Programs whose products are written out (`products.py`). Their buffers are as small as they can be: for TVM to look at every
access of hundreds of them takes it as long as all the rest."""
LONGEST = (*WRITTEN_OUT, "group", "walk")
"""Programs that take long to compile, the longest first."""
LIMITS = {"max_shared_memory_per_block": 227 * 1024, "max_threads_per_block": 1024, "thread_warp_size": 32}
"""Of CUDA's architectures, as TVM wants to be told; `machine.py` keeps to those of each."""


def lowered(name: str, tile: Tile) -> Any:
    """The scheduled program. One at a time: it is parsed by Python, whose parser is not for several threads."""
    return rules.schedule(PROGRAMS[name](tile), tile)


def compiled(name: str, program: Any, tile: Tile, cpu: str | None = None) -> Any:
    """What TVM makes of it, at any time: for this processor, or for one that LLVM has a name for."""
    if tile.target == "cpu":
        left_out = ["s_tir.CompactBufferAllocation"] if name in WRITTEN_OUT else []
        with tvm.transform.PassContext(disabled_pass=left_out):
            return tvm.compile(program, target=processor(cpu))
    toolkit.prepare()
    with for_gpu(tile, "llvm") as target:
        return tvm.compile(program, target=target)


def cuda_text(program: Any, tile: Tile) -> str:
    """A program for GPUs, and what calls it by TVM's FFI and CUDA's runtime, as text for nvcc."""
    with for_gpu(tile, "cuda_host") as target:
        return str(cuda.export_cuda_host(tvm.tirx.build(program, target=target)))


@contextmanager
def for_gpu(tile: Tile, host: str) -> Iterator[Target]:
    """The target of a GPU, and how TVM is to compile for it."""
    target = Target({"kind": "cuda", "arch": tile.target, **LIMITS}, host=host)
    # the program has its own barriers, and its tiles may lie over one another where those allow it
    with target, tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}, disabled_pass=["s_tir.ThreadSync"]):
        yield target


def processor(cpu: str | None) -> Target:
    """The user's target, or this processor; or one that LLVM has a name for.

    Raises:
        UnsupportedError: LLVM knows none of that name.
        ConfigError: of the user's target.
    """
    if cpu is None and (text := tvm_target()):
        return targets.of_user(text)
    if cpu is not None and not targets.known(cpu):
        raise UnsupportedError(f"LLVM knows no processor {cpu!r} here; x86-64-v3 has AVX2, for example")
    return Target({"kind": "llvm", "mcpu": cpu or codegen.llvm_get_system_cpu()})


def features(cpu: str | None) -> list[str]:
    """The instructions that such a processor has, in LLVM's names."""
    return [str(feature) for feature in codegen.llvm_get_cpu_features(processor(cpu))]
