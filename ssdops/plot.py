"""A picture of a mask: an example of its matrix, and the blocks that its terms are computed in. Needs matplotlib.

The example has seeded operands and at most 64 tokens in chunks of 8. Left, the entries `L[i, j]` of one head; right,
each term of the normal form on its chunk grid: of a scan, diagonal blocks run as masked attention, and the blocks off
the diagonal go through the state. The number in a block is its rank, computed from the example.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError, ValueRangeError
from .ir import nodes as n
from .ir.passes.structure import structure_of
from .ir.resolve import Span, document_spans
from .ir.terms import Diagonal, Linear, Quadratic, Term
from .masks import Mask
from .plan import terms_of
from .plot_example import TOKENS, Example, example_of, own_operands

CHUNKS, MOST_TERMS = 8, 9
GREY = "#f2f2f2"
COLORS = {
    "quadratic": "#d1495b",
    "low rank": "#2e86ab",
    "by entries": "#edae49",
    "banded": "#e8871e",
    "levels": "#2e86ab",
    "lags": "#8d6a9f",
    "diagonal": "#3d7a57",
}
MEANINGS = {
    "quadratic": "inside a chunk: masked attention",
    "low rank": "between chunks: through the state",
    "by entries": "not a scan: entry by entry",
    "banded": "in the band: masked attention",
    "levels": "levels: from the states of halves",
    "lags": "lags: by convolution, or entry by entry",
    "diagonal": "diagonal: token by token",
}


@dataclass(frozen=True)
class Block:
    """Rows and columns [start, stop) of a block, how it is computed, and its rank in the example."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    kind: str
    rank: int


def draw(tree: n.Node, seqlen: int, path: Path) -> None:
    """Draw an example of a mask into a PNG.

    Args:
        tree: the mask.
        seqlen: of the call; the example is as long, up to 64 tokens.
        path: ends in .png.

    Raises:
        UnsupportedError: matplotlib is not installed.
        ValueRangeError: the path is not a PNG's, or cannot be written.
    """
    save(figure_of(tree, example_of(tree, min(seqlen, TOKENS))), path)


def figure_of(tree: n.Node, example: Example, small: bool = False) -> Any:
    """The picture, a matplotlib figure; `small` leaves out what is written around it.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("drawing needs matplotlib, which is not installed: pip install ssdops[plot]") from None
    terms = terms_of(tree)
    figure = Figure(figsize=(6.4, 3.0) if small else (12.5, 6.4), dpi=84 if small else 120, layout="constrained")
    sides: Any = figure.subfigures(1, 2, width_ratios=(1, 1.08))
    _draw_matrix(sides[0], example, tree, small)
    _draw_terms(sides[1], example, terms, small)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure into a PNG.

    Raises:
        ValueRangeError: the path is not a PNG's, or cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ValueRangeError(f"pictures are PNGs, so the file's name must end in .png, got {path}")
    try:
        figure.savefig(path, metadata={"Software": None})  # the same bytes whatever wrote them
    except OSError as error:
        raise ValueRangeError(f"cannot write {path}: {error.strerror or error}") from None


def plot(mask: Mask, path: str | Path | None, seqlen: int | None, row: int, head: int) -> Any:
    """`Mask.plot`: the mask with its own operands."""
    figure = figure_of(mask.tree, own_operands(mask, seqlen, row, head))
    if path is not None:
        save(figure, Path(path))
    return figure


# --- left: the matrix -----------------------------------------------------------------------------------------------


def _draw_matrix(figure: Any, example: Example, tree: n.Node, small: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, SymLogNorm

    dense, axes = example.matrix(tree), figure.subplots()
    size = dense.abs().max().item() or 1.0
    norm: Any
    if (dense < 0).any():
        norm, colors = SymLogNorm(size / 30, vmin=-size, vmax=size), "RdBu_r"
        ticks = [-size, -size / 10, 0.0, size / 10, size]
    else:
        positive = dense[dense > 0]
        low = max(positive.min().item(), size * 1e-6) if len(positive) else size
        low = low if low < size else size / 10
        norm, colors = LogNorm(low, size), "viridis"
        ticks = [low ** (1 - part / 4) * size ** (part / 4) for part in range(5)]
    shown = torch.where(dense == 0, torch.nan, dense)
    image = axes.imshow(shown.numpy(), norm=norm, cmap=colormaps[colors].with_extremes(bad=GREY), interpolation="nearest")
    if small:
        axes.set(xticks=[], yticks=[])
        return
    bar = figure.colorbar(image, ax=axes, shrink=0.75, label="L[i, j]; grey is 0", location="bottom", pad=0.02)
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.minorticks_off()
    axes.set_xlabel("column j (reads k, v)")
    axes.set_ylabel("row i (reads q, writes y)")
    axes.set_title(example.caption, fontsize=10)
    figure.suptitle(_wrapped(f"L = {tree}", 58), fontsize=11, family="monospace")


# --- right: the blocks ----------------------------------------------------------------------------------------------


def _draw_terms(figure: Any, example: Example, terms: tuple[Term, ...], small: bool) -> None:
    from matplotlib.patches import Patch

    shown = terms[:MOST_TERMS]
    count = max(len(shown), 1)
    columns = ceil(sqrt(count))
    grid = figure.subplots(ceil(count / columns), columns, squeeze=False)
    kinds: dict[str, None] = {}
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, term in zip(grid.flat, shown, strict=False):
        axes.set_axis_on()
        kinds |= dict.fromkeys(_draw_term(axes, example, term, (10 if columns == 1 else 7) - 3 * small))
        if small:
            continue
        width, fontsize = {1: (64, 10), 2: (38, 9)}.get(columns, (32, 7))
        axes.set_title(_wrapped(str(term.node()), width), fontsize=fontsize, family="monospace")
    if small:
        return
    left_out = f"; {len(terms) - len(shown)} more terms are not drawn" if len(terms) > len(shown) else ""
    chunk = chunk_size(example.seqlen)
    noun = f"{len(terms)} terms" if len(terms) != 1 else "one term"
    figure.suptitle(f"normal form: {noun} in chunks of {chunk}; numbers are ranks{left_out}", fontsize=11)
    if kinds:
        patches = [Patch(color=COLORS[kind], label=MEANINGS[kind]) for kind in COLORS if kind in kinds]
        figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _draw_term(axes: Any, example: Example, term: Term, fontsize: int) -> list[str]:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    seqlen, found = example.seqlen, list(blocks(example, term))
    axes.set(xlim=(0, seqlen), ylim=(seqlen, 0), aspect="equal", xticks=[], yticks=[], facecolor=GREY)
    support = example.matrix(term.node()) != 0
    for block in found:
        (i0, i1), (j0, j1) = block.rows, block.cols
        color = COLORS[block.kind]
        if block.kind in ("low rank", "levels"):
            axes.add_patch(Rectangle((j0, i0), j1 - j0, i1 - i0, facecolor=color, alpha=0.55, edgecolor="white"))
        else:
            if block.kind != "diagonal":
                axes.add_patch(Rectangle((j0, i0), j1 - j0, i1 - i0, facecolor="none", edgecolor=color, linewidth=0.8))
            _fill_entries(axes, support, block, color)
        if block.kind != "diagonal" and min(i1 - i0, j1 - j0) >= chunk_size(seqlen) / 2:  # else there is no room
            text = axes.text((j0 + j1) / 2, (i0 + i1) / 2, str(block.rank), ha="center", va="center", fontsize=fontsize)
            text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    return list(dict.fromkeys(block.kind for block in found))


def _fill_entries(axes: Any, support: Tensor, block: Block, color: str) -> None:
    from matplotlib.colors import ListedColormap

    (i0, i1), (j0, j1) = block.rows, block.cols
    image = torch.where(support[i0:i1, j0:j1], 1.0, torch.nan)
    axes.imshow(image.numpy(), extent=(j0, j1, i1, i0), cmap=ListedColormap([color]), alpha=0.75, interpolation="nearest")


def chunk_size(seqlen: int) -> int:
    """The example's chunk length: a power of two, as the halves of a Fenwick mask are."""
    return 1 << max(ceil(seqlen / CHUNKS) - 1, 0).bit_length()


def blocks(example: Example, term: Term) -> Iterator[Block]:
    """The blocks of a term that are not zero.

    Chunks start anew with each document, at its right end for an anticausal scan.
    """
    dense, chunks = example.matrix(term.node()), list(_chunks(example, term))
    for i, rows in enumerate(chunks):
        for j, cols in enumerate(chunks):
            block = dense[slice(*rows), slice(*cols)]
            if not block.any():
                continue
            yield Block(rows, cols, _kind(term, i == j), int(torch.linalg.matrix_rank(block, rtol=1e-9)))


def _kind(term: Term, on_diagonal: bool) -> str:
    match term:
        case Linear():
            return "quadratic" if on_diagonal else "low rank"
        case Diagonal():
            return "diagonal"
        case Quadratic(mask):
            found = structure_of(mask)
            if found is None:
                return "by entries"
            if found.levels is not None:
                return "quadratic" if on_diagonal else "levels"
            return "lags" if found.coeffs is not None else "banded"


def _chunks(example: Example, term: Term) -> Iterator[tuple[int, int]]:
    size = chunk_size(example.seqlen)
    documents = term.documents if isinstance(term, Linear) else None
    spans = [Span(0, 0, example.seqlen, 0)]
    if documents is not None:
        spans = document_spans(documents, example.operands, example.batch, example.seqlen)
        spans = [span for span in spans if span.row == example.row]
    for span in spans:
        if isinstance(term, Linear) and not term.causal:
            edges = [span.start, *reversed(range(span.stop, span.start, -size))]
        else:
            edges = [*range(span.start, span.stop, size), span.stop]
        yield from pairwise(edges)


def _wrapped(text: str, width: int) -> str:
    lines = textwrap.wrap(text, max(width, 16))
    return "\n".join(lines[:3]) + (" …" if len(lines) > 3 else "")
