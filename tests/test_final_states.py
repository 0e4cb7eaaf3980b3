"""What slices of a sequence are run by: a pass for final states alone, and passes that begin before states are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ssdops import masks
from ssdops.backends.base import Config, Summarizer, bind
from ssdops.backends.registry import get
from ssdops.ir.contraction import Contraction
from ssdops.ir.nodes import operand_names
from ssdops.ir.terms import Linear
from ssdops.plan import terms_of
from ssdops.run import Call, backward, begin, final_states, forward
from ssdops.testing.case import Case
from ssdops.testing.oracle import output_bounds, outputs
from ssdops.testing.structures import STRUCTURES, Make
from ssdops.testing.tolerance import assert_close


def call_of(case: Case, backend: str) -> Call:
    program = str(Contraction(case.mask.tree, return_state=True, backend=backend))
    operands = [case.mask.operands[name] for name in operand_names(case.mask.tree)]
    return Call(case.q, case.k, case.v, operands, list(case.initial), program, case.scale)


@pytest.mark.parametrize(
    "name", ["decay", "scale T", "decay * documents(segment_ids)", "shift", "channel_decay(dt, A)", "causal"]
)
@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
def test_they_are_those_of_the_whole_pass(backend: str, name: str) -> None:
    make = Make(seqlen=150)
    case = make.case(STRUCTURES[name](make))
    p = case.problem
    assert p.n_states is not None
    case = replace(case, initial=(make.normal(p.n_states, p.nheads, p.headdim, p.dstate),))
    (found,), (_, whole) = final_states(call_of(case, backend)), forward(call_of(case, backend))
    assert_close(found, whole, 2 * output_bounds(case, True)["state[0]"], "the final state")


@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter")
@pytest.mark.parametrize(("seqlen", "segments"), [(330, 3), (1300, 20)])
@pytest.mark.parametrize("name", ["decay", "scale T", "decay * documents(segment_ids)"])
def test_triton_sums_what_segments_make(name: str, seqlen: int, segments: int) -> None:
    from ssdops.backends.triton.replay import final_state

    make = Make(seqlen=seqlen, dstate=16, headdim=16, dtype=torch.float32)
    mask = STRUCTURES[name](make)
    slow = masks.Mask(mask.tree, {n: 0.01 * x if n.startswith("log") else x for n, x in mask.operands.items()})
    case = make.case(slow)
    p = case.problem
    assert p.n_states is not None
    case = replace(case, initial=(make.normal(p.n_states, p.nheads, p.headdim, p.dstate),))
    (term,) = terms_of(case.mask.tree)
    assert isinstance(term, Linear)
    x = bind(term, p, case.q, case.k, case.v, case.mask.operands, case.initial[0], case.scale)
    found = final_state(term, x, Config(segments=segments))
    assert_close(found, outputs(case, True)["state[0]"], output_bounds(case, True)["state[0]"], "the final state")
    backend = get("triton")
    assert isinstance(backend, Summarizer)
    whole = backend.final_state(term, x, Config())
    assert_close(whole, outputs(case, True)["state[0]"], output_bounds(case, True)["state[0]"], "the final state")


def late(call: Call) -> tuple[Call, Callable[[], None]]:
    """The same call with NaN for its states, and what puts them there."""
    rooms = [torch.full_like(x, torch.nan) for x in call.states]

    def arrive() -> None:
        for room, x in zip(rooms, call.states, strict=True):
            room.copy_(x)

    return replace(call, states=rooms), arrive


NAMES = ["decay", "scale T", "decay * documents(segment_ids)", "shift", "channel_decay(dt, A)", "causal", "quasiseparable"]
INTERPRETED = [(name, segments) for name in NAMES[:3] for segments in (1, 3)] + [("channel_decay(dt, A)", 1)]


@pytest.mark.parametrize(
    ("backend", "name", "segments"),
    [(backend, name, 1) for backend in ("chunked", "recurrent") for name in NAMES]
    + [("triton", *rest) for rest in INTERPRETED],
)
def test_a_pass_may_begin_before_its_states_are_there(
    backend: str, name: str, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward it says first what the slice does to states, then gives what it would have given; so do gradients."""
    if backend == "triton":
        if torch.cuda.is_available():
            pytest.skip("in Triton's interpreter")
        monkeypatch.setattr("ssdops.backends.triton.backend.Triton._splits", lambda *_: [Config(16, segments)])
        monkeypatch.setattr("ssdops.run._prepared", {})
    make = Make(seqlen=100, dstate=16, headdim=16, dtype=torch.float32)
    case = make.case(STRUCTURES[name](make))
    p = case.problem
    assert p.n_states is not None
    shape = (p.n_states, p.nheads, p.headdim, p.dstate)
    case = replace(case, initial=tuple(make.normal(*shape).float() for _ in case.carried))
    call = call_of(case, backend)
    waiting, arrive = late(call)
    started = begin(waiting, learnt=True)
    y, *finals = started.finish(False, arrive)
    wanted, bounds = outputs(case, True), output_bounds(case, True)
    assert_close(y, wanted["y"], bounds["y"], "y")
    for i, (final, begun, initial) in enumerate(zip(finals, started.begun, case.initial, strict=True)):
        assert_close(final, wanted[f"state[{i}]"], bounds[f"state[{i}]"], "the final state")
        if begun.decay is not None:
            assert_close(begun.state + begun.decay * initial, wanted[f"state[{i}]"], bounds[f"state[{i}]"], "what leaves")
    cotangents = [make.normal(*y.shape).float(), *(make.normal(*shape).float() for _ in finals)]
    given, arrive = late(replace(call, states=cotangents[1:]))
    expected = backward(call, cotangents, [])
    found = backward(call, [cotangents[0], *given.states], [], arrive)
    for x, grad in zip(found, expected, strict=True):
        assert torch.equal(x, grad)
