"""The causal depthwise convolution, bound by its bytes: each program walks some tokens of some channels, TOKENS at a time.

What TOKENS outputs need is loaded first, all at once, and stays in registers as one vector [BLOCK] per token; the tokens before
come out of the cache, where a neighbour has read them. Pointers to x and dy go by their strides in units of ALIGN elements, by
which the compiler knows how wide it may load. `position` is a token's place in its document: a tap that reaches over the
document's start reads the window of the document instead, or zero, and what lies there is selected away.
"""

import triton
import triton.language as tl


@triton.jit
def place(seqlen, span, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row, its tokens [start, stop), and its channels, [BLOCK]."""
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    spans = (seqlen + span - 1) // span
    program = tl.program_id(0)
    start = program // blocks % spans * span
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks // spans).to(tl.int64), start, tl.minimum(start + span, seqlen), c


@triton.jit
def taps_of(weight, c, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """The taps of channels, the one on the token itself last: a tuple of [BLOCK]."""
    taps = ()
    for tap in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + c * WIDTH + tap, mask=c < CHANNELS, other=0.0).to(ACC),)
    return taps


@triton.jit
def bias_of(bias, c, CHANNELS: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr):
    """The bias of channels, or zero."""
    if BIAS:
        return tl.load(bias + c, mask=c < CHANNELS, other=0.0).to(ACC)
    else:
        return tl.zeros(c.shape, ACC)


@triton.jit
def rows_of(
    x, row, first, seqlen, c, row_stride, token_stride,
    CHANNELS: tl.constexpr, COUNT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """x of tokens first … first + COUNT − 1, each [BLOCK]; zero where there is no such token."""
    rows = ()
    for i in tl.static_range(COUNT):
        t = first + i
        at = x + (row * row_stride + t.to(tl.int64) * token_stride) * ALIGN
        rows = rows + (tl.load(at + c, mask=(c < CHANNELS) & (t >= 0) & (t < seqlen), other=0.0),)
    return rows


@triton.jit
def places_of(position, row, first, seqlen, COUNT: tl.constexpr, PACKED: tl.constexpr):
    """The places of tokens first … first + COUNT − 1 in their documents; past the end of the row, where no window is read."""
    places = ()
    for i in tl.static_range(COUNT):
        t = first + i
        if PACKED:
            t = tl.load(position + row * seqlen + t, mask=t < seqlen, other=1 << 20).to(tl.int32)
        places = places + (t,)
    return places


@triton.jit
def document_of(documents, row, t, seqlen, PACKED: tl.constexpr, WINDOW: tl.constexpr):
    """The row of the window of a token's document."""
    if PACKED and WINDOW:
        return tl.load(documents + row * seqlen + t, mask=t < seqlen, other=0).to(tl.int64)
    else:
        return row


@triton.jit
def reached(
    rows, at: tl.constexpr, place, window, document, c,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What each tap reads of token `at` of `rows`, whose place in its document is given: a tuple of [BLOCK], as taps are.

    Unpacked, only the WIDTH − 1 tokens before a block can lie before the sequence, and `rows` has zeros there.
    """
    values = ()
    for lag in tl.static_range(WIDTH - 1, -1, -1):
        value = rows[at - lag].to(ACC)
        if lag > 0:
            if WINDOW and (PACKED or at - lag < WIDTH - 1):
                if place < lag:  # a branch, as such tokens are few, and a load that is masked off still takes its registers
                    before = window + (document * CHANNELS + c) * (WIDTH - 1) + (WIDTH - 1 + place - lag)
                    value = tl.load(before, mask=c < CHANNELS, other=0.0).to(ACC)
            elif PACKED:
                value = tl.where(place >= lag, value, 0.0)
        values = values + (value,)
    return values


@triton.jit
def weighted(taps, values, bias, WIDTH: tl.constexpr):
    """bias + Σ taps · values."""
    total = bias
    for tap in tl.static_range(WIDTH):
        total += taps[tap] * values[tap]
    return total


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x)), in the dtype of x."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def through(dy, pre, SILU: tl.constexpr):
    """The cotangent of what goes into the activation."""
    if SILU:
        s = sigmoid(pre)
        return dy * s * (1.0 + pre * (1.0 - s))
    else:
        return dy


@triton.jit
def conv(
    x, weight, bias, window, position, documents, y,
    seqlen, span, x_row, x_token,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ALIGN: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = act(bias + Σ taps · x). Grid: rows · spans of tokens · blocks of channels."""
    row, start, stop, c = place(seqlen, span, CHANNELS, BLOCK)
    taps, b = taps_of(weight, c, CHANNELS, WIDTH, ACC), bias_of(bias, c, CHANNELS, BIAS, ACC)
    for first in range(start, stop, TOKENS):
        rows = rows_of(x, row, first - WIDTH + 1, seqlen, c, x_row, x_token, CHANNELS, WIDTH - 1 + TOKENS, ALIGN)
        places = places_of(position, row, first, seqlen, TOKENS, PACKED)
        for i in tl.static_range(TOKENS):
            t = first + i
            document = document_of(documents, row, t, seqlen, PACKED, WINDOW)
            values = reached(rows, i + WIDTH - 1, places[i], window, document, c, CHANNELS, WIDTH, WINDOW, PACKED, ACC)
            out = weighted(taps, values, b, WIDTH)
            if SILU:
                out *= sigmoid(out)
            to = y + (row * seqlen + t) * CHANNELS + c
            tl.store(to, out.to(y.dtype.element_ty), mask=(c < CHANNELS) & (t < seqlen))


@triton.jit
def conv_gradients(
    dy, x, weight, bias, window, position, documents, dx, sums,
    seqlen, span, dy_row, dy_token, x_row, x_token,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    DY_ALIGN: tl.constexpr, ALIGN: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx, and what a span of tokens adds to the gradients of the taps and the bias, `[rows · spans, WIDTH + 1, CHANNELS]`.

    Grid: that of `conv`. A block reads WIDTH − 1 tokens to either side of its own, and reckons the activation's slope of those
    behind it once more.
    """
    halo: tl.constexpr = WIDTH - 1
    row, start, stop, c = place(seqlen, span, CHANNELS, BLOCK)
    taps, b = taps_of(weight, c, CHANNELS, WIDTH, ACC), bias_of(bias, c, CHANNELS, BIAS, ACC)
    dbias = tl.zeros([BLOCK], ACC)
    dtaps = ()
    for _tap in tl.static_range(WIDTH):
        dtaps = dtaps + (tl.zeros([BLOCK], ACC),)
    for first in range(start, stop, TOKENS):
        rows = rows_of(x, row, first - halo, seqlen, c, x_row, x_token, CHANNELS, TOKENS + 2 * halo, ALIGN)
        cotangents = rows_of(dy, row, first, seqlen, c, dy_row, dy_token, CHANNELS, TOKENS + halo, DY_ALIGN)
        places = places_of(position, row, first, seqlen, TOKENS + halo, PACKED)
        slopes = ()  # the cotangents of what goes into the activation
        for i in tl.static_range(TOKENS + halo):
            document = document_of(documents, row, first + i, seqlen, PACKED, WINDOW)
            values = reached(rows, i + halo, places[i], window, document, c, CHANNELS, WIDTH, WINDOW, PACKED, ACC)
            slope = through(cotangents[i].to(ACC), weighted(taps, values, b, WIDTH), SILU)
            slope = tl.where(first + i < seqlen, slope, 0.0)
            slopes = slopes + (slope,)
            if i < TOKENS:
                dbias += slope
                grown = ()
                for tap in tl.static_range(WIDTH):
                    grown = grown + (dtaps[tap] + slope * values[tap],)
                dtaps = grown
        for i in tl.static_range(TOKENS):
            out = tl.zeros([BLOCK], ACC)
            for lag in tl.static_range(WIDTH):
                slope = slopes[i + lag]
                if PACKED:
                    slope = tl.where(places[i + lag] >= lag, slope, 0.0)
                out += taps[WIDTH - 1 - lag] * slope
            to = dx + (row * seqlen + first + i) * CHANNELS + c
            tl.store(to, out.to(dx.dtype.element_ty), mask=(c < CHANNELS) & (first + i < seqlen))
    to = sums + (row * ((seqlen + span - 1) // span) + start // span) * (WIDTH + 1) * CHANNELS + c
    for tap in tl.static_range(WIDTH):
        tl.store(to + tap * CHANNELS, dtaps[tap], mask=c < CHANNELS)
    tl.store(to + WIDTH * CHANNELS, dbias, mask=c < CHANNELS)


@triton.jit
def window_gradients(
    dy, x, weight, bias, window, starts, stops, dwindow,
    per_row, dy_row, dy_token, x_row, x_token,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DY_ALIGN: tl.constexpr, ALIGN: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The windows' gradients, from the first WIDTH − 1 tokens of each document. Grid: documents · blocks of channels."""
    halo: tl.constexpr = WIDTH - 1
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    document = (tl.program_id(0) // blocks).to(tl.int64)
    row, c = document // per_row, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    start, stop = tl.load(starts + document).to(tl.int32), tl.load(stops + document).to(tl.int32)
    taps, b = taps_of(weight, c, CHANNELS, WIDTH, ACC), bias_of(bias, c, CHANNELS, BIAS, ACC)
    rows = rows_of(x, row, start - halo, stop, c, x_row, x_token, CHANNELS, 2 * halo, ALIGN)
    cotangents = rows_of(dy, row, start, stop, c, dy_row, dy_token, CHANNELS, halo, DY_ALIGN)
    slopes = ()
    for i in tl.static_range(halo):
        values = reached(rows, i + halo, i, window, document, c, CHANNELS, WIDTH, True, True, ACC)
        slope = through(cotangents[i].to(ACC), weighted(taps, values, b, WIDTH), SILU)
        slopes = slopes + (tl.where(start + i < stop, slope, 0.0),)
    for at in tl.static_range(halo):
        out = tl.zeros([BLOCK], ACC)
        for i in tl.static_range(at + 1):
            out += taps[at - i] * slopes[i]
        to = dwindow + (document * CHANNELS + c) * halo + at
        tl.store(to, out.to(dwindow.dtype.element_ty), mask=c < CHANNELS)


@triton.jit
def windows_after(
    x, window, starts, stops, after,
    per_row, x_row, x_token,
    CHANNELS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The last COUNT tokens of each document, after those of its window, or zero. Grid: documents · blocks of channels."""
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    document = (tl.program_id(0) // blocks).to(tl.int64)
    row, c = document // per_row, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    start, stop = tl.load(starts + document).to(tl.int32), tl.load(stops + document).to(tl.int32)
    rows = rows_of(x, row, stop - COUNT, stop, c, x_row, x_token, CHANNELS, COUNT, ALIGN)
    own = (document * CHANNELS + c) * COUNT
    for at in tl.static_range(COUNT):
        inside = stop - COUNT + at >= start
        value = tl.where(inside, rows[at], 0.0)
        if WINDOW:
            older = window + own + tl.minimum(stop - start + at, COUNT - 1)
            value = tl.where(inside, value, tl.load(older, mask=(c < CHANNELS) & (stop >= start), other=0.0))
        tl.store(after + own + at, value.to(after.dtype.element_ty), mask=c < CHANNELS)


@triton.jit
def conv_step(
    x, weight, bias, window, y, after, x_row,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One token of each row, and the window after it. Grid: rows · blocks of channels."""
    halo: tl.constexpr = WIDTH - 1
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside, at = c < CHANNELS, (row * CHANNELS + c) * halo
    out = bias_of(bias, c, CHANNELS, BIAS, ACC)
    token = tl.load(x + row * x_row * ALIGN + c, mask=inside, other=0.0)
    for tap in tl.static_range(WIDTH):
        value = token
        if tap < halo:
            value = tl.load(window + at + tap, mask=inside, other=0.0)
        out += tl.load(weight + c * WIDTH + tap, mask=inside, other=0.0).to(ACC) * value.to(ACC)
        if tap > 0:
            tl.store(after + at + tap - 1, value, mask=inside)
    if SILU:
        out *= sigmoid(out)
    tl.store(y + row * CHANNELS + c, out.to(y.dtype.element_ty), mask=inside)
