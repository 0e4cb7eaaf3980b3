"""The Mamba-2 block is its equations: against their transcription, in parts, step by step, and packed."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from nn_reference import (
    PARTS,
    Roundings,
    allowed,
    both,
    close,
    expected,
    longest_sum,
    make_block,
    reference,
    some_cache,
    tokens,
)
from torch import Tensor

from ssdops.nn import Mamba2, Mamba2Cache
from ssdops.testing import assert_close, tolerance
from ssdops.testing.tolerance import assert_same

BATCH, SEQLEN = 2, 9
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"ngroups": 2, "D_has_hdim": True, "bias": True},
    "one_norm": {"ngroups": 2, "norm_groups": 1, "norm_before_gate": True, "conv_bias": False},
    "no_norm": {"rmsnorm": False, "d_conv": 2, "expand": 1},
    "clamped": {"dt_limit": (0.2, 0.6), "d_conv": 1},
}


@cache
def whole(name: str, dtype: torch.dtype) -> tuple[Mamba2, Tensor, list[Tensor], list[float]]:
    """A block, tokens, and what is expected of them all at once."""
    block = make_block(dtype, **BLOCKS[name])
    u = tokens(BATCH, SEQLEN, block)
    return block, u, *expected(block, u)


# --- the equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_is_its_equations(name: str, dtype: torch.dtype) -> None:
    block = make_block(dtype, **BLOCKS[name])
    u, cache = tokens(BATCH, SEQLEN, block), some_cache(block, BATCH)
    for before in (None, cache):
        parts, limits = expected(block, u, before)
        out, after = block(u, before, return_cache=True)
        assert out.dtype == dtype and after.window.dtype == dtype and after.state.dtype == block.initial_cache(1).state.dtype
        close((out, after), parts, limits)
        assert_same(block(u, before), out, "the output without a cache")


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_those_of_the_equations(name: str) -> None:
    """Of every parameter, the input and the cache, of a loss that reads all that comes out."""
    block = make_block(**BLOCKS[name])
    u = tokens(BATCH, SEQLEN, block).requires_grad_()
    cache = Mamba2Cache(*(x.requires_grad_() for x in both(some_cache(block, BATCH))))
    each = [{n: p.detach().clone().requires_grad_() for n, p in block.named_parameters()} for _ in range(SEQLEN)]
    results = reference(block, u, cache, parameters=each)
    weights = [torch.randn_like(x) for x in results]

    def loss(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([(x * w).sum() for x, w in zip(parts, weights, strict=True)]).sum()

    inputs = {"u": u, "state": cache.state} | ({"window": cache.window} if cache.window.numel() else {})
    slopes = torch.autograd.grad(loss(results), [*inputs.values(), *(p for at in each for p in at.values())])
    want = {what: (x, x.abs().max()) for what, x in zip(inputs, slopes, strict=False)}
    by_token = dict(zip(((n, t) for t, at in enumerate(each) for n in at), slopes[len(inputs) :], strict=True))
    for n in each[0]:
        parts = torch.stack([by_token[n, t] for t in range(SEQLEN)])
        want[n] = (parts.sum(0), parts.abs().sum(0).max())
    out, after = block(u, cache, return_cache=True)
    named = inputs | dict(block.named_parameters())
    got = torch.autograd.grad(loss((out, *both(after))), list(named.values()))
    for what, x in zip(named, got, strict=True):
        length = longest_sum(block, SEQLEN) * BATCH * SEQLEN
        value, magnitude = want[what]
        assert_close(x, value, tolerance(x.dtype, x.dtype, length, magnitude.item()), f"the gradient of {what}")


# --- in parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [(0, 9), (0, 1, 9), (0, 2, 5, 5, 9), (0, 8, 9)], ids=str)
@pytest.mark.parametrize("name", ["plain", "clamped"])
def test_prefill_in_parts_is_the_whole(name: str, cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    block, u, parts, limits = whole(name, dtype)
    cache, outputs = None, []
    for start, stop in pairwise(cuts):
        y, cache = block(u[:, start:stop], cache, return_cache=True)
        outputs.append(y)
    assert cache is not None
    close((torch.cat(outputs, 1), cache), parts, limits, "in parts")
    y, after = block(u, return_cache=True)
    close((torch.cat(outputs, 1), cache), [y, *both(after)], limits, "against the whole")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefill", [0, 1, 3, 7])
@pytest.mark.parametrize("name", ["groups", "no_norm"])
def test_steps_after_a_prefill_are_the_whole(name: str, prefill: int, dtype: torch.dtype) -> None:
    block, u, parts, limits = whole(name, dtype)
    outputs, cache = [], block.initial_cache(BATCH)
    if prefill:
        y, cache = block(u[:, :prefill], return_cache=True)
        outputs.append(y)
    for t in range(prefill, SEQLEN):
        kept = [x.clone() for x in both(cache)]
        y, after = block.step(u[:, t], cache)
        for name_, x, before in zip(PARTS[1:], both(cache), kept, strict=True):
            assert_same(x, before, f"the {name_} that entered")
        assert y.dtype == dtype and [x.dtype for x in both(after)] == [x.dtype for x in kept]
        outputs, cache = [*outputs, y[:, None]], after
    close((torch.cat(outputs, 1), cache), parts, limits, "step by step")


@torch.no_grad()
def test_a_thousand_steps() -> None:
    """After a prefill, in every dtype, of weights and tokens that every dtype has: each y, and the cache after the last.

    What is allowed of y is what eleven of the tokens allow, among them 907, whose roundings weigh much, and the last.
    """
    block, prefill = make_block(torch.bfloat16, expand=1), 5
    u, roundings = tokens(1, prefill + 1000, block), Roundings()
    assert all(torch.equal(x.half().bfloat16(), x) for x in (u, *block.parameters()))
    with torch.enable_grad():
        parts = reference(block, u, None, roundings)
        y, window, state = parts
        effects = [roundings.effects(x) for x in (y[:, 34::97], window, state)]
    for dtype in (*DTYPES, torch.float16):
        block, tokens_ = block.to(dtype), u.to(dtype)
        limits = [allowed(effect, dtype, longest_sum(block, u.shape[1])) for effect in effects]
        begun, cache = block(tokens_[:, :prefill], return_cache=True)
        stepped = []
        for u_t in tokens_[:, prefill:].unbind(1):
            y_t, cache = block.step(u_t, cache)
            stepped.append(y_t)
        steps = torch.cat([begun, torch.stack(stepped, 1)], 1), cache
        close(steps, list(parts), limits, f"by steps in {dtype}:")
        whole_y, left = block(tokens_, return_cache=True)
        close(steps, [whole_y, *both(left)], limits, f"against the whole in {dtype}:")


def test_steps_have_gradients() -> None:
    block = make_block()
    u = tokens(BATCH, 3, block).requires_grad_()

    def stepped(u: Tensor) -> Tensor:
        cache, outputs = block.initial_cache(BATCH), []
        for t in range(u.shape[1]):
            y, cache = block.step(u[:, t], cache)
            outputs.append(y)
        return torch.stack(outputs, 1)

    assert torch.autograd.gradcheck(stepped, (u,))


def test_decays_are_exact_whatever_activations_are() -> None:
    """Of zeros, a bfloat16 block leaves its state times exp(dt · A) for each token, in float32."""
    block = make_block(torch.bfloat16, conv_bias=False)
    cache = Mamba2Cache(block.initial_cache(1).window, torch.ones(1, 4, 4, 3))
    _, after = block(torch.zeros(1, SEQLEN, 8, dtype=torch.bfloat16), cache, return_cache=True)
    exponent = SEQLEN * torch.nn.functional.softplus(block.dt_bias.double()) * block.A_log.double().exp()
    value = torch.exp(-exponent)[:, None, None].expand(4, 4, 3)
    magnitude = ((1 + exponent) * torch.exp(-exponent)).max().item()
    assert_close(after.state[0], value, tolerance(torch.float32, torch.float32, SEQLEN, magnitude), "the state")


# --- packed -----------------------------------------------------------------------------------------------------------

LENGTHS = (4, 0, 1, 2, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "no_norm", "clamped"])
@pytest.mark.parametrize("entering", [False, True])
def test_packed_is_separate(entering: bool, name: str, dtype: torch.dtype) -> None:
    """Prompts, sequences that go on by one token, and one that does nothing, in a single call."""
    block = make_block(dtype, **BLOCKS[name])
    u, cache = tokens(1, sum(LENGTHS), block), some_cache(block, len(LENGTHS)) if entering else None
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    packed = block(u, cache, cu_seqlens=cu, return_cache=True)
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    by_ids = block(u, cache, segment_ids=ids, n_segments=len(LENGTHS), return_cache=True)
    bare = block(u, cache, cu_seqlens=cu)
    no_count = None if entering else block(u, segment_ids=ids)  # where no states are asked for, n_segments need not be known
    for row, (start, stop) in enumerate(pairwise(cu.tolist())):
        own = None if cache is None else Mamba2Cache(cache.window[row, None], cache.state[row, None])
        if start == stop:
            window, state = both(own or block.initial_cache(1))
            parts, limits = [u[:, :0], window, state], [0.0, 0.0, 0.0]
        else:
            parts, limits = expected(block, u[:, start:stop], own)
        for out, after in (packed, by_ids):
            close((out[:, start:stop], Mamba2Cache(after.window[row, None], after.state[row, None])), parts, limits, str(row))
        for out in (bare, *([] if no_count is None else [no_count])):
            assert_close(out[:, start:stop], parts[0], limits[0], f"{row}, without a cache")


def test_a_batch_of_packed_rows() -> None:
    block = make_block()
    u, cache = tokens(2, 6, block), some_cache(block, 4)
    ids = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    out, after = block(u, cache, segment_ids=ids, n_segments=2, return_cache=True)
    spans = ((0, 0, 0, 2), (0, 1, 2, 6), (1, 1, 0, 6))
    for row, segment, start, stop in spans:
        at = slice(2 * row + segment, 2 * row + segment + 1)
        parts, limits = expected(block, u[row, None, start:stop], Mamba2Cache(cache.window[at], cache.state[at]))
        close((out[row, None, start:stop], Mamba2Cache(after.window[at], after.state[at])), parts, limits, f"{row}, {segment}")
    assert_same(after.window[2], cache.window[2], "the window of a document without tokens")
    assert_same(after.state[2], cache.state[2], "the state of a document without tokens")


def test_packed_gradients_are_separate_ones() -> None:
    block = make_block()
    u, cu = tokens(1, 6, block), torch.tensor([0, 2, 6])
    cache = some_cache(block, 2)

    def run(u: Tensor, window: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        y, after = block(u, Mamba2Cache(window, state), cu_seqlens=cu, return_cache=True)
        return (y, *both(after))

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (u, *both(cache))], fast_mode=True)


# --- what stays where it is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_document(poison: float) -> None:
    block = make_block(torch.float32)
    cu, u, cache = torch.tensor([0, 3, 5, 9]), tokens(1, SEQLEN, block), some_cache(block, 3)
    bad_u, bad = u.clone(), Mamba2Cache(cache.window.clone(), cache.state.clone())
    bad_u[0, 3] = poison
    bad.window[1] = poison
    clean, after = block(u, cache, cu_seqlens=cu, return_cache=True)
    dirty, dirty_after = block(bad_u, bad, cu_seqlens=cu, return_cache=True)
    assert dirty[0, 3:5].isnan().all() and dirty_after.state[1].isnan().any()
    for at in (slice(0, 3), slice(5, 9)):
        assert_same(dirty[:, at], clean[:, at], "another document")
    for row in (0, 2):
        assert_same(dirty_after.window[row], after.window[row], "another document's window")
        assert_same(dirty_after.state[row], after.state[row], "another document's state")


def test_poison_stays_in_its_row() -> None:
    block = make_block(torch.float32)
    u = tokens(2, SEQLEN, block)
    bad = u.clone()
    bad[1, 2] = float("nan")
    clean, cache = block(u, return_cache=True)
    dirty, dirty_cache = block(bad, return_cache=True)
    assert dirty[1, 2:].isnan().all()
    assert_same(dirty[0], clean[0], "the other row")
    y, _ = block.step(u[:, 0], cache)
    dirty_y, _ = block.step(u[:, 0], dirty_cache)
    assert dirty_y[1].isnan().all()
    assert_same(dirty_y[0], y[0], "the other row's step")
