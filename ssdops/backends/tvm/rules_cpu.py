"""Schedules for CPUs: small rules for kinds of blocks, found by name, and what applies them to a program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm.s_tir import Schedule

BY_ROWS = (
    "load_logs", "load_lines", "load_q", "load_k", "load_k_ahead", "load_v", "load_dy", "load_g", "scale_v", "scale_v_ahead",
    "scale_dy", "weigh_pairs", "weights", "pairs", "keep", "give", "store", "store_q", "store_k", "store_v",
)  # fmt: skip
"""Blocks that work on rows of a tile, whose last axis is a vector."""
SUMS = ("row_lanes", "col_lanes", "row_sums", "col_sums", "before", "all_sum", "log_lanes")
"""Blocks that add vectors up."""
TURNED = ("turn_k", "turn_v", "turn_d")
"""Blocks that transpose a tile."""
ROWS, BYTES, DEPTH = 4, 64, 4
"""Of scores, the product that GPUs have too (`products.py` has the others, as they are to be): rows and bytes of columns that
are summed in registers, and steps of the sum that are written out."""
VECTOR = 32
"""Bytes of a vector."""


def schedule(program: Any, itemsize: int) -> Any:
    """A program for the threads and vectors of a CPU."""
    sch = Schedule(program)
    there = set(blocks(sch, sch.get_sblock("program")))
    turned = [name for name in TURNED if name in there]
    if "product" in there:  # which takes k by columns, so that they are held as rows, and are vectors
        sch.transform_layout("load_k", ("write", 0), lambda i, m: (m, i))
        turned.append("load_k")
        product(sch, "product", BYTES // itemsize, VECTOR // itemsize)
    for name in BY_ROWS:
        if name in there and name not in turned:
            vectorize(sch, name, VECTOR // itemsize)
    for name in turned:
        transpose(sch, name, VECTOR // itemsize)
    for name in SUMS:
        if name in there:
            accumulate(sch, name, VECTOR // itemsize)
    sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock("program"))))
    return sch.mod


def blocks(sch: Schedule, block: Any) -> Iterator[str]:
    """Names of the blocks inside one. (To ask a schedule for one that is not there makes it print the program, for 20 ms.)"""
    for inner in sch.get_child_blocks(block):
        yield str(sch.get(inner).name_hint)
        yield from blocks(sch, inner)


def product(sch: Schedule, name: str, lanes: int, vector: int) -> None:
    """A product whose sums stay in registers: broadcasts of one operand, vectors of the other."""
    block = sch.get_sblock(name)
    out = sch.cache_write(block, 0, "local")
    i, j, m = sch.get_loops(block)[-3:]
    (i0, i1), (j0, j1), (m0, m1) = sch.split(i, [None, ROWS]), sch.split(j, [None, lanes]), sch.split(m, [None, DEPTH])
    sch.reorder(j0, i0, m0, m1, i1, j1)
    halves, lane = sch.split(j1, [None, vector])
    sch.vectorize(lane)
    for loop in (halves, i1, m1):
        sch.unroll(loop)
    sch.reverse_compute_at(out, i0)
    _, lane = sch.split(sch.get_loops(out)[-1], [None, vector])
    sch.vectorize(lane)
    sch.decompose_reduction(block, m0)


def vectorize(sch: Schedule, name: str, vector: int) -> None:
    """The last axis of a block by vectors."""
    _, lane = sch.split(sch.get_loops(sch.get_sblock(name))[-1], [None, vector])
    sch.vectorize(lane)


def accumulate(sch: Schedule, name: str, vector: int) -> None:
    """A sum of vectors, its last axis but the summed one, in registers."""
    block = sch.get_sblock(name)
    lane, step = sch.get_loops(block)[-2:]
    outer, inner = sch.split(lane, [None, vector])
    sch.reorder(outer, step, inner)
    sch.vectorize(inner)
    sch.decompose_reduction(block, step)


def transpose(sch: Schedule, name: str, vector: int) -> None:
    """A tile that is read by columns: few rows at a time, so that their lines stay in the nearest cache."""
    lane, step = sch.get_loops(sch.get_sblock(name))[-2:]
    outer, inner = sch.split(lane, [None, vector])
    sch.reorder(outer, step, inner)
    sch.vectorize(inner)
