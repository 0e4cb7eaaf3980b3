"""`mamba_split_conv1d_scan_combined` is convolution, scan, norm and projection, each by its formula in float64."""

from __future__ import annotations

import pytest
import torch
from compat_loops import BATCH, IDS, G, H, N, P, T, close, draw, loops
from torch import Tensor

from ssdops.compat.mamba_ssm import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from ssdops.errors import DtypeError, ShapeError, UnsupportedError
from ssdops.nn import causal_conv1d

DIM, WIDTH, MLP, OUT = H * P, 4, 6, 7
CHANNELS = DIM + 2 * G * N


def inputs(mlp: int = 0) -> dict[str, Tensor]:
    """Every float tensor that must be given, in float64."""
    return {
        "zxbcdt": draw(BATCH, T, 2 * mlp + DIM + CHANNELS + H, seed=1), "conv1d_weight": draw(CHANNELS, WIDTH, seed=2),
        "conv1d_bias": draw(CHANNELS, seed=3), "dt_bias": draw(H, seed=4), "A": -draw(H, seed=5).exp(), "D": draw(H, P, seed=6),
    }  # fmt: skip


def extras(mlp: int = 0) -> dict[str, Tensor]:
    return {
        "rmsnorm_weight": draw(DIM, seed=7), "outproj_weight": draw(OUT, mlp + DIM, seed=8), "outproj_bias": draw(OUT, seed=9),
        "initial_states": draw(BATCH, H, P, N, seed=10),
    }  # fmt: skip


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    """Token by token and tap by tap, within an id."""
    rows = []
    for t in range(T):
        row = torch.zeros_like(x[:, 0]) if bias is None else bias.expand_as(x[:, 0])
        for s in range(min(t + 1, WIDTH)):
            same = torch.ones(BATCH, 1) if ids is None else (ids[:, t - s] == ids[:, t])[:, None]
            row = row + same * x[:, t - s] * weight[:, WIDTH - 1 - s]
        rows.append(row)
    return torch.stack(rows, 1)


def block(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, initial_states=None, seq_idx=None, dt_limit=(0.0, 1e300),
    activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=P,
    norm_before_gate=True, mlp=0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    first, second, z, mixed, dt = zxbcdt.split([mlp, mlp, DIM, CHANNELS, H], -1)
    mixed = convolved(mixed, conv1d_weight, conv1d_bias, seq_idx)
    mixed = mixed if activation is None else mixed * mixed.sigmoid()
    x, B, C = mixed.split([DIM, G * N, G * N], -1)
    x, B, C = x.reshape(BATCH, T, H, P), B.reshape(BATCH, T, G, N), C.reshape(BATCH, T, G, N)
    y, states = loops(
        x, dt, A, B, C, D, None, dt_bias, initial_states, seq_idx, dt_softplus=True, dt_limit=dt_limit
    )  # fmt: skip
    y, gate = y.reshape(BATCH, T, DIM), z * z.sigmoid()
    if rmsnorm_weight is None:
        y = y * gate
    else:
        y = y if norm_before_gate else y * gate
        squares = y.reshape(BATCH, T, G, DIM // G).pow(2).mean(-1).repeat_interleave(DIM // G, -1)
        y = y / (squares + rmsnorm_eps).sqrt() * rmsnorm_weight
        y = y * gate if norm_before_gate else y
    y = torch.cat([first * first.sigmoid() * second, y], -1)
    return (y if outproj_weight is None else y @ outproj_weight.T + (0 if outproj_bias is None else outproj_bias)), states[
        :, -1
    ]


OPTIONS = {
    "plain": ((), {}, 0),
    "no activation": ((), {"activation": None}, 0),
    "swish, limits": ((), {"activation": "swish", "dt_limit": (0.1, 0.8)}, 0),
    "norm": (("rmsnorm_weight",), {"rmsnorm_eps": 0.1}, 0),
    "norm after the gate": (("rmsnorm_weight",), {"norm_before_gate": False}, 0),
    "projection": (("outproj_weight",), {}, 0),
    "mlp": (("outproj_weight", "outproj_bias"), {}, MLP),
    "packed": (("initial_states",), {"seq_idx": IDS}, 0),
    "all": (tuple(extras()), {"seq_idx": IDS, "norm_before_gate": False}, MLP),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_is_its_parts_with_gradients(name: str) -> None:
    chosen, options, mlp = OPTIONS[name]
    leaves = inputs(mlp) | {key: t for key, t in extras(mlp).items() if key in chosen}
    leaves = {key: t.requires_grad_() for key, t in leaves.items()}
    out, state = mamba_split_conv1d_scan_combined(**leaves, chunk_size=16, ngroups=G, return_final_states=True, **options)
    expected, final = block(**leaves, **options, mlp=mlp)
    close(out, expected)
    close(state, final)
    weights = draw(*out.shape, seed=20), draw(*state.shape, seed=21)
    for found, wanted in zip(
        torch.autograd.grad((out, state), list(leaves.values()), weights),
        torch.autograd.grad((expected, final), list(leaves.values()), weights),
        strict=True,
    ):
        close(found, wanted)
    close(mamba_split_conv1d_scan_combined(**leaves, chunk_size=16, ngroups=G, **options), expected)


@pytest.mark.parametrize("ids", [None, IDS])
def test_without_a_bias_and_with_a_skip_per_head(ids: Tensor | None) -> None:
    given = inputs() | {"conv1d_bias": None, "D": draw(H)}
    out = mamba_split_conv1d_scan_combined(**given, chunk_size=16, ngroups=G, headdim=P, seq_idx=ids)
    close(out, block(**given, seq_idx=ids)[0])


def test_a_row_shorter_than_the_convolution() -> None:
    given = inputs()
    given["zxbcdt"] = given["zxbcdt"][:, :2]
    whole = mamba_split_conv1d_scan_combined(**inputs(), chunk_size=16, ngroups=G, seq_idx=torch.zeros(BATCH, T).long())
    close(mamba_split_conv1d_scan_combined(**given, chunk_size=16, ngroups=G), whole[:, :2])
    close(
        mamba_split_conv1d_scan_combined(**given, chunk_size=16, ngroups=G, seq_idx=torch.zeros(BATCH, 2).long()), whole[:, :2]
    )


def test_a_sequence_knows_nothing_of_the_one_before() -> None:
    """Not even by way of the convolution, and not even a NaN."""
    given = inputs()
    alone = mamba_split_conv1d_scan_combined(**given | {"zxbcdt": given["zxbcdt"][:1, 25:]}, chunk_size=16, ngroups=G)
    given["zxbcdt"][:, :25] = torch.nan
    packed = mamba_split_conv1d_scan_combined(**given, chunk_size=16, ngroups=G, seq_idx=IDS[:1].expand(BATCH, T))
    close(packed[:1, 25:], alone)


def test_low_precision_has_the_bits_of_its_parts() -> None:
    """bfloat16 activations beside float32 parameters; nothing is reckoned here that the scan does not reckon."""
    given = {
        key: t.bfloat16() if key in ("zxbcdt", "conv1d_weight", "conv1d_bias") else t.float() for key, t in inputs().items()
    }
    out = mamba_split_conv1d_scan_combined(**given, chunk_size=16, ngroups=G)
    zxbcdt, weight, bias, *_ = given.values()
    z, mixed, dt = zxbcdt.split([DIM, CHANNELS, H], -1)
    mixed = causal_conv1d(mixed, weight, bias, activation="silu")
    x, B, C = mixed[..., :DIM], mixed[..., DIM : DIM + G * N], mixed[..., DIM + G * N :]
    x, z, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, H), (z, H), (B, G), (C, G)))
    y = mamba_chunk_scan_combined(x, dt, given["A"], B, C, 16, given["D"], z, given["dt_bias"], dt_softplus=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, y.flatten(2))


BAD = {
    "activation": ({"activation": "gelu"}, UnsupportedError, "activation='gelu'"),
    "bias alone": ({"outproj_bias": torch.ones(3)}, ShapeError, "outproj_bias is given without outproj_weight"),
    "headdim": ({"D": torch.ones(H)}, ShapeError, "headdim is None, and D is"),
    "groups": ({"ngroups": 3}, ShapeError, "zxbcdt has 48 columns and conv1d_weight 32 channels; for 4 heads of 3"),
    "columns": ({"zxbcdt": torch.ones(BATCH, T, 47)}, ShapeError, "zxbcdt has 47 columns"),
    "norm": ({"rmsnorm_weight": torch.ones(3)}, ShapeError, r"rmsnorm_weight must be \(12\), got \(3,\)"),
    "projection": ({"outproj_weight": torch.ones(3, 3)}, ShapeError, r"outproj_weight must be \(out_dim, 12\)"),
    "weight": ({"conv1d_weight": torch.ones(CHANNELS, 1, WIDTH)}, ShapeError, r"conv1d_weight must be \(channels, width\)"),
    "A": ({"A": 3.0}, DtypeError, "A must be a torch.Tensor, got float"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    change, error, match = BAD[name]
    with pytest.raises(error, match=match):
        mamba_split_conv1d_scan_combined(**inputs() | {"chunk_size": 16, "ngroups": G} | change)
