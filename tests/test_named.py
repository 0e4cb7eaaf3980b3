"""Named masks are what their papers write: each against loops over the paper's own formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssdops import Mask, masks, named, ssd
from ssdops.errors import MaskError
from ssdops.ir.evaluate import evaluate
from ssdops.ir.problem import fenwick_levels
from ssdops.ir.terms import Linear
from ssdops.plan import terms_of

T, H, N, P = 9, 4, 3, 2
GENERATOR = torch.Generator().manual_seed(3)
Q, K = torch.randn(2, 1, T, H, N, dtype=torch.float64, generator=GENERATOR)
V = torch.randn(1, T, H, P, dtype=torch.float64, generator=GENERATOR)
LOGS = -torch.rand(2, 1, T, H, dtype=torch.float64, generator=GENERATOR)
FACTOR = torch.randn(1, T, H, dtype=torch.float64, generator=GENERATOR)


def matrix(mask: Mask) -> Tensor:
    return evaluate(mask.tree, mask.operands, 1, T, H)[0]


def by_entries(entry) -> Tensor:
    """[H, T, T] from entry(h, i, j)."""
    return torch.tensor([[[entry(h, i, j) for j in range(T)] for i in range(T)] for h in range(H)], dtype=torch.float64)


def decayed(log_a: Tensor, h: int, i: int, j: int) -> float:
    return math.exp(sum(float(log_a[0, s, h]) for s in range(j + 1, i + 1)))


def close(found: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-13)


# --- by entries -----------------------------------------------------------------------------------------------------


def test_linear_attention_is_the_recurrence_of_katharopoulos():
    """s_i = s_{i−1} + φ(k_i) v_iᵀ, z_i = z_{i−1} + φ(k_i), y_i = φ(q_i)ᵀ s_i / φ(q_i)ᵀ z_i with φ = elu + 1."""
    q, k = torch.nn.functional.elu(Q) + 1, torch.nn.functional.elu(K) + 1
    mask = masks.linear_attention()
    found = ssd(q, k, V, mask) / ssd(q, k, torch.ones_like(V[..., :1]), mask)
    for h in range(H):
        s, z = torch.zeros(N, P, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
        for i in range(T):
            s, z = s + k[0, i, h, :, None] * V[0, i, h], z + k[0, i, h]
            close(found[0, i, h], (q[0, i, h] @ s) / (q[0, i, h] @ z))


def test_retnet_decays_by_head():
    """D_nm = γ^{n−m} for n ≥ m, γ = 1 − 2^{−5−arange(0, h)}."""
    close(matrix(masks.retnet(H)), by_entries(lambda h, i, j: (1 - 2.0 ** (-5 - h)) ** (i - j) if i >= j else 0.0), 1e-6)


def test_lightning_decays_by_head_and_layer():
    """M_st = λ^{s−t} for s ≥ t, λ = exp(−8h/H · (1 − l/L))."""

    def entry(h: int, i: int, j: int) -> float:
        return math.exp(-8 * (h + 1) / H * (1 - 2 / 5)) ** (i - j) if i >= j else 0.0

    close(matrix(masks.lightning(H, layer=2, n_layers=5)), by_entries(entry), 1e-5)


def test_alibi_is_the_exponential_of_its_bias():
    """exp(q_i · k_j + m · (−(i − j))) over its unbiased part, slopes a geometric sequence from 2^{−8/n} with that ratio."""
    ratio = 2 ** (-8 / H)
    slopes = [ratio * ratio**h for h in range(H)]
    close(matrix(masks.alibi(H)), by_entries(lambda h, i, j: math.exp(-slopes[h] * (i - j)) if i >= j else 0.0), 1e-6)


def test_quasiseparable_has_two_ways_and_a_diagonal():
    def entry(h: int, i: int, j: int) -> float:
        if i == j:
            return float(FACTOR[0, i, h])
        return decayed(LOGS[0], h, i, j) if i > j else decayed(LOGS[1], h, j, i)

    close(matrix(masks.quasiseparable(LOGS[0], LOGS[1], FACTOR)), by_entries(entry))


@pytest.mark.parametrize("decays", [True, False])
def test_sliding_window_sees_itself_and_those_before(decays):
    def entry(h: int, i: int, j: int) -> float:
        return (decayed(LOGS[0], h, i, j) if decays else 1.0) if 0 <= i - j <= 3 else 0.0

    found = matrix(masks.sliding_window(3, LOGS[0] if decays else None))
    close(found.expand(H, T, T), by_entries(entry))


# --- by recurrence --------------------------------------------------------------------------------------------------


def test_mamba2_is_its_recurrence_with_the_skip():
    """h_t = exp(dt A) h_{t−1} + dt B_t x_t, y_t = C_tᵀ h_t + D x_t."""
    dt, A, D = torch.nn.functional.softplus(FACTOR), -torch.arange(1.0, H + 1).double(), torch.arange(H).double()
    found = ssd(Q, K, V * dt[..., None], masks.mamba2(dt, A)) + D[:, None] * V
    for h in range(H):
        state = torch.zeros(N, P, dtype=torch.float64)
        for t in range(T):
            state = torch.exp(dt[0, t, h] * A[h]) * state + dt[0, t, h] * K[0, t, h, :, None] * V[0, t, h]
            close(found[0, t, h], Q[0, t, h] @ state + D[h] * V[0, t, h])


def test_mlstm_is_its_recurrence_with_the_normaliser():
    """C_t = f_t C_{t−1} + i_t v_t k_tᵀ, n_t = f_t n_{t−1} + i_t k_t, h_t = C_t q_t / max(|n_tᵀ q_t|, 1)."""
    log_f, log_i = torch.nn.functional.logsigmoid(FACTOR), 2 * FACTOR.flip(1)
    mask = masks.mlstm(log_f, log_i)
    found = ssd(Q, K, V, mask) / ssd(Q, K, torch.ones_like(V[..., :1]), mask).abs().clamp_min(1)
    for h in range(H):
        c, n = torch.zeros(P, N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
        for t in range(T):
            f, i, k = log_f[0, t, h].exp(), log_i[0, t, h].exp(), K[0, t, h]
            c, n = f * c + i * V[0, t, h, :, None] * k, f * n + i * k
            close(found[0, t, h], c @ Q[0, t, h] / max(abs(float(n @ Q[0, t, h])), 1.0))


def test_log_linear_attention_sums_the_buckets_of_a_fenwick_tree():
    """y_t = Σ_ℓ λ_t^{(ℓ)} q_tᵀ Σ_{s in bucket ℓ} a_{t:s} k_s v_sᵀ: the token, then what a Fenwick tree cuts its prefix into."""
    levels = torch.randn(1, T, H, fenwick_levels(T), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = ssd(Q, K, V, masks.fenwick(LOGS[0], levels))
    for t in range(T):
        buckets, end = {0: range(t, t + 1)}, t
        while end:
            low = (end & -end).bit_length() - 1  # the least set bit
            buckets[low + 1], end = range(end - 2**low, end), end - 2**low
        assert sorted(s for bucket in buckets.values() for s in bucket) == list(range(t + 1))
        for h in range(H):
            y = torch.zeros(P, dtype=torch.float64)
            for level, bucket in buckets.items():
                for s in bucket:
                    weight = levels[0, t, h, level] * decayed(LOGS[0], h, t, s)
                    y = y + weight * (Q[0, t, h] @ K[0, s, h]) * V[0, s, h]
            close(found[0, t, h], y)


# --- what they are --------------------------------------------------------------------------------------------------


def test_they_are_found_among_the_masks():
    for name in named.__all__:
        assert getattr(masks, name) is getattr(named, name) and name in dir(masks)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = masks.nonsense


@pytest.mark.parametrize(
    "mask",
    [masks.linear_attention(), masks.retnet(4), masks.lightning(4, 0, 2), masks.alibi(3), masks.mlstm(LOGS[0], LOGS[1])],
    ids=str,
)
def test_these_are_one_scan(mask):
    (term,) = terms_of(mask.tree)
    assert isinstance(term, Linear) and term.causal


def test_bad_counts_are_named():
    for make in (lambda: masks.retnet(0), lambda: masks.alibi(-1), lambda: masks.lightning(2, 3, 3)):
        with pytest.raises(MaskError, match=r"at least 1, got|counted from 0 to n_layers - 1"):
            make()
