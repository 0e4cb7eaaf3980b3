"""`ssdops.compat.fla` is what fla's functions are documented to be: each against loops over tokens in float64."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ssdops.compat import fla
from ssdops.testing import assert_close, tolerance

B, T, H, K, V = 2, 37, 4, 5, 3
CU = torch.tensor([0, 5, 5, 25, T])  # the second sequence is empty


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    return draw(batch, T, H, K, seed=1), draw(batch, T, H, K, seed=2), draw(batch, T, H, V, seed=3)


def loops(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor | None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """o and the last state [B, H, K, V] of h ← exp(g) h + k vᵀ, o = scale · hᵀ q; g is [B, T, H, K], or 1 for K."""
    state = q.new_zeros(len(q), H, K, v.shape[-1]) if state is None else state
    outputs: dict[int, Tensor] = {}
    for t in range(T)[::-1] if reverse else range(q.shape[1]):
        state = g[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[t] = scale * (q[:, t, :, :, None] * state).sum(-2)
    return torch.stack([outputs[t] for t in sorted(outputs)], 1), state


def packed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, states: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Every sequence of CU on its own."""
    outputs, finals = [], []
    for row, (start, stop) in enumerate(pairwise(CU.tolist())):
        parts = [x[:, start:stop].flip(1) if reverse else x[:, start:stop] for x in (q, k, v, g)]
        state = states[row : row + 1]
        if stop > start:
            o, state = loops(*parts, scale, state)
            outputs.append(o.flip(1) if reverse else o)
        finals.append(state)
    return torch.cat(outputs, 1), torch.cat(finals)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


G, GK, GAMMA = -draw(B, T, H, seed=4).exp(), -draw(B, T, H, K, seed=5).exp(), -draw(H, seed=6).exp()
NONE = torch.zeros(B, T, H, 1).double()
RETENTION = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(H)]).double().log().float().double()
LIGHTNING = torch.tensor([-(8 / H * (1 - 2 / 6)) * h for h in range(H)]).double().float().double()

SCANS = {
    "chunk_simple_gla": (partial(fla.chunk_simple_gla, g=G), G[..., None]),
    "chunk_simple_gla, g_gamma": (partial(fla.chunk_simple_gla, g_gamma=GAMMA), GAMMA.expand(B, T, H)[..., None]),
    "chunk_simple_gla, no gate": (fla.chunk_simple_gla, NONE),
    "fused_recurrent_simple_gla": (partial(fla.fused_recurrent_simple_gla, g=G), G[..., None]),
    "chunk_retention": (fla.chunk_retention, RETENTION.expand(B, T, H)[..., None]),
    "chunk_lightning_attn": (
        partial(fla.chunk_lightning_attn, layer_idx=2, num_layers=6), LIGHTNING.expand(B, T, H)[..., None]
    ),
    "chunk_linear_attn": (partial(fla.chunk_linear_attn, normalize=False), NONE),
    "chunk_gla": (partial(fla.chunk_gla, g=GK), GK),
    "fused_recurrent_gla": (partial(fla.fused_recurrent_gla, gk=GK), GK),
    "fused_recurrent_gla, no gate": (fla.fused_recurrent_gla, NONE),
}  # fmt: skip
"""Name → the function with what only it takes, and its log decays."""


# --- one scan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCANS)
def test_is_the_recurrence_with_states_and_gradients(name: str) -> None:
    function, g = SCANS[name]
    leaves = [t.requires_grad_() for t in (*qkv(), draw(B, H, K, V, seed=7))]
    *inputs, first = leaves
    o, state = function(*inputs, scale=0.7, initial_state=first, output_final_state=True)
    expected, final = loops(*inputs, g, 0.7, first)
    close(o, expected)
    close(state, final)
    weights = draw(*o.shape, seed=20), draw(*state.shape, seed=21)
    for found, wanted in zip(
        torch.autograd.grad((o, state), leaves, weights), torch.autograd.grad((expected, final), leaves, weights), strict=True
    ):
        close(found, wanted)


@pytest.mark.parametrize("name", SCANS)
def test_defaults(name: str) -> None:
    """scale is K ** -0.5, there is no state before, and none comes back."""
    function, g = SCANS[name]
    o, state = function(*qkv())
    close(o, loops(*qkv(), g, K**-0.5, None)[0])
    assert state is None


@pytest.mark.parametrize("name", SCANS)
def test_packed_sequences(name: str) -> None:
    function, g = SCANS[name]
    if isinstance(function, partial):  # its gates are of one row
        keywords = {key: x[:1] if isinstance(x, Tensor) and x.ndim > 1 else x for key, x in function.keywords.items()}
        function = partial(function.func, **keywords)
    inputs, states = qkv(batch=1), draw(len(CU) - 1, H, K, V, seed=8)
    o, final = function(*inputs, initial_state=states, output_final_state=True, cu_seqlens=CU)
    expected, finals = packed(*inputs, g[:1], K**-0.5, states, False)
    close(o, expected)
    close(final, finals)


@pytest.mark.parametrize("name", ["fused_recurrent_simple_gla", "fused_recurrent_gla", "fused_recurrent_gla, no gate"])
def test_backwards_in_time(name: str) -> None:
    """From the last token, whose own gate decays the state before the token enters it; packed or not."""
    function, g = SCANS[name]
    first = draw(B, H, K, V, seed=7)
    o, state = function(*qkv(), initial_state=first, output_final_state=True, reverse=True)
    expected, final = loops(*qkv(), g, K**-0.5, first, reverse=True)
    close(o, expected)
    close(state, final)
    keywords = {key: x[:1] for key, x in getattr(function, "keywords", {}).items()}
    inputs, states = qkv(batch=1), draw(len(CU) - 1, H, K, V, seed=8)
    o, final = getattr(function, "func", function)(
        *inputs, **keywords, initial_state=states, output_final_state=True, reverse=True, cu_seqlens=CU
    )
    expected, finals = packed(*inputs, g[:1], K**-0.5, states, True)
    close(o, expected)
    close(final, finals)


@pytest.mark.parametrize("name", ["chunk_simple_gla", "fused_recurrent_simple_gla", "chunk_gla", "fused_recurrent_gla"])
def test_states_with_values_first(name: str) -> None:
    function, first = SCANS[name][0], draw(B, H, K, V, seed=7)
    o, state = function(*qkv(), initial_state=first, output_final_state=True)
    turned, other = function(*qkv(), initial_state=first.mT, output_final_state=True, state_v_first=True)
    close(turned, o)
    close(other, state.mT)


def test_compiles_as_one_graph() -> None:
    given, options = (*qkv(), G), {"initial_state": draw(B, H, K, V, seed=7), "output_final_state": True}
    compiled = torch.compile(fla.chunk_simple_gla, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(*given, **options), fla.chunk_simple_gla(*given, **options), strict=True):
        close(found, expected)


def test_gates_have_gradients() -> None:
    for function, key, g in (
        (fla.chunk_simple_gla, "g", G), (fla.chunk_gla, "g", GK), (fla.fused_recurrent_gla, "gk", GK),
        (fla.parallel_simple_gla, "g", G),
    ):  # fmt: skip
        leaf = g.clone().requires_grad_()
        weights = draw(B, T, H, V, seed=22)
        (found,) = torch.autograd.grad(function(*qkv(), **{key: leaf})[0], leaf, weights)
        expected = loops(*qkv(), leaf if leaf.ndim == 4 else leaf[..., None], K**-0.5, None)[0]
        (wanted,) = torch.autograd.grad(expected, leaf, weights)
        close(found, wanted)


def test_parallel_has_no_state() -> None:
    o, attentions = fla.parallel_simple_gla(*qkv(), G, scale=0.3)
    close(o, loops(*qkv(), G[..., None], 0.3, None)[0])
    assert attentions is None


# --- functions with more to them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("are_packed", [False, True])
def test_normalised_linear_attention(are_packed: bool) -> None:
    """z_t = z + Σ_{s≤t} k_s, o_t = scale · hᵀq / (⟨scale · q, z_t⟩ + 1e-10); z comes back whether it was asked for or not."""
    q, k, v = qkv(batch=1)
    q, k = q.exp(), k.exp()
    count = len(CU) - 1 if are_packed else 1
    bounds = CU.tolist() if are_packed else [0, T]
    first, z = draw(count, H, K, V, seed=7), draw(count, 1, H, K, seed=9).exp()
    cu_seqlens = CU if are_packed else None
    o, (state, after) = fla.chunk_linear_attn(q, k, v, initial_state=(first, z), output_final_state=True, cu_seqlens=cu_seqlens)
    for row, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            close(state[row], first[row])
            close(after[row], z[row])
            continue
        at = slice(start, stop)
        raw, final = loops(q[:, at], k[:, at], v[:, at], torch.zeros(1, T, H, 1).double(), K**-0.5, first[row : row + 1])
        sums = z[row : row + 1] + k[:, at].cumsum(1)
        close(o[:, at], raw / ((q[:, at] * K**-0.5 * sums).sum(-1, keepdim=True) + 1e-10))
        close(state[row], final[0])
        close(after[row], sums[0, -1:])
    _, (state, after_zero) = fla.chunk_linear_attn(q, k, v)
    assert state is None
    close(after_zero, k.sum(1, keepdim=True))


def test_log_linear_attention_by_entries() -> None:
    """fla's level of (i, j): 0 on the diagonal; ℓ where bit ℓ − 1 of i is set and j lies in the block of 2^(ℓ−1) before i's."""
    heads = 2
    q, k, v = draw(B, T, heads, K, seed=1), draw(B, T, heads, K, seed=2), draw(B, T, H, V, seed=3)
    levels = draw(B, T, H, 7, seed=10)  # one more than T needs
    expected = torch.zeros(B, T, H, V).double()
    for i in range(T):
        for j in range(i + 1):
            found = [0] if i == j else [
                level for level in range(1, 7)
                if i % 2**level >= 2 ** (level - 1)
                and i - i % 2 ** (level - 1) - 2 ** (level - 1) <= j < i - i % 2 ** (level - 1)
            ]  # fmt: skip
            assert len(found) == 1
            weight = levels[:, i, :, found[0]] * G[:, j + 1 : i + 1].sum(1).exp()
            score = (q[:, i] * k[:, j]).sum(-1).repeat_interleave(H // heads, 1)
            expected[:, i] += (weight * score)[..., None] * v[:, j]
    o, state = fla.chunk_log_linear_attn(q, k, v, G, levels)
    close(o, expected)
    assert state is None
    close(fla.chunk_log_linear_attn(q, k, v, G, levels, scale=None)[0], expected * K**-0.5)


def test_lightning_counts_heads_from_0() -> None:
    """The first head keeps everything: what masks.lightning, counted from 1, does not."""
    o, _ = fla.chunk_lightning_attn(*qkv(), layer_idx=0, num_layers=6)
    close(o[:, :, 0], loops(*qkv(), NONE, K**-0.5, None)[0][:, :, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """o is like q; states are float32; gates may be float32 beside q, k and v in a low precision."""
    inputs = [t.to(dtype) for t in qkv()]
    exact = [t.double() for t in inputs]
    for function, g in ((fla.chunk_simple_gla, G), (fla.chunk_gla, GK)):
        g = g.float()
        o, state = function(*inputs, g, output_final_state=True)
        assert (o.dtype, state.dtype) == (dtype, torch.float32)
        gates = g.double() if g.ndim == 4 else g.double()[..., None]
        expected, final = loops(*exact, gates, K**-0.5, None)
        most, most_state = loops(*(t.abs() for t in exact), gates, K**-0.5, None)
        assert_close(o, expected, tolerance(dtype, torch.float32, T * K, most.max().item(), operands=dtype), "o")
        bound = tolerance(torch.float32, torch.float32, T, most_state.max().item(), operands=dtype)
        assert_close(state, final, bound, "state")
