"""One kernel for decoding: a few tokens of one scan, its state in registers from the first to the last.

Bound by the state's bytes, each read once and written once; everything else about a step (decay, scales, shared heads, slots of
a pool, a diagonal, the dtype of y) happens on the way. Tensors come as `Strided` (`step.py`), and one that is None is switched
off when the kernel is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(x, row, token, head):
    """The address of x[row, token, the head that `head` shares]."""
    return x.data + row * x.row + token * x.token + (head // x.share).to(tl.int64) * x.head


@triton.jit
def number(x, row, token, head, live):
    """A value per token and head, in float32."""
    return tl.load(row_of(x, row, token, head), mask=live, other=0.0).to(tl.float32)


@triton.jit
def vector(x, row, token, head, at, inside):
    """A vector per token and head, at the places `at`, in float32."""
    return tl.load(row_of(x, row, token, head) + at * x.last, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def tile(x, row, head, p, n):
    """Addresses of a tile of the state of a row and head, [P, N]."""
    return x.data + row * x.row + head.to(tl.int64) * x.head + (p * x.middle)[:, None] + (n * x.last)[None, :]


@triton.jit(do_not_specialize=["n_slots"])
def step_kernel(
    # read, per token: q, k, v; the slots of the scan; a diagonal's value
    q, k, v, log_a, channel, dt, rows, cols, log_cols, diagonal,
    # the state before (None: zero) and after, the state after every token (or None), the slot of each row (or None)
    before, after, every, slots, n_slots,
    # y of earlier scans to add to (or None), and y
    partial, y,
    # how many tokens; the factors of the scan's part of y and of the diagonal's (None: there is no diagonal)
    tokens, scale, diagonal_scale,
    NHEADS: tl.constexpr, HEADDIM: tl.constexpr, DSTATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    DECAY_AT: tl.constexpr,  # the order of events: "first", "between" reading and adding, "last", or "never"
    READ_FIRST: tl.constexpr,  # ... and whether the state is read before the token is added
):  # fmt: skip
    """S ← a S + w v kᵀ, y = u S q: one program per row, head and BLOCK_P rows of its state."""
    blocks: tl.constexpr = (HEADDIM + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    row = (program // (blocks * NHEADS)).to(tl.int64)
    head = program // blocks % NHEADS
    p = (program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    in_p, in_n = p < HEADDIM, n < DSTATE
    slot, live = row, row >= 0
    if slots is not None:
        slot = tl.load(slots.data + row * slots.row).to(tl.int64)
        live = (slot >= 0) & (slot < n_slots)  # of a row that is not, nothing is read, so that all is 0
    in_tile = in_p[:, None] & in_n[None, :]

    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)  # [P, N]
    if before is not None:
        state = tl.load(tile(before, slot, head, p, n), mask=in_tile & live, other=0.0).to(tl.float32)
    for token in range(tokens):
        t = tl.cast(token, tl.int64)
        q_t = vector(q, row, t, head, n, in_n & live)  # [N]
        k_t = vector(k, row, t, head, n, in_n & live)  # [N]
        v_t = vector(v, row, t, head, p, in_p & live)  # [P]
        add = v_t
        if cols is not None:
            add *= number(cols, row, t, head, live)
        if log_cols is not None:
            add *= tl.exp(number(log_cols, row, t, head, live))
        decay = tl.zeros([1, BLOCK_N], tl.float32)  # the log of it, [1, N]
        if log_a is not None:
            decay += number(log_a, row, t, head, live)
        if channel is not None:
            per_channel = vector(channel, row, t, head, n, in_n & live)  # [N]
            if dt is not None:
                per_channel *= number(dt, row, t, head, live)
            decay += per_channel[None, :]
        decay = tl.exp(decay)

        if DECAY_AT == "first":
            state *= decay
        read = tl.zeros([BLOCK_P], tl.float32)  # [P]
        if READ_FIRST:
            read = tl.sum(state * q_t[None, :], axis=1)
        if DECAY_AT == "between":
            state *= decay
        state += add[:, None] * k_t[None, :]
        if not READ_FIRST:
            read = tl.sum(state * q_t[None, :], axis=1)
        if DECAY_AT == "last":
            state *= decay

        out = read * scale
        if rows is not None:
            out *= number(rows, row, t, head, live)
        if diagonal_scale is not None:
            own = tl.sum(q_t * k_t, axis=0) * diagonal_scale
            if diagonal is not None:
                own *= number(diagonal, row, t, head, live)
            out += own * v_t
        at = (row * tokens + t) * NHEADS + head
        if partial is not None:
            out += tl.load(partial + at * HEADDIM + p, mask=in_p & live, other=0.0)
        tl.store(y + at * HEADDIM + p, out.to(y.dtype.element_ty), mask=in_p)
        if every is not None:
            to = every + (at * HEADDIM + p)[:, None] * DSTATE + n[None, :]
            tl.store(to, state.to(every.dtype.element_ty), mask=in_tile)
    tl.store(tile(after, slot, head, p, n), state.to(after.data.dtype.element_ty), mask=in_tile & live)
