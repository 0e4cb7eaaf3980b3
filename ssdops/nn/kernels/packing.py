"""Where the documents of a packed batch lie: each token's place in its document, and the tokens of each document.

Boundaries and ids are on the GPU, where nothing has looked at them: they are taken to be in order, and what is written is in
range whether they are or not, as other kernels read memory by it.
"""

import triton
import triton.language as tl


@triton.jit
def count_less(values, count, bits, x):
    """How many of `count` values in order are less than x, [BLOCK]: a search by halves. `bits` is how many digits count has."""
    less = tl.zeros(x.shape, tl.int32)
    for bit in range(bits):
        more = less + (1 << (bits - 1 - bit))
        value = tl.load(values + more - 1, mask=more <= count, other=0)
        less = tl.where((more <= count) & (value < x), more, less)
    return less


@triton.jit
def places(
    given, position, rows, starts, stops,
    given_row, seqlen, per_row, n_rows, bits,
    BOUNDARIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's place and its document's row, `[batch, seqlen]`; a document's tokens [start, stop), `[batch · per_row]`.

    given: boundaries `[per_row + 1]`, or ids `[batch, seqlen]`. Grid: rows of the batch · blocks of tokens, or of documents
    where these are more.
    """
    blocks = (tl.maximum(seqlen, per_row) + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    at = first + tl.arange(0, BLOCK)  # [BLOCK], of tokens and of documents
    given += row * given_row
    if first < seqlen:
        if BOUNDARIES:
            document = count_less(given + 1, per_row, bits, at + 1)
            start = tl.load(given + document)
        else:
            document = tl.load(given + at, mask=at < seqlen, other=0)
            start = count_less(given, seqlen, bits, document)
        place = at - tl.minimum(tl.maximum(start, 0), at)
        tl.store(position + row * seqlen + at, place, mask=at < seqlen)
        own = tl.minimum(tl.maximum(document + row * per_row, 0), tl.maximum(n_rows - 1, 0))
        tl.store(rows + row * seqlen + at, own, mask=at < seqlen)
    if first < per_row:
        if BOUNDARIES:
            start = tl.load(given + at, mask=at < per_row, other=0)
            stop = tl.load(given + at + 1, mask=at < per_row, other=0)
        else:
            start, stop = count_less(given, seqlen, bits, at), count_less(given, seqlen, bits, at + 1)
        tl.store(starts + row * per_row + at, tl.minimum(tl.maximum(start, 0), seqlen), mask=at < per_row)
        tl.store(stops + row * per_row + at, tl.minimum(tl.maximum(stop, 0), seqlen), mask=at < per_row)
