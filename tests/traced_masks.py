"""Masks by their formulas alone, products or not, and what they look like in a small call."""

from __future__ import annotations

import torch

from ssdops import masks, operand, register_mask
from ssdops.testing.structures import Make

TOKEN, HEAD = "batch seqlen nheads", "nheads"


def between(x, i, j):
    sums = x.cumsum()
    return sums[i] - sums[j]


def kind(name: str, entries, causal: bool = False, support=None, **operands: object):
    """A registered mask that has no lower()."""
    body = {key: operand(axes) for key, axes in operands.items()} | {"entries": entries, "causal": causal}
    return register_mask(f"traced_{name}")(type(name, (), body | ({} if support is None else {"support": support})))


DECAY = kind("decay", lambda s, i, j: torch.where(i >= j, between(s.log_a, i, j), 0.0).exp(), True, log_a=TOKEN)
WHERE = kind("where", lambda s, i, j: torch.where(i < j, 0, torch.exp(between(s.log_a, i, j) / 2)), log_a=TOKEN)
GROWTH = kind("growth", lambda s, i, j: (s.log_a.cumsum()[j] - s.log_a.cumsum()[i]).exp(), log_a=TOKEN,
              support=lambda s, i, j: i <= j)  # fmt: skip
ALIBI = kind("alibi", lambda s, i, j: torch.exp(-s.slope.abs() * (i - j).abs()), slope=HEAD)
POWERS = kind("powers", lambda s, i, j: s.w[j] / (i - j).clamp_min(1) ** s.p, w=TOKEN, p=int, support=lambda s, i, j: i > j)
GATES = kind("gates", lambda s, i, j: -(s.u[i] * 2) * torch.exp(s.log_c[j] - s.log_g * (i - j).abs()).double(),
             u=TOKEN, log_c=TOKEN, log_g=HEAD, support=lambda s, i, j: (i - j <= 5) & (j - i <= 2))  # fmt: skip
DILATED = kind("dilated", lambda s, i, j: torch.sigmoid(s.u[i]) * s.w[(j - 1)], True, u=TOKEN, w=TOKEN, step=int,
               support=lambda s, i, j: (i - j) % s.step == 0)  # fmt: skip
MATRIX = kind("matrix", lambda s, i, j: s.L[j, i] * s.c[i - j], L="batch nheads seqlen seqlen", c="nheads 2*seqlen-1")
TANH = kind("tanh", lambda s, i, j: torch.where(i > j, torch.tanh(s.u[i] * s.w[j] / 2), 0.5), True, u=TOKEN, w=TOKEN)
MANY = kind(
    "many",
    lambda s, i, j: (
        (s.u[i] - s.w[j]).sigmoid() + torch.minimum(s.u[i], s.w[j]) - torch.maximum(s.u[i], s.w[j] * 2).sin()
        + (s.u[i] + s.w[j]).clamp_min(0.2).log() * (s.u[i] * s.w[j]).abs().sqrt() + (s.u[i] - s.w[j]).sign().exp2()
        + torch.where((s.u[i] > s.w[j]) & ~(s.u[i] < 0.3) | (i - j == 2), 1.5, (s.u[i] + s.w[j]).floor())
        + (s.u[i] - s.w[j]) ** 2 / (1 + (i - j).abs() + s.u[i].abs() * s.w[j].abs()) + (s.u[i] - s.w[j]) % 0.7
        + (s.u[i] + s.w[j]).cos().square().log1p() - (1 + (s.u[i] * s.w[j]).square()).rsqrt().ceil().reciprocal()
    ),
    u=TOKEN, w=TOKEN,
)  # fmt: skip
EXPM1 = kind("expm1", lambda s, i, j: torch.expm1(s.u[i] * s.u[j] / 4), u=TOKEN)
BITS = kind("bits", lambda s, i, j: torch.where(((i ^ j) & 1) == 0, s.u[i] * s.w[j] / (1 + (i | j)), 0.5 * ~(i & j)),
            u=TOKEN, w=TOKEN)  # fmt: skip
LAGS = kind("lags", lambda s, i, j: torch.cos(s.u[i] * (i - j) * s.rate) ** 2, True, u=TOKEN, rate=HEAD)
CLOSE = kind("close", lambda s, i, j: torch.exp(s.u[i] * s.u[j] / 4), u=TOKEN,
             support=lambda s, i, j: (s.u[i] - s.u[j]).abs() < 0.5)  # fmt: skip
NOTHING = kind("nothing", lambda s, i, j: s.u[i], True, u=TOKEN, support=lambda s, i, j: i < j)


def choices(s, i, j):
    near = torch.where((i - j).abs() <= 2 * s.width.exp(), 1.0, 0.25)
    return torch.where(i >= 3, s.u[i], 0.5) * near


CHOICE = kind("choice", choices, u=TOKEN, width=HEAD)


def matrix(s: Make) -> masks.Mask:
    return MATRIX(s.normal(1, s.nheads, s.seqlen, s.seqlen), s.normal(s.nheads, 2 * s.seqlen - 1))


MASKS = {
    "decay": lambda s: DECAY(s.log()),
    "where": lambda s: WHERE(s.log(1)),
    "growth": lambda s: GROWTH(s.log()),
    "alibi": lambda s: ALIBI(s.normal(s.nheads)),
    "powers": lambda s: POWERS(s.factor(), 2),
    "gates": lambda s: GATES(s.factor(), s.log(), s.normal(s.nheads)),
    "dilated": lambda s: DILATED(s.factor(), s.normal(s.nheads), 3),
    "choice": lambda s: CHOICE(s.factor(), s.normal(s.nheads)),
    "matrix": matrix,
    "nothing": lambda s: NOTHING(s.factor()),
    "powers.T": lambda s: POWERS(s.factor(), 1).T,
    "powers reverse": lambda s: POWERS(s.factor(), 1).reverse().strict(),
    "gates shift": lambda s: GATES(s.factor(), s.log(), s.normal(s.nheads)).shift(2) * masks.window(9, 9),
    "matrix.T scale": lambda s: matrix(s).T.scale(rows=s.factor(), log_cols=s.log()),
    "decay * decay * documents": lambda s: DECAY(s.log()) * masks.decay(s.log(1)) * s.cu,
    "alibi * powers": lambda s: ALIBI(s.normal(s.nheads)) * POWERS(s.factor(), 1),
}

PAIRS = {
    "tanh": lambda s: TANH(s.factor(), s.factor()),
    "tanh.T scale": lambda s: TANH(s.factor(), s.factor(1)).T.scale(rows=s.factor(), log_cols=s.log()),
    "many": lambda s: MANY(s.factor(), s.factor()),
    "expm1": lambda s: EXPM1(s.factor()),
    "bits": lambda s: BITS(s.factor(), s.factor()),
    "lags": lambda s: LAGS(s.factor(), s.normal(s.nheads)),
    "lags reverse": lambda s: LAGS(s.factor(), s.normal(s.nheads)).reverse() * masks.window(9, 9),
    "close * documents": lambda s: CLOSE(s.factor()) * s.cu,
    "tanh * decay": lambda s: TANH(s.factor(), s.factor()) * masks.decay(s.log()),
}
"""No products."""
