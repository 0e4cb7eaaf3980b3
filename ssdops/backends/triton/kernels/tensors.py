"""Tiles of matrices in memory: through Hopper's tensor memory accelerator, or through pointers."""

import triton
import triton.language as tl


@triton.jit
def tile_of(x, rows, cols: tl.constexpr, stride, BR: tl.constexpr, BC: tl.constexpr, TILED: tl.constexpr):
    """A descriptor of x [rows, cols] in tiles [BR, BC], if TILED; else x."""
    if TILED:
        out = tl.make_tensor_descriptor(x, shape=[rows, cols], strides=[stride, 1], block_shape=[BR, BC])
    else:
        out = x
    return out


@triton.jit
def load_tile(tile, x, first, i, j, stride, inside_i, inside_j, TILED: tl.constexpr):
    """x[first + i, j], zero outside."""
    if TILED:
        out = tile.load([first, tl.min(j, 0)])
    else:
        base = x + first.to(tl.int64) * stride
        out = tl.load(base + i[:, None] * stride + j[None, :], mask=inside_i[:, None] & inside_j, other=0.0)
    return out


@triton.jit
def heads_of(x, seqlen, heads, dim: tl.constexpr, x_t, x_h, BR: tl.constexpr, BC: tl.constexpr, TILED: tl.constexpr):
    """A descriptor of x [seqlen, heads, dim] in tiles of one head [BR, BC], if TILED; else x."""
    if TILED:
        out = tl.make_tensor_descriptor(x, shape=[seqlen, heads, dim], strides=[x_t, x_h, 1], block_shape=[BR, 1, BC])
    else:
        out = x
    return out


@triton.jit
def load_head(tile, x, first, h, j0, i, j, x_t, x_h, inside_i, inside_j, TILED: tl.constexpr):
    """Tokens `first` and on (i, in tokens from x) of head h, dims j0 and on (j), zero outside."""
    if TILED:
        out = tile.load([first, h, j0]).reshape([i.shape[0], j.shape[0]])
    else:
        out = tl.load(x + h * x_h + i[:, None] * x_t + j[None, :], mask=inside_i[:, None] & inside_j, other=0.0)
    return out


@triton.jit
def load_state(tile, x, block, p0, n0, p, n, P: tl.constexpr, N: tl.constexpr, mask, TILED: tl.constexpr):
    """The state of a block and head, rows p0 and on (p), columns n0 and on (n), zero outside."""
    if TILED:
        out = tile.load([(block * P).to(tl.int32) + p0, n0])
    else:
        out = tl.load(x + block * P * N + p[:, None] * N + n[None, :], mask=mask, other=0.0)
    return out
