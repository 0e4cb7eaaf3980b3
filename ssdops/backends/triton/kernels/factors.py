"""What decays between tokens of a block and one of its ends: the factors of a scan from block to block (`backends/banded`)."""

import triton
import triton.language as tl


@triton.jit
def block_factors(
    log, rows, cols, heads, blocks, size, l_b, l_n, l_t, l_h,
    PIECE: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ROW_INCLUSIVE: tl.constexpr, COL_INCLUSIVE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """exp of sums of logs from where a scan enters a block to its rows, and from its columns to where it leaves.

    Grid: (batch · blocks, heads / HEADS).

    Args:
        log: `[batch, blocks, size, heads]`, by strides.
        rows, cols: `[batch, blocks - 1, size, heads]`, of the pairs of blocks in the order of tokens: a causal scan's rows are
            in the later one. Sums are in WIDE.
    """
    n, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    log += b.to(tl.int64) * l_b + n.to(tl.int64) * l_n
    pair = b.to(tl.int64) * (blocks - 1) + n
    row_pair, col_pair = pair - (1 if CAUSAL else 0), pair - (0 if CAUSAL else 1)
    if (n > 0) if CAUSAL else (n < blocks - 1):
        _put(log, rows + row_pair * size * heads, h, heads, size, l_t, l_h, PIECE, HEADS, CAUSAL, ROW_INCLUSIVE, WIDE)
    if (n < blocks - 1) if CAUSAL else (n > 0):
        _put(log, cols + col_pair * size * heads, h, heads, size, l_t, l_h, PIECE, HEADS, not CAUSAL, not COL_INCLUSIVE, WIDE)


@triton.jit
def _put(
    log, out, h, heads, size, l_t, l_h, PIECE: tl.constexpr, HEADS: tl.constexpr, FROM_LEFT: tl.constexpr,
    INCLUSIVE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """exp of sums over the tokens of a block from one of its ends, each itself among them or not."""
    total, pieces = tl.zeros([HEADS], WIDE), tl.cdiv(size, PIECE)
    for turn in range(0, pieces):
        t = ((turn if FROM_LEFT else pieces - 1 - turn) * PIECE + tl.arange(0, PIECE)).to(tl.int64)
        read = t if INCLUSIVE else t - (1 if FROM_LEFT else -1)
        there = ((read >= 0) & (read < size))[:, None] & (h < heads)[None, :]
        logs = tl.load(log + read[:, None] * l_t + h[None, :] * l_h, mask=there, other=0.0).to(WIDE)
        sums = total[None, :] + tl.cumsum(logs, 0, reverse=not FROM_LEFT)
        inside = (t < size)[:, None] & (h < heads)[None, :]
        tl.store(out + t[:, None] * heads + h[None, :], tl.exp2(sums * 1.4426950408889634).to(tl.float32), mask=inside)
        total += tl.sum(logs, 0)


@triton.jit
def block_factor_gradients(
    rows, cols, drows, dcols, dlog, heads, blocks, size,
    PIECE: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, ROW_INCLUSIVE: tl.constexpr, COL_INCLUSIVE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of the logs, `[batch, blocks, size, heads]`, from the factors and theirs. Grid as above."""
    n, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dlog += tl.program_id(0).to(tl.int64) * size * heads
    pair = b.to(tl.int64) * (blocks - 1) + n
    row_pair, col_pair = pair - (1 if CAUSAL else 0), pair - (0 if CAUSAL else 1)
    has_rows = (n > 0) if CAUSAL else (n < blocks - 1)
    has_cols = (n < blocks - 1) if CAUSAL else (n > 0)
    at = row_pair * size * heads
    _add(rows + at, drows + at, dlog, h, heads, size, has_rows, PIECE, HEADS, not CAUSAL, ROW_INCLUSIVE, False, WIDE)
    tl.debug_barrier()  # what is added to may have come from another thread
    at = col_pair * size * heads
    _add(cols + at, dcols + at, dlog, h, heads, size, has_cols, PIECE, HEADS, CAUSAL, not COL_INCLUSIVE, True, WIDE)


@triton.jit
def _add(
    x, dx, dlog, h, heads, size, real, PIECE: tl.constexpr, HEADS: tl.constexpr, FROM_LEFT: tl.constexpr,
    INCLUSIVE: tl.constexpr, MORE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of x ∘ dx over a block from one of its ends: the transpose of `_put`'s, from its other end."""
    total, pieces = tl.zeros([HEADS], WIDE), tl.cdiv(size, PIECE)
    for turn in range(0, pieces):
        t = ((turn if FROM_LEFT else pieces - 1 - turn) * PIECE + tl.arange(0, PIECE)).to(tl.int64)
        read = t if INCLUSIVE else t - (1 if FROM_LEFT else -1)
        there = ((read >= 0) & (read < size) & real)[:, None] & (h < heads)[None, :]
        place = read[:, None] * heads + h[None, :]
        both = tl.load(x + place, mask=there, other=0.0).to(WIDE) * tl.load(dx + place, mask=there, other=0.0)
        sums = total[None, :] + tl.cumsum(both, 0, reverse=not FROM_LEFT)
        inside, out = (t < size)[:, None] & (h < heads)[None, :], dlog + t[:, None] * heads + h[None, :]
        if MORE:
            sums += tl.load(out, mask=inside, other=0.0)
        tl.store(out, sums.to(tl.float32), mask=inside)
        total += tl.sum(both, 0)
