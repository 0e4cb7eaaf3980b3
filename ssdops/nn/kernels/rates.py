"""Step sizes and the logs of decays from what a projection gives: each program walks some tiles of rows.

A row is a token; its columns are heads, of one direction after another, which share bias and A. A tile is [ROWS, BLOCK]; what
belongs to a column is read once by a program, and summed over its rows in registers.
"""

import triton
import triton.language as tl


@triton.jit
def softplus(x, TERMS: tl.constexpr):
    """log(1 + exp(x)) = max(x, 0) + 2 artanh(s), s = u / (2 + u), u = exp(−|x|), by TERMS of its series: s is at most a third.

    A logarithm of 1 + u would lose the digits of u; those of a GPU lose more.
    """
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    square = s * s
    series = tl.zeros_like(x)
    for term in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - term) - 1)
    return tl.where(x > 0, x, tl.zeros_like(x)) + 2.0 * s * series


@triton.jit
def clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x within limits, which a NaN passes."""
    x = tl.where(x < LOW, tl.full(x.shape, LOW, x.dtype), x)
    return tl.where(x > HIGH, tl.full(x.shape, HIGH, x.dtype), x)


@triton.jit
def columns_of(bias, a, HEADS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, LOG: tl.constexpr, ACC: tl.constexpr):
    """The columns, whether they are some, and bias and A of each, `[1, BLOCK]`; A = −exp(a) if LOG."""
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < COLUMNS
    b = tl.load(bias + at % HEADS, mask=inside, other=0.0).to(ACC)
    rate = tl.load(a + at % HEADS, mask=inside, other=0.0).to(ACC)
    if LOG:
        rate = -tl.exp(rate)
    return at, inside, b, rate


@triton.jit
def biased(dt, start, rows, dt_row, at, inside, b, ROWS: tl.constexpr, BIASED: tl.constexpr, ACC: tl.constexpr):
    """The rows of a tile, `[ROWS, 1]`, where it has elements, and dt + bias there, `[ROWS, BLOCK]`."""
    row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    here = inside & (row < rows)
    x = tl.load(dt + row * dt_row + at, mask=here, other=0.0).to(ACC)
    return row, here, x + b if BIASED else x


@triton.jit
def discretize(
    dt, bias, a, steps, logs, rows, per_program, dt_row,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BIASED: tl.constexpr, SOFTPLUS: tl.constexpr, LOG: tl.constexpr, TERMS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """steps = clamp(softplus(dt + bias)) and logs = steps · A, `[rows, COLUMNS]`. Grid: parts of the rows."""
    at, inside, b, rate = columns_of(bias, a, HEADS, COLUMNS, BLOCK, LOG, ACC)
    first = tl.program_id(0) * per_program
    for start in range(first, tl.minimum(first + per_program, rows), ROWS):
        row, here, x = biased(dt, start, rows, dt_row, at, inside, b, ROWS, BIASED, ACC)
        if SOFTPLUS:
            x = softplus(x, TERMS)
        x = clamp(x, LOW, HIGH)
        tl.store(steps + row * COLUMNS + at, x, mask=here)
        tl.store(logs + row * COLUMNS + at, x * rate, mask=here)


@triton.jit
def discretize_gradients(
    dsteps, dlogs, dt, bias, a, ddt, sums, rows, per_program, dsteps_row, dlogs_row, dt_row,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BIASED: tl.constexpr, SOFTPLUS: tl.constexpr, LOG: tl.constexpr, TERMS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ddt; and what these rows add to the gradients of a and bias, `[parts, 2, COLUMNS]`. Grid: that above."""
    at, inside, b, rate = columns_of(bias, a, HEADS, COLUMNS, BLOCK, LOG, ACC)
    dbias, drate = tl.zeros([1, BLOCK], ACC), tl.zeros([1, BLOCK], ACC)
    first = tl.program_id(0) * per_program
    for start in range(first, tl.minimum(first + per_program, rows), ROWS):
        row, here, x = biased(dt, start, rows, dt_row, at, inside, b, ROWS, BIASED, ACC)
        step = softplus(x, TERMS) if SOFTPLUS else x
        free = (step >= LOW) & (step <= HIGH)
        step = clamp(step, LOW, HIGH)
        of_logs = tl.load(dlogs + row * dlogs_row + at, mask=here, other=0.0).to(ACC)
        drate += tl.sum(of_logs * step, axis=0, keep_dims=True)
        dx = tl.load(dsteps + row * dsteps_row + at, mask=here, other=0.0).to(ACC) + of_logs * rate
        if SOFTPLUS:
            dx *= 1.0 / (1.0 + tl.exp(-x))
        dx = tl.where(free & here, dx, 0.0)
        dbias += tl.sum(dx, axis=0, keep_dims=True)
        tl.store(ddt + row * COLUMNS + at, dx.to(ddt.dtype.element_ty), mask=here)
    if LOG:
        drate *= rate
    to = sums + tl.program_id(0).to(tl.int64) * (2 * COLUMNS) + at
    tl.store(to, drate, mask=inside)
    tl.store(to + COLUMNS, dbias, mask=inside)
