"""The skip connection and the gate after a scan: each program walks some tiles of rows, over some channels.

A tile is [ROWS, BLOCK]; D is read once by a program, and its gradient summed over the rows in registers. Rows go by their
strides in units of ALIGN elements, by which the compiler knows how wide it may load.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(x, row, x_row, c, here, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """A tile of x, [ROWS, BLOCK], zero outside."""
    return tl.load(x + row * x_row * ALIGN + c, mask=here, other=0.0).to(ACC)


@triton.jit
def gated_skip(
    y, x, d, z, out, rows, per_program, y_row, x_row, z_row,
    CHANNELS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    Y_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr,
    SKIP: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out, `[rows, CHANNELS]`; SHARE channels have one value of D. Grid: parts of the rows, blocks of channels."""
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if SKIP:
        share = tl.load(d + c // SHARE, mask=c < CHANNELS, other=0.0).to(ACC)
    first = tl.program_id(0) * per_program
    for start in range(first, tl.minimum(first + per_program, rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        here = (row < rows) & (c < CHANNELS)
        u = tile_of(y, row, y_row, c, here, Y_ALIGN, ACC)
        if SKIP:
            u += share * tile_of(x, row, x_row, c, here, X_ALIGN, ACC)
        if GATE:
            gate = tile_of(z, row, z_row, c, here, Z_ALIGN, ACC)
            u *= gate / (1.0 + tl.exp(-gate))
        tl.store(out + row * CHANNELS + c, u.to(out.dtype.element_ty), mask=here)


@triton.jit
def gated_skip_gradients(
    dout, y, x, d, z, dy, dx, dz, sums, rows, per_program, dout_row, y_row, x_row, z_row,
    CHANNELS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    D_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr,
    SKIP: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dy; dx and what these rows add to the gradient of D, `[parts, CHANNELS]`, if SKIP; dz if GATE. Grid: that above."""
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dd = tl.zeros([1, BLOCK], ACC)
    if SKIP:
        share = tl.load(d + c // SHARE, mask=c < CHANNELS, other=0.0).to(ACC)
    first = tl.program_id(0) * per_program
    for start in range(first, tl.minimum(first + per_program, rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        here = (row < rows) & (c < CHANNELS)
        to = row * CHANNELS + c
        du = tile_of(dout, row, dout_row, c, here, D_ALIGN, ACC)
        if SKIP:
            skipped = tile_of(x, row, x_row, c, here, X_ALIGN, ACC)
        if GATE:
            u = tile_of(y, row, y_row, c, here, Y_ALIGN, ACC)
            if SKIP:
                u += share * skipped
            gate = tile_of(z, row, z_row, c, here, Z_ALIGN, ACC)
            sigmoid = 1.0 / (1.0 + tl.exp(-gate))
            tl.store(dz + to, (du * u * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dz.dtype.element_ty), mask=here)
            du *= gate * sigmoid
        tl.store(dy + to, du.to(dy.dtype.element_ty), mask=here)
        if SKIP:
            tl.store(dx + to, (du * share).to(dx.dtype.element_ty), mask=here)
            dd += tl.sum(du * skipped, axis=0, keep_dims=True)
    if SKIP:
        tl.store(sums + tl.program_id(0).to(tl.int64) * CHANNELS + c, dd, mask=c < CHANNELS)
