"""Where a row of a scan lies: batch rows, or packed documents, cut into chunks that start anew with each of them.

Tokens are counted through the batch: token t of batch row b is b · seqlen + t. The chunks of row r, of `size` tokens, have
the slots ⌊start / size⌋ + r and on, which no two rows share; the last of them may be short, and slots between rows unused.
"""

import triton
import triton.language as tl

FORGOTTEN = tl.constexpr(-256.0)
"""In units of log 2: no float32 is as large as 2^128, and 2^-128 is less than GPUs compute with."""


@triton.jit
def bounds(cu, row, seqlen, tokens, PACKED: tl.constexpr):
    """[start, stop) of a row in tokens of the whole batch; boundaries out of range are pulled in."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu + row).to(tl.int64), 0), tokens)
        stop = tl.minimum(tl.maximum(tl.load(cu + row + 1).to(tl.int64), start), tokens)
    else:
        start = row.to(tl.int64) * seqlen
        stop = start + seqlen
    return start, stop


@triton.jit
def row_of_slot(cu, slot, n_rows, tokens, at_once, SIZE):
    """The packed row whose slots a slot belongs to: the last one whose first slot is not after it."""
    found = 0
    for first in range(0, n_rows, at_once.shape[0]):
        row = first + at_once
        start = tl.load(cu + row, mask=row < n_rows, other=0).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), tokens)
        before = (start // SIZE + row <= slot) & (row < n_rows)
        found += tl.sum(before.to(tl.int32), 0)
    return tl.maximum(found - 1, 0)


@triton.jit
def slot_bounds(cu, slot, n_rows, seqlen, tokens, at_once, SIZE: tl.constexpr, PACKED: tl.constexpr):
    """Of a slot: its row, the row's start and stop, and the slot's own first token.

    Packed rows are looked through as many at once as the range `at_once` counts, which a kernel makes as its language does.
    """
    if PACKED:
        row = row_of_slot(cu, slot, n_rows, tokens, at_once, SIZE)
        start, stop = bounds(cu, row, seqlen, tokens, PACKED)
        first = start + (slot - row - start // SIZE) * SIZE
    else:
        per_row = (seqlen + SIZE - 1) // SIZE
        row = slot // per_row
        start, stop = bounds(cu, row, seqlen, tokens, PACKED)
        first = start + (slot - row * per_row).to(tl.int64) * SIZE
    return row, start, stop, first


@triton.jit
def first_slot(start, row, seqlen, SIZE: tl.constexpr, PACKED: tl.constexpr):
    """The first slot of a row."""
    if PACKED:
        slot = start // SIZE + row
    else:
        slot = row.to(tl.int64) * ((seqlen + SIZE - 1) // SIZE)
    return slot


@triton.jit
def segment_of(places, cu, at, tokens, SIZE, PACKED: tl.constexpr, SPLIT: tl.constexpr):
    """The row and the segment of `SIZE` tokens that a program walks, and the slot of the row's first segment.

    Packed rows that are SPLIT have a program for each slot of that size, which `at` counts: so however long each of them
    is, few programs have nothing to do. Whose slot it is `prepare` has put into places: to look for it here would take
    registers of the whole walk. Else `at` counts rows, and the last axis of the grid segments.
    """
    if PACKED and SPLIT:
        row = tl.load(places + at)
        start = tl.minimum(tl.maximum(tl.load(cu + row).to(tl.int64), 0), tokens)
        slot0 = (start // SIZE).to(tl.int32) + row
        segment = at - slot0
    else:
        row, segment = at, tl.program_id(2)
        slot0 = row * tl.num_programs(2)
    return row, segment, slot0.to(tl.int64)


@triton.jit
def row_of_end(cu, cell, n_rows, tokens, at_once, SIZE):
    """The packed row that has a segment of SIZE tokens, but not its last, end in [cell · SIZE, (cell + 1) · SIZE); −1 if none.

    No two segments do. So there are as many cells as there can be segments that others go on from, however long rows are.
    """
    found = tl.full([at_once.shape[0]], -1, tl.int32)
    for first in range(0, n_rows, at_once.shape[0]):
        row = first + at_once
        here = row < n_rows
        start = tl.minimum(tl.maximum(tl.load(cu + row, mask=here, other=0).to(tl.int64), 0), tokens)
        stop = tl.minimum(tl.load(cu + row + 1, mask=here, other=0).to(tl.int64), tokens)
        ended = (cell.to(tl.int64) + 1) * SIZE - start  # how far the row's tokens are counted, if it has so many
        goes_on = here & (ended >= SIZE) & (start + ended // SIZE * SIZE < stop)
        found = tl.maximum(found, tl.where(goes_on, row, -1))
    return tl.max(found, 0)


@triton.jit
def ended_segment(ends, cu, cell, tokens, SIZE):
    """As `segment_of` says, of the segment that ends in a cell; `prepare` has put the rows of cells into ends. Row −1: none."""
    row = tl.load(ends + cell)
    start = tl.minimum(tl.maximum(tl.load(cu + tl.maximum(row, 0)).to(tl.int64), 0), tokens)
    segment = (((cell.to(tl.int64) + 1) * SIZE - start) // SIZE).to(tl.int32) - 1
    return row, segment, start // SIZE + row


@triton.jit
def tokens_of(x, t, inside, m, SIZE: tl.constexpr, stride, DOT: tl.constexpr):
    """Tokens t of x as rows, `[t, m]`, 0 outside."""
    return tl.load(x + t[:, None] * stride + m[None, :], mask=inside[:, None] & (m < SIZE)[None, :], other=0.0).to(DOT)


@triton.jit
def any_wide(center, first, step, count):
    """Whether decays span more than exponents do in any of some chunks: `center` says so (`prepare`)."""
    found = 0.0
    for begin in range(0, count, 128):
        i = begin + tl.arange(0, 128)
        found = tl.maximum(found, tl.max(tl.load(center + first + i * step, mask=i < count, other=0.0), 0))
    return found > 1e29


@triton.jit
def remembered(logs, step, lo, hi):
    """Of parts [lo, hi) of a walk: the first that the state after them remembers, and the sum of all their log decays.

    A state that has decayed by FORGOTTEN since is 0 in float32, whatever it was. Decays may be positive: the last such counts.

    Args:
        logs, step: the sums of log decays of parts 0, 1, …, so far apart.
    """
    first, after = lo, 0.0
    for stop in range(hi, lo, -64):
        at = stop - 1 - tl.arange(0, 64)
        own = tl.load(logs + at * step, mask=at >= lo, other=0.0).to(tl.float32)
        since = after + tl.cumsum(own, 0)  # what has passed when the walk ends, of the state that enters each
        first = tl.maximum(first, tl.max(tl.where(since < FORGOTTEN, at, lo), 0))
        after += tl.sum(own, 0)
    return first, after
