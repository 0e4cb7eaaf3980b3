"""`selective_state_update` and `ssd_minimal_discrete` are what they are documented to be, token by token in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compat_loops import BATCH, H, N, P, T, close, draw, inputs, loops
from torch import Tensor

from ssdops.compat.mamba_ssm import mamba_chunk_scan_combined, selective_state_update, ssd_minimal_discrete
from ssdops.errors import DtypeError, ShapeError, UnsupportedError, ValueRangeError
from ssdops.testing import assert_close, tolerance


def token(given: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    """One token as Mamba-2's layer passes it: numbers per head expanded over the head."""
    spread = {"dt": given["dt"][:, t, :, None].expand(-1, H, P), "A": given["A"][:, None, None].expand(H, P, N)}
    spread |= {key: given[key][:, None].expand(H, P) for key in ("D", "dt_bias")}
    return spread | {key: given[key][:, t] for key in ("x", "B", "C", "z")}


def channels(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True) -> tuple[Tensor, Tensor]:
    """y and the new state of one token whose channels decay on their own."""
    dt = F.softplus(dt + dt_bias) if dt_softplus else dt + dt_bias
    B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1)[:, :, None] for t in (B, C))
    state = (dt[..., None] * A).exp() * state + (dt * x)[..., None] * B
    return ((state * C).sum(-1) + D * x) * z * z.sigmoid(), state


def test_steps_go_on_from_the_scan() -> None:
    given = inputs()
    scanned = {key: t[:, :30] if key in ("x", "dt", "B", "C", "z") else t for key, t in given.items()}
    _, state = mamba_chunk_scan_combined(**scanned, chunk_size=16, dt_softplus=True, return_final_states=True)
    expected, states = loops(**given, dt_softplus=True)
    for t in range(30, T):
        y = selective_state_update(state, **token(given, t), dt_softplus=True)
        close(y, expected[:, t])
        close(state, states[:, t])


def by_channel(given: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {"dt": draw(BATCH, H, P, seed=30), "A": -draw(H, P, N, seed=31).exp(), "dt_bias": draw(H, P, seed=32)}
    return token(given, 0) | own | {"D": draw(H, P, seed=33)}


@pytest.mark.parametrize("softplus", [True, False])
def test_step_with_decays_per_channel(softplus: bool) -> None:
    given, state = by_channel(inputs()), draw(BATCH, H, P, N, seed=34)
    expected, new = channels(state.clone(), **given, dt_softplus=softplus)
    close(selective_state_update(state, **given, dt_softplus=softplus), expected)
    close(state, new)


def test_step_without_heads() -> None:
    """Mamba-1's form: one group of B and C, and channels for heads."""
    given = {key: t[0] if key in ("A", "D", "dt_bias") else t[:, 0] for key, t in by_channel(inputs()).items()}
    state = draw(BATCH, P, N, seed=35)
    lifted = {key: t[None] if key in ("A", "D", "dt_bias") else t[:, None] for key, t in given.items()}
    expected, new = channels(state.clone()[:, None], **lifted)
    y = selective_state_update(state, **given, dt_softplus=True)
    assert y.shape == (BATCH, P)
    close(y, expected[:, 0])
    close(state, new[:, 0])


@pytest.mark.parametrize("tied", [True, False])
def test_step_in_a_pool(tied: bool) -> None:
    """Rows find their slots; a row without one gives zero, even where D x is not; no other slot is touched."""
    given = token(inputs(), 0) if tied else by_channel(inputs())
    pool = draw(5, H, P, N, seed=36)
    before, slots = pool.clone(), torch.tensor([3, -1])
    expected, new = channels(before[3:4], **{k: t if k in ("A", "D", "dt_bias") else t[:1] for k, t in given.items()})
    y = selective_state_update(pool, **given, dt_softplus=True, state_batch_indices=slots)
    close(y[:1], expected)
    assert not y[1].any()
    close(pool[3:4], new)
    kept = [0, 1, 2, 4]
    assert torch.equal(pool[kept], before[kept])


def test_step_takes_what_is_optional_and_keeps_dtypes() -> None:
    given = {key: t.bfloat16() for key, t in token(inputs(), 0).items() if key in ("x", "dt", "A", "B", "C")}
    state = draw(BATCH, H, P, N, seed=37).bfloat16()
    none = {"D": torch.zeros(()), "z": torch.full((), 1e3), "dt_bias": torch.zeros(())}  # silu(1000) = 1000
    exact, new = channels(state.double(), **{k: t.double() for k, t in (given | none).items()})
    expected = exact / 1e3
    y = selective_state_update(state, **given, dt_softplus=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16)
    sizes = {k: t.double() if k in ("dt", "A", "dt_bias") else t.double().abs() for k, t in (given | none).items()}
    most = channels(draw(BATCH, H, P, N, seed=37).bfloat16().double().abs(), **sizes)
    assert_close(y, expected, tolerance(y.dtype, torch.float32, N, most[0].max().item() / 1e3, operands=y.dtype), "y")
    assert_close(state, new, tolerance(state.dtype, torch.float32, 2, most[1].max().item(), operands=y.dtype), "state")


def test_bad_steps_are_named() -> None:
    given, state = by_channel(inputs()), draw(BATCH, H, P, N)
    with pytest.raises(ShapeError, match="state has 3 rows and x 2; say which"):
        selective_state_update(draw(3, H, P, N), **given)
    with pytest.raises(ShapeError, match=r"B must be \(batch=2, ngroups, dstate=5\), got \(2, 2, 4\)"):
        selective_state_update(state, **given | {"B": given["B"][..., 1:]})
    with pytest.raises(ShapeError, match="ngroups=3 must divide nheads=4"):
        selective_state_update(state, **given | {"B": draw(BATCH, 3, N), "C": draw(BATCH, 3, N)})
    with pytest.raises(DtypeError, match=r"A must be a .*Tensor, got float"):
        selective_state_update(state, **given | {"A": -1.0})
    with pytest.raises(UnsupportedError, match="not one axis"):
        selective_state_update(state.transpose(1, 2).contiguous().transpose(1, 2), **given)
    with pytest.raises(ValueRangeError, match="each slot once"):
        selective_state_update(state, **given, state_batch_indices=torch.tensor([1, 1]))


# --- Listing 1 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [1, 37, 64])
def test_listing_is_the_recurrence(seqlen: int) -> None:
    X, B, C = draw(BATCH, seqlen, H, P), draw(BATCH, seqlen, H, N, seed=1), draw(BATCH, seqlen, H, N, seed=2)
    A, first = -draw(BATCH, seqlen, H, seed=3).exp(), draw(BATCH, 1, H, P, N, seed=4)
    state, ys = first[:, 0], []
    for t in range(seqlen):
        state = A[:, t].exp()[..., None, None] * state + X[:, t, :, :, None] * B[:, t, :, None]
        ys.append((state * C[:, t, :, None]).sum(-1))
    y, final = ssd_minimal_discrete(X, A, B, C, 16, initial_states=first)
    close(y, torch.stack(ys, 1))
    close(final, state)
    low = ssd_minimal_discrete(X.bfloat16(), A.bfloat16(), B.bfloat16(), C.bfloat16(), 16)
    assert [t.dtype for t in low] == [torch.bfloat16] * 2


def test_listing_names_bad_input() -> None:
    X, A = torch.ones(1, 2, H, P), torch.zeros(1, 2, H)
    with pytest.raises(ShapeError, match=r"initial_states must be \(batch=1, 1, n_heads=4, .*got \(1, 3, 4, 3, 3\)"):
        ssd_minimal_discrete(X, A, X, X, 1, initial_states=torch.ones(1, 3, H, P, P))
    with pytest.raises(ShapeError, match="heads_of_C=8 must divide n_heads=4"):
        ssd_minimal_discrete(X, A, X, torch.ones(1, 2, 2 * H, P), 1)
    with pytest.raises(ShapeError, match="initial_states must be"):
        ssd_minimal_discrete(X, A, X, X, 1, initial_states=torch.ones(1, H, P, P))
