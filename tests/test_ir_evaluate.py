"""The oracle against a second source of truth: each row of the design's mask table, entry by entry, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssdops.ir import nodes as n
from ssdops.ir import operands as ops
from ssdops.ir.evaluate import contract, evaluate, linear_state
from ssdops.ir.operands import Operand
from ssdops.ir.terms import Linear
from ssdops.ir.text import parse

BATCH, T, H, N, P, R = 2, 7, 4, 3, 2, 2
Entry = Callable[[int, int, int, int], float]
"""L[b, h, i, j]."""


def _tensors(batch: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "a": random(batch, T, H), "a2": random(1, T, 2), "ah": random(H), "a0": random(), "g": random(2),
        "u": random(batch, T, H), "w": random(batch, 1, 2), "z": random(batch, T, 1), "d": random(batch, T, H),
        "b": random(batch, T, 2, R), "c": random(batch, T, H, R), "levels": random(batch, T, 2, 4),
        "coeffs": random(2, 2 * T - 1), "L": random(batch, 2, T, T), "L2": random(T, T),
        "beta": random(batch, T, H), "gamma": random(batch, T, 2), "ratio": random(T, H), "dt": random(batch, T, 2),
        "A": random(H, N), "ca": random(batch, T, 2, N), "cu": torch.tensor([0, 3, 3, 6, T]),
        "ids": torch.tensor([[0, 0, 0, 2, 2, 5, 5], [1, 1, 1, 1, 1, 1, 3]])[:batch],
    }  # fmt: skip


X = _tensors()


def at(name: str, b: int, t: int, h: int, *rest: int) -> float:
    """Element [b, t, h, …] of a per-token operand, broadcast from the right, heads shared in contiguous groups."""
    x = X[name]
    x = x.reshape((1,) * (3 + len(rest) - x.ndim) + tuple(x.shape))
    b, t, h = (0 if x.shape[0] == 1 else b), (0 if x.shape[1] == 1 else t), h // (H // x.shape[2])
    return float(x[(b, t, h, *rest)])


def decayed(name: str, b: int, h: int, i: int, j: int, *rest: int) -> float:
    """a_{i:j} = Π_{j<s≤i} exp(log_a[s])."""
    out = 1.0
    for s in range(j + 1, i + 1):
        out *= math.exp(at(name, b, s, h, *rest))
    return out


def level(i: int, j: int) -> int:
    """0 on the diagonal, else 1 + the index of the highest bit in which i and j differ."""
    out = 0
    for bit in range(10):
        if (i >> bit) % 2 != (j >> bit) % 2:
            out = 1 + bit
    return out


def same_document(i: int, j: int) -> bool:
    bounds = [(0, 3), (3, 3), (3, 6), (6, T)]
    return any(start <= i < stop and start <= j < stop for start, stop in bounds)


def trapezoid(over: str | None, b: int, h: int, i: int, j: int) -> float:
    """From the recurrence h_t = a_t h_{t−1} + β_t x_{t−1} + γ_t x_t: what x_j contributes to h_i."""
    state = 0.0
    for t in range(i + 1):
        a = math.exp(at("a", b, t, h))
        beta = at("beta", b, t, h) if over is None else at(over, b, t, h) * a
        state = a * state + (beta if t - 1 == j else 0.0) + (at("gamma", b, t, h) if t == j else 0.0)
    return state


TABLE: dict[str, Entry] = {
    "causal()": lambda b, h, i, j: float(i >= j),
    "full()": lambda b, h, i, j: 1.0,
    "decay(a)": lambda b, h, i, j: decayed("a", b, h, i, j) if i >= j else 0.0,
    "decay(a2)": lambda b, h, i, j: decayed("a2", b, h, i, j) if i >= j else 0.0,
    "decay(ah)": lambda b, h, i, j: math.exp(float(X["ah"][h])) ** (i - j) if i >= j else 0.0,
    "decay(a0)": lambda b, h, i, j: math.exp(float(X["a0"])) ** (i - j) if i >= j else 0.0,
    "retention(g)": lambda b, h, i, j: math.exp(float(X["g"][h // 2])) ** (i - j) if i >= j else 0.0,
    "documents(cu)": lambda b, h, i, j: float(same_document(i, j)),
    "documents(segment_ids=ids)": lambda b, h, i, j: float(X["ids"][b, i] == X["ids"][b, j]),
    "documents(segment_ids=ids, n_segments=9)": lambda b, h, i, j: float(X["ids"][b, i] == X["ids"][b, j]),
    "window(left=2, right=1)": lambda b, h, i, j: float(-1 <= i - j <= 2),
    "window(left=-1, right=2)": lambda b, h, i, j: float(-2 <= i - j <= -1),
    "toeplitz(coeffs)": lambda b, h, i, j: float(X["coeffs"][h // 2, i - j + T - 1]),
    "dense(L)": lambda b, h, i, j: float(X["L"][b, h // 2, i, j]),
    "dense(L2)": lambda b, h, i, j: float(X["L2"][i, j]),
    "diagonal(d)": lambda b, h, i, j: at("d", b, i, h) if i == j else 0.0,
    "semiseparable(a, b, c, rank=2)": lambda b, h, i, j: (
        sum(at("c", b, i, h, r) * decayed("a", b, h, i, j) * at("b", b, j, h, r) for r in range(R)) if i >= j else 0.0
    ),
    "fenwick(a, levels)": lambda b, h, i, j: (
        at("levels", b, i, h, level(i, j)) * decayed("a", b, h, i, j) if i >= j else 0.0
    ),
    "trapezoidal(a, beta, gamma)": lambda b, h, i, j: trapezoid(None, b, h, i, j) if i >= j else 0.0,
    "trapezoidal(a, gamma=gamma, beta_over_a=ratio)": lambda b, h, i, j: (
        trapezoid("ratio", b, h, i, j) if i >= j else 0.0
    ),
    # combinators
    "decay(a) * dense(L)": lambda b, h, i, j: TABLE["decay(a)"](b, h, i, j) * TABLE["dense(L)"](b, h, i, j),
    "decay(a) * window(left=2, right=1) * diagonal(d)": lambda b, h, i, j: TABLE["diagonal(d)"](b, h, i, j),
    "decay(a) + dense(L) + diagonal(d)": lambda b, h, i, j: sum(
        TABLE[m](b, h, i, j) for m in ("decay(a)", "dense(L)", "diagonal(d)")
    ),
    "-dense(L)": lambda b, h, i, j: -TABLE["dense(L)"](b, h, i, j),
    "dense(L).T": lambda b, h, i, j: TABLE["dense(L)"](b, h, j, i),
    "decay(a).T": lambda b, h, i, j: TABLE["decay(a)"](b, h, j, i),
    "dense(L).reverse()": lambda b, h, i, j: TABLE["dense(L)"](b, h, T - 1 - i, T - 1 - j),
    "decay(a).reverse()": lambda b, h, i, j: TABLE["decay(a)"](b, h, T - 1 - i, T - 1 - j),
    "dense(L).shift(1)": lambda b, h, i, j: TABLE["dense(L)"](b, h, i - 1, j) if i >= 1 else 0.0,
    "full().shift(3)": lambda b, h, i, j: float(i >= 3),
    "dense(L).shift(99)": lambda b, h, i, j: 0.0,
    "dense(L).shift(0)": lambda b, h, i, j: TABLE["dense(L)"](b, h, i, j),
    "dense(L).T.shift(1).T": lambda b, h, i, j: TABLE["dense(L)"](b, h, i, j - 1) if j >= 1 else 0.0,
    "dense(L).strict()": lambda b, h, i, j: TABLE["dense(L)"](b, h, i, j) if i != j else 0.0,
    "dense(L).scale(rows=u)": lambda b, h, i, j: at("u", b, i, h) * TABLE["dense(L)"](b, h, i, j),
    "dense(L).scale(cols=w)": lambda b, h, i, j: at("w", b, j, h) * TABLE["dense(L)"](b, h, i, j),
    "decay(a).scale(rows=u, cols=w, log_cols=z)": lambda b, h, i, j: (
        at("u", b, i, h) * TABLE["decay(a)"](b, h, i, j) * at("w", b, j, h) * math.exp(at("z", b, j, h))
    ),
    "dense(L).scale(log_cols=a).T": lambda b, h, i, j: math.exp(at("a", b, i, h)) * TABLE["dense(L)"](b, h, j, i),
    "zero()": lambda b, h, i, j: 0.0,
}  # fmt: skip
CHANNEL: dict[str, Callable[[int, int, int, int, int], float]] = {
    "channel_decay(ca)": lambda b, h, i, j, c: decayed("ca", b, h, i, j, c) if i >= j else 0.0,
    "channel_decay(dt=dt, A=A)": lambda b, h, i, j, c: (
        math.exp(sum(at("dt", b, s, h) for s in range(j + 1, i + 1)) * float(X["A"][h, c])) if i >= j else 0.0
    ),
    "channel_decay(ca) * decay(a).strict() + diagonal(d)": lambda b, h, i, j, c: (
        CHANNEL["channel_decay(ca)"](b, h, i, j, c) * TABLE["decay(a)"](b, h, i, j)
        if i != j
        else at("d", b, i, h)
    ),
    "channel_decay(ca).T": lambda b, h, i, j, c: CHANNEL["channel_decay(ca)"](b, h, j, i, c),
}  # fmt: skip


def _batch(text: str) -> int:
    return 1 if "(cu)" in text else BATCH


@pytest.mark.parametrize("text", TABLE)
def test_entries_of_the_mask_table(text):
    batch = _batch(text)
    got = evaluate(parse(text), X, batch, T, H)
    want = [[[[TABLE[text](b, h, i, j) for j in range(T)] for i in range(T)] for h in range(H)] for b in range(batch)]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("text", CHANNEL)
def test_entries_per_channel(text):
    got = evaluate(parse(text), X, BATCH, T, H)
    want = [
        [[[[CHANNEL[text](b, h, i, j, c) for c in range(N)] for j in range(T)] for i in range(T)] for h in range(H)]
        for b in range(BATCH)
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_every_row_of_the_table_is_transcribed():
    kinds = {type(m) for text in (*TABLE, *CHANNEL) for m in n.walk(parse(text))}
    assert kinds >= {kind for kind in n.FIELDS if not issubclass(kind, n.Registered)}


OPERANDS: dict[Operand, Callable[[int, int, int], float]] = {
    ops.Add("a", "w"): lambda b, t, h: at("a", b, t, h) + at("w", b, t, h),
    ops.Mul("a2", "ah"): lambda b, t, h: at("a2", b, t, h) * at("ah", b, t, h),
    ops.Exp("a2"): lambda b, t, h: math.exp(at("a2", b, t, h)),
    ops.Flip("a"): lambda b, t, h: at("a", b, T - 1 - t, h),
    ops.Flip("w"): lambda b, t, h: at("w", b, t, h),
    ops.Advance("a"): lambda b, t, h: at("a", b, t + 1, h) if t + 1 < T else 0.0,
    ops.Advance("ah"): lambda b, t, h: at("ah", b, t, h) if t + 1 < T else 0.0,
    ops.Delay("z"): lambda b, t, h: at("z", b, t - 1, h) if t else 0.0,
    ops.Select("b", 1): lambda b, t, h: at("b", b, t, h, 1),
    ops.Centre("coeffs"): lambda b, t, h: float(X["coeffs"][h // 2, T - 1]),
    ops.Main("L"): lambda b, t, h: float(X["L"][b, h // 2, t, t]),
    ops.Flip(ops.Main("L2")): lambda b, t, h: float(X["L2"][T - 1 - t, T - 1 - t]),
}  # fmt: skip


@pytest.mark.parametrize("x", OPERANDS, ids=lambda x: str(n.Diagonal(x)))
def test_operand_expressions(x):
    got = evaluate(n.Diagonal(x), X, BATCH, T, H).diagonal(dim1=2, dim2=3)  # [B, H, T]
    want = [[[OPERANDS[x](b, t, h) for t in range(T)] for h in range(H)] for b in range(BATCH)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-14, atol=0)


def test_mirrored_documents_are_the_documents_seen_from_the_end():
    for text, batch in (("documents({})", 1), ("documents(segment_ids={})", BATCH)):
        name = "cu" if batch == 1 else "ids"
        straight = evaluate(parse(text.format(name)), X, batch, T, 1)
        mirrored = evaluate(parse(text.format(f"mirror({name})")), X, batch, T, 1)
        assert torch.equal(mirrored, straight.flip(2, 3))
        assert not torch.equal(mirrored, straight)


def test_what_lies_outside_the_support_is_selected_away():
    """A decay that would overflow above the diagonal, and inf in a dense matrix under a window, leave exact zeros."""
    log_a = torch.full((1, 400, 1), -5.0)
    assert torch.equal(evaluate(n.Decay("a"), {"a": log_a}, 1, 400, 1).triu(1), torch.zeros(1, 1, 400, 400).double())
    infinite = {"L": torch.full((3, 3), torch.inf)}
    got = evaluate(parse("dense(L) * window(left=0, right=0)"), infinite, 1, 3, 1)
    assert torch.equal(got[0, 0], torch.diag(torch.full((3,), torch.inf, dtype=torch.float64)))


@pytest.mark.parametrize("seqlen", [0, 1])
def test_no_tokens_and_one(seqlen):
    operands = {
        "a": torch.ones(1, seqlen, 1),
        "x": torch.ones(1, seqlen, 1),
        "lags": torch.ones(1, max(2 * seqlen - 1, 0)),
    }
    for text in ("decay(a)", "decay(a).shift(1)", "trapezoidal(a, x, x)", "toeplitz(lags)", "full().reverse()"):
        assert evaluate(parse(text), operands, 1, seqlen, 1).shape == (1, 1, seqlen, seqlen)


# --- contraction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4, 4), (1, 1, 4), (4, 1, 1), (1, 4, 2), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("text", ["decay(a)", "channel_decay(ca)", "dense(L).T", "decay(a) * documents(segment_ids=ids)"])
def test_contraction_is_the_nested_loops(text, heads):
    q, k, v = _qkv(*heads)
    scale = 0.3
    want = torch.zeros(BATCH, T, H, P, dtype=torch.float64)
    entry = TABLE.get(text) or (lambda b, h, i, j: TABLE["decay(a)"](b, h, i, j) * float(X["ids"][b, i] == X["ids"][b, j]))
    entry = entry if text not in CHANNEL else (lambda b, h, i, j: 1.0)
    for b in range(BATCH):
        for h in range(H):
            hq, hk, hv = (h // (H // count) for count in heads)
            for i in range(T):
                for j in range(T):
                    score = 0.0
                    for c in range(N):
                        inner = CHANNEL[text](b, h, i, j, c) if text in CHANNEL else 1.0
                        score += inner * float(q[b, i, hq, c]) * float(k[b, j, hk, c])
                    for p in range(P):
                        want[b, i, h, p] += scale * entry(b, h, i, j) * score * float(v[b, j, hv, p])
    got = contract(parse(text), X, q, k, v, H, scale)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_documents_do_not_see_one_anothers_nan():
    q, k, v = _qkv(1, 1, 1)
    v[:, 3] = torch.nan  # with it, later tokens of its document: 4 in row 0; 4 and 5 in row 1
    got = contract(parse("decay(a) * documents(segment_ids=ids)"), X, q, k, v, H)
    assert got[0].isnan().any(-1).all(-1).tolist() == [False, False, False, True, True, False, False]
    assert got[1].isnan().any(-1).all(-1).tolist() == [False, False, False, True, True, True, False]


def _qkv(q_heads: int, k_heads: int, v_heads: int, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = ((q_heads, N), (k_heads, N), (v_heads, P))
    q, k, v = (torch.randn((batch, T, *shape), generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


# --- states ---------------------------------------------------------------------------------------------------------

STATES = {
    "decay": (Linear(log_a="a"), "decay(a)"),
    "strict": (Linear(log_a="a", strict=True), "decay(a).strict()"),
    "plain": (Linear(), "causal()"),
    "scaled": (
        Linear(log_a="a", rows="u", cols="w", log_cols="z", sign=-1),
        "-decay(a).scale(rows=u, cols=w, log_cols=z)",
    ),
    "shifted": (Linear(log_a="a", strict=True, row_inclusive=False), "decay(a).shift(1)"),
    "transposed": (
        Linear(log_a="a", causal=False, row_inclusive=False, col_inclusive=False, cols="w"),
        "decay(a).T.scale(cols=w)",
    ),
    "reversed": (Linear(log_a=ops.Flip("a"), causal=False), "decay(a).reverse()"),
    "channel": (Linear(channel="ca", cols="w"), "channel_decay(ca).scale(cols=w)"),
}  # fmt: skip


def _steps(name: str, q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t−1} + w[t] v_t k_tᵀ, y = u[t] S q, one token, row and head at a time.

    Whether a step decays before or after it reads and writes is what the table's formulas say of each mask.
    """
    term, _ = STATES[name]
    y = torch.zeros(BATCH, T, H, P, dtype=torch.float64)
    finals = torch.zeros(BATCH, H, P, N, dtype=torch.float64)
    for b in range(BATCH):
        for h in range(H):
            state = torch.zeros(P, N, dtype=torch.float64) if initial is None else initial[b, h].clone()
            for t in range(T) if term.causal else reversed(range(T)):
                if name == "channel":
                    a = torch.tensor([math.exp(at("ca", b, t, h, c)) for c in range(N)], dtype=torch.float64)
                elif name == "reversed":  # L[i, j] = exp(Σ_{T−1−j<s≤T−1−i} log_a[s]): token t is s = T − 1 − t
                    a = torch.tensor(math.exp(at("a", b, T - 1 - t, h)), dtype=torch.float64)
                else:
                    a = torch.tensor(1.0 if name == "plain" else math.exp(at("a", b, t, h)), dtype=torch.float64)
                weight = at("w", b, t, h) if term.cols else 1.0
                weight *= math.exp(at("z", b, t, h)) if term.log_cols else 1.0
                added = weight * torch.outer(v[b, t, 0], k[b, t, 0])
                row = (at("u", b, t, h) if term.rows else 1.0) * term.sign
                match name:
                    case "shifted":  # y_i reads what the token before left, undecayed
                        y[b, t, h] = row * (state @ q[b, t, 0])
                        state = a * state + added
                    case "transposed":  # exp(Σ_{i<s≤j} log_a[s]): token j decays on its way out
                        y[b, t, h] = row * ((state + added) @ q[b, t, 0])
                        state = a * (state + added)
                    case "strict":
                        state = a * state
                        y[b, t, h] = row * (state @ q[b, t, 0])
                        state = state + added
                    case _:
                        state = a * state + added
                        y[b, t, h] = row * (state @ q[b, t, 0])
            finals[b, h] = state
    return y, finals


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from a state"])
def test_states_are_those_of_the_recurrence(name, given):
    term, text = STATES[name]
    q, k, v = _qkv(1, 1, 1)
    start = torch.randn(BATCH, H, P, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    initial = start if given else None
    entered, final = linear_state(term, X, q, k, v, H, initial)
    got = contract(parse(text), X, q, k, v, H) + entered
    want, want_final = _steps(name, q, k, v, initial)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, want_final, rtol=1e-10, atol=1e-10)
    assert entered.any() == given


@pytest.mark.parametrize("kind", ["cu_seqlens", "segment_ids"])
def test_each_document_has_its_own_state(kind):
    """Documents one by one, with their own initial states, are the packed call; an empty one keeps its state."""
    batch = 1 if kind == "cu_seqlens" else BATCH
    q, k, v = _qkv(1, 1, 1, batch)
    operands = {"a": X["a"][:batch], "cu": X["cu"], "ids": X["ids"]}
    docs = n.Documents("cu") if batch == 1 else n.Documents(segment_ids="ids", n_segments=6)
    starts = [(0, 0, 3), (0, 3, 3), (0, 3, 6), (0, 6, T)]
    if batch == BATCH:
        rows = [[(0, 3), (0, 0), (3, 5), (0, 0), (0, 0), (5, 7)], [(0, 0), (0, 6), (0, 0), (6, 7), (0, 0), (0, 0)]]
        starts = [(b, *span) for b in range(BATCH) for span in rows[b]]
    initial = torch.randn(len(starts), H, P, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    entered, final = linear_state(Linear(log_a="a", documents=docs), operands, q, k, v, H, initial)
    got = contract(n.Product((n.Decay("a"), docs)), operands, q, k, v, H) + entered
    seen = torch.zeros(batch, T, dtype=torch.bool)
    for state, (b, start, stop) in enumerate(starts):
        at_, seen[b, start:stop] = (slice(b, b + 1), slice(start, stop)), True
        one, last = linear_state(
            Linear(log_a="a"), {"a": operands["a"][at_]}, q[at_], k[at_], v[at_], H, initial[state : state + 1]
        )
        one = one + contract(n.Decay("a"), {"a": operands["a"][at_]}, q[at_], k[at_], v[at_], H)
        torch.testing.assert_close(got[at_], one, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(final[state : state + 1], last, rtol=1e-11, atol=1e-11)
    assert seen.all()
