"""`ssdops.compat.mamba_ssm` is what mamba_ssm's functions are documented to be: each against loops over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from compat_loops import BATCH, IDS, REQUIRED, H, N, P, T, close, draw, inputs, loops

from ssdops.compat.mamba_ssm import mamba_chunk_scan_combined
from ssdops.errors import DtypeError, ShapeError, UnsupportedError, ValueRangeError
from ssdops.testing import assert_close, tolerance

OPTIONS = {
    "plain": ((), {"dt_softplus": True}),
    "no softplus": ((), {}),
    "D": (("D",), {"dt_softplus": True}),
    "gate": (("z",), {"dt_softplus": True}),
    "bias": (("dt_bias",), {"dt_softplus": True}),
    "limits": (("dt_bias",), {"dt_softplus": True, "dt_limit": (0.3, 0.9)}),
    "states": (("initial_states",), {"dt_softplus": True}),
    "packed": (("initial_states",), {"dt_softplus": True, "seq_idx": IDS}),
    "all": (("D", "z", "dt_bias", "initial_states"), {"dt_softplus": True, "dt_limit": (0.01, 2.0), "seq_idx": IDS}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_scan_is_the_recurrence_with_gradients(name: str) -> None:
    extra, options = OPTIONS[name]
    leaves = {key: t.requires_grad_() for key, t in inputs().items() if key in (*REQUIRED, *extra)}
    y, state = mamba_chunk_scan_combined(**leaves, chunk_size=16, return_final_states=True, **options)
    expected, states = loops(**leaves, **options)
    close(y, expected)
    close(state, states[:, -1])
    weights = draw(*y.shape, seed=20), draw(*state.shape, seed=21)
    found = torch.autograd.grad((y, state), list(leaves.values()), weights)
    wanted = torch.autograd.grad((expected, states[:, -1]), list(leaves.values()), weights)
    for gradient, right in zip(found, wanted, strict=True):
        close(gradient, right)
    close(mamba_chunk_scan_combined(**leaves, chunk_size=16, **options), expected)


def test_skip_per_channel() -> None:
    given = {key: t for key, t in inputs().items() if key in REQUIRED} | {"D": draw(H, P)}
    close(mamba_chunk_scan_combined(**given, chunk_size=16), loops(**given)[0])


def test_negative_steps_are_zero_by_default() -> None:
    """As in mamba_ssm, whose least step is 0: without softplus a negative dt neither decays nor adds."""
    given = {key: t for key, t in inputs().items() if key in REQUIRED} | {"dt": -torch.ones(BATCH, T, H).double()}
    assert not mamba_chunk_scan_combined(**given, chunk_size=16).any()


def test_chunk_size_changes_nothing() -> None:
    given = {key: t.float() for key, t in inputs().items()}
    assert torch.equal(mamba_chunk_scan_combined(**given, chunk_size=3), mamba_chunk_scan_combined(**given, chunk_size=256))


@pytest.mark.parametrize("first", [0, 3])
def test_ids_may_be_any_and_states_enter_the_one_that_is_0(first: int) -> None:
    """Ids need not rise, nor begin with 0; if they begin with another, the initial state is nobody's."""
    ids = torch.tensor([[first] * 10 + [9] * 7 + [-1] * 20]).expand(BATCH, T)
    given = {key: t for key, t in inputs().items() if key in (*REQUIRED, "initial_states")} | {"seq_idx": ids}
    y, state = mamba_chunk_scan_combined(**given, chunk_size=16, dt_softplus=True, return_final_states=True)
    expected, states = loops(**given, dt_softplus=True)
    close(y, expected)
    close(state, states[:, -1])


@pytest.mark.parametrize("ends", [[37], [5, 25, 37], [5, 5, 25, 37, 37]])
def test_states_of_sequences(ends: list[int]) -> None:
    cu_seqlens = torch.tensor([0, *ends])
    ids = torch.arange(len(ends)).repeat_interleave(cu_seqlens.diff())[None]
    given = {key: t for key, t in inputs(batch=1).items() if key in (*REQUIRED, "initial_states")} | {"seq_idx": ids}
    y, final, varlen = mamba_chunk_scan_combined(
        **given, chunk_size=16, dt_softplus=True, cu_seqlens=cu_seqlens, return_final_states=True, return_varlen_states=True
    )
    expected, states = loops(**given, dt_softplus=True)
    close(y, expected)
    close(final, states[:, -1])
    for row, (start, stop) in enumerate(zip(cu_seqlens[:-1].tolist(), ends, strict=True)):
        close(varlen[row], states[0, stop - 1] if stop > start else torch.zeros(H, P, N).double())
    again = mamba_chunk_scan_combined(
        **given, chunk_size=16, dt_softplus=True, cu_seqlens=cu_seqlens, return_varlen_states=True
    )
    assert len(again) == 2 and torch.equal(again[1], varlen)


def test_boundaries_alone_change_nothing() -> None:
    """cu_seqlens is read only where the states of sequences are wanted, as in mamba_ssm."""
    given = {key: t for key, t in inputs(batch=1).items() if key in REQUIRED}
    with_them = mamba_chunk_scan_combined(**given, chunk_size=16, cu_seqlens=torch.tensor([0, 5, T]))
    assert torch.equal(with_them, mamba_chunk_scan_combined(**given, chunk_size=16))


def test_compiles_as_one_graph() -> None:
    given = {key: t for key, t in inputs(batch=1).items() if key != "initial_states"} | {"seq_idx": IDS[:1]}
    given |= {"cu_seqlens": torch.tensor([0, 5, 25, T]), "return_final_states": True, "return_varlen_states": True}
    compiled = torch.compile(mamba_chunk_scan_combined, fullgraph=True, backend="eager")
    for found, expected in zip(
        compiled(**given, chunk_size=16), mamba_chunk_scan_combined(**given, chunk_size=16), strict=True
    ):
        close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """x, B, C and z in a low precision beside float32 parameters, as in training; y is like x, states are float32, or C's."""
    low = ("x", "dt", "B", "C", "z")
    given = {key: t.to(dtype if key in low else torch.float32) for key, t in inputs(batch=1).items()}
    options = {"dt_softplus": True, "seq_idx": IDS[:1], "chunk_size": 16}
    boundaries = {"cu_seqlens": torch.tensor([0, 5, 25, T]), "return_varlen_states": True}
    y, state, varlen = mamba_chunk_scan_combined(**given, **options, **boundaries, return_final_states=True)
    assert (y.dtype, state.dtype, varlen.dtype) == (dtype, torch.float32, dtype)
    exact = {key: t.double() for key, t in given.items()}
    expected, states = loops(**exact, dt_softplus=True, seq_idx=IDS[:1])
    sizes = {key: t if key in ("A", "dt", "dt_bias") else t.abs() for key, t in exact.items()}
    most, most_states = loops(**sizes, dt_softplus=True, seq_idx=IDS[:1])
    assert_close(y, expected, tolerance(dtype, torch.float32, T * N, most.max().item(), operands=dtype), "y")
    bound = tolerance(torch.float32, torch.float32, T, most_states.max().item(), operands=dtype)
    assert_close(state, states[:, -1], bound, "state")


BAD = {
    "x": (lambda t: t[0], ShapeError, r"x must be \(batch, seqlen, nheads, headdim\), got \(37, 4, 3\)"),
    "dt": (lambda t: t[:, 1:], ShapeError, r"dt must be \(batch=2, seqlen=37, nheads=4\), got \(2, 36, 4\)"),
    "A": (lambda t: t[:2], ShapeError, r"A must be \(nheads=4\), got \(2,\)"),
    "C": (lambda t: t[..., 1:], ShapeError, r"C must be .*dstate=5.*got \(2, 37, 2, 4\)"),
    "D": (lambda t: t[:, None], ShapeError, r"D must be \(nheads=4, headdim=3\), got \(4, 1\)"),
    "z": (lambda t: t.flatten(2), ShapeError, r"z must be .*got \(2, 37, 12\)"),
    "initial_states": (lambda t: t.mT, ShapeError, r"initial_states must be .*headdim=3, dstate=5.*got \(2, 4, 5, 3\)"),
    "B": (lambda t: t.tolist(), DtypeError, "B must be a torch.Tensor, got list"),
    "dt_bias": (lambda t: 1.0, DtypeError, "dt_bias must be a torch.Tensor, got float"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    change, error, match = BAD[name]
    given = inputs()
    given[name] = change(given[name])
    with pytest.raises(error, match=match):
        mamba_chunk_scan_combined(**given, chunk_size=16)


def test_groups_must_divide_heads() -> None:
    """More groups than heads are an error, and not heads that share x."""
    given = inputs() | {"B": draw(BATCH, T, 2 * H, N), "C": draw(BATCH, T, 2 * H, N)}
    with pytest.raises(ShapeError, match="ngroups=8 must divide nheads=4"):
        mamba_chunk_scan_combined(**given, chunk_size=16)


def test_bad_packing_is_named() -> None:
    given = {key: t for key, t in inputs(batch=1).items() if key in REQUIRED} | {"chunk_size": 16, "return_varlen_states": True}
    ids, cu_seqlens = IDS[:1], torch.tensor([0, 5, 25, T])
    with pytest.raises(ValueRangeError, match="needs cu_seqlens"):
        mamba_chunk_scan_combined(**given, seq_idx=ids)
    with pytest.raises(UnsupportedError, match="without seq_idx"):
        mamba_chunk_scan_combined(**given, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueRangeError, match=r"changes at \[5, 25\], and cu_seqlens has inner boundaries \[6, 25\]"):
        mamba_chunk_scan_combined(**given, seq_idx=ids, cu_seqlens=torch.tensor([0, 6, 25, T]))
    two = inputs(batch=2)
    with pytest.raises(ShapeError, match="x has batch 2"):
        mamba_chunk_scan_combined(
            *(two[key] for key in REQUIRED), 16, seq_idx=IDS, cu_seqlens=cu_seqlens, return_varlen_states=True
        )
