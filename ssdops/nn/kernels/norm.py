"""The gated RMSNorm, with the skip connection that stands before it in a block: each program walks some rows of one group.

u = y + D · x is what is normalised, gated before or after. All of a row's group is in registers, [BLOCK], so that each tensor
is read once and each result written once; the backward pass reckons the forward one again from the same reads. Rows go by their
strides in units of ALIGN elements, by which the compiler knows how wide it may load.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(x, row, row_stride, c, inside, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """The group's part of a row, [BLOCK], zero past its end."""
    return tl.load(x + tl.cast(row, tl.int64) * row_stride * ALIGN + c, mask=inside, other=0.0).to(ACC)


@triton.jit
def place(per_program, rows, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows [first, stop), and the channels of its group with whether they are some."""
    group, first = tl.program_id(0) % GROUPS, tl.program_id(0) // GROUPS * per_program
    at = tl.arange(0, BLOCK)
    return first, tl.minimum(first + per_program, rows), group * SIZE + at, at < SIZE


@triton.jit
def inverse_root(x):
    """1 / √x, rounded as its dtype is: that of float64, as tl.rsqrt has it, is right to 28 bits on GPUs."""
    return 1.0 / tl.sqrt(x)


@triton.jit
def gated_norm(
    y, z, weight, x, d, out, rows, per_program, y_row, z_row, x_row,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr,
    Y_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr,
    BEFORE: tl.constexpr, SKIP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out, `[rows, channels]`; SHARE channels have one value of D. Grid: groups · parts of the rows."""
    first, stop, c, inside = place(per_program, rows, GROUPS, SIZE, BLOCK)
    w = tl.load(weight + c, mask=inside, other=0.0).to(ACC)
    if SKIP:
        share = tl.load(d + c // SHARE, mask=inside, other=0.0).to(ACC)
    for row in range(first, stop):
        u = row_of(y, row, y_row, c, inside, Y_ALIGN, ACC)
        if SKIP:
            u += share * row_of(x, row, x_row, c, inside, X_ALIGN, ACC)
        gate = row_of(z, row, z_row, c, inside, Z_ALIGN, ACC)
        gate *= 1.0 / (1.0 + tl.exp(-gate))
        if not BEFORE:
            u *= gate
        u *= inverse_root(tl.sum(u * u, axis=0) / SIZE + EPS) * w
        if BEFORE:
            u *= gate
        tl.store(out + tl.cast(row, tl.int64) * (GROUPS * SIZE) + c, u.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm_gradients(
    dout, y, z, weight, x, d, dy, dz, dx, sums, rows, per_program, dout_row, y_row, z_row, x_row,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr,
    D_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr,
    BEFORE: tl.constexpr, SKIP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dy, dz and dx; and what these rows add to the gradients of weight and D, `[parts, 2, channels]`. Grid: that above."""
    first, stop, c, inside = place(per_program, rows, GROUPS, SIZE, BLOCK)
    w = tl.load(weight + c, mask=inside, other=0.0).to(ACC)
    dweight, dd = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    if SKIP:
        share = tl.load(d + c // SHARE, mask=inside, other=0.0).to(ACC)
    for row in range(first, stop):
        u = row_of(y, row, y_row, c, inside, Y_ALIGN, ACC)
        if SKIP:
            skipped = row_of(x, row, x_row, c, inside, X_ALIGN, ACC)
            u += share * skipped
        own = row_of(z, row, z_row, c, inside, Z_ALIGN, ACC)
        sigmoid = 1.0 / (1.0 + tl.exp(-own))
        gate, slope = own * sigmoid, sigmoid * (1.0 + own * (1.0 - sigmoid))
        given = row_of(dout, row, dout_row, c, inside, D_ALIGN, ACC)
        normed = u if BEFORE else u * gate
        scale = inverse_root(tl.sum(normed * normed, axis=0) / SIZE + EPS)
        normed *= scale
        back = given * gate if BEFORE else given  # the cotangent of w · normed
        dweight += back * normed
        back *= w
        back = scale * (back - normed * (tl.sum(back * normed, axis=0) / SIZE))
        if BEFORE:
            dgate, du = given * normed * w, back
        else:
            dgate, du = back * u, back * gate
        at = tl.cast(row, tl.int64) * (GROUPS * SIZE) + c
        tl.store(dz + at, (dgate * slope).to(dz.dtype.element_ty), mask=inside)
        tl.store(dy + at, du.to(dy.dtype.element_ty), mask=inside)
        if SKIP:
            dd += du * skipped
            tl.store(dx + at, (du * share).to(dx.dtype.element_ty), mask=inside)
    to = sums + (tl.program_id(0) // GROUPS).to(tl.int64) * (2 * GROUPS * SIZE) + c
    tl.store(to, dweight, mask=inside)
    tl.store(to + GROUPS * SIZE, dd, mask=inside)
