"""`ssdops.compat` beside the packages it is named for, where they are installed: plain torch, and kernels on a GPU.

benchmarks/peers.py says how to get them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from compat_loops import IDS, H, T, inputs
from torch import Tensor

from ssdops.compat import fla, mamba_ssm

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device for the peer's kernels")]


def peer(package: str, module: str) -> ModuleType:
    """A module of a package; mamba_ssm's `__init__`, which wants compiled parts that nothing here uses, is not run."""
    for needed in (package, "einops"):
        if find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    if package == "mamba_ssm" and package not in sys.modules:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        sys.modules[package] = bare = ModuleType(package)
        bare.__path__, bare.__spec__ = list(spec.submodule_search_locations), spec
    return import_module(f"{package}.{module}")


def close(found: Any, expected: Any) -> None:
    """Both are float32 by different orders of sums."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Q, K, V, FIRST = draw(2, T, H, 8, seed=1), draw(2, T, H, 8, seed=2), draw(2, T, H, 8, seed=3), draw(2, H, 8, 8, seed=4)
G, GK = -draw(2, T, H, seed=5).exp(), -draw(2, T, H, 8, seed=6).exp()


def test_fla_simple_gla() -> None:
    naive = peer("fla", "ops.simple_gla.naive").naive_recurrent_simple_gla
    close(fla.chunk_simple_gla(Q, K, V, G, None, None, FIRST, True), naive(Q, K, V, G, None, FIRST, True))


def test_fla_gla() -> None:
    naive = peer("fla", "ops.gla.naive").naive_recurrent_gla
    close(fla.chunk_gla(Q, K, V, GK, None, FIRST, True), naive(Q, K, V, GK, FIRST, True))


def test_fla_retention() -> None:
    naive = peer("fla", "ops.retention.naive").naive_retention
    expected = naive(*(x.transpose(1, 2) for x in (Q, K, V))).transpose(1, 2)
    close(fla.chunk_retention(Q, K, V)[0], expected)


def test_fla_log_linear_attention() -> None:
    naive, levels = peer("fla", "ops.log_linear_attn.naive").naive_log_linear_attn, draw(2, T, H, 7)
    close(fla.chunk_log_linear_attn(Q, K, V, G, levels)[0], naive(Q, K, V, G, levels))


def test_mamba_step() -> None:
    update = peer("mamba_ssm", "ops.triton.selective_state_update").selective_state_update_ref
    x, dt, z, A = draw(2, H, 8, seed=7), draw(2, H, 8, seed=8), draw(2, H, 8, seed=9), -draw(H, 8, 8, seed=10).exp()
    state, options = FIRST.clone(), {"D": draw(H, 8), "z": z, "dt_bias": draw(H, 8, seed=11), "dt_softplus": True}
    theirs = FIRST.clone()
    expected = update(theirs, x, dt, A, K[:, 0, :2], Q[:, 0, :2], **options)
    close(mamba_ssm.selective_state_update(state, x, dt, A, K[:, 0, :2], Q[:, 0, :2], **options), expected)
    close(state, theirs)


def test_mamba_listing() -> None:
    listing = peer("mamba_ssm", "modules.ssd_minimal").ssd_minimal_discrete
    given = V[:, :32], G[:, :32], K[:, :32], Q[:, :32], 8, FIRST[:, None]
    close(mamba_ssm.ssd_minimal_discrete(*given), listing(*given))


class TestKernels:
    """The peers' kernels, forward."""

    pytestmark = ON_A_GPU

    @pytest.mark.parametrize("packed", [False, True])
    def test_mamba_scan(self, packed: bool) -> None:
        scan = peer("mamba_ssm", "ops.triton.ssd_combined").mamba_chunk_scan_combined
        low = ("x", "dt", "B", "C", "z")
        given = {key: t.to("cuda", torch.bfloat16 if key in low else torch.float32) for key, t in inputs(batch=1).items()}
        options = {"chunk_size": 16, "dt_softplus": True, "return_final_states": True}
        if packed:
            cu_seqlens = torch.tensor([0, 5, 25, T], device="cuda", dtype=torch.int32)
            del given["initial_states"]  # which its states of sequences leave out, where one ends in the first chunk
            options |= {"seq_idx": IDS[:1].cuda().int(), "cu_seqlens": cu_seqlens, "return_varlen_states": True}
        for found, expected in zip(
            mamba_ssm.mamba_chunk_scan_combined(**given, **options), scan(**given, **options), strict=True
        ):
            assert found.dtype == expected.dtype
            apart = 8 * torch.finfo(torch.bfloat16).eps  # both round scores, states and y on the way
            torch.testing.assert_close(found, expected, rtol=apart, atol=apart * float(expected.abs().max()))

    @pytest.mark.parametrize("reverse", [False, True])
    def test_fla_fused_recurrent(self, reverse: bool) -> None:
        given = [x.cuda() for x in (Q, K, V, GK)]
        options = {"initial_state": FIRST.cuda(), "output_final_state": True, "reverse": reverse}
        kernel = peer("fla", "ops.gla.fused_recurrent").fused_recurrent_gla
        close(fla.fused_recurrent_gla(*given, **options), kernel(*given, **options))
