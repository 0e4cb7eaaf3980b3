"""The decode kernel on a GPU: what the interpreter is asked too, and CUDA graphs, streams, torch.compile and large pools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import MASKS, Made, assert_right, stepped
from torch import Tensor

from ssdops import masks as m
from ssdops import ssd, ssd_step
from ssdops.testing import strategies
from ssdops.testing.case import Case
from ssdops.testing.source import problems
from ssdops.testing.tolerance import assert_close, assert_same, tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_triton_step.py interprets the kernel"),
]
LOW = (torch.bfloat16, torch.float16)
FULL = Made(batch=3, nheads=80, headdim=64, dstate=128, heads=(1, 1, 80), dtype=torch.bfloat16, device="cuda")
SMALL = Made(device="cuda")


def decay_of(made: Made) -> m.Mask:
    return m.decay(made.log())


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", MASKS)
def test_equals_oracle(name, tokens):
    made = replace(SMALL, tokens=tokens)
    case = made.case(MASKS[name](made))
    assert_right(case, stepped(case))
    assert_right(case, stepped(case, backend="auto"))


@pytest.mark.parametrize("state_dtype", [None, torch.float32, *LOW])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_dtypes_at_full_size(dtype, state_dtype):
    made = replace(FULL, dtype=dtype)
    case = made.case(decay_of(made) + m.diagonal(made.per_token()), state_dtype)
    out = stepped(case)
    assert out["y"].dtype == dtype and out["state[0]"].dtype == (state_dtype or torch.float32)
    assert_right(case, out)


@pytest.mark.parametrize(("headdim", "dstate"), [(1, 1), (3, 2), (17, 16), (64, 100), (5, 129), (128, 256), (1, 16)])
@pytest.mark.parametrize("heads", [(1, 1, 4), (4, 2, 1), (2, 4, 4)])
def test_sizes_and_heads(headdim, dstate, heads):
    made = replace(SMALL, heads=heads, headdim=headdim, dstate=dstate)
    case = made.case(decay_of(made).scale(cols=made.per_token()[:, :, ::2]))
    assert_right(case, stepped(case))


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_equals_oracle_for_any_causal_mask(data):
    case = data.draw(
        strategies.cases(
            make=lambda s: strategies.linear_mask(s, channel=True, backwards=False),
            sizes=problems(max_seqlen=3, max_dim=5, max_batch=2),
            dtypes=(torch.float32, torch.bfloat16),
            states=True,
        )
    )
    case = case.map(lambda _, x: x.to("cuda"))
    assert_right(case, stepped(case))


def test_steps_equal_scan():
    made = replace(SMALL, tokens=64)
    case = made.case(decay_of(made))
    whole = ssd(case.q, case.k, case.v, case.mask, scale=case.scale, initial_state=case.initial, backend="recurrent")
    size = float(ssd(*(x.abs() for x in (case.q, case.k, case.v)), case.mask, initial_state=case.initial[0].abs()).max())
    state, log_a = case.initial[0], made.log()
    for t in range(made.tokens):
        y, state = ssd_step(case.q[:, t], case.k[:, t], case.v[:, t], m.decay(log_a[:, t]), state, scale=case.scale)
        assert_close(y, whole[:, t], 2 * tolerance(y.dtype, torch.float32, 64 * made.dstate, size), f"y of token {t}")


# --- pools ----------------------------------------------------------------------------------------------------------


def pooled(case: Case, slots: list[int], size: int) -> tuple[Tensor, Tensor]:
    """A pool, NaN but for the slots in use, and the slots."""
    pool = case.initial[0].new_full((size, *case.initial[0].shape[1:]), torch.nan)
    for row, slot in enumerate(slots):
        if 0 <= slot < size:
            pool[slot] = case.initial[0][row]
    return pool, torch.tensor(slots, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_pool_is_updated_where_it_is_used(tokens, dtype):
    """Slots out of range are skipped like −1: on a GPU nobody looks at them before the kernel does."""
    made, slots = replace(FULL, batch=5, tokens=tokens), [7, -1, 0, 2, 9]
    case = made.case(decay_of(made), dtype)
    pool, where = pooled(case, slots, 9)
    out, want = stepped(case, state=pool, state_indices=where), stepped(case)
    for row, slot in enumerate(slots):
        if 0 <= slot < 9:
            assert_same(out["y"][row], want["y"][row], "y")
            assert_same(out["every[0]"][row], want["every[0]"][row], "the states")
            assert_same(pool[slot], want["state[0]"][row], f"slot {slot}")
        else:
            assert not out["y"][row].any() and not out["every[0]"][row].any()
    assert bool(pool[[slot for slot in range(9) if slot not in slots]].isnan().all())


def test_torch_backends_write_a_pool_without_a_sync():
    case = SMALL.case(decay_of(SMALL))
    pool, where = pooled(case, [1, -1], 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.ssdops.write_slots_(pool, 2 * case.initial[0], where)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(pool[1], 2 * case.initial[0][0], "slot 1")
    assert bool(pool[[0, 2]].isnan().all())


@pytest.mark.slow
def test_a_pool_of_more_than_two_to_the_31_elements():
    made = replace(FULL, tokens=1, batch=2)
    case = made.case(decay_of(made), torch.bfloat16)
    slots = 2**31 // case.initial[0][0].numel() + 3
    pool = torch.zeros(slots, *case.initial[0].shape[1:], dtype=torch.bfloat16, device="cuda")
    where = torch.tensor([slots - 1, slots - 2], device="cuda")
    pool[where] = case.initial[0]
    out, want = stepped(case, state=pool, state_indices=where), stepped(case)
    assert_same(out["y"], want["y"], "y")
    assert_same(pool[where], want["state[0]"], "the last slots")
    assert not pool[:-2].any()


# --- a citizen of CUDA ----------------------------------------------------------------------------------------------


class Decoder:
    """One sequence of steps on a pool, its inputs in fixed places, as CUDA graphs need them."""

    def __init__(self, made: Made) -> None:
        self.made = made
        case = made.case(decay_of(made))
        self.q, self.k, self.v, self.scale = case.q[:, 0], case.k[:, 0], case.v[:, 0], case.scale
        self.log_a = made.log()[:, 0]
        self.pool, self.slots = pooled(case, list(range(made.batch)), made.batch + 1)

    def step(self, **options: Any) -> Tensor:
        """One token."""
        args = (self.q, self.k, self.v, m.decay(self.log_a), self.pool)
        return ssd_step(*args, state_indices=self.slots, scale=self.scale, **options)[0]


def captured(decoder: Decoder) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A step as a graph, on a pool that is as it was."""
    before = decoder.pool.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decoder.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decoder.step()
    decoder.pool.copy_(before)
    return graph, y


def test_a_graph_replays_steps():
    ours, theirs = Decoder(FULL), Decoder(FULL)
    graph, y = captured(ours)
    for i in range(3):
        for x in (ours, theirs):
            x.v.add_(i)
            x.slots.copy_(torch.tensor([i, -1, 3], device="cuda"))
        graph.replay()
        assert_same(y, theirs.step(), f"y of replay {i}")
        assert_same(ours.pool, theirs.pool, f"the pool after replay {i}")


def test_a_captured_step_is_one_kernel():
    decoder = Decoder(FULL)
    graph, _ = captured(decoder)
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1 and "step_kernel" in kernels[0], kernels


def test_two_streams():
    decoders = [Decoder(FULL) for _ in range(2)]
    want = Decoder(FULL)
    for _ in range(4):
        y = want.step()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in decoders]
    out: dict[int, Tensor] = {}
    for _ in range(4):
        for i, (stream, decoder) in enumerate(zip(streams, decoders, strict=True)):
            with torch.cuda.stream(stream):
                out[i] = decoder.step()
    torch.cuda.synchronize()
    for i, decoder in enumerate(decoders):
        assert_same(out[i], y, "y")
        assert_same(decoder.pool, want.pool, "the pool")


def test_nothing_is_read_on_the_host():
    decoder = Decoder(FULL)
    decoder.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("several", [False, True])
def test_compiles(several):
    def one(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor, slots: Tensor | None) -> Any:
        return ssd_step(
            q * 2, k, v, m.decay(log_a), state, state_indices=slots, return_intermediate_states=several
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(one, fullgraph=True)
    made = replace(FULL, tokens=2)
    case = made.case(decay_of(made))
    args = [x if several else x[:, 0] for x in (case.q, case.k, case.v, made.log())]
    for slots in (None, torch.tensor([2, -1, 0], device="cuda")):
        ours, theirs = case.initial[0].clone(), case.initial[0].clone()
        got, want = compiled(*args, ours, slots), one(*args, theirs, slots)
        torch.testing.assert_close(got, want)
        assert_same(ours, theirs, "the state that was given")


def test_gradients_are_those_of_ssd():
    made = replace(SMALL, tokens=2)
    case = made.case(decay_of(made))
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    y, _ = ssd_step(q, k, v, case.mask, case.initial, scale=case.scale)
    found = torch.autograd.grad(y.square().sum(), (q, k, v))
    y = ssd(q, k, v, case.mask, scale=case.scale, initial_state=case.initial)
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), (q, k, v)))
