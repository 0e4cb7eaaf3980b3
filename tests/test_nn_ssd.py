"""The scan as a layer is `ssd` and `ssd_step` of its mask, with operands that it holds, learns and moves, or is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ssdops import explain, masks, ssd, ssd_step
from ssdops.errors import DtypeError, MaskError, ParseError, UnsupportedError
from ssdops.nn import SSD
from ssdops.testing.structures import STRUCTURES, Make
from ssdops.testing.tolerance import assert_same

LOG_A, LOG_GAMMA = -torch.rand(2, 12, 4), -torch.rand(4)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(2, 2, 12, 2, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return q, k, torch.randn(2, 12, 4, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", STRUCTURES)
def test_it_is_ssd_of_any_structure(name: str) -> None:
    """By a mask whose tensors it holds, and by the mask's text with all operands given."""
    make = Make(seqlen=16)
    case = make.case(STRUCTURES[name](make))
    expected = ssd(case.q, case.k, case.v, case.mask, scale=0.5)
    held, given = SSD(case.mask, scale=0.5), SSD(str(case.mask), scale=0.5)
    assert_same(held(case.q, case.k, case.v), expected, "y by a mask")
    assert_same(given(case.q, case.k, case.v, **case.mask.operands), expected, "y by its text")
    assert held.given == () and dict(held.operands.named_buffers()).keys() == case.mask.operands.keys()


def test_states_steps_and_options() -> None:
    q, k, v = inputs()
    scan, mask = SSD("decay(log_a)", scale=2.0, backend="recurrent"), masks.decay(LOG_A)
    y, state = ssd(q, k, v, mask, scale=2.0, return_state=True, backend="recurrent")
    found, left = scan(q[:, :7], k[:, :7], v[:, :7], log_a=LOG_A[:, :7], return_state=True)
    rest, last = scan(q[:, 7:], k[:, 7:], v[:, 7:], log_a=LOG_A[:, 7:], initial_state=left, return_state=True)
    assert_same(torch.cat([found, rest], 1), y, "y in two parts")
    assert_same(last, state, "the state")
    token = q[:, 0], k[:, 0], v[:, 0]
    found, left = scan.step(*token, state, log_a=LOG_A[:, 0])
    y, state = ssd_step(*token, masks.decay(LOG_A[:, 0]), state, scale=2.0, backend="recurrent")
    assert_same(found, y, "y of a step")
    assert_same(left, state, "the state after it")
    plan = explain(q, k, v, SSD("decay(log_a)").mask(log_a=LOG_A), backend="chunked").plan
    assert [step.backend for step in plan.steps] == ["chunked"]
    assert "decay(log_a), scale=2.0, backend='recurrent'" in repr(scan)


def test_what_it_holds_is_learnt_saved_and_moved() -> None:
    q, k, v = inputs()
    scan = SSD("retention(log_gamma) * documents(cu) + diagonal(d)", {"log_gamma": nn.Parameter(LOG_GAMMA), "d": torch.ones(1)})
    assert [name for name, _ in scan.named_parameters()] == ["operands.log_gamma"]
    cu = torch.tensor([0, 5, 12])
    scan(q[:1], k[:1], v[:1], cu=cu).sum().backward()
    own = LOG_GAMMA.clone().requires_grad_()
    mask = masks.retention(own) * masks.documents(cu) + masks.diagonal(torch.ones(1))
    (expected,) = torch.autograd.grad(ssd(q[:1], k[:1], v[:1], mask).sum(), own)
    torch.testing.assert_close(scan.operands.log_gamma.grad, expected)
    other = SSD(str(scan.tree), {"log_gamma": nn.Parameter(torch.zeros(4)), "d": torch.zeros(1)})
    other.load_state_dict(scan.state_dict())
    assert_same(other(q[:1], k[:1], v[:1], cu=cu), scan(q[:1], k[:1], v[:1], cu=cu), "y of what was loaded")
    moved = SSD(masks.retention(nn.Parameter(LOG_GAMMA)) + masks.diagonal(LOG_GAMMA)).to("meta")
    assert all(x.is_meta for x in moved.mask().operands.values())


def test_compiles_whole() -> None:
    q, k, v = inputs()
    scan = SSD("decay(log_a) * retention(log_gamma)", {"log_gamma": nn.Parameter(LOG_GAMMA)})
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    y, plain = compiled(q, k, v, log_a=LOG_A), scan(q, k, v, log_a=LOG_A)
    torch.testing.assert_close(y, plain)
    given = list(scan.parameters())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), given), torch.autograd.grad(plain.sum(), given))


def test_what_does_not_fit() -> None:
    q, k, v = inputs()
    scan = SSD("decay(log_a) * retention(log_gamma)", {"log_gamma": LOG_GAMMA})
    for call, error, message in [
        (lambda: SSD("decay(log_a"), ParseError, "is not an expression"),
        (lambda: SSD(3), MaskError, "mask must be a Mask or its text, got int"),
        (lambda: SSD("decay(log_a)", {"log_b": LOG_A}), MaskError, r"log_b: no operands of decay\(log_a\) .* those are: log_a"),
        (lambda: SSD("decay(log_a)", {"log_a": 3.0}), DtypeError, "log_a must be a torch.Tensor, got float"),
        (lambda: SSD("decay(half)", {"half": LOG_A}), MaskError, "cannot be called 'half'"),
        (lambda: SSD(masks.causal(), {}), MaskError, "a Mask has its own"),
        (lambda: scan(q, k, v), MaskError, "needs log_a with each call"),
        (lambda: scan(q, k, v, log_a=LOG_A, log_gamma=LOG_GAMMA), MaskError, "log_gamma: no operands .* those are: log_a"),
        (lambda: scan(q, k, v, log_a=LOG_A, return_states=True), MaskError, "return_states: no operands"),
        (lambda: SSD("full()").step(q[:, 0], k[:, 0], v[:, 0], None), UnsupportedError, "reads later tokens"),
    ]:
        with pytest.raises(error, match=message):
            call()
