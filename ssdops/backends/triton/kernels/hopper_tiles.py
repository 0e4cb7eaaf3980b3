"""Tiles, lines and layouts of `hopper.py`: where what it reads of a head lies, and how it comes there and into registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
TOKEN = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
"""A token to a thread, of 256."""
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def tiles(COUNT: gl.constexpr, T: gl.constexpr, M: gl.constexpr):
    """Room for tiles [T, M] that tensor cores read. What is never used takes none."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([T, M], gl.bfloat16)
    return gl.allocate_shared_memory(gl.bfloat16, [COUNT, T, M], layout)


@gluon.jit
def lines(COUNT: gl.constexpr, T: gl.constexpr):
    """Room for a number per token."""
    return gl.allocate_shared_memory(gl.float32, [COUNT, T], LINE)


@gluon.jit
def fetch(tile, x, length, stride, SIZE: gl.constexpr):
    """Send for rows 0, 1, … of x; zeros come from `length` on and past SIZE."""
    layout: gl.constexpr = coalesced(tile.shape[0], tile.shape[1])
    t, m = gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout)), gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
    inside = (t < length)[:, None] & (m < SIZE)[None, :]
    async_copy.async_copy_global_to_shared(tile, x + t[:, None] * stride + m[None, :], mask=inside)


@gluon.jit
def fetch_head(
    rooms, tensors, line_rooms, line_tensors, base, length, h, hi, v_share, v_t, v_h, y_t, y_h, stage,
    BLOCK: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Send for what there is room for, of S, V, dY and dS, and of ρ, κ, u, w and d of a head, if there is one."""
    s_room, v_room, y_room, ds_room = rooms
    states, v, dy, dstates = tensors
    if h < hi:
        if s_room is not None:
            fetch(s_room.index(stage), states + (base + h) * P * N, P, N, N)
        if v_room is not None:
            fetch(v_room.index(stage), v + (h // v_share) * v_h, length, v_t, P)
        if y_room is not None:
            fetch(y_room.index(stage), dy + h * y_h, length, y_t, P)
        if ds_room is not None:
            fetch(ds_room.index(stage), dstates + (base + h) * P * N, P, N, N)
        line = (base + h) * BLOCK + gl.arange(0, BLOCK, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
        for each in gl.static_range(5):
            if line_rooms[each] is not None:
                async_copy.async_copy_global_to_shared(line_rooms[each].index(stage), line_tensors[each] + line)
    async_copy.commit_group()


# --- registers --------------------------------------------------------------------------------------------------------------


@gluon.jit
def rows_of(tile, layout: gl.constexpr):
    """A tile in registers, as a product with as many columns has it."""
    return gl.convert_layout(tile.load(gl.DotOperandLayout(0, layout, 2)), layout).to(gl.float32)


@gluon.jit
def operand_of(x, layout: gl.constexpr):
    """A product in registers as the left operand of another, whose layout is given: its rows are where they are wanted."""
    return gl.convert_layout(x.to(gl.bfloat16), gl.DotOperandLayout(0, layout, 2))


@gluon.jit
def sums_by_warp(x):
    """The sums of x, `[j, i]`, over the rows of each warp: lanes trade a row for another's column, and are left with half."""
    warps: gl.constexpr = gl.num_warps()
    x = gl.sum(gl.reshape(x, [warps, 2, 8, x.shape[1]]), 1)
    for rows in gl.static_range(3):
        x = gl.reshape(x, [warps, 4 >> rows, 2, x.shape[2]])
        x = gl.sum(gl.convert_layout(x, traded(rows, x.shape)), 2)
    return gl.reshape(x, [warps, x.shape[2]])


# --- layouts ------------------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def coalesced(T, M):
    """Of tiles [T, M], sixteen bytes to a thread at a time."""
    lanes = min(M // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [8, 1], [1, 0])


@gluon.constexpr_function
def whole_sectors(T, M):
    """As products have tiles [T, M], but for a bit of columns: what four lanes store is 32 bytes."""
    wide = [[0, 1 << bit] for bit in range(4, M.bit_length() - 1)]
    warps = [[16 << bit, 0] for bit in range((T // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], *wide, [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], warps, [], [T, M]
    )


@gluon.constexpr_function
def traded(rows, shape):
    """Of sums `[warp, row, 2, column]` with `rows` bits of rows summed: the next bit has gone from lanes to registers."""
    warps, _, _, columns = shape
    column = [[0, 0, 0, 1 << bit] for bit in range(columns.bit_length() - 1)]
    far = column[:2:-1]
    lanes = [*column[1:3], *far[: rows + 1], *([0, 1 << bit, 0, 0] for bit in range(2 - rows))]
    registers = [column[0], *far[:rows:-1], [0, 0, 1, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[1 << bit, 0, 0, 0] for bit in range(warps.bit_length() - 1)], [], shape
    )
