"""Hypothesis strategies for everything that `ssd` takes: masks of every structure, and whole calls on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from .. import masks
from ..ir import nodes as n
from ..ir.problem import FLOATS, fenwick_levels
from ..masks import Mask
from .case import Case
from .source import Draw, Sizes, Source, problems

KINDS = ("scalar", "linear", "any")
"""Which masks: sums of scans with scalar decay; with decay per channel too; every structure and combinator."""


# --- masks ----------------------------------------------------------------------------------------------------------


def _toeplitz(s: Source) -> Mask:
    return masks.toeplitz(s.lay(s.normal(s.heads(), max(2 * s.sizes.seqlen - 1, 0))))


def _dense(s: Source) -> Mask:
    batch, t = s.pick([s.sizes.batch, 1]), s.sizes.seqlen
    return masks.dense(s.lay(s.normal(batch, s.heads(), t, t)))


def _semiseparable(s: Source) -> Mask:
    rank = s.pick([1, 2])
    return masks.semiseparable(s.token_log(), s.ranked(rank), s.ranked(rank))


def _fenwick(s: Source) -> Mask:
    levels = fenwick_levels(s.sizes.seqlen) + s.pick([0, 1])
    return masks.fenwick(s.token_log(), s.ranked(levels))


def _channel_product(s: Source) -> Mask:
    dt = s.lay(s.uniform(0.0, 1.0, *s.token_shape()))
    return masks.channel_decay(dt=dt, A=-s.uniform(0.0, 1.5, s.heads(), s.sizes.dstate))


SCANS: dict[str, Callable[[Source], Mask]] = {
    "decay": lambda s: masks.decay(s.token_log()),
    "causal": lambda s: masks.causal(),
    "retention": lambda s: masks.retention(s.log(s.heads())),
    "two decays": lambda s: masks.decay(s.token_log()) * masks.decay(s.token_log()),
}
CHANNEL_SCANS: dict[str, Callable[[Source], Mask]] = {
    "channel_decay": lambda s: masks.channel_decay(s.channel_log()),
    "channel_decay(dt, A)": _channel_product,
    "both decays": lambda s: masks.channel_decay(s.channel_log()) * masks.decay(s.token_log()),
}
SUMS: dict[str, Callable[[Source], Mask]] = {
    "full": lambda s: masks.full(),
    "semiseparable": _semiseparable,
    "trapezoidal": lambda s: masks.trapezoidal(s.token_log(), s.token(), s.token()),
    "trapezoidal(beta_over_a)": lambda s: masks.trapezoidal(s.token_log(), gamma=s.token(), beta_over_a=s.token()),
}
QUADRATIC: dict[str, Callable[[Source], Mask]] = {
    "window": lambda s: masks.window(s.draw(st.integers(0, 5)), s.draw(st.integers(0, 3))),
    "documents": lambda s: s.documents(s.pick([True, False])),
    "toeplitz": _toeplitz,
    "dense": _dense,
    "diagonal": lambda s: masks.diagonal(s.token()),
    "fenwick": _fenwick,
}
LEAVES = {**SCANS, **CHANNEL_SCANS, **SUMS, **QUADRATIC}


def scaled(s: Source, mask: Mask) -> Mask:
    """The mask with some of its scales."""
    chosen = s.pick(["rows", "cols", "log_cols", "rows cols", "rows cols log_cols"]).split()
    return mask.scale(**{name: s.token_log() if name == "log_cols" else s.token() for name in chosen})


def scan_mask(s: Source, channel: bool = False, backwards: bool = True) -> Mask:
    """One scan: a decay, shifted, strict, transposed, reversed, scaled or not."""
    table = {**SCANS, **CHANNEL_SCANS} if channel else SCANS
    mask = table[s.pick(list(table))](s)
    mask = mask.shift(1) if s.chance(4) else mask
    mask = mask.strict() if s.chance(4) else mask
    if backwards:
        mask = mask.T if s.chance(3) else mask
        mask = mask.reverse() if s.chance(4) else mask
    return scaled(s, mask) if s.chance(3) else mask


def linear_mask(s: Source, channel: bool = False, backwards: bool = True, states: bool = True) -> Mask:
    """A sum of scans and diagonals, packed or not: what every linear backend runs.

    Args:
        channel: whether decays per channel may be among them.
        backwards: whether anticausal and packed ones may.
        states: whether all of it must have states.
    """
    left_out = (() if backwards else ("full",)) + (("trapezoidal", "trapezoidal(beta_over_a)") if states else ())
    mask = SUMS[s.pick([name for name in SUMS if name not in left_out])](s) if s.chance(4) else scan_mask(s, channel, backwards)
    if s.chance(3):
        mask = mask + scan_mask(s, channel, backwards)
    if s.chance(4):
        mask = mask - masks.diagonal(s.token())
    if backwards:
        mask = mask * s.documents() if s.chance(3) else mask
    return -mask if s.chance(6) else mask


def any_mask(s: Source, depth: int) -> Mask:
    """Any structure under any combinators, nested at most `depth` deep."""
    if depth <= 0 or s.chance(4):
        return LEAVES[s.pick(list(LEAVES))](s)
    inner = any_mask(s, depth - 1)
    match s.pick(["+", "*", "-", "T", "reverse", "strict", "shift", "scale", "-m"]):
        case "+":
            return inner + any_mask(s, depth - 1)
        case "*":
            return inner * any_mask(s, depth - 1)
        case "-":
            return inner - any_mask(s, depth - 1)
        case "T":
            return inner.T
        case "reverse":
            return inner.reverse()
        case "strict":
            return inner.strict()
        case "shift":
            return inner.shift(s.draw(st.integers(0, 3)))
        case "scale":
            return scaled(s, inner)
        case _:
            return -inner


def build(s: Source, kind: str, depth: int = 2, states: bool = False) -> Mask:
    """A mask of that kind."""
    if kind == "any" and not states and s.chance(2):
        mask = any_mask(s, depth)
    else:
        mask = linear_mask(s, channel=kind != "scalar", states=states)
    return with_heads(s, mask)


def with_heads(s: Source, mask: Mask) -> Mask:
    """The mask, with an operand of nheads heads where q, k and v have fewer."""
    z = s.sizes
    return mask.scale(cols=s.normal(z.nheads)) if z.nheads > max(z.q_heads, z.k_heads, z.v_heads) else mask


@st.composite
def mask_for(draw: Draw, sizes: Sizes, kind: str = "any", depth: int = 2, dtype: torch.dtype = torch.float64) -> Mask:
    """A mask with its operands, for a problem."""
    return build(Source(draw, sizes, dtype), kind, depth)


@st.composite
def mask_trees(draw: Draw, depth: int = 2, kind: str = "any") -> n.Node:
    """A mask expression without operands' values."""
    return draw(mask_for(draw(problems(max_seqlen=8)), kind, depth)).tree


def linear_mask_trees(depth: int = 2) -> st.SearchStrategy[n.Node]:
    """A mask expression that is a sum of scans."""
    return mask_trees(depth, "linear")


# --- calls ----------------------------------------------------------------------------------------------------------


@st.composite
def operand_tensors(draw: Draw, sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, now and then strided."""
    return _qkv(Source(draw, sizes, dtype), (dtype, dtype, dtype))


def _qkv(s: Source, dtypes: Sequence[torch.dtype]) -> tuple[Tensor, Tensor, Tensor]:
    z = s.sizes
    shapes = ((z.q_heads, z.dstate), (z.k_heads, z.dstate), (z.v_heads, z.headdim))
    q, k, v = (s.lay(s.normal(z.batch, z.seqlen, *shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes, strict=True))
    return q, k, v


@st.composite
def cases(
    draw: Draw,
    kind: str = "any",
    *,
    sizes: st.SearchStrategy[Sizes] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    make: Callable[[Source], Mask] | None = None,
    states: bool = False,
    mixed: bool = True,
) -> Case:
    """A call of `ssd`.

    Args:
        kind: which masks, one of `KINDS`.
        dtypes: of q, k and v; operands come in the same, in float32, or (where allowed) in float64.
        make: the mask, instead of one of that kind.
        states: only masks that carry states, and an initial state more often than not.
        mixed: whether q, k, v and the operands may differ in dtype.
    """
    size: Sizes = draw(problems() if sizes is None else sizes)
    dtype: torch.dtype = draw(st.sampled_from(list(dtypes)))
    wider = [d for d in dtypes if d.itemsize > dtype.itemsize or d == dtype]
    others = [dtype, *wider] if mixed else [dtype]
    operand_dtype = draw(st.sampled_from([*others, torch.float32] if mixed and dtype.itemsize == 2 else others))
    source = Source(draw, size, operand_dtype)
    mask = with_heads(source, make(source)) if make is not None else build(source, kind, states=states)
    q, k, v = _qkv(source, [dtype, draw(st.sampled_from(others)) if mixed and source.chance(6) else dtype, dtype])
    scale = source.pick([1.0, 0.7, -0.5])
    case = Case(q, k, v, mask, scale)
    if case.carried and (source.chance(2) or states):
        p = case.problem
        assert p.n_states is not None  # carried says so
        shape = (p.n_states, p.nheads, p.headdim, p.dstate)
        initial = tuple(source.lay(source.normal(*shape, dtype=p.state_dtype)) for _ in case.carried)
        case = Case(q, k, v, mask, scale, initial)
    return case
