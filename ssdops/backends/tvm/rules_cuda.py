"""Schedules for CUDA GPUs: small rules for kinds of blocks, found by name, and what applies them to a program.

A program is a block of threads: `warps` of 32. Tiles lie in shared memory; barriers are the program's own (`parts.barrier`).
Products of 16-bit numbers are the tensor cores', by warps; others are by threads, each with its sums in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

from tvm.s_tir import Schedule

from . import tensor_cores as tc
from .tile import STRETCH, Tile

WARP, REDUCED = 32, 2
"""Threads of a warp; the kind of a block's axis that is summed over."""
PRODUCTS = {
    "product": ("qt", "kt"), "reads": ("qt", "low"), "values": ("weights", "vt"), "update": ("kt", "vs"),
    "scored": ("dyt", "vt"), "reads_q": ("dyt", "st"), "reads_k": ("vt", "dst"), "values_q": ("weights", "kt"),
    "values_k": ("weights", "qt"),
}  # fmt: skip
"""Blocks that are matrix products, and their operands."""
TURNED = {
    "product": (False, True), "update": (True, False), "scored": (False, True), "reads_q": (False, True),
    "reads_k": (False, True), "values_k": (True, False),
}  # fmt: skip
"""Which operands are held as their transposes, where any is."""
OPAQUE = ("program", "part", "coming", "chunk")
"""Blocks that hold others."""
PADDED = (
    "load_q", "load_k", "load_dy", "get_q", "get_k", "get_dy", "get_v", "get_before", "get_after", "scale_v", "put",
    "clear_low", "clear_out", "clear_other", "show_state", "enter", "give_state",
)  # fmt: skip
"""Blocks that first write tiles of which tensor cores read or write columns: longer rows put them in different banks."""
FILLED = ("load_q", "load_k", "load_dy", "scale_v", "store", "enter", "keep", "leave")
"""Blocks that touch tensors whose heads may be smaller than tiles: then they take one number at a time."""
FETCHED = "get_"
"""How names of blocks begin that copy tiles, ahead of their use by vectors of their own."""
OWN: dict[str, Callable[[str], str]] = {
    "take": tc.take, "round": tc.rounded, "carry": tc.carry, "join": tc.join, "turn": tc.turn,
    "show_state": tc.store, "show_other": tc.store, "give_state": tc.store, "give": partial(tc.rounded, to="global"),
    "take_straight": partial(tc.take, origin="global"), "leave_straight": partial(tc.store, to="global"),
    "give_scored": tc.rounded, "clear_q": tc.fill, "clear_k": tc.fill, "clear_state": tc.fill,
    "gather_q": tc.gather, "gather_k": tc.gather,
    "turn_q": tc.turn, "turn_k": tc.turn, "leave_q": partial(tc.store, to="global"), "leave_k": partial(tc.store, to="global"),
}  # fmt: skip
"""Blocks that take what was summed up, where it was, and the intrinsics that do, by what products multiply."""
SUMS = (
    "summed_t", "weight", "read", "inside", "added", "after", "state", "scored", "read_q", "read_k", "inside_q", "inside_k",
    "sum_q", "sum_k", "next_q", "next_k", "lefts",
)  # fmt: skip
"""Sums that stay where they are made."""
SKEWED = {
    "weigh": (1, 1), "crossed": (0, 1), "load_logs": (0, 9), "row_totals": (0, 4), "col_totals": (0, 4), "beside": (0, 4),
    "apart": (0, 4),
}  # fmt: skip
"""Blocks that write tiles of which threads side by side read columns: which, and how much longer than 32s its rows are."""
DOTS = ("dots_q", "dots_k")
"""Blocks that sum up stretches of rows of what was summed up, times a tile."""
SCALARS = ("place", "owner", "here", "there", "edge")
"""What every thread has, beside single numbers."""
TILES = (
    "qt", "kt", "vt", "vs", "low", "gt", "weights", "out", "full", "passage", "left", "tokens_t", "dyt", "st", "dst", "other",
    "pairs", "row_lanes", "col_lanes", "parts_q", "parts_k", "near_rows", "near_cols", "crossing",
)  # fmt: skip
"""What TVM is to lay over what is not needed any more, which is safe only with a barrier between: see `walk.py`."""
SINGLE = ("pairs", "load_logs", "load_u", "load_w", "leaf_rows", "leaf_cols", "leaf_lags", "give_lags", "give_entries")
"""Blocks that are not taken by vectors."""
COLUMNS = 4
"""Of a product that is not the tensor cores': how many a thread sums up, of as many rows as it takes."""
PADDING = 8
"""Numbers that rows of tiles are longer."""
VECTOR = 16
"""Bytes that a thread moves at once."""


def schedule(program: Any, tile: Tile) -> Any:
    """A program for the threads of a GPU."""
    sch = Schedule(program)
    names = blocks(sch)
    warps = warps_of(sch, names)
    tensor_cores = tile.data in ("float16", "bfloat16")
    if tile.flipped and "weigh" in names:
        sch.transform_layout("put", ("write", 0), lambda i, j: (j, i))
        for name in ("weigh", "put"):
            i, j = sch.get_loops(sch.get_sblock(name))[-2:]
            sch.reorder(j, i)
    for loop, axis in zip(sch.get_loops(sch.get_sblock("program")), "xyz", strict=False):
        sch.bind(loop, f"blockIdx.{axis}")
    lie(sch, names)
    if "load_logs" in names:  # stretches of tokens side by side, which threads read at once
        sch.transform_layout("load_logs", ("write", 0), lambda i, h: (h, i // STRETCH, i % STRETCH))
    for name, (which, offset) in ((name, SKEWED[name]) for name in names if name in SKEWED):
        if which < len(sch.get(sch.get_sblock(name)).writes):
            sch.storage_align(name, which, -2, WARP, offset)
    if tensor_cores:
        for name in (name for name in PADDED if name in names):
            sch.storage_align(name, 0, -2, tc.SIDE, PADDING)  # whichever block writes a tile first
    for name in names:
        if name in PRODUCTS and tensor_cores:
            multiply(sch, name, tile, warps)
        elif name in PRODUCTS:
            multiply_by_threads(sch, name, warps)
        elif name in OWN:
            own(sch, sch.get_sblock(name), warps, OWN[name](tile.data) if tensor_cores else None)
        elif name in ("weigh", "put"):
            by_strips(sch, name, warps)
        elif name in DOTS:
            dot(sch, sch.get_sblock(name), warps, tc.dots(tile.data) if tensor_cores else None)
        elif name not in OPAQUE:
            spread(sch, name, warps, tile)
    return sch.mod


def blocks(sch: Schedule) -> list[str]:
    """Names of a program's blocks, in order, but for barriers, which all have the same."""

    def inside(block: Any) -> Iterator[str]:
        for child in sch.get_child_blocks(block):
            if not (name := sch.get(child).name_hint).startswith("barrier"):
                yield name
            yield from inside(child)

    return list(inside(sch.get_sblock("root")))


def warps_of(sch: Schedule, names: list[str]) -> int:
    """As many as all products can be cut for."""
    products = [sch.get_loops(sch.get_sblock(name))[-3:-1] for name in names if name in PRODUCTS]
    return min((8, *(prod(int(sch.get(loop).extent) for loop in loops) // tc.SIDE**2 for loops in products)))


def lie(sch: Schedule, names: list[str]) -> None:
    """What blocks write for others lies in shared memory, single numbers with every thread, and sums where they are made."""

    def scope(buffer: str) -> str:
        if buffer in (*SUMS, *SCALARS) or numbers[buffer] == 1:
            return "local"
        return tc.SHARED if buffer in TILES else "shared"

    numbers = {
        buffer.name: prod(map(int, buffer.shape))
        for name in OPAQUE
        if name in names
        for buffer in sch.get(sch.get_sblock(name)).alloc_buffers
    }
    for name in names:
        for index, region in enumerate(sch.get(sch.get_sblock(name)).writes):
            buffer = region.source.name
            if name not in OPAQUE and buffer in numbers:
                sch.set_scope(name, index, scope(buffer))


def spread(sch: Schedule, name: str, warps: int, tile: Tile) -> None:
    """A block's elements over threads, vectors at a time; what is summed is summed by a thread, in a register."""
    block = sch.get_sblock(name)
    iters = sch.get(block).iter_vars
    summed = sum(int(i.iter_type) == REDUCED for i in iters)
    out = sch.cache_write(block, 0, "local") if summed else None
    loops = sch.get_loops(block)[-len(iters) :]
    spatial = loops[: len(iters) - summed]
    fetched = name.startswith(FETCHED)
    alone = summed or len(spatial) == 1 or (fetched and tile.ahead) or ((fetched or name in FILLED) and not tile.whole)
    vector = 1 if alone else vector_of(sch, name)
    if prod(int(sch.get(loop).extent) for loop in spatial) % (vector * warps * WARP):
        vector = 1  # rather than have a few threads do it, and others again
    last, lanes = sch.split(spatial[-1], [None, vector])
    fused = sch.fuse(*spatial[:-1], last)
    extent = int(sch.get(fused).extent)
    inside = fused
    if fetched and tile.ahead:
        _, y, inside = sch.split(fused, [None, warps, WARP])  # with a question where there are fewer
        sch.bind(inside, "threadIdx.x")
        sch.bind(y, "threadIdx.y")
    elif extent % WARP == 0:  # else every thread does all of it: of what only some do, TVM forgets who writes single numbers
        y, inside = sch.split(fused, [None, WARP])
        sch.bind(inside, "threadIdx.x")
        if extent % (warps * WARP) == 0:  # else every warp does all of it, and writes what the others write
            again, y = sch.split(y, [None, warps])
            sch.bind(y, "threadIdx.y")
            sch.unroll(again)  # so that loads of all rounds are under way at once
    if out is not None:
        sch.reverse_compute_at(out, inside)
        sch.decompose_reduction(block, sch.get_loops(block)[-summed])
    elif vector > 1:
        sch.vectorize(lanes)


def by_strips(sch: Schedule, name: str, warps: int) -> None:
    """A tile's rows over threads side by side, several rows to each: what one block reads another has in registers."""
    i, j = sch.get_loops(sch.get_sblock(name))[-2:]
    m, n = (int(sch.get(loop).extent) for loop in (i, j))
    rows = min(m, m * n // (warps * WARP))
    it, ii = sch.split(i, [None, rows])
    jt, x, jj = sch.split(j, [None, WARP, m * n // (warps * WARP * rows)])
    sch.reorder(it, jt, x, ii, jj)
    sch.bind(sch.fuse(it, jt), "threadIdx.y")
    sch.bind(x, "threadIdx.x")
    sch.unroll(ii)
    sch.unroll(jj)


def vector_of(sch: Schedule, name: str) -> int:
    """Numbers of 16 bytes, if they are only copied; 4 of those that are worked out."""
    if name in SINGLE:
        return 1  # TVM asks about vectors of int64 in a way that CUDA has not
    block = sch.get(sch.get_sblock(name))
    dtypes = {str(region.source.dtype) for region in (*block.reads, *block.writes)} - {"int64"}
    return 8 if dtypes <= {"float16", "bfloat16"} else 4


def operand(sch: Schedule, block: Any, name: str) -> int:
    """Which of a block's reads is of that buffer."""
    return next(i for i, region in enumerate(sch.get(block).reads) if region.source.name.split("_")[0] == name.split("_")[0])


def sides(sch: Schedule, loop: Any) -> int:
    """Tiles along a loop."""
    return int(sch.get(loop).extent) // tc.SIDE


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
    rows, columns = grid(sides(sch, i), sides(sch, j), warps)
    iw, it, ii = sch.split(i, [rows, None, tc.SIDE])
    jw, jt, jj = sch.split(j, [columns, None, tc.SIDE])
    k0, kk = sch.split(k, [None, tc.SIDE])
    sch.reorder(iw, jw, k0, it, jt, ii, jj, kk)
    inner, outer = block, sch.blockize(ii)
    warp = sch.fuse(iw, jw)
    sch.bind(warp, "threadIdx.y")
    for which, side, turned in ((left, "left", a_turned), (right, "right", b_turned)):
        read = sch.cache_read(outer, operand(sch, outer, which), tc.OWN, consumer_blocks=[outer])
        sch.compute_at(read, k0)
        tiles(sch, read, tc.load(side, turned, tile.data))
    sch.unroll(it)
    sch.unroll(jt)
    init = sch.decompose_reduction(outer, k0)
    sch.tensorize(sch.get_loops(sch.get_child_blocks(init)[0])[-2], tc.fill(tile.data))
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
    rows, columns = grid(sides(sch, i), sides(sch, j), warps)
    iw, it = sch.split(i, [rows, None])
    jw, jt = sch.split(j, [columns, None])
    sch.reorder(iw, jw, it, jt)
    sch.bind(sch.fuse(iw, jw), "threadIdx.y")
    tiles(sch, block, intrinsic)


def dot(sch: Schedule, block: Any, warps: int, intrinsic: str | None) -> None:
    """Sums of stretches of rows, by the warps or threads that have the rows; loops are stretches, then rows."""
    t, i = sch.get_loops(block)[-2:]
    rows, stretches = (int(sch.get(loop).extent) for loop in (i, t))
    if intrinsic is None:
        it, ii = sch.split(i, [None, rows * stretches // (warps * WARP)])
        sch.reorder(it, t, ii)
        y, x = sch.split(sch.fuse(it, t), [warps, WARP])
        sch.bind(y, "threadIdx.y")
        sch.bind(x, "threadIdx.x")
        sch.unroll(ii)
        return
    down, across = grid(rows // tc.SIDE, stretches, warps)
    iw, it, ii = sch.split(i, [down, None, tc.SIDE])
    jw, jt = sch.split(t, [across, None])
    sch.reorder(iw, jw, it, jt, ii)
    sch.bind(sch.fuse(iw, jw), "threadIdx.y")
    sch.unroll(it)
    sch.unroll(jt)
    sch.tensorize(ii, intrinsic)


def multiply_by_threads(sch: Schedule, name: str, warps: int) -> None:
    """A product by threads, each with some rows and columns of it in registers."""
    block = sch.get_sblock(name)
    i, j, k = sch.get_loops(block)[-3:]
    ii, jj = by_own(sch, i, j, warps)
    sch.reorder(k, ii, jj)
    sch.decompose_reduction(block, k)


def by_own(sch: Schedule, i: Any, j: Any, warps: int) -> tuple[Any, Any]:
    """Rows and columns of a tile over threads, a few of both to each, so that they always have the same ones."""
    m, n = (int(sch.get(loop).extent) for loop in (i, j))
    it, ii = sch.split(i, [None, m * n // (warps * WARP * COLUMNS)])
    jt, jj = sch.split(j, [None, COLUMNS])
    sch.reorder(it, jt, ii, jj)
    y, x = sch.split(sch.fuse(it, jt), [warps, WARP])
    sch.bind(y, "threadIdx.y")
    sch.bind(x, "threadIdx.x")
    sch.unroll(ii)
    sch.unroll(jj)
    return ii, jj
