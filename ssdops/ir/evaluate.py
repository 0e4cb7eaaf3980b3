"""The oracle: what a mask means, entry by entry, dense, in float64 and plain torch, without cleverness.

`entries` gives the block of L for chosen rows and columns together with its support; entries outside the support are
selected away, never multiplied by 0. `evaluate` is the whole matrix; `contract` is `Y = (L ∘ QKᵀ)V`; `linear_state` is
the state of one linear term. Every backend, and every rewrite, is held to these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import nodes as n
from .operands import ChannelLog, Operand, names
from .resolve import Span, document_spans, repeat_heads, resolve, segment_ids
from .terms import Linear


@dataclass(frozen=True)
class Scope:
    """Where entries are asked for: the operands, the sizes, and the rows i and columns j."""

    operands: Mapping[str, Tensor]
    batch: int
    seqlen: int
    nheads: int
    i: Tensor  # [rows] int64
    j: Tensor  # [cols] int64

    def token(self, x: Operand, axes: str = n.TOKEN) -> Tensor:
        """An operand per token in float64, heads repeated, time in full."""
        exact = {name: self.operands[name].double() for name in names(x)}  # before any arithmetic on them
        value = repeat_heads(resolve(x, exact, axes, self.seqlen), self.nheads, 2)
        return value.expand(-1, self.seqlen, *value.shape[2:])  # [B | 1, T, H, …]

    def at_rows(self, x: Tensor) -> Tensor:
        """[B, T, H] → [B, H, rows, 1, 1]."""
        return x[:, self.i].transpose(1, 2)[..., None, None]

    def at_cols(self, x: Tensor) -> Tensor:
        """[B, T, H] → [B, H, 1, cols, 1]."""
        return x[:, self.j].transpose(1, 2)[:, :, None, :, None]

    @property
    def lag(self) -> Tensor:
        """i − j as [1, 1, rows, cols, 1]."""
        return (self.i[:, None] - self.j[None, :])[None, None, :, :, None]


Block = tuple[Tensor, Tensor]
"""Values and support, each broadcastable to [B, H, rows, cols, N]; N is 1 unless decay is per channel."""


def entries(node: n.Node, at: Scope) -> Block:
    """The entries of `node` at rows `at.i` and columns `at.j`, float64, and where they are in its support."""
    match node:
        case n.Sum(terms):
            value, support = torch.zeros_like(at.lag, dtype=torch.float64), torch.zeros_like(at.lag, dtype=torch.bool)
            for term in terms:
                v, s = entries(term, at)
                value, support = value + torch.where(s, v, 0.0), support | s
            return value, support
        case n.Product(factors):
            value, support = entries(factors[0], at)
            for factor in factors[1:]:
                v, s = entries(factor, at)
                value, support = value * v, support & s
            return torch.where(support, value, 0.0), support
        case n.Neg(m):
            value, support = entries(m, at)
            return -value, support
        case n.Transpose(m):
            value, support = entries(m, replace(at, i=at.j, j=at.i))
            return value.transpose(2, 3), support.transpose(2, 3)
        case n.Reverse(m):
            return entries(m, replace(at, i=at.seqlen - 1 - at.i, j=at.seqlen - 1 - at.j))
        case n.Shift(m, count):
            value, support = entries(m, replace(at, i=(at.i - count).clamp_min(0)))
            return value, support & (at.i >= count)[None, None, :, None, None]
        case n.Strict(m):
            value, support = entries(m, at)
            return value, support & (at.lag != 0)
        case n.Scale(m, rows, cols, log_cols):
            value, support = entries(m, at)
            value = value if rows is None else value * at.at_rows(at.token(rows))
            value = value if cols is None else value * at.at_cols(at.token(cols))
            value = value if log_cols is None else value * at.at_cols(at.token(log_cols)).exp()
            return torch.where(support, value, 0.0), support
        case _:
            return _leaf(node, at)


def _leaf(node: n.Node, at: Scope) -> Block:
    one, lag = torch.ones_like(at.lag, dtype=torch.float64), at.lag
    match node:
        case n.Causal():
            return one, lag >= 0
        case n.Full():
            return one, lag == lag
        case n.Decay(log_a):
            return _decayed(at, at.token(log_a)), lag >= 0
        case n.Retention(log_gamma):
            gamma = at.at_rows(at.token(log_gamma, n.HEAD))
            return (gamma * lag.clamp_min(0)).exp(), lag >= 0
        case n.Documents():
            ids = segment_ids(node, at.operands, at.seqlen)[:, None]  # [B, 1, T]
            return one, (ids[:, :, at.i, None] == ids[:, :, None, at.j])[..., None]
        case n.Window(left, right):
            return one, (lag <= left) & (lag >= -right)
        case n.Toeplitz(coeffs):
            c = repeat_heads(resolve(coeffs, at.operands, n.LAG, at.seqlen).double(), at.nheads, 0)
            return c[:, lag[0, 0, :, :, 0] + at.seqlen - 1][None, ..., None], lag == lag
        case n.Dense(matrix):
            dense = repeat_heads(resolve(matrix, at.operands, n.MATRIX, at.seqlen).double(), at.nheads, 1)
            dense = dense.expand(-1, -1, at.seqlen, at.seqlen)
            return dense[:, :, at.i][:, :, :, at.j][..., None], lag == lag
        case n.Diagonal(d):
            return at.at_rows(at.token(d)).expand(-1, -1, -1, lag.shape[3], 1), lag == 0
        case n.Semiseparable(log_a, b, c):
            rows, cols = at.token(c, n.RANK)[:, at.i], at.token(b, n.RANK)[:, at.j]
            low_rank = torch.einsum("bihr,bjhr->bhij", rows, cols)
            return low_rank[..., None] * _decayed(at, at.token(log_a)), lag >= 0
        case n.Fenwick(log_a, levels):
            return _fenwick_levels(at, at.token(levels, n.LEVEL)) * _decayed(at, at.token(log_a)), lag >= 0
        case n.Trapezoidal():
            return _trapezoidal(node, at), lag >= 0
        case n.ChannelDecay(log_a, dt, big_a):
            x = log_a if log_a is not None else ChannelLog(dt, big_a)  # type: ignore[arg-type]  # verify() promises
            return _decayed(at, at.token(x, n.CHANNEL)), lag >= 0
        case n.Registered():
            return node.definition.entries(node, at)
        case _:
            raise AssertionError(f"no entries for {type(node).__name__}")


def _decayed(at: Scope, log_a: Tensor, skip: int = 0) -> Tensor:
    """exp(Σ_{j+skip<s≤i} log_a[s]) where i ≥ j + skip, else 1; log_a [B, T, H] or [B, T, H, N]."""
    log_a = log_a[..., None] if log_a.ndim == 3 else log_a  # [B, T, H, N]
    finite = log_a.isfinite()
    sums, oddities = torch.where(finite, log_a, 0.0).cumsum(1), (~finite).cumsum(1)
    cols = (at.j + skip).clamp_max(max(at.seqlen - 1, 0))
    exponent = sums[:, at.i, None] - sums[:, None, cols]  # [B, rows, cols, H, N]
    # a log that is not finite spoils what spans it, and not, through the sums, whatever comes after
    exponent = torch.where(oddities[:, at.i, None] == oddities[:, None, cols], exponent, torch.nan)
    # above the diagonal the exponent may be positive and overflow
    return torch.where(at.lag >= skip, exponent.permute(0, 3, 1, 2, 4), 0.0).exp()


def _fenwick_levels(at: Scope, levels: Tensor) -> Tensor:
    """levels[i, level(i, j)] as [B, H, rows, cols, 1]."""
    differ = at.i[:, None] ^ at.j[None, :]
    level = torch.frexp(differ.double()).exponent.long()  # its bits; log2 of a power of two may fall short on a GPU
    level = torch.where(at.lag[0, 0, :, :, 0] >= 0, level, 0)
    rows = levels[:, at.i].permute(0, 2, 1, 3)  # [B, H, rows, n_levels]
    return rows.gather(3, level.expand(*rows.shape[:2], *level.shape))[..., None]


def _trapezoidal(node: n.Trapezoidal, at: Scope) -> Tensor:
    """(γ_j · 1[i = j] + (γ_j + β_{j+1}/a_{j+1}) · 1[i > j]) · a_{i:j}, dividing by nothing."""
    assert node.gamma is not None
    log_a, below = at.token(node.log_a), at.lag > 0
    value = at.at_cols(at.token(node.gamma)) * _decayed(at, log_a)
    following = (at.j + 1).clamp_max(max(at.seqlen - 1, 0))
    shifted = replace(at, j=following)
    if node.beta is not None:  # β_{j+1}/a_{j+1} · a_{i:j} = β_{j+1} · a_{i:j+1}
        extra = shifted.at_cols(at.token(node.beta)) * _decayed(at, log_a, skip=1)
    else:
        assert node.beta_over_a is not None
        extra = shifted.at_cols(at.token(node.beta_over_a)) * _decayed(at, log_a)
    return value + torch.where(below, extra, 0.0)


def evaluate(node: n.Node, operands: Mapping[str, Tensor], batch: int, seqlen: int, nheads: int) -> Tensor:
    """L as a dense float64 tensor `(batch, nheads, seqlen, seqlen)`, with a last axis `dstate` if decay is per channel."""
    dense, support = dense_block(node, operands, batch, seqlen, nheads)
    dense = torch.where(support, dense, 0.0)
    return dense[..., 0] if dense.shape[-1] == 1 else dense


def dense_block(
    node: n.Node,
    operands: Mapping[str, Tensor],
    batch: int,
    seqlen: int,
    nheads: int,
    device: torch.device | None = None,
) -> Block:
    """All entries with their support, expanded to [B, H, T, T, N]; on the operands' device, if there are any."""
    device = next((x.device for x in operands.values()), device)
    tokens = torch.arange(seqlen, device=device)
    value, support = entries(node, Scope(operands, batch, seqlen, nheads, tokens, tokens))
    shape = torch.broadcast_shapes(value.shape, support.shape, (batch, nheads, seqlen, seqlen, 1))
    return value.expand(shape), support.expand(shape)


def contract(
    node: n.Node, operands: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, nheads: int, scale: float = 1.0
) -> Tensor:
    """Y = scale · (L ∘ QKᵀ)V in float64: q, k `(batch, seqlen, heads, dstate)`, v `(batch, seqlen, heads, headdim)`."""
    batch, seqlen = q.shape[:2]
    q, k, v = (repeat_heads(x.double(), nheads, 2) for x in (q, k, v))
    value, support = dense_block(node, operands, batch, seqlen, nheads, q.device)
    if value.shape[-1] == 1:
        products = torch.einsum("bihn,bjhn->bhij", q, k)
        scores = torch.where(support[..., 0], value[..., 0] * products, 0.0)
    else:  # row by row: [B, H, T, N] fits where [B, H, T, T, N] several times would not
        by_row = zip(q.unbind(1), value.unbind(2), support.unbind(2), strict=True)
        rows = [torch.where(s, row * torch.einsum("bhn,bjhn->bhjn", q_i, k), 0.0).sum(-1) for q_i, row, s in by_row]
        scores = torch.stack(rows, 2) if rows else q.new_zeros(batch, nheads, 0, 0)
    if v.isfinite().all():
        return scale * torch.einsum("bhij,bjhp->bihp", scores, v)
    inside, y = support.any(-1)[..., None], []
    for i in range(seqlen):  # a row selects what it sees, as 0 times what is not finite is not 0
        y.append(torch.where(inside[:, :, i], scores[:, :, i, :, None] * v.transpose(1, 2), 0.0).sum(2))
    return scale * torch.stack(y, 1)


def linear_state(
    term: Linear, operands: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, nheads: int, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What states do, in float64: what `initial` adds to Y (before `scale`), and the final states.

        y_i += sign · rows[i] · exp(ρ_i) · S₀ q_i
        final = exp(E) · S₀ + Σ_j exp(E − κ_j + log_cols[j]) · cols[j] · v_j k_jᵀ

    Args:
        term: the linear term that carries the state.
        initial: S₀ `(batch | segments, nheads, headdim, dstate)`; None is 0.

    Returns:
        The addition to Y `(batch, seqlen, nheads, headdim)`, and the final states, shaped like `initial`.
    """
    batch, seqlen = q.shape[:2]
    q, k, v = (repeat_heads(x.double(), nheads, 2) for x in (q, k, v))
    tokens = torch.arange(seqlen, device=q.device)
    at = Scope(operands, batch, seqlen, nheads, tokens, tokens)

    def token(x: Operand | None, axes: str = n.TOKEN) -> Tensor:  # [B, T, H, 1 | N]
        value = q.new_zeros(batch, seqlen, nheads) if x is None else at.token(x, axes)
        value = value if value.ndim == 4 else value[..., None]
        return value.expand(batch, *value.shape[1:])

    log_a = token(term.log_a) + token(term.channel, n.CHANNEL)
    rows = (token(term.rows) if term.rows is not None else token(None) + 1) * term.sign
    cols = (token(term.cols) if term.cols is not None else token(None) + 1) * token(term.log_cols).exp()
    spans = document_spans(term.documents, operands, batch, seqlen)
    entered = torch.zeros(batch, seqlen, nheads, v.shape[-1], dtype=torch.float64, device=q.device)
    final = torch.zeros(len(spans), nheads, v.shape[-1], q.shape[-1], dtype=torch.float64, device=q.device)

    def local(x: Tensor, span: Span) -> Tensor:
        part = x[span.row, span.start : span.stop]
        return part if term.causal else part.flip(0)

    for span in spans:
        d = local(log_a, span)
        inclusive = d.cumsum(0)
        rho = inclusive if term.row_inclusive else inclusive - d
        kappa = inclusive if term.col_inclusive else inclusive - d
        total = inclusive[-1] if len(d) else d.sum(0)  # [H, 1 | N]; the sum that κ is of, as another order rounds otherwise
        weight = (total - kappa).exp() * local(cols, span)  # [T, H, 1 | N]
        state = torch.einsum("thp,thn->hpn", local(v, span), local(k, span) * weight)
        if initial is not None:
            s0 = initial[span.state].double()
            y = torch.einsum("hpn,thn->thp", s0, local(q, span) * rho.exp()) * local(rows, span)
            entered[span.row, span.start : span.stop] = y if term.causal else y.flip(0)
            state = state + total.exp()[:, None] * s0
        final[span.state] = state
    return entered, final
