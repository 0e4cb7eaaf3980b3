"""Schedules for CUDA GPUs: small rules for kinds of blocks, found by name, and what applies them to a program.

A program is a block of threads: `warps` of 32. Tiles lie in shared memory, and TVM puts barriers between blocks that write
them and blocks that read them. Products of 16-bit numbers are the tensor cores', by warps; others are by threads, each with
its sums in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

from tvm.s_tir import Schedule

from . import tensor_cores as tc
from .tile import Tile

WARP, REDUCED = 32, 2
"""Threads of a warp; the kind of a block's axis that is summed over."""
PRODUCTS = {"product": ("qt", "kt"), "reads": ("qt", "low"), "values": ("weights", "vt"), "update": ("kt", "vt")}
"""Blocks that are matrix products, and their operands."""
TURNED = {"product": (False, True), "update": (True, False)}
"""Which operands are held as their transposes, where any is."""
TILES = ("qt", "kt", "vt", "low", "weights", "out", "shown", "state")
"""What is so large that TVM is to lay it over what is not needed any more, which is safe only between barriers."""
OPAQUE = ("program", "chunk")
"""Blocks that hold others."""
PADDED = ("load_q", "load_k", "load_v", "round", "weigh", "join", "show", "enter")
"""Blocks that write tiles of which tensor cores read, or write, columns: 16 bytes more a row put them in different banks."""
FILLED = ("load_q", "load_k", "load_v", "store", "enter", "keep", "leave")
"""Blocks that touch tensors whose heads may be smaller than tiles: then they take one number at a time."""
OWN: dict[str, Callable[[], str]] = {"join": tc.joined, "carry": tc.carried, "turn": partial(tc.store, tc.SHARED), "show": partial(tc.store, tc.SHARED),
    "give": partial(tc.store, "global")}
"""Blocks that take what was summed up, where it was, and the intrinsics that do."""
SUMS = ("gt", "read", "inside", "added", "after")
"""Sums that stay where they are made."""
ROWS, COLUMNS = 4, 4
"""Of a product that is not the tensor cores': what a thread sums up."""
VECTOR = 16
"""Bytes that a thread moves at once."""


def schedule(program: Any, tile: Tile) -> Any:
    """A program for the threads of a GPU."""
    sch = Schedule(program)
    names = blocks(sch)
    warps = warps_of(tile, names)
    tensor_cores = tile.data in ("float16", "bfloat16")
    if not tensor_cores and "round" in names:
        sch.compute_inline(sch.get_sblock("round"))
        names.remove("round")
    if tile.flipped and "weigh" in names:
        sch.transform_layout("weigh", ("write", 0), lambda i, j: (j, i))
        i, j = sch.get_loops(sch.get_sblock("weigh"))[-2:]
        sch.reorder(j, i)
    for loop, axis in zip(sch.get_loops(sch.get_sblock("program")), "xyz", strict=False):
        sch.bind(loop, f"blockIdx.{axis}")
    lie(sch, names, tc.SUM if tensor_cores else "local")
    if tensor_cores:
        for name in (name for name in PADDED if name in names):
            sch.storage_align(name, 0, -2, tc.SIDE, VECTOR // 4 if name in ("enter", "join", "show") else VECTOR // 2)
    for name in names:
        if name in PRODUCTS and tensor_cores:
            multiply(sch, name, tile, warps)
        elif name in PRODUCTS:
            multiply_by_threads(sch, name, warps)
        elif name in OWN:
            own(sch, sch.get_sblock(name), warps, OWN[name]() if tensor_cores else None)
        elif name not in OPAQUE and not name.startswith("barrier"):
            spread(sch, name, warps, tile.whole)
    return sch.mod


def blocks(sch: Schedule) -> list[str]:
    """Names of a program's blocks, in order."""

    def inside(block: Any) -> Iterator[str]:
        for child in sch.get_child_blocks(block):
            yield sch.get(child).name_hint
            yield from inside(child)

    return list(inside(sch.get_sblock("root")))


def warps_of(tile: Tile, names: list[str]) -> int:
    """As many as all products can be cut for."""
    if not any(name in PRODUCTS for name in names):
        return tile.chunk // WARP
    out = [(tile.chunk, tile.chunk)] if "product" in names else [(tile.chunk, tile.outer), (tile.inner, tile.outer)]
    return min(8, *(m * n // tc.SIDE**2 for m, n in out))


def lie(sch: Schedule, names: list[str], sums: str) -> None:
    """What blocks write for others lies in shared memory, single numbers with every thread, and sums where they are made."""
    def scope(buffer: str) -> str:
        if buffer in SUMS:
            return sums
        return tc.SHARED if buffer in TILES else "shared" if own[buffer] > 1 else "local"

    own = {
        buffer.name: prod(map(int, buffer.shape))
        for name in OPAQUE
        if name in names
        for buffer in sch.get(sch.get_sblock(name)).alloc_buffers
    }
    for name in names:
        for index, region in enumerate(sch.get(sch.get_sblock(name)).writes):
            buffer = region.source.name
            if name not in OPAQUE and buffer in own:
                sch.set_scope(name, index, scope(buffer))


def spread(sch: Schedule, name: str, warps: int, whole: bool) -> None:
    """A block's elements over threads, vectors at a time; what is summed is summed by a thread, in a register."""
    block = sch.get_sblock(name)
    iters = sch.get(block).iter_vars
    summed = sum(int(i.iter_type) == REDUCED for i in iters)
    out = sch.cache_write(block, 0, "local") if summed else None
    loops = sch.get_loops(block)[-len(iters) :]
    spatial = loops[: len(iters) - summed]
    vector = 1 if summed or len(spatial) == 1 or (name in FILLED and not whole) else vector_of(sch, name)
    last, lanes = sch.split(spatial[-1], [None, vector])
    fused = sch.fuse(*spatial[:-1], last)
    extent = int(sch.get(fused).extent)
    inside = fused
    if extent % WARP == 0:  # else every thread does all of it: TVM puts no barrier into what only some threads do
        y, inside = sch.split(fused, [None, WARP])
        sch.bind(inside, "threadIdx.x")
        if extent % (warps * WARP) == 0:  # else every warp does all of it
            again, y = sch.split(y, [None, warps])
            sch.bind(y, "threadIdx.y")
            sch.unroll(again)  # else TVM puts a barrier into every round
    if out is not None:
        sch.reverse_compute_at(out, inside)
        sch.decompose_reduction(block, sch.get_loops(block)[-summed])
    elif vector > 1:
        sch.vectorize(lanes)


def vector_of(sch: Schedule, name: str) -> int:
    """Numbers of 16 bytes, if they are only copied; 4 of those that are worked out."""
    if name in ("weigh", "pairs"):
        return 1  # TVM asks about vectors of int64 in a way that CUDA has not
    block = sch.get(sch.get_sblock(name))
    dtypes = {str(region.source.dtype) for region in (*block.reads, *block.writes)} - {"int64"}
    return 8 if dtypes <= {"float16", "bfloat16"} else 4


def out_of(sch: Schedule, block: Any) -> Any:
    """What a block writes."""
    (region,) = sch.get(block).writes
    return region.source


def operand(sch: Schedule, block: Any, name: str) -> int:
    """Which of a block's reads is of that buffer."""
    return next(i for i, region in enumerate(sch.get(block).reads) if region.source.name.split("_")[0] == name)


def grid(m: int, n: int, warps: int) -> tuple[int, int]:
    """Rows and columns of warps over so many tiles, as square as they go."""
    fitting = [(r, warps // r) for r in (1, 2, 4, 8) if warps % r == 0 and m % r == 0 and n % (warps // r) == 0]
    return min(fitting, key=lambda rc: m // rc[0] + n // rc[1])


def multiply(sch: Schedule, name: str, tile: Tile, warps: int) -> None:
    """A product by tensor cores: warps over its tiles, sums in fragments."""
    left, right = PRODUCTS[name]
    a_turned, b_turned = TURNED.get(name, (tile.flipped and name == "values", False))
    block = sch.get_sblock(name)
    i, j, k = sch.get_loops(block)[-3:]
    m, n = (int(sch.get(loop).extent) // tc.SIDE for loop in (i, j))
    rows, columns = grid(m, n, warps)
    iw, it, ii = sch.split(i, [rows, None, tc.SIDE])
    jw, jt, jj = sch.split(j, [columns, None, tc.SIDE])
    k0, kk = sch.split(k, [None, tc.SIDE])
    sch.reorder(iw, jw, k0, it, jt, ii, jj, kk)
    inner, outer = block, sch.blockize(ii)
    warp = sch.fuse(iw, jw)
    sch.bind(warp, "threadIdx.y")
    if out_of(sch, outer).scope() != tc.SUM:
        stored = sch.cache_write(outer, 0, tc.SUM)
        sch.reverse_compute_at(stored, warp)
        tiles(sch, stored, tc.store(tc.SHARED))
    for which, side, turned in ((left, tc.A, a_turned), (right, tc.B, b_turned)):
        read = sch.cache_read(outer, operand(sch, outer, which), side, consumer_blocks=[outer])
        sch.compute_at(read, k0)
        tiles(sch, read, tc.load(side, tile.data, turned))
    sch.unroll(it)
    sch.unroll(jt)
    init = sch.decompose_reduction(outer, k0)
    sch.tensorize(sch.get_loops(sch.get_child_blocks(init)[0])[-2], tc.fill())
    sch.tensorize(sch.get_loops(inner)[-3], tc.multiply(tile.data, a_turned, b_turned))


def tiles(sch: Schedule, block: Any, intrinsic: str) -> None:
    """A block by tiles, each an intrinsic."""
    i, j = sch.get_loops(block)[-2:]
    i0, i1 = sch.split(i, [None, tc.SIDE])
    j0, j1 = sch.split(j, [None, tc.SIDE])
    sch.reorder(i0, j0, i1, j1)
    sch.unroll(i0)
    sch.unroll(j0)
    sch.tensorize(i1, intrinsic)


def own(sch: Schedule, block: Any, warps: int, intrinsic: str | None) -> None:
    """A block by the warps, or the threads, that have summed up what it takes."""
    i, j = sch.get_loops(block)[-2:]
    if intrinsic is None:
        by_own(sch, i, j, warps)
        return
    rows, columns = grid(*(int(sch.get(loop).extent) // tc.SIDE for loop in (i, j)), warps)
    iw, it = sch.split(i, [rows, None])
    jw, jt = sch.split(j, [columns, None])
    sch.reorder(iw, jw, it, jt)
    sch.bind(sch.fuse(iw, jw), "threadIdx.y")
    tiles(sch, block, intrinsic)


def multiply_by_threads(sch: Schedule, name: str, warps: int) -> None:
    """A product by threads, each with some rows and columns of it in registers."""
    block = sch.get_sblock(name)
    stored = None
    if out_of(sch, block).scope() != "local":
        stored = sch.cache_write(block, 0, "local")
    i, j, k = sch.get_loops(block)[-3:]
    thread, ii, jj = by_own(sch, i, j, warps)
    sch.reorder(k, ii, jj)
    if stored is not None:
        sch.reverse_compute_at(stored, thread)
    sch.decompose_reduction(block, k)


def by_own(sch: Schedule, i: Any, j: Any, warps: int) -> tuple[Any, Any, Any]:
    """Rows and columns of a tile over threads, a few of both to each, so that they always have the same ones."""
    m, n = (int(sch.get(loop).extent) for loop in (i, j))
    rows = min(ROWS, m * n // (warps * WARP * COLUMNS))
    it, ii = sch.split(i, [None, rows])
    jt, jj = sch.split(j, [None, COLUMNS])
    sch.reorder(it, jt, ii, jj)
    again, y, x = sch.split(sch.fuse(it, jt), [None, warps, WARP])
    sch.bind(y, "threadIdx.y")
    sch.bind(x, "threadIdx.x")
    for loop in (again, ii, jj):
        sch.unroll(loop)
    return x, ii, jj
