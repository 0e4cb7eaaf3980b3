"""The quadratic form by tiles: scores of a block of rows against a block of keys, weighed by the mask's tile, never stored.

    contract      out_i = scale · Σ_j L_ij ⟨x_i, y_j⟩ z_j
    row_sums      Σ_j G_ij,  G = L ∘ (QKᵀ) ∘ (dY Vᵀ), per row
    lag_sums      the same along each diagonal
    entry_sums    the same per entry, summed over the batch rows and heads that share it

`contract` is Y, and is each gradient of q, k and v with the roles turned and L transposed. The others are the gradients of
the mask's factors. The launcher puts a mask into one form (`quadratic/form.py`), of which a kernel reads what is there:

    L_ij = rows_i · exp2(u_i + w_j) · lags[i − j] · entries_ij · FORMULA_ij · cols_j
                                                                         if low ≤ i − j ≤ high and i − j ≠ hole, else 0

Arguments that come as tuples:

    x, y, z, …: (pointer, strides of batch, token and head, heads of the call that share one of its heads)
    factors:    (u, w, rows, cols, lags, entries, leaves of the formula at rows, columns and lags): pointers, None where the
                mask has no such factor
    strides:    (u's, w's, rows', cols' over batch; entries' over batch, head, i, j; heads that share one of entries'; leaves'
                at rows and at columns over batch and head, at lags over head)
    support:    (low, high, hole or None, first row, row to stop at, first column, column to stop at)

u and w are (batch, nheads, 3, seqlen): a float32, what is left of the float64 sum beyond it, and how many logs that are
not finite were met. rows and cols are (batch, nheads, seqlen), lags (nheads, 2·seqlen − 1). Leaves are float64, (batch, nheads,
leaves, seqlen) and (nheads, leaves, 2·seqlen − 1); FORMULA is a constant, or None (`formula.py`).
"""

import triton
import triton.language as tl

from . import formula
from .formula import LN2


@triton.jit
def tile_of(x, b, h, t, inside, first, D, WIDTH: tl.constexpr):
    """x[b, t, h // shared, first : first + WIDTH] as [t, WIDTH]; zeros past D and where a token is not inside."""
    d = first + tl.arange(0, WIDTH)
    rows = x[0] + tl.cast(b, tl.int64) * x[1] + tl.cast(h // x[4], tl.int64) * x[3] + t.to(tl.int64) * x[2]
    at = rows[:, None] + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def products(
    x, held, y, b, h, i, j, rows_inside, cols_inside, D,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """⟨x_i, y_j⟩: [i, j]. x's tile is held where one step is all it takes; else x and y are read in steps of WIDTH dims."""
    if STEPS == 1:
        y_tile = tile_of(y, b, h, j, cols_inside, 0, D, WIDTH).to(DTYPE)  # [j, D]
        total = tl.dot(held, tl.trans(y_tile), input_precision=PRECISION)
    else:
        total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
        for step in range(0, STEPS):
            x_tile = tile_of(x, b, h, i, rows_inside, step * WIDTH, D, WIDTH).to(DTYPE)
            y_tile = tile_of(y, b, h, j, cols_inside, step * WIDTH, D, WIDTH).to(DTYPE)
            total = tl.dot(x_tile, tl.trans(y_tile), total, input_precision=PRECISION)
    return total


@triton.jit
def token_factors(
    logs, logs_stride, scales, scales_stride, of_formula, leaves_b, leaves_h, b, h, t, inside, T, COUNT: tl.constexpr
):  # fmt: skip
    """The parts of a token's exponent (float32, the rest, odd logs), its scale, and its leaves of the formula."""
    high = tl.zeros(t.shape, tl.float32)
    rest, odd, scale = high, high, high
    if logs is not None:
        at = logs + tl.cast(b, tl.int64) * logs_stride + tl.cast(h, tl.int64) * (3 * T) + t
        high = tl.load(at, mask=inside, other=0.0)
        rest = tl.load(at + T, mask=inside, other=0.0)
        odd = tl.load(at + 2 * T, mask=inside, other=0.0)
    if scales is not None:
        scale = tl.load(scales + tl.cast(b, tl.int64) * scales_stride + tl.cast(h, tl.int64) * T + t, mask=inside, other=0.0)
    found = ()
    if COUNT > 0:
        found = formula.leaves(
            of_formula + tl.cast(b, tl.int64) * leaves_b + tl.cast(h, tl.int64) * leaves_h + t, T, inside, COUNT
        )
    return high, rest, odd, scale, found


@triton.jit
def within(i, j, rows_inside, cols_inside, support):
    """Which pairs the mask has: [i, j]."""
    lag = i[:, None] - j[None, :]
    inside = rows_inside[:, None] & cols_inside[None, :] & (lag >= support[0]) & (lag <= support[1])
    if support[2] is not None:
        inside &= lag != support[2]
    return inside


@triton.jit
def weigh(pairs, of_row, of_col, b, h, i, j, inside, factors, strides, T, FORMULA: tl.constexpr):
    """pairs ∘ L: [i, j]; what is outside is selected away, whatever was computed there."""
    if factors[0] is not None:
        # u_i + w_j is a small difference of long sums: what the float32 sum rounds away (Knuth's TwoSum) is kept in rest
        a, c = of_row[0][:, None], of_col[0][None, :]
        exponent = a + c
        back = exponent - a
        rest = (a - (exponent - back)) + (c - back) + (of_row[1][:, None] + of_col[1][None, :])
        rest = tl.where(of_row[2][:, None] + of_col[2][None, :] == 0.0, rest, float("nan"))
        pairs *= tl.exp2(exponent) * (1.0 + LN2 * rest)
    if factors[2] is not None:
        pairs *= of_row[3][:, None]
    if factors[3] is not None:
        pairs *= of_col[3][None, :]
    if factors[4] is not None:
        lags = factors[4] + tl.cast(h, tl.int64) * (2 * T - 1) + (T - 1)
        pairs *= tl.load(lags + (i[:, None] - j[None, :]), mask=inside, other=0.0)
    if factors[5] is not None:
        entries = factors[5] + tl.cast(b, tl.int64) * strides[4] + tl.cast(h // strides[8], tl.int64) * strides[5]
        at = entries + i.to(tl.int64)[:, None] * strides[6] + j.to(tl.int64)[None, :] * strides[7]
        pairs *= tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if FORMULA is not None:
        at_lags = ()
        if formula.held(FORMULA, "lag") > 0:
            at = factors[8] + tl.cast(h, tl.int64) * strides[13] + (T - 1) + (i[:, None] - j[None, :])
            at_lags = formula.leaves(at, 2 * T - 1, inside, formula.held(FORMULA, "lag"))
        at_rows, at_cols = spread(of_row[4], 1), spread(of_col[4], 0)
        pairs *= formula.value(FORMULA, at_rows, at_cols, at_lags).to(tl.float32)
    return tl.where(inside, pairs, 0.0)


@triton.jit
def spread(leaves, AXIS: tl.constexpr):
    """Leaves of tokens along the other axis of pairs."""
    out = ()
    for k in tl.static_range(len(leaves)):
        out += (tl.expand_dims(leaves[k], AXIS),)
    return out


@triton.jit
def row_factors(factors, strides, b, h, i, inside, T, FORMULA: tl.constexpr):
    """What `weigh` wants to know of rows."""
    COUNT: tl.constexpr = formula.held(FORMULA, "row")
    return token_factors(
        factors[0], strides[0], factors[2], strides[2], factors[6], strides[9], strides[10], b, h, i, inside, T, COUNT
    )  # fmt: skip


@triton.jit
def col_factors(factors, strides, b, h, j, inside, T, FORMULA: tl.constexpr):
    """What `weigh` wants to know of columns."""
    COUNT: tl.constexpr = formula.held(FORMULA, "col")
    return token_factors(
        factors[1], strides[1], factors[3], strides[3], factors[7], strides[11], strides[12], b, h, j, inside, T, COUNT
    )  # fmt: skip


@triton.jit
def limits(table, table_stride, b, tile, support, T, ROWS: tl.constexpr):
    """Rows [i0, i1) of a tile and the columns [j0, j1) that they see: all rows of a tile are in one document."""
    if table is None:
        i0 = tile * ROWS
        i1, j0, j1 = tl.minimum(i0 + ROWS, T), 0, T
    else:
        at = table + tl.cast(b, tl.int64) * table_stride + tile * 4
        i0, i1, j0, j1 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    # low ≤ i − j ≤ high: blocks outside the band are not visited
    j0 = tl.maximum(tl.maximum(j0, support[5]), i0 - support[1])
    j1 = tl.minimum(tl.minimum(j1, support[6]), i1 - support[0])
    return i0, i1, j0, j1


@triton.jit(do_not_specialize=["T", "tiles", "groups"])
def contract(
    out, x, y, z, factors, strides, support, table, table_stride, T, tiles, groups, share, scale, D, E,
    ROWS: tl.constexpr, COLS: tl.constexpr, D_WIDTH: tl.constexpr, D_STEPS: tl.constexpr,
    E_WIDTH: tl.constexpr, E_STEPS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, FORMULA: tl.constexpr,
):  # fmt: skip
    """out[b, i, group, :] = scale · Σ_{h in group} Σ_j L_ij ⟨x_i, y_j⟩ z_j.

    A program for each (batch row, group of heads, tile of rows, step of E_WIDTH dims of z).
    """
    pid = tl.program_id(0)
    first = (pid % E_STEPS) * E_WIDTH
    pid = pid // E_STEPS
    tile, group, b = pid % tiles, (pid // tiles) % groups, pid // (tiles * groups)
    i0, i1, j0, j1 = limits(table, table_stride, b, tile, support, T, ROWS)
    i = i0 + tl.arange(0, ROWS)
    real = i < i1
    rows_inside = real & (i >= support[3]) & (i < support[4])
    total = tl.zeros([ROWS, E_WIDTH], tl.float32)
    for h in tl.range(group * share, (group + 1) * share, disable_licm=True):  # what is hoisted would be spilled
        x_tile = tile_of(x, b, h, i, rows_inside, 0, D, D_WIDTH).to(DTYPE)  # [i, D]
        of_row = row_factors(factors, strides, b, h, i, rows_inside, T, FORMULA)
        for start in range(j0, j1, COLS):
            j = start + tl.arange(0, COLS)
            cols_inside = j < j1
            pairs = products(
                x, x_tile, y, b, h, i, j, rows_inside, cols_inside, D, D_WIDTH, D_STEPS, DTYPE, PRECISION
            )  # fmt: skip
            of_col = col_factors(factors, strides, b, h, j, cols_inside, T, FORMULA)
            inside = within(i, j, rows_inside, cols_inside, support)
            pairs = weigh(pairs, of_row, of_col, b, h, i, j, inside, factors, strides, T, FORMULA)
            z_tile = tile_of(z, b, h, j, cols_inside, first, E, E_WIDTH).to(DTYPE)  # [j, E]
            total = tl.dot((pairs * scale).to(DTYPE), z_tile, total, input_precision=PRECISION)  # [i, E]
    e = first + tl.arange(0, E_WIDTH)
    start = out + ((tl.cast(b, tl.int64) * T + i0) * groups + group) * E
    at = start + (i - i0)[:, None] * (groups * E) + e[None, :]
    # a row without any support is 0, also where 0 · NaN came out of the dot
    tl.store(at, tl.where(rows_inside[:, None], total, 0.0), mask=real[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["zero", "T", "tiles", "nheads"])
def row_sums(
    out, x, y, g, z, factors, strides, support, table, table_stride, zero, T, tiles, nheads, scale, D, E,
    ROWS: tl.constexpr, COLS: tl.constexpr, D_WIDTH: tl.constexpr, D_STEPS: tl.constexpr,
    E_WIDTH: tl.constexpr, E_STEPS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, FORMULA: tl.constexpr,
):  # fmt: skip
    """out[b, h, 0, i] = scale · Σ_j L_ij ⟨x_i, y_j⟩ ⟨g_i, z_j⟩ without the pair at i − j = zero, which is out[b, h, 1, i].

    A pair with no decay between its tokens moves with no decay: left in the sum, it would drown what strong decays leave of
    the others.
    """
    pid = tl.program_id(0)
    tile, h, b = pid % tiles, (pid // tiles) % nheads, pid // (tiles * nheads)
    i0, i1, j0, j1 = limits(table, table_stride, b, tile, support, T, ROWS)
    i = i0 + tl.arange(0, ROWS)
    real = i < i1
    rows_inside = real & (i >= support[3]) & (i < support[4])
    apart, at_zero = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    x_tile = tile_of(x, b, h, i, rows_inside, 0, D, D_WIDTH).to(DTYPE)  # [i, D]
    g_tile = tile_of(g, b, h, i, rows_inside, 0, E, E_WIDTH).to(DTYPE)  # [i, E]
    of_row = row_factors(factors, strides, b, h, i, rows_inside, T, FORMULA)
    for start in range(j0, j1, COLS):
        j = start + tl.arange(0, COLS)
        cols_inside = j < j1
        pairs = products(x, x_tile, y, b, h, i, j, rows_inside, cols_inside, D, D_WIDTH, D_STEPS, DTYPE, PRECISION)
        pairs *= products(g, g_tile, z, b, h, i, j, rows_inside, cols_inside, E, E_WIDTH, E_STEPS, DTYPE, PRECISION)
        of_col = col_factors(factors, strides, b, h, j, cols_inside, T, FORMULA)
        inside = within(i, j, rows_inside, cols_inside, support)
        pairs = weigh(pairs, of_row, of_col, b, h, i, j, inside, factors, strides, T, FORMULA)
        still = i[:, None] - j[None, :] == zero
        apart += tl.sum(tl.where(still, 0.0, pairs), 1)
        at_zero += tl.sum(tl.where(still, pairs, 0.0), 1)
    at = out + (tl.cast(b, tl.int64) * nheads + h) * 2 * T + i
    tl.store(at, apart * scale, mask=real)
    tl.store(at + T, at_zero * scale, mask=real)


@triton.jit
def dl_tile(
    x, y, g, z, factors, strides, support, spans, spans_stride, b, h, i, j, T, D, E,
    D_WIDTH: tl.constexpr, D_STEPS: tl.constexpr, E_WIDTH: tl.constexpr, E_STEPS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, FORMULA: tl.constexpr,
):  # fmt: skip
    """L ∘ (X Yᵀ) ∘ (G Zᵀ) at rows i and columns j of any documents: [i, j]."""
    rows_inside = (i < T) & (i >= support[3]) & (i < support[4])
    cols_inside = (j < T) & (j >= support[5]) & (j < support[6])
    x_tile = tile_of(x, b, h, i, rows_inside, 0, D, D_WIDTH).to(DTYPE)
    pairs = products(x, x_tile, y, b, h, i, j, rows_inside, cols_inside, D, D_WIDTH, D_STEPS, DTYPE, PRECISION)
    g_tile = tile_of(g, b, h, i, rows_inside, 0, E, E_WIDTH).to(DTYPE)
    pairs *= products(g, g_tile, z, b, h, i, j, rows_inside, cols_inside, E, E_WIDTH, E_STEPS, DTYPE, PRECISION)
    inside = within(i, j, rows_inside, cols_inside, support)
    if spans is not None:  # the columns [start, stop) of each row's document
        at = spans + tl.cast(b, tl.int64) * spans_stride + i
        start, stop = tl.load(at, mask=rows_inside, other=0), tl.load(at + T, mask=rows_inside, other=0)
        inside &= (j[None, :] >= start[:, None]) & (j[None, :] < stop[:, None])
    of_row = row_factors(factors, strides, b, h, i, rows_inside, T, FORMULA)
    of_col = col_factors(factors, strides, b, h, j, cols_inside, T, FORMULA)
    return weigh(pairs, of_row, of_col, b, h, i, j, inside, factors, strides, T, FORMULA)


@triton.jit(do_not_specialize=["T", "first", "diagonals", "nheads"])
def lag_sums(
    out, x, y, g, z, factors, strides, support, spans, spans_stride, T, first, diagonals, nheads, scale, D, E,
    SIZE: tl.constexpr, D_WIDTH: tl.constexpr, D_STEPS: tl.constexpr, E_WIDTH: tl.constexpr, E_STEPS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, FORMULA: tl.constexpr,
):  # fmt: skip
    """out[b, h, d, r] = scale · Σ G over i − j = (first + d) · SIZE + r − (SIZE − 1), within the block diagonal first + d.

    All tiles of a block diagonal have the same lag at the same place: they are summed as they are, and only their sum along
    its diagonals.
    """
    pid = tl.program_id(0)
    diagonal, h, b = pid % diagonals, (pid // diagonals) % nheads, pid // (diagonals * nheads)
    apart, blocks = first + diagonal, tl.cdiv(T, SIZE)
    row, col = tl.arange(0, SIZE), tl.arange(0, SIZE)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for block in range(tl.maximum(apart, 0), tl.minimum(blocks, blocks + apart)):
        total += dl_tile(
            x, y, g, z, factors, strides, support, spans, spans_stride, b, h, block * SIZE + row, (block - apart) * SIZE + col,
            T, D, E, D_WIDTH, D_STEPS, E_WIDTH, E_STEPS, DTYPE, PRECISION, FORMULA,
        )  # fmt: skip
    lag = row[:, None] - col[None, :] + (SIZE - 1)
    at = out + ((tl.cast(b, tl.int64) * nheads + h) * diagonals + diagonal) * (2 * SIZE)
    for r in range(0, 2 * SIZE):  # the last is empty
        tl.store(at + r, tl.sum(tl.sum(tl.where(lag == r, total, 0.0), 1), 0) * scale)


@triton.jit(do_not_specialize=["T", "tiles", "heads", "rows_shared", "heads_shared"])
def entry_sums(
    out, x, y, g, z, factors, strides, support, spans, spans_stride, T, tiles, heads, rows_shared, heads_shared, scale, D, E,
    SIZE: tl.constexpr, D_WIDTH: tl.constexpr, D_STEPS: tl.constexpr, E_WIDTH: tl.constexpr, E_STEPS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, FORMULA: tl.constexpr,
):  # fmt: skip
    """out[b', h', i, j] = scale · Σ G_ij over the batch rows and heads that share an entry: a program for each tile."""
    pid = tl.program_id(0)
    across, down = pid % tiles, (pid // tiles) % tiles
    head, row = (pid // (tiles * tiles)) % heads, pid // (tiles * tiles * heads)
    i, j = down * SIZE + tl.arange(0, SIZE), across * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    least, greatest = (down - across) * SIZE - (SIZE - 1), (down - across) * SIZE + (SIZE - 1)
    meets = (greatest >= support[0]) & (least <= support[1])  # else no entry of the tile is in the band
    for b in range(row * rows_shared, tl.where(meets, (row + 1) * rows_shared, 0)):
        for h in range(head * heads_shared, (head + 1) * heads_shared):
            total += dl_tile(
                x, y, g, z, factors, strides, support, spans, spans_stride, b, h, i, j,
                T, D, E, D_WIDTH, D_STEPS, E_WIDTH, E_STEPS, DTYPE, PRECISION, FORMULA,
            )  # fmt: skip
    at = out + ((tl.cast(row, tl.int64) * heads + head) * T + i[:, None]) * T + j[None, :]
    tl.store(at, total * scale, mask=(i < T)[:, None] & (j < T)[None, :])
