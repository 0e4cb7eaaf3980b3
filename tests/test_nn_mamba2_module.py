"""The Mamba-2 block as a module: its parameters, autocast, compilation, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn_reference import Roundings, allowed, both, close, expected, longest_sum, make_block, reference, some_cache, tokens

from ssdops.errors import DtypeError, MaskError, ShapeError, SsdopsError, UnsupportedError, ValueRangeError
from ssdops.nn import Mamba2, Mamba2Cache
from ssdops.testing import assert_close
from ssdops.testing.tolerance import assert_same

BATCH, SEQLEN = 2, 9

# --- construction -----------------------------------------------------------------------------------------------------

SHAPES = {
    "in_proj.weight": (2 * 128 + 2 * 2 * 16 + 4, 64), "conv1d.weight": (128 + 2 * 2 * 16, 1, 4), "conv1d.bias": (192,),
    "dt_bias": (4,), "A_log": (4,), "D": (4,), "norm.weight": (128,), "out_proj.weight": (64, 128),
}  # fmt: skip
"""Of the checkpoints of mamba_ssm's Mamba2 and transformers' Mamba2Mixer, for d_model 64, 4 heads of 32, 2 groups of 16."""


def test_checkpoints_load() -> None:
    block = Mamba2(64, d_state=16, headdim=32, ngroups=2)
    assert {name: tuple(x.shape) for name, x in block.state_dict().items()} == SHAPES
    block.load_state_dict({name: torch.randn(shape) for name, shape in SHAPES.items()})
    wrong = {name: torch.randn(shape) for name, shape in SHAPES.items() if name != "D"} | {"E": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"D".*Unexpected.*"E"|Unexpected.*"E".*Missing.*"D"'):
        block.load_state_dict(wrong)
    other = Mamba2(64, d_state=16, headdim=32, ngroups=2, D_has_hdim=True, rmsnorm=False, bias=True, conv_bias=False)
    shapes = {name: tuple(x.shape) for name, x in other.state_dict().items()}
    assert shapes["D"] == (128,) and shapes["in_proj.bias"] == (324,) and shapes["out_proj.bias"] == (64,)
    assert not {"norm.weight", "conv1d.bias"} & set(shapes)


def test_initial_values() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        block = Mamba2(1024, headdim=2, dt_min=0.01, dt_max=0.1, dt_init_floor=0.02, A_init_range=(1, 4), dtype=dtype)
        step, A = torch.nn.functional.softplus(block.dt_bias.float()), block.A_log.float().exp()
        slack = 8 * torch.finfo(dtype).eps  # dt_bias is at most 4 times a relative error of dt, in softplus and its inverse
        assert 0.02 * (1 - slack) <= step.min() and step.max() <= 0.1 * (1 + slack)
        assert (step < 0.021).sum() > (step > 0.09).sum()  # the floor gathers what lies below it
        assert 1 - slack <= A.min() < 1.1 and 3.9 < A.max() <= 4 + 4 * slack
        assert (block.D == 1).all() and block.norm is not None and (block.norm.weight == 1).all()


def test_on_the_meta_device() -> None:
    block = Mamba2(64, d_state=16, headdim=32, device="meta")
    assert {x.device.type for x in block.state_dict().values()} == {"meta"}
    given = Mamba2(64, d_state=16, headdim=32)
    u = torch.randn(1, 5, 64)
    assert block(u.to("meta")).shape == u.shape
    block.load_state_dict(given.state_dict(), assign=True)
    assert_same(block(u), given(u), "the output of what was loaded")
    block = Mamba2(64, d_state=16, headdim=32, device="meta").to_empty(device="cpu")
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert block(u).isfinite().all() and (block.D == 1).all()


def test_under_autocast() -> None:
    """Activations take autocast's dtype; the state and the decays do not. A cast keeps these weights and tokens."""
    block = make_block(torch.bfloat16)
    u = tokens(BATCH, SEQLEN, block).float()
    block = block.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, cache = block(u[:, :5], return_cache=True)
        rest, _ = block(u[:, 5:], cache, return_cache=True)
        next_y, _ = block.step(u[:, 5], cache)
    assert (y.dtype, cache.window.dtype, cache.state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    roundings = Roundings()
    parts = reference(block, u, None, roundings)
    limit = allowed(roundings.effects(parts[0]), torch.bfloat16, longest_sum(block, SEQLEN))
    assert_close(torch.cat([y, rest], 1), parts[0], limit, "under autocast")
    assert_close(next_y, parts[0][:, 5], limit, "a step under autocast")


def test_it_compiles() -> None:
    """Without a break in the graph, packed and stepped too."""
    block = make_block(torch.float32)
    u, cu = tokens(1, SEQLEN, block), torch.tensor([0, 3, 9])
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert_same(compiled(u), block(u), "the output")
    cache = some_cache(block, 2)
    y, after = compiled(u, cache, cu_seqlens=cu, return_cache=True)
    parts = block(u, cache, cu_seqlens=cu, return_cache=True)
    assert_same(y, parts[0], "the packed output")
    assert_same(after.state, parts[1].state, "the packed state")
    y, after = torch.compile(block.step, fullgraph=True, backend="eager")(u[0, :2], cache)
    _, limits = expected(block, u[0, :2, None], cache)
    close((y[:, None], after), [block.step(u[0, :2], cache)[0][:, None], *both(block.step(u[0, :2], cache)[1])], limits)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"headdim": 5}, ShapeError, "headdim must divide d_inner = expand · d_model = 16, got 5"),
        ({"headdim": 4, "ngroups": 3}, ShapeError, "ngroups must divide nheads = d_inner / headdim = 4, got 3"),
        ({"headdim": 0}, ShapeError, "headdim must be at least 1, got 0"),
        ({"headdim": 4, "d_conv": 0}, ShapeError, "d_conv must be at least 1"),
        ({"headdim": 4, "norm_groups": 3}, ShapeError, "groups must divide channels=16, got 3"),
        ({"headdim": 4, "A_init_range": (0, 4)}, ValueRangeError, "A_init_range must be two numbers above 0"),
        ({"headdim": 4, "dt_min": 0.2}, ValueRangeError, r"\(dt_min, dt_max\) must be .*got \(0.2, 0.1\)"),
        ({"headdim": 4, "dt_limit": (1.0, 0.5)}, ValueRangeError, "dt_limit must be two numbers, the lower first"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], error: type[SsdopsError], message: str) -> None:
    with pytest.raises(error, match=message):
        Mamba2(8, **options)


def test_inputs_that_do_not_fit() -> None:
    block = make_block(torch.float32)
    u = tokens(2, 4, block)
    cache, cu = block.initial_cache(2), torch.tensor([0, 1, 4])
    wide = Mamba2Cache(cache.window, cache.state[..., :2])
    short = Mamba2Cache(cache.window[..., 1:], cache.state)
    for call, error, message in [
        (lambda: block(u[0]), ShapeError, r"u must be \(batch, seqlen, d_model=8\), got \(4, 8\)"),
        (lambda: block(u[..., :7]), ShapeError, r"d_model=8\), got \(2, 4, 7\)"),
        (lambda: block(u.double()), DtypeError, "u is torch.float64, but the block's weights are torch.float32"),
        (lambda: block(u, block.initial_cache(3)), ShapeError, "cache.window has 3 rows, expected 2, the batch of u"),
        (lambda: block(u, wide), ShapeError, r"cache.state must be \(rows, 4, 4, 3\) in this block, got \(2, 4, 4, 2\)"),
        (lambda: block(u, short), ShapeError, r"cache.window must be \(rows, 22, 3\) in this block, got \(2, 22, 2\)"),
        (lambda: block(u, (cache.window, cache.state)), DtypeError, "cache must be a Mamba2Cache.*got tuple"),
        (lambda: block(u, cu_seqlens=cu), ShapeError, "batch must be 1, got 2"),
        (lambda: block(u[:1], cache=block.initial_cache(1), cu_seqlens=cu), ShapeError, "has 1 rows, expected 2, one per doc"),
        (lambda: block(u, cache, segment_ids=torch.zeros(2, 4).long()), ShapeError, "give n_segments"),
        (lambda: block(u, segment_ids=torch.zeros(2, 4)), DtypeError, "segment_ids must be int32 or int64"),
        (lambda: block(u, segment_ids=torch.zeros(2, 3).long()), ShapeError, r"segment_ids must be .*\(2, 4\)"),
        (lambda: block(u, n_segments=2), MaskError, "exactly one of cu_seqlens and segment_ids"),
        (lambda: block(u[:1], cu_seqlens=torch.tensor([0, 5])), ValueRangeError, "cu_seqlens must end at seqlen=4"),
        (lambda: block.step(u, cache), ShapeError, r"u must be \(batch, d_model=8\), got \(2, 4, 8\)"),
        (lambda: block.step(u[:, 0], block.initial_cache(1)), ShapeError, "has 1 rows, expected 2, the batch of u"),
        (lambda: block.step(u[:, 0], None), DtypeError, "cache must be a Mamba2Cache.*got NoneType"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(UnsupportedError, match="triton"):
        make_block(torch.float64, backend="triton")(u.double())


def test_prefill_after_decoding_with_the_wrong_cache() -> None:
    """Decoding leaves a cache; the next part of a prompt says what is wrong with one of another batch or block."""
    block = make_block(torch.float32)
    u = tokens(2, 4, block)

    def decoded(other: Mamba2, rows: int) -> Mamba2Cache:
        x = tokens(rows, 4, other)
        _, cache = other(x[:, :3], return_cache=True)
        return other.step(x[:, 3], cache)[1]

    block(u, decoded(block, 2))
    for options, rows, message in [
        ({}, 3, "cache.window has 3 rows, expected 2, the batch of u; give each sequence its own row"),
        ({}, 1, "cache.window has 1 rows, expected 2, the batch of u"),
        ({"d_state": 5}, 2, r"cache.window must be \(rows, 22, 3\) in this block, got \(2, 26, 3\); it is of a block of other"),
        ({"d_conv": 3}, 2, r"cache.window must be \(rows, 22, 3\) in this block, got \(2, 22, 2\)"),
        ({"headdim": 8}, 2, r"cache.state must be \(rows, 4, 4, 3\) in this block, got \(2, 2, 8, 3\)"),
        ({"expand": 1}, 2, r"cache.window must be \(rows, 22, 3\) in this block, got \(2, 14, 3\)"),
    ]:
        with pytest.raises(ShapeError, match=message):
            block(u, decoded(make_block(torch.float32, **options), rows))
    packed, cu = tokens(1, 4, block), torch.tensor([0, 1, 2, 4])
    with pytest.raises(ShapeError, match="has 2 rows, expected 3, one per document"):
        block(packed, decoded(block, 2), cu_seqlens=cu)
