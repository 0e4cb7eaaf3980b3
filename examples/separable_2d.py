"""A separable two-dimensional scan over an image: rows first, then columns, two calls of `ssd` with linear cost in the pixels.

With decays a along rows and b along columns, the matrix over pixels (r, c) is the Kronecker product of two semiseparable ones,

    L[(r, c), (r', c')] = rows[r, r'] · columns[c, c'],

and `Y = L V` is `columns` along every row of the image, and then `rows` along every column. Each of the two is a scan one
way, and strictly the other way: every pixel sees all others, and no matrix over pixels is formed.
"""

import torch
from torch import Tensor

from ssdops import masks, ssd
from ssdops.masks import Mask


def both_ways(log_a: Tensor) -> Mask:
    """exp of the sum of log decays between two tokens, whichever comes first."""
    return masks.decay(log_a) + masks.decay(log_a).strict().T


def along(x: Tensor, log_a: Tensor) -> Tensor:
    """Scan the second axis of x (lines, tokens, heads, headdim), with q = k = 1."""
    one = x.new_ones(*x.shape[:2], 1, 1)
    return ssd(one, one, x, both_ways(log_a))


def scan_2d(image: Tensor, log_rows: Tensor, log_columns: Tensor) -> Tensor:
    """Both directions of a batch of images.

    Args:
        image: `(batch, height, width, heads, headdim)`.
        log_rows: log decays from row to row `(height, heads)`; log_columns: from column to column `(width, heads)`.
    """
    batch, height, width, heads, dim = image.shape
    lines = along(image.reshape(batch * height, width, heads, dim), log_columns)
    turned = lines.view(batch, height, width, heads, dim).transpose(1, 2)
    columns = along(turned.reshape(batch * width, height, heads, dim), log_rows)
    return columns.view(batch, width, height, heads, dim).transpose(1, 2)


def dense_2d(image: Tensor, log_rows: Tensor, log_columns: Tensor) -> Tensor:
    """The same from the Kronecker product itself."""

    def matrix(log_a: Tensor) -> Tensor:  # [heads, tokens, tokens]
        sums = log_a.T.cumsum(1)
        return -(sums[:, :, None] - sums[:, None, :]).abs()

    batch, height, width, heads, dim = image.shape
    rows, columns = matrix(log_rows).exp(), matrix(log_columns).exp()
    kronecker = torch.stack([torch.kron(rows[h], columns[h]) for h in range(heads)])
    flat = image.reshape(batch, height * width, heads, dim)
    return torch.einsum("hij,bjhp->bihp", kronecker, flat).view(image.shape)


def main() -> None:
    """The scans are the dense formula, values and gradients."""
    torch.manual_seed(0)
    image = torch.randn(2, 5, 7, 3, 4, dtype=torch.float64, requires_grad=True)
    logs = [(-torch.rand(tokens, 3, dtype=torch.float64)).requires_grad_() for tokens in (5, 7)]
    found, expected = scan_2d(image, *logs), dense_2d(image, *logs)
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, [image, *logs], dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    print(f"an image of {image.shape[1]} × {image.shape[2]}: largest difference {(found - expected).abs().max().item():.1g}")


if __name__ == "__main__":
    main()
