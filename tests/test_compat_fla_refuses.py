"""What `ssdops.compat.fla` does not take, it names, and says what to do."""

from __future__ import annotations

import pytest
import torch
from test_compat_fla import CU, GAMMA, GK, B, G, H, K, T, V, draw, qkv

from ssdops.compat import fla
from ssdops.errors import DtypeError, MaskError, ShapeError, UnsupportedError, ValueRangeError

STATE = draw(B, H, K, V)
REFUSED = {
    "head_first": (fla.chunk_simple_gla, {"g": G, "head_first": False}, UnsupportedError, "head_first=False: inputs are"),
    "retention, head_first": (fla.chunk_retention, {"head_first": True}, UnsupportedError, "head_first=True"),
    "both gates": (fla.chunk_simple_gla, {"g": G, "g_gamma": GAMMA}, UnsupportedError, "add g_gamma to g"),
    "attentions": (fla.parallel_simple_gla, {"output_attentions": True}, UnsupportedError, "output_attentions=True"),
    "gv": (fla.fused_recurrent_gla, {"gv": draw(B, T, H, V)}, UnsupportedError, "gv: a decay per value channel"),
    "g": (fla.chunk_simple_gla, {"g": GK}, ShapeError, r"g must be \(B=2, T=37, H=4\), got \(2, 37, 4, 5\)"),
    "gk": (fla.chunk_gla, {"g": G}, ShapeError, r"gk must be \(B=2, T=37, H=4, K=5\), got \(2, 37, 4\)"),
    "g_gamma": (fla.chunk_simple_gla, {"g_gamma": GAMMA[1:]}, ShapeError, r"g_gamma must be \(H=4\), got \(3,\)"),
    "state": (fla.chunk_simple_gla, {"initial_state": STATE.mT}, ShapeError, r"initial_state must be \(B=2, H=4, K=5, V=3\)"),
    "turned state": (
        fla.chunk_gla, {"g": GK, "initial_state": STATE, "state_v_first": True}, ShapeError, r"\(B=2, H=4, V=3, K=5\)"
    ),
    "rows": (fla.chunk_simple_gla, {"cu_seqlens": CU}, ShapeError, "q has B = 2; flatten it into B = 1"),
    "layer": (fla.chunk_lightning_attn, {"layer_idx": 6, "num_layers": 6}, MaskError, "from 0 to num_layers - 1"),
    "pair": (fla.chunk_linear_attn, {"initial_state": (STATE, STATE), "normalize": False}, DtypeError, "pair"),
    "z": (fla.chunk_linear_attn, {"initial_state": (STATE, STATE[:, 0])}, ShapeError, r"z_state must be \(B=2, 1, H=4, K=5\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    function, keywords, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        function(*qkv(), **keywords)


def test_groups_must_divide_heads() -> None:
    wide = draw(B, T, 2 * H, K)
    with pytest.raises(ShapeError, match="G=8 must divide H=4"):
        fla.chunk_log_linear_attn(wide, wide, draw(B, T, H, V), G, draw(B, T, H, 7))


def test_bad_boundaries_are_named() -> None:
    inputs = qkv(batch=1)
    with pytest.raises(ShapeError, match="N=3, and cu_seqlens bounds 4 sequences"):
        fla.chunk_simple_gla(*inputs, initial_state=draw(3, H, K, V), cu_seqlens=CU)
    with pytest.raises(ValueRangeError, match="cu_seqlens"):
        fla.chunk_simple_gla(*inputs, cu_seqlens=torch.tensor([0, 9, 5, T]))


@pytest.mark.parametrize(("key", "value"), [("initial_state", STATE), ("output_final_state", True), ("cu_seqlens", CU)])
def test_log_linear_attention_keeps_no_state(key: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=key):
        fla.chunk_log_linear_attn(*qkv(), G, draw(B, T, H, 7), **{key: value})
