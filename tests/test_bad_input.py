"""Bad input: an error that names the argument, what was expected and what came.

Nothing is changed by it, the same call fails the same way again, and the next good call works.
"""
# ruff: noqa: E501  # the tables have a row a line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssdops import explain, masks, ssd, ssd_step
from ssdops.errors import (
    DeviceError,
    DtypeError,
    MaskError,
    ShapeError,
    SsdopsError,
    UnknownBackendError,
    UnsupportedError,
    ValueRangeError,
)

B, T, H, N, P = 2, 5, 4, 3, 2
Call = Callable[[dict[str, Tensor]], Any]


def tensors() -> dict[str, Tensor]:
    """Everything that a call of the tables takes, good in itself."""
    generator = torch.Generator().manual_seed(3)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "q": r(B, T, 2, N), "k": r(B, T, 1, N), "v": r(B, T, H, P), "a": -r(B, T, H).abs(),
        "q_row": r(1, T, 2, N), "k_row": r(1, T, 1, N), "v_row": r(1, T, H, P), "s": r(B, H, P, N),
        "c": r(B, T, H, N), "levels": r(B, T, H, 4), "q1": r(B, 2, N), "k1": r(B, 1, N), "v1": r(B, H, P), "a1": -r(B, H).abs(),
        "pool": r(7, H, P, N), "slots": torch.tensor([3, 5]), "ids": torch.zeros(B, T, dtype=torch.int64),
    }  # fmt: skip


def run(x: dict[str, Tensor], mask: Any = None, **options: Any) -> Any:
    changed = {name: options.pop(name) for name in ("q", "k", "v") if name in options}
    mask = masks.decay(x["a"]) if mask is None else mask
    return ssd(*({**x, **changed}[name] for name in ("q", "k", "v")), mask, **options)


def packed(x: dict[str, Tensor], cu: Any) -> Any:
    mask = masks.decay(x["a"][:1]) * masks.documents(cu if isinstance(cu, Tensor) else torch.tensor(cu))
    return ssd(x["q_row"], x["k_row"], x["v_row"], mask)


def step(x: dict[str, Tensor], mask: Any = None, state: Any = None, **options: Any) -> Any:
    changed = {name: options.pop(name) for name in ("q1", "k1", "v1") if name in options}
    mask = masks.decay(x["a1"]) if mask is None else mask
    return ssd_step(*({**x, **changed}[name] for name in ("q1", "k1", "v1")), mask, state, **options)


def ids(x: dict[str, Tensor], row: list[int], count: int | None = None, **options: Any) -> Any:
    mask = masks.decay(x["a"]) * masks.documents(segment_ids=torch.tensor([row, row]), n_segments=count)
    return run(x, mask, **options)


# name: (call, exception, what the message must contain)
SHAPES: dict[str, tuple[Call, type[SsdopsError], list[str]]] = {
    "rank of q": (lambda x: run(x, q=x["q"][0]), ShapeError, ["q must be (batch, seqlen, heads, dstate)", "got 3 dimensions", "(5, 2, 3)"]),
    "rank of v": (lambda x: run(x, v=x["v"][None]), ShapeError, ["v must be (batch, seqlen, heads, headdim)", "got 5 dimensions"]),
    "seqlen of v": (lambda x: run(x, v=x["v"][:, 1:]), ShapeError, ["v has (batch, seqlen) = (2, 4)", "expected (2, 5) as in q"]),
    "batch of k": (lambda x: run(x, k=x["k"][:1]), ShapeError, ["k has (batch, seqlen) = (1, 5)", "expected (2, 5) as in q"]),
    "dstate of k": (lambda x: run(x, k=x["k"][..., :2]), ShapeError, ["k has dstate 2", "expected 3 as in q"]),
    "heads of v": (lambda x: run(x, v=x["v"][:, :, :3]), ShapeError, ["v has 3 heads", "divide nheads=4 (from log_a)", "expand v"]),
    "heads of the mask": (lambda x: run(x, masks.decay(x["a"][..., :3])), ShapeError, ["log_a has 3 heads", "nheads=4 (from v)", "expand log_a"]),
    "no heads": (lambda x: run(x, k=x["k"][:, :, :0]), ShapeError, ["k has 0 heads", "at least one"]),
    "no heads at all": (lambda x: run(x, masks.causal(), q=x["q"][:, :, :0], k=x["k"][:, :, :0], v=x["v"][:, :, :0]), ShapeError, ["q has 0 heads"]),
    "seqlen of a decay": (lambda x: run(x, masks.decay(x["a"][:, :4])), ShapeError, ["log_a has shape (2, 4, 4)", "seqlen must be 5", "expected (batch, seqlen, nheads)"]),
    "batch of a decay": (lambda x: run(x, masks.decay(x["a"][[0, 1, 1]])), ShapeError, ["log_a has shape (3, 5, 4)", "batch must be 2"]),
    "rank of a decay": (lambda x: run(x, masks.decay(x["a"][None])), ShapeError, ["log_a must be (batch, seqlen, nheads)", "got 4 dimensions"]),
    "a second decay": (lambda x: run(x, masks.decay(x["a"]) + masks.decay(x["a"][:, :3])), ShapeError, ["log_a_1 has shape (2, 3, 4)", "seqlen must be 5"]),
    "retention per token": (lambda x: run(x, masks.retention(x["a"])), ShapeError, ["log_gamma must be (nheads)", "got 3 dimensions"]),
    "a row scale": (lambda x: run(x, masks.causal().scale(rows=x["a"][:, :2])), ShapeError, ["rows has shape (2, 2, 4)", "seqlen must be 5"]),
    "a dense mask": (lambda x: run(x, masks.dense(torch.zeros(T, T + 1))), ShapeError, ["L has shape (5, 6)", "seqlen must be 5"]),
    "lags": (lambda x: run(x, masks.toeplitz(torch.zeros(H, 2 * T))), ShapeError, ["coeffs has shape (4, 10)", "2*seqlen-1 must be 9"]),
    "levels": (lambda x: run(x, masks.fenwick(x["a"], x["levels"][..., :2])), ShapeError, ["levels has 2 levels", "seqlen=5 needs n_levels >= 4"]),
    "channels": (lambda x: run(x, masks.channel_decay(x["c"][..., :2])), ShapeError, ["log_a has shape (2, 5, 4, 2)", "dstate must be 3"]),
    "channels of A": (lambda x: run(x, masks.channel_decay(dt=x["a"], A=torch.zeros(H, 1))), ShapeError, ["A has shape (4, 1)", "dstate must be 3"]),
    "batch with cu_seqlens": (lambda x: run(x, masks.documents(torch.tensor([0, T]))), ShapeError, ["batch must be 1, got 2", "use segment_ids"]),
    "no boundaries": (lambda x: packed(x, torch.zeros(0, dtype=torch.int64)), ShapeError, ["cu_seqlens", "at least the boundary 0", "(0,)"]),
    "rank of cu_seqlens": (lambda x: packed(x, [[0, T]]), ShapeError, ["cu_seqlens must be (n_segments+1)", "got 2 dimensions"]),
    "length of segment_ids": (lambda x: ids(x, [0, 0, 0]), ShapeError, ["segment_ids has shape (2, 3)", "seqlen must be 5"]),
    "rank of segment_ids": (lambda x: run(x, masks.documents(segment_ids=x["ids"][0])), ShapeError, ["segment_ids must be (batch, seqlen)", "got 1 dimensions"]),
    "shape of a state": (lambda x: run(x, initial_state=x["s"].mT), ShapeError, ["initial_state has shape (2, 4, 3, 2)", "expected (batch, nheads, headdim, dstate) = (2, 4, 2, 3)"]),
    "batch of a state": (lambda x: run(x, initial_state=x["s"][:1]), ShapeError, ["initial_state has shape (1, 4, 2, 3)", "(2, 4, 2, 3)"]),
    "too many states": (lambda x: run(x, initial_state=(x["s"], x["s"])), ShapeError, ["initial_state has 2 states", "carries 1"]),
    "too few states": (lambda x: run(x, masks.full(), initial_state=x["s"]), ShapeError, ["initial_state has 1 states", "carries 2"]),
    "no states": (lambda x: run(x, initial_state=()), ShapeError, ["initial_state has 0 states", "carries 1"]),
    "a state where there is none": (lambda x: run(x, masks.diagonal(x["a"]), initial_state=x["s"]), ShapeError, ["initial_state has 1 states", "carries 0"]),
    "states without a count": (lambda x: ids(x, [0, 0, 1, 1, 1], return_state=True), ShapeError, ["need n_segments"]),
    "states of documents": (lambda x: ids(x, [0, 0, 1, 1, 1], 3, initial_state=x["s"]), ShapeError, ["initial_state has shape (2, 4, 2, 3)", "(6, 4, 2, 3)"]),
    "chunk_size 0": (lambda x: run(x, chunk_size=0), ShapeError, ["chunk_size must be at least 1, got 0"]),
    "chunk_size below 0": (lambda x: run(x, chunk_size=-4), ShapeError, ["chunk_size must be at least 1, got -4"]),
}  # fmt: skip
KINDS: dict[str, tuple[Call, type[SsdopsError], list[str]]] = {
    "integer q": (lambda x: run(x, q=x["q"].long()), DtypeError, ["q is torch.int64", "expected float32"]),
    "complex v": (lambda x: run(x, v=x["v"].to(torch.complex64)), DtypeError, ["v is torch.complex64", "expected float32"]),
    "8-bit k": (lambda x: run(x, k=x["k"].to(torch.float8_e4m3fn)), DtypeError, ["k is torch.float8_e4m3fn", "expected float32"]),
    "integer decay": (lambda x: run(x, masks.decay(x["a"].int())), DtypeError, ["log_a is torch.int32", "expected float32"]),
    "complex decay": (lambda x: run(x, masks.decay(x["a"].to(torch.complex64))), DtypeError, ["log_a is torch.complex64"]),
    "boolean diagonal": (lambda x: run(x, masks.diagonal(x["a"] > 0)), DtypeError, ["d is torch.bool"]),
    "boolean dense": (lambda x: run(x, masks.dense(torch.ones(T, T).bool())), DtypeError, ["L is torch.bool", "convert it"]),
    "float cu_seqlens": (lambda x: packed(x, [0.0, 5.0]), DtypeError, ["cu_seqlens is torch.float32", "expected int32 or int64"]),
    "float segment_ids": (lambda x: run(x, masks.documents(segment_ids=x["a"][..., 0])), DtypeError, ["segment_ids is torch.float32", "int64"]),
    "integer state": (lambda x: run(x, initial_state=x["s"].long()), DtypeError, ["initial_state[0] is torch.int64"]),
    "a number as a state": (lambda x: run(x, initial_state=3), DtypeError, ["initial_state must be a tensor or a tuple", "got int"]),
    "None among states": (lambda x: run(x, masks.full(), initial_state=(x["s"], None)), DtypeError, ["initial_state must be", "NoneType"]),
    "a list as q": (lambda x: run(x, q=[1.0]), DtypeError, ["q must be a torch.Tensor, got list"]),
    "a tensor as the mask": (lambda x: run(x, x["a"]), MaskError, ["mask must be a Mask", "Tensor"]),
    "a constructor as the mask": (lambda x: run(x, masks.causal), MaskError, ["mask must be a Mask", "got function"]),
    "a tensor as scale": (lambda x: run(x, scale=torch.tensor(2.0)), DtypeError, ["scale must be a Python number, got", "Tensor", "multiply v"]),
    "None as scale": (lambda x: run(x, scale=None), DtypeError, ["scale must be a Python number, got NoneType"]),
    "integer state_dtype": (lambda x: run(x, return_state=True, state_dtype=torch.int32), DtypeError, ["state_dtype 'int32'", "bfloat16"]),
    "state_dtype by name": (lambda x: run(x, state_dtype="float32"), DtypeError, ["state_dtype must be a torch.dtype", "got str: 'float32'"]),
    "return_state by word": (lambda x: run(x, return_state="no"), DtypeError, ["return_state must be True or False", "'no'"]),
    "no tokens between states": (lambda x: run(x, state_every=0), ShapeError, ["state_every must be at least 1, got 0"]),
    "state_every by word": (lambda x: run(x, state_every=True), DtypeError, ["state_every must be an int or None", "got bool: True"]),
    "states between of a band": (lambda x: run(x, masks.window(3), state_every=2), UnsupportedError, ["window(left=3, right=0) has no recurrence"]),
    "states between of later tokens": (lambda x: run(x, masks.full(), state_every=2), UnsupportedError, ["state_every", "reads later tokens", "leave it out"]),
    "states between of documents": (lambda x: ids(x, [0, 0, 1, 1, 1], 2, state_every=2), UnsupportedError, ["state_every", "documents()", "its own row"]),
    "states between of a trapezoid": (lambda x: run(x, masks.trapezoidal(x["a"], x["a"], x["a"]), state_every=2), UnsupportedError, ["trapezoidal() run a token ahead", "one stretch of tokens after another"]),
    "float chunk_size": (lambda x: run(x, chunk_size=8.0), DtypeError, ["chunk_size must be an int", "got float: 8.0"]),
    "sparse q": (lambda x: run(x, q=x["q"].to_sparse()), UnsupportedError, ["q is torch.sparse_coo", "dense tensors"]),
    "k on another device": (lambda x: run(x, k=x["k"].to("meta")), DeviceError, ["k is on meta", "q is on cpu", "move it"]),
    "q on another device": (lambda x: run(x, q=x["q"].to("meta")), DeviceError, ["k is on cpu", "q is on meta"]),
    "decay on another device": (lambda x: run(x, masks.decay(x["a"].to("meta"))), DeviceError, ["log_a is on meta", "q is on cpu"]),
    "state on another device": (lambda x: run(x, initial_state=x["s"].to("meta")), DeviceError, ["initial_state[0] is on meta"]),
    "an unknown backend": (lambda x: run(x, backend="tritn"), UnknownBackendError, ["'tritn'", "chunked", "recurrent", "naive", "'auto'"]),
    "a module as backend": (lambda x: run(x, backend=torch), UnknownBackendError, ["backend must be a name", "got module"]),
    "a backend without bands": (
        lambda x: run(x, masks.window(3), backend="recurrent"),
        UnsupportedError, ["'recurrent' cannot run window(left=3, right=0)", "semiseparable", "able: ", "naive"],
    ),
    "a backend without channels": (
        lambda x: run(x, masks.channel_decay(x["c"]), backend="tvm"),
        UnsupportedError, ["'tvm' cannot run channel_decay(log_a)", "per channel", "able: ", "chunked, recurrent, naive)"],
    ),
    "a backend without chunks": (
        lambda x: run(x, backend="recurrent", chunk_size=4),
        UnsupportedError, ["'recurrent' has no chunks", "chunk_size=4", "able: chunked"],
    ),
    "a state of a band": (lambda x: run(x, masks.window(3), return_state=True), UnsupportedError, ["window(left=3, right=0) has no recurrence"]),
    "a state of a trapezoid": (lambda x: run(x, masks.trapezoidal(x["a"], x["a"], x["a"]) + masks.causal(), return_state=True), UnsupportedError, ["trapezoidal()", "previous k and v"]),
    "a mask that grows": (lambda x: run(x, _grown(x)), MaskError, ["12 factors", "4096 terms", "512"]),
}  # fmt: skip
VALUES: dict[str, tuple[Call, type[SsdopsError], list[str]]] = {
    "cu_seqlens starts late": (lambda x: packed(x, [1, T]), ValueRangeError, ["cu_seqlens must start at 0, got 1"]),
    "cu_seqlens decreases": (lambda x: packed(x, [0, 3, 2, T]), ValueRangeError, ["cu_seqlens must not decrease, got 3 then 2 at index 2"]),
    "cu_seqlens ends early": (lambda x: packed(x, [0, 2, 4]), ValueRangeError, ["cu_seqlens must end at seqlen=5, got 4"]),
    "cu_seqlens ends late": (lambda x: packed(x, [0, 2, 6]), ValueRangeError, ["cu_seqlens must end at seqlen=5, got 6"]),
    "segment_ids decrease": (lambda x: ids(x, [1, 1, 0, 0, 0]), ValueRangeError, ["segment_ids must not decrease"]),
    "segment_ids too large": (lambda x: ids(x, [0, 0, 1, 1, 3], 3), ValueRangeError, ["segment_ids must lie in [0, n_segments=3)", "0 to 3"]),
    "segment_ids below 0": (lambda x: ids(x, [-1, 0, 0, 0, 0], 3), ValueRangeError, ["segment_ids must lie in [0, n_segments=3)", "-1 to 0"]),
}  # fmt: skip
STEPS: dict[str, tuple[Call, type[SsdopsError], list[str]]] = {
    "q with seqlen": (lambda x: step(x, q1=x["q"]), ShapeError, ["q must be (batch, heads, dstate) in a step", "got 4 dimensions"]),
    "v with seqlen": (lambda x: step(x, v1=x["v"]), ShapeError, ["v must be (batch, heads, headdim) in a step"]),
    "batch of k": (lambda x: step(x, k1=x["k1"][:1]), ShapeError, ["k has batch 1, expected 2 as in q"]),
    "decay with seqlen": (lambda x: step(x, masks.decay(x["a"])), ShapeError, ["log_a has shape (2, 5, 4)", "without its seqlen axis"]),
    "no mask": (lambda x: ssd_step(x["q1"], x["k1"], x["v1"], None, None), MaskError, ["mask must be a Mask", "NoneType"]),
    "anticausal": (lambda x: step(x, masks.decay(x["a1"]).T), UnsupportedError, ["decay(log_a).T reads later tokens", "run ssd on the whole sequence"]),
    "full": (lambda x: step(x, masks.full()), UnsupportedError, ["reads later tokens", "full() has no step"]),
    "reversed": (lambda x: step(x, masks.decay(x["a1"]).reverse()), UnsupportedError, ["reads later tokens"]),
    "documents": (lambda x: step(x, masks.decay(x["a1"]) * masks.documents(torch.tensor([0, 1]))), UnsupportedError, ["a step has no documents", "own batch row"]),
    "band": (lambda x: step(x, masks.window(2)), UnsupportedError, ["window(left=2, right=0) has no recurrence"]),
    "delay by two": (lambda x: step(x, masks.decay(x["a1"]).shift(2)), UnsupportedError, ["decay(log_a).shift(2) has no recurrence"]),
    "dense": (lambda x: step(x, masks.dense(torch.ones(1, 1))), UnsupportedError, ["dense(L) has no recurrence"]),
    "trapezoid": (lambda x: step(x, masks.trapezoidal(x["a1"], x["a1"], x["a1"]) + masks.causal()), UnsupportedError, ["trapezoidal()"]),
    "state of another batch": (lambda x: step(x, None, x["s"][:1]), ShapeError, ["state has shape (1, 4, 2, 3)", "= (2, 4, 2, 3)"]),
    "too many states": (lambda x: step(x, None, (x["s"], x["s"])), ShapeError, ["state has 2 states", "carries 1"]),
    "no states": (lambda x: step(x, None, ()), ShapeError, ["state has 0 states", "carries 1"]),
    "integer state": (lambda x: step(x, None, x["s"].long()), DtypeError, ["state[0] is torch.int64"]),
    "a number as state": (lambda x: step(x, None, 1.0), DtypeError, ["state must be a tensor or a tuple", "got float"]),
    "an unknown backend": (lambda x: step(x, backend="x"), UnknownBackendError, ["'x'", "chunked", "'auto'"]),
    "slots without a pool": (lambda x: step(x, state_indices=x["slots"]), ShapeError, ["state_indices", "give the pool as state"]),
    "slots of another batch": (lambda x: step(x, None, x["pool"], state_indices=x["slots"][:1]), ShapeError, ["state_indices must be (2,) int32 or int64", "(1,)"]),
    "float slots": (lambda x: step(x, None, x["pool"], state_indices=x["slots"].float()), ShapeError, ["state_indices must be", "torch.float32"]),
    "a list of slots": (lambda x: step(x, None, x["pool"], state_indices=[3, 5]), DtypeError, ["state_indices must be a torch.Tensor, got list"]),
    "slots on another device": (lambda x: step(x, None, x["pool"], state_indices=x["slots"].to("meta")), DeviceError, ["state_indices is on meta"]),
    "a slot that is not there": (lambda x: step(x, None, x["pool"], state_indices=x["slots"] + 2), ValueRangeError, ["state_indices must lie in [0, 7), or be -1, got 7 at row 1"]),
    "a negative slot": (lambda x: step(x, None, x["pool"], state_indices=x["slots"] - 5), ValueRangeError, ["got -2 at row 0"]),
    "a slot taken twice": (lambda x: step(x, None, x["pool"], state_indices=x["slots"] * 0), ValueRangeError, ["each slot once, got slot 0 for 2 rows"]),
    "pool of other heads": (lambda x: step(x, None, x["pool"][:, :2], state_indices=x["slots"]), ShapeError, ["state has shape (7, 2, 2, 3)", "(slots, nheads, headdim, dstate) = (7, 4, 2, 3)"]),
    "pool without slots": (lambda x: step(x, None, x["pool"][0], state_indices=x["slots"]), ShapeError, ["state must be a pool (slots, nheads, headdim, dstate)", "(4, 2, 3)"]),
    "pool on another device": (lambda x: step(x, None, x["pool"].to("meta"), state_indices=x["slots"]), DeviceError, ["state is on meta"]),
    "two pools for one term": (lambda x: step(x, None, (x["pool"], x["pool"]), state_indices=x["slots"]), ShapeError, ["state has 2 states", "carries 1"]),
    "pool with a gradient": (lambda x: step(x, None, x["pool"].clone().requires_grad_(), state_indices=x["slots"]), UnsupportedError, ["in place and takes no gradient", "detach"]),
}  # fmt: skip
CALLS = {f"{kind}: {name}": row for kind, table in (("shape", SHAPES), ("kind", KINDS), ("value", VALUES), ("step", STEPS)) for name, row in table.items()}  # fmt: skip


def _grown(x: dict[str, Tensor]) -> masks.Mask:
    part = masks.decay(x["a"]) + masks.decay(x["a"]).T
    out = part
    for _ in range(11):
        out = out * part
    return out


def failure(call: Call, x: dict[str, Tensor]) -> SsdopsError:
    with pytest.raises(SsdopsError) as error:
        call(x)
    return error.value


@pytest.mark.parametrize("name", CALLS)
def test_the_error_names_the_argument_what_was_expected_and_what_came(name):
    call, kind, words = CALLS[name]
    x = tensors()
    error = failure(call, x)
    assert type(error) is kind
    for word in words:
        assert word in str(error)
    # nothing changed, a second time it fails the same way, and with gradients too
    assert all(torch.equal(t, before) for t, before in zip(x.values(), tensors().values(), strict=True))
    again = failure(call, x)
    assert (type(again), str(again)) == (kind, str(error))
    with torch.no_grad():
        assert str(failure(call, x)) == str(error)
    learnt = {
        name: t.requires_grad_() if name in ("q", "k", "v", "a", "q_row", "q1", "a1") else t for name, t in tensors().items()
    }
    assert str(failure(call, learnt)) == str(error)
    # and a good call after a bad one works
    assert run(x).shape == (B, T, H, P) and step(x)[0].shape == (B, H, P)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith(("shape", "kind"))])
def test_fake_tensors_fail_alike(name):
    """Whatever only shapes, dtypes and devices tell is told without data: under FakeTensorMode, and so under tracing."""
    call, _, words = CALLS[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = {key: mode.from_tensor(t) for key, t in tensors().items()}
        error = failure(call, x)
    for word in words:
        assert word in str(error)


COMPILED = [
    "shape: rank of q", "shape: heads of v", "shape: seqlen of a decay", "shape: shape of a state", "kind: integer q",
    "kind: an unknown backend", "kind: a tensor as the mask", "value: cu_seqlens ends early", "step: anticausal",
]  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_calls_fail_with_the_same_words(name):
    call, _, words = CALLS[name]
    torch._dynamo.reset()
    with pytest.raises(Exception) as error:  # dynamo wraps what is raised while it traces
        torch.compile(call, backend="eager")(tensors())
    text = _chain(error.value)
    for word in words:
        assert word in text


def _chain(error: BaseException | None) -> str:
    """The messages of an exception and of what it came from."""
    return "" if error is None else f"{error}\n{_chain(error.__cause__ or error.__context__)}"


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("shape") and "state" not in name])
def test_explain_fails_alike_for_what_it_takes(name):
    """`explain` takes the same arguments, states apart: it must not plan what `ssd` refuses."""
    call, kind, words = CALLS[name]
    x = tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ssd", explain)
        error = failure(call, x)
    assert type(error) is kind
    assert all(word in str(error) for word in words)


@pytest.mark.parametrize("options", [{"chunksize": 8}, {"backends": "naive"}, {"initial_states": None}])
def test_a_misspelt_option_is_a_type_error(options):
    with pytest.raises(TypeError, match="unexpected keyword"):
        run(tensors(), **options)


@pytest.mark.parametrize("backend", ["naive", "recurrent", "chunked"])
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (2, 0), (0, 0), (1, 1)])
def test_nothing_and_one_token_are_good_input(backend, batch, seqlen):
    q, v, a = torch.randn(batch, seqlen, 2, N), torch.randn(batch, seqlen, H, P), -torch.rand(batch, seqlen, H)
    q.requires_grad_(), a.requires_grad_()
    initial = torch.randn(batch, H, P, N)
    for mask in (masks.decay(a), masks.full() * masks.decay(a) + masks.diagonal(a)):
        y, state = ssd(q, q, v, mask, initial_state=initial, return_state=True, backend=backend)
        assert y.shape == (batch, seqlen, H, P) and state.shape == initial.shape
        (y.sum() + state.sum()).backward()
        assert q.grad.shape == q.shape and a.grad.shape == a.shape
        if seqlen == 0:
            assert torch.equal(state, initial)


def test_packed_rows_may_be_empty():
    q, v = torch.randn(1, 0, 2, N), torch.randn(1, 0, H, P)
    y, state = ssd(q, q, v, masks.causal() * masks.documents(torch.tensor([0, 0, 0])), return_state=True)
    assert y.shape == v.shape and torch.equal(state, torch.zeros(2, H, P, N))
