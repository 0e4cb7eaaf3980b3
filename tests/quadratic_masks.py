"""Masks that are no scans, for the tests of backends that run them by tiles."""

from __future__ import annotations

from ssdops import masks as m
from ssdops.testing import strategies
from ssdops.testing.source import Source
from ssdops.testing.structures import Make


def toeplitz(s: Make) -> m.Mask:
    return m.toeplitz(s.normal(s.nheads, 2 * s.seqlen - 1))


def dense(s: Make) -> m.Mask:
    return m.dense(s.normal(1, s.nheads, s.seqlen, s.seqlen))


MASKS = {
    "window": lambda s: m.window(5, 2),
    "window strict": lambda s: m.window(3, 3).strict(),
    "toeplitz": toeplitz,
    "dense": dense,
    "dense over heads": lambda s: m.dense(s.normal(s.seqlen, s.seqlen)),
    "dense rows": lambda s: m.dense(s.normal(1, s.nheads, s.seqlen, 1)),
    "decay * window": lambda s: m.decay(s.log()) * m.window(7),
    "retention * window": lambda s: m.retention(-s.normal(s.nheads).abs()) * m.window(40),
    "decay * toeplitz": lambda s: m.decay(s.log()) * toeplitz(s),
    "toeplitz * toeplitz.T": lambda s: toeplitz(s) * m.toeplitz(s.normal(2 * s.seqlen - 1)).T,
    "documents * window": lambda s: s.cu * m.window(4, 1),
    "decay * documents * toeplitz": lambda s: m.decay(s.log()) * s.ids * toeplitz(s),
    "two documents": lambda s: s.cu * s.ids * m.window(50, 50),
    "reverse": lambda s: (m.decay(s.log()) * dense(s) * s.ids).reverse(),
    "T": lambda s: (m.decay(s.log(1)) * m.window(6)).T,
    "scale": lambda s: m.window(9, 3).scale(rows=s.factor(), cols=s.factor(1), log_cols=s.log()),
    "shift(2)": lambda s: m.decay(s.log()).shift(2) * s.cu,
    "shift T": lambda s: (dense(s).scale(rows=s.factor()) * m.window(30, 1)).shift(3).T,
    "sum": lambda s: m.decay(s.log()) + m.window(3) - toeplitz(s).strict(),
    "empty": lambda s: m.window(2) * m.window(40, 0).shift(3) * m.causal().strict().T,
}


def products(s: Source) -> m.Mask:
    """Products of up to three structures under combinators."""
    mask = strategies.QUADRATIC[s.pick(["window", "toeplitz", "dense"])](s)
    if s.chance(2):
        mask = mask * strategies.QUADRATIC[s.pick(["documents", "window", "toeplitz", "dense"])](s)
    if s.chance(2):
        mask = mask * strategies.scan_mask(s)
    for _ in range(s.pick([0, 1, 2])):
        match s.pick(["T", "reverse", "strict", "shift", "scale", "-m"]):
            case "T":
                mask = mask.T
            case "reverse":
                mask = mask.reverse()
            case "strict":
                mask = mask.strict()
            case "shift":
                mask = mask.shift(s.pick([1, 2, 3]))
            case "scale":
                mask = strategies.scaled(s, mask)
            case _:
                mask = -mask
    return mask
