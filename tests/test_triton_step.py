"""The decode kernel: `ssd_step` on the Triton backend, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from step_cases import MASKS, Made, assert_right, stepped
from torch import Tensor

import ssdops
from ssdops import config, ssd_step
from ssdops import masks as m
from ssdops.backends import registry
from ssdops.backends.triton import step
from ssdops.backends.triton.step import Tile
from ssdops.ir.contraction import Contraction
from ssdops.plan import terms_of
from ssdops.testing import strategies
from ssdops.testing.case import Case
from ssdops.testing.source import problems
from ssdops.testing.tolerance import assert_same

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_step.py tests the compiled kernel here")
LOW = (torch.bfloat16, torch.float16)


def decay_of(made: Made) -> m.Mask:
    return m.decay(made.log())


# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", MASKS)
def test_equals_oracle(name, tokens):
    made = Made(tokens=tokens)
    case = made.case(MASKS[name](made))
    assert_right(case, stepped(case))


@pytest.mark.parametrize("name", ["decay", "shifted", "two scans"])
def test_no_state_is_zero(name):
    made = Made()
    case = made.case(MASKS[name](made), None)
    assert_right(case, stepped(case))


@pytest.mark.parametrize("state_dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_dtypes(dtype, state_dtype):
    made = Made(dtype=dtype)
    case = made.case(decay_of(made) + m.diagonal(made.per_token()), state_dtype)
    out = stepped(case)
    assert out["y"].dtype == dtype and out["state[0]"].dtype == out["every[0]"].dtype == state_dtype
    assert_right(case, out)


@pytest.mark.parametrize("heads", [(1, 1, 4), (4, 1, 1), (1, 4, 1), (2, 1, 4), (4, 4, 4), (1, 1, 1)])
def test_heads_are_shared(heads):
    made = Made(heads=heads)
    case = made.case(decay_of(made).scale(cols=made.per_token()[:, :, ::2]))
    assert_right(case, stepped(case))


@pytest.mark.parametrize(("headdim", "dstate"), [(1, 1), (3, 2), (1, 40), (17, 16), (64, 128), (5, 129), (2, 256)])
def test_sizes(headdim, dstate):
    made = Made(batch=1, tokens=2, nheads=2, heads=(1, 1, 2), headdim=headdim, dstate=dstate)
    case = made.case(decay_of(made))
    assert_right(case, stepped(case))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"headdim": 0}, {"dstate": 0}, {"tokens": 0}], ids=str)
def test_nothing(sizes):
    made = Made(**sizes)
    case = made.case(decay_of(made))
    out = stepped(case)
    assert out["y"].shape == (made.batch, made.tokens, made.nheads, made.headdim) and not out["y"].any()
    assert out["every[0]"].shape == (made.batch, made.tokens, *case.initial[0].shape[1:])
    if not made.tokens:
        assert_same(out["state[0]"], case.initial[0], "the state")


@given(data=st.data())
def test_equals_oracle_for_any_causal_mask(data):
    """Every layout, head pattern, dtype and broadcast operand that the strategies draw."""
    case = data.draw(
        strategies.cases(
            make=lambda s: strategies.linear_mask(s, channel=True, backwards=False),
            sizes=problems(max_seqlen=3, max_dim=5, max_batch=2),
            dtypes=(torch.float32, *LOW),
            states=True,
        )
    )
    out = stepped(case)
    assume(case.problem.dtype != torch.float16 or all(bool(x.isfinite().all()) for x in out.values()))
    assert_right(case, out)


def test_tokens_at_once_are_tokens_one_by_one():
    made = Made(tokens=4)
    case = made.case(decay_of(made), torch.float32)
    out, state = stepped(case), case.initial[0]
    for t in range(made.tokens):
        q, k, v, log_a = (x[:, t] for x in (case.q, case.k, case.v, made.log()))
        y, state = ssd_step(q, k, v, m.decay(log_a), state, scale=case.scale, backend="triton")
        assert_same(y, out["y"][:, t], f"y of token {t}")
        assert_same(state, out["every[0]"][:, t], f"the state after token {t}")
    assert_same(state, out["state[0]"], "the last state")


@pytest.mark.parametrize("tile", [Tile(1, 16, 1), Tile(2, 8, 1), Tile(16, 32, 4)], ids=str)
def test_how_a_state_is_cut_changes_nothing(tile, monkeypatch):
    made = Made()
    case = made.case(decay_of(made))
    monkeypatch.setattr(step, "tile_of", lambda *sizes: tile)
    assert_right(case, stepped(case))


def test_tiles_cover_the_state_and_no_two_warps_hold_one_element():
    for states, headdim, dstate in ((80, 64, 128), (5120, 64, 128), (4, 100, 16), (1, 1, 1), (8, 3, 256), (80, 64, 100)):
        for itemsize in (2, 4):
            tile = step.tile_of(states, headdim, dstate, itemsize, 132)
            assert tile.block_n >= dstate and (tile.warps == 1 or tile.block_p * tile.block_n >= tile.warps * 512)
    assert step.tile_of(80, 64, 128, 4, 132) == Tile(16, 128, 4)
    assert step.tile_of(4, 64, 128, 4, 132) == Tile(4, 128, 1)


# --- pools ----------------------------------------------------------------------------------------------------------


def pool_for(case: Case, slots: list[int], size: int) -> list[Tensor]:
    """A pool per scan, NaN but for the slots in use."""
    pools = []
    for state in case.initial:
        pool = state.new_full((size, *state.shape[1:]), torch.nan)
        for row, slot in enumerate(slots):
            if slot >= 0:
                pool[slot] = state[row]
        pools.append(pool)
    return pools


@pytest.mark.parametrize("backend", ["triton", "recurrent", "chunked"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["decay", "two scans"])
def test_a_pool_is_updated_in_place_where_it_is_used(name, index, backend):
    made, slots = Made(batch=4), [5, -1, 0, 2]
    case = made.case(MASKS[name](made))
    pools = pool_for(case, slots, 7)
    where = torch.tensor(slots, dtype=index).repeat_interleave(2)[::2]  # strided
    out = stepped(case, state=tuple(pools), state_indices=where, backend=backend)
    want = stepped(case, backend=backend)
    for row, slot in enumerate(slots):
        for i, pool in enumerate(pools):
            if slot < 0:
                assert not out["y"][row].any() and not out[f"every[{i}]"][row].any()
            else:
                assert_same(out["y"][row], want["y"][row], "y")
                assert_same(out[f"every[{i}]"][row], want[f"every[{i}]"][row], "the states")
                assert_same(pool[slot], want[f"state[{i}]"][row], f"slot {slot}")
    unused = [slot for slot in range(7) if slot not in slots]
    for i, pool in enumerate(pools):
        assert out[f"state[{i}]"] is pool
        assert bool(pool[unused].isnan().all())


def test_a_row_without_a_slot_is_zero_whatever_it_holds():
    made = Made()
    case = made.case(m.decay(made.log() * torch.inf) + m.diagonal(made.per_token()))
    case = replace(case, q=case.q * torch.nan, k=case.k * torch.inf, v=case.v * torch.nan)
    pool = torch.full((3, *case.initial[0].shape[1:]), torch.nan)
    out = stepped(case, state=pool, state_indices=torch.tensor([-1, -1]))
    assert not out["y"].any() and not out["every[0]"].any() and bool(pool.isnan().all())


def test_a_strided_pool():
    """Slots in a view of a larger cache, headdim last."""
    made, slots = Made(), [1, 0]
    case = made.case(decay_of(made))
    cache = torch.zeros(4, made.dstate, made.nheads, made.headdim + 3)
    pool = cache[::2, :, :, 1:-2].permute(0, 2, 3, 1)
    pool.copy_(pool_for(case, slots, 2)[0])
    out = stepped(case, state=pool, state_indices=torch.tensor(slots))
    assert_right(case, {**out, "state[0]": pool[slots]})
    assert not cache[1::2].any() and not cache[..., 0].any() and not cache[..., -2:].any()


def test_rolling_back_in_a_pool():
    """A draft of three tokens of which one is accepted: its state is written back, and decoding goes on from there."""
    made = Made()
    case = made.case(decay_of(made))
    pool, slots = case.initial[0].clone(), torch.tensor([0, 1])
    out = stepped(case, state=pool, state_indices=slots)
    pool[slots] = out["every[0]"][:, 0]
    rest = (case.q[:, 1:], case.k[:, 1:], case.v[:, 1:], m.decay(made.log()[:, 1:]))
    y, _ = ssd_step(*rest, pool, state_indices=slots, scale=case.scale, backend="triton")
    assert_same(y, out["y"][:, 1:], "y of the other tokens")
    assert_same(pool, out["every[0]"][:, -1], "the pool")


# --- what it does not take ------------------------------------------------------------------------------------------


def test_what_it_refuses_says_why_and_what_does_it(monkeypatch):
    def reason(case: Case) -> str:
        return registry.get("triton").supports_step(terms_of(case.mask.tree), case.problem).reason

    made = Made()
    x = made.per_token()
    double = replace(made, dtype=torch.float64)
    wide = replace(made, dstate=257)
    for words, case in {
        "float64": double.case(m.decay(made.log())),
        "dstate=257 exceeds 256": wide.case(m.decay(made.log())),
        "a diagonal beside it": made.case(m.decay(made.log()) + m.diagonal(x) + m.diagonal(x + 1)),
    }.items():
        assert words in reason(case) and "recurrent" in reason(case)
    monkeypatch.setattr(config, "triton_interpreted", lambda: False)
    assert "'triton' runs on CUDA GPUs, and the tensors are on cpu" in reason(made.case(m.causal()))


def test_auto_never_interprets():
    """On a CPU `auto` is a torch backend, which takes float64 too."""
    made = Made(dtype=torch.float64)
    case = made.case(m.decay(made.log()), torch.float64)
    out = stepped(case, backend="auto")
    assert out["y"].dtype == torch.float64
    assert_right(case, out)


def test_gradients_go_another_way():
    """A step that is learnt from is a short `ssd`, on a backend that has gradients."""
    made = Made()
    case = made.case(decay_of(made))
    k = case.k.clone().requires_grad_()
    out = stepped(replace(case, k=k), backend="recurrent")
    assert_right(case, out)
    (out["y"].sum() + out["every[0]"].sum()).backward()
    assert k.grad is not None and bool(k.grad.isfinite().all())


# --- a citizen of torch ---------------------------------------------------------------------------------------------


def arguments(backend: str) -> tuple:
    """Of `ssdops::step`, but for what it returns."""
    made = Made()
    case = made.case(MASKS["two scans"](made))
    program = str(Contraction(case.mask.tree, True, None, backend))
    states = [x.clone() for x in case.initial]
    return case.q, case.k, case.v, list(case.mask.operands.values()), states, program, 0.5


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_opcheck_step(backend, every):
    torch.library.opcheck(torch.ops.ssdops.step.default, (*arguments(backend), every))


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_opcheck_step_in_place(backend, every):
    given = arguments(backend)
    rooms = [x.new_empty(x.shape[0], 3, *x.shape[1:]) for x in given[4]] if every else []
    torch.library.opcheck(torch.ops.ssdops.step_.default, (*given, torch.tensor([1, -1]), rooms))


@pytest.mark.parametrize("slots", [None, [1, -1]], ids=["states", "pool"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_several_tokens_compile(backend, slots):
    def few(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return ssd_step(
            q, k, v, m.decay(log_a), state, state_indices=where, return_intermediate_states=True, backend=backend
        )  # fmt: skip

    torch._dynamo.reset()
    where = None if slots is None else torch.tensor(slots)
    made = Made()
    case = made.case(decay_of(made))
    ours, theirs = (case.initial[0].clone() for _ in range(2))
    args = (case.q, case.k, case.v, made.log())
    got, want = torch.compile(few, fullgraph=True, backend="aot_eager")(*args, ours), few(*args, theirs)
    torch.testing.assert_close(got, want)
    assert_same(ours, theirs, "the state that was given")


def test_a_compiled_step_has_gradients():
    def loss(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor) -> Tensor:
        y, _, every = ssd_step(q, k, v, m.decay(log_a), state, return_intermediate_states=True)
        return y.sum() + every.square().sum()

    torch._dynamo.reset()
    made = Made()
    case = made.case(decay_of(made))
    args = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, made.log(), case.initial[0])]
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*args), args)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*args), args))


def test_vmap_is_the_loop():
    made = Made()
    case = made.case(decay_of(made))

    def few(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return ssd_step(q, k, v, m.decay(log_a), state, return_intermediate_states=True)

    args = (case.q, case.k, case.v, made.log(), case.initial[0])
    got = torch.func.vmap(few)(*(torch.stack([x, x / 2]) for x in args))
    for i in range(2):
        torch.testing.assert_close(tuple(x[i] for x in got), few(*(x / (1 + i) for x in args)))


def test_autocast_casts_q_k_and_v_only():
    made = Made()
    case = made.case(decay_of(made))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stepped(case)
    assert out["y"].dtype == torch.bfloat16 and out["state[0]"].dtype == torch.float32
    low = replace(case, q=case.q.bfloat16(), k=case.k.bfloat16(), v=case.v.bfloat16())
    for name, x in stepped(low).items():
        assert_same(out[name], x, name)


# --- what it compiles to --------------------------------------------------------------------------------------------


def test_compiled_for_sm_80_and_sm_90_it_is_lean():
    """Loads and stores of 16 bytes, no spills, a token's vectors in shared memory and no more."""
    script = Path(__file__).with_name("step_ptx.py")
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(ssdops.__file__).parents[1])}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(facts) == 4
    for fact in facts:
        assert fact["spilt"] == 0 and fact["registers"] <= 64 and fact["shared"] <= 1024, fact
        assert fact["wide loads"] == fact["wide stores"] == fact["state bytes"] // fact["threads"] // 16, fact
