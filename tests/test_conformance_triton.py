"""The Triton backend keeps every law, in Triton's interpreter: what its kernels compute, if not what compilers make of them.

`test_cuda_triton.py` holds what compilers make of them to the same laws.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssdops import explain, masks, ssd
from ssdops.backends.base import Config, Cotangents, bind
from ssdops.backends.triton.backward import in_turns
from ssdops.backends.triton.launch import Scan
from ssdops.errors import UnsupportedError
from ssdops.ir.terms import Diagonal, Linear
from ssdops.masks import Mask
from ssdops.plan import terms_of
from ssdops.testing import Conformance, laws
from ssdops.testing.case import Case
from ssdops.testing.laws import Runner, twice
from ssdops.testing.oracle import gradient_bounds, output_bounds, outputs
from ssdops.testing.structures import Make
from ssdops.testing.tolerance import assert_close

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here; test_cuda_triton.py has these laws")


class TestTriton(Conformance):
    backend = "triton"
    kind = "scalar"
    every_multiple = 16
    rounds_operands = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    chunk_sizes = (32, 16, 64)
    share = 0.2


def test_uncounted_documents_are_refused_where_they_could_be_too_many() -> None:
    """Ids without a count make room for a document per token, so long rows of them ask for the count."""
    x, ids = torch.zeros(1, 2049, 1, 4), torch.zeros(1, 2049, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match="give n_segments"):
        ssd(x, x, x, masks.documents(segment_ids=ids), backend="triton")


@pytest.mark.parametrize("dstate", [6, 130])
@pytest.mark.parametrize("make", [masks.decay, lambda log_a: masks.decay(log_a).T])
def test_a_relay_says_what_one_pass_says(
    make: Callable[[Tensor], masks.Mask], dstate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that hand the state on: y and final states, of rows and groups of their own, in one part of dstate or two."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 200, 2, dstate, generator=generator) for _ in range(2))
    v, initial = torch.randn(2, 200, 6, 20, generator=generator), torch.randn(2, 6, 20, dstate, generator=generator)
    mask = make(-0.1 * torch.rand(2, 200, 6, generator=generator))

    def outputs() -> tuple[Tensor, Tensor]:
        return ssd(q, k, v, mask, initial_state=initial, return_state=True, backend="triton")

    wanted, asked = outputs(), []
    monkeypatch.setattr("ssdops.backends.triton.launch.relay_of", lambda problem, programs: asked.append(programs) or 3)
    monkeypatch.setattr("ssdops.backends.triton.replay._replays", {})
    for name, x, y in zip(("y", "state"), outputs(), wanted, strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max(), name
    assert asked == [2 * 6 * 2]  # rows, heads, and tiles of 16 rows of headdim


def forgetful(strength: float, gain: float) -> Tensor:
    """Log decays (1, 600, 2): strong on 80 tokens of the first half, and what undoes some of that after them."""
    log_a = torch.full((1, 600, 2), -0.01)
    log_a[:, 100:180], log_a[:, 200:260] = -strength, gain
    return log_a


@pytest.mark.parametrize(("strength", "gain", "read"), [(2.0, 0.0, True), (2.5, 0.0, False), (2.5, 1.0, True)])
def test_segments_read_what_they_remember(strength: float, gain: float, read: bool) -> None:
    """A state that decays by 2^256 is 0, unless it grows again: the tokens before are not read, and else they count."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 600, 2, 8, generator=generator) for _ in range(3))
    mask = masks.decay(forgetful(strength, gain))
    (term,) = terms_of(mask.tree)
    made = Case(q, k, v, mask)
    assert isinstance(term, Linear)

    def outputs(v: Tensor, segments: int) -> Tensor:
        return Scan(term, bind(term, made.problem, q, k, v, mask.operands, None, 1.0), Config(16, segments)).forward().y

    whole, parts = outputs(v, 1), outputs(v, 2)
    assert (parts - whole).abs().max() <= 1e-5 * whole.abs().max()
    spoilt = outputs(v.index_fill(1, torch.arange(40), torch.nan), 2)
    assert spoilt[:, 320:].isnan().all() if read else torch.equal(spoilt[:, 320:], parts[:, 320:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_segments_say_what_one_pass_says(causal: bool, packed: bool) -> None:
    """Parts of the sequence scanned side by side, forward and backward, with a state that enters and one that leaves.

    Of packed rows one is empty, one is in most segments, and one ends where a segment does.
    """
    case = Make(seqlen=400, dtype=torch.float32, device="cpu")
    mask = masks.decay(case.log()).scale(rows=case.log())
    mask = mask if causal else mask.T
    ends = torch.tensor([0, 20, 20, 290, 354, 400])
    made = case.case(mask * masks.documents(ends) if packed else mask)
    term = terms_of(made.mask.tree)[0]
    assert isinstance(term, Linear)
    p = made.problem
    assert p.n_states is not None
    states = torch.randn(2, p.n_states, p.nheads, p.headdim, p.dstate, generator=torch.Generator().manual_seed(0))
    x = bind(term, p, made.q, made.k, made.v, made.mask.operands, states[0], 0.7)
    dy = torch.randn(p.batch, p.seqlen, p.nheads, p.headdim, generator=torch.Generator().manual_seed(1))
    one, many = (Config(16, segments) for segments in (1, 5))
    made = replace(made, scale=0.7, initial=(states[0],))
    allowed = twice({**output_bounds(made, True), **gradient_bounds(made, [dy, states[1]])})
    out, expected = (Scan(term, x, config).forward() for config in (many, one))
    assert out.state is not None and expected.state is not None
    assert_close(out.y, expected.y.double(), allowed["y"], "y")
    assert_close(out.state, expected.state.double(), allowed["state[0]"], "state")
    found, wanted = (in_turns(term, x, config, Cotangents(dy, states[1])) for config in (many, one))
    for slot, name in {"q": "q", "k": "k", "v": "v", "initial": "initial_state[0]"}.items():
        assert_close(getattr(found, slot), getattr(wanted, slot).double(), allowed[name], name)
    for name, grad in found.values.items():
        operand = "rows" if name == "cols" else name  # a transpose's columns are scaled by what its mask's rows were
        assert_close(grad, wanted.values[name].double(), allowed[operand], name)


def test_packed_rows_without_decay_leave_their_inputs_alone() -> None:
    """Of which nothing is summed: what prepares them once put the sums that there are not where q was."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 150, 2, 16, generator=generator).requires_grad_() for _ in range(3)]
    given = [x.detach().clone() for x in inputs]
    mask = masks.causal() * masks.documents(torch.tensor([0, 20, 20, 130, 150]))

    def results(backend: str) -> list[Tensor]:
        y = ssd(*inputs, mask, backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    for x, y in zip(results("triton"), results("naive"), strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()
    assert all(torch.equal(x, y) for x, y in zip(inputs, given, strict=True))


IN_SEGMENTS: dict[str, Callable[[Make], Mask]] = {
    "scales": lambda s: masks.causal().scale(s.factor(), s.factor(1)),
    "scales, anticausal": lambda s: masks.causal().T.scale(s.factor(), s.factor(1)),
    "scales in documents": lambda s: masks.causal().scale(s.factor(), s.factor(1)) * s.cu,
    "late scales": lambda s: masks.causal().scale(log_cols=s.log()),
    "neither": lambda s: masks.causal() * s.cu,
    "trapezoidal": lambda s: masks.trapezoidal(s.log(), gamma=s.factor(), beta_over_a=s.factor().flip(1)),
    "everything": lambda s: masks.decay(s.log()).shift(1).scale(s.factor(), s.factor(), s.log()) * s.cu,
}


@pytest.mark.parametrize("mask", IN_SEGMENTS)
def test_segments_leave_their_inputs_alone(mask: str) -> None:
    """With scales and no decay, what prepares factors once put the sums of blocks that there are not where q was."""
    made = Make(seqlen=300, nheads=2, dstate=16, headdim=16, dtype=torch.bfloat16)
    case = replace(made.case(IN_SEGMENTS[mask](made)), operands=torch.bfloat16)
    term, *beside = terms_of(case.mask.tree)
    assert isinstance(term, Linear)
    for other in beside:
        assert isinstance(other, Diagonal)
        term = replace(term, diagonal=other)
    x = bind(term, case.problem, case.q, case.k, case.v, case.mask.operands, None, case.scale)
    given = {name: tensor.clone() for name, tensor in case.tensors()}
    y = Scan(term, x, Config(16, 3)).forward().y
    assert_close(y, outputs(case, False)["y"], output_bounds(case, False)["y"], "y")
    for name, tensor in case.tensors():
        assert torch.equal(tensor, given[name]), name


@pytest.mark.parametrize("v_heads", [1, 4])
def test_rows_in_turns_have_the_gradients_of_all_at_once(v_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where states of a whole batch would take much memory; heads may share v, and rows a decay."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, 70, 2, 20, generator=generator) for _ in range(2))
    v, initial = torch.randn(3, 70, v_heads, 9, generator=generator), torch.randn(3, 4, 9, 20, generator=generator)
    inputs = [x.requires_grad_() for x in (q, k, v, -torch.rand(1, 70, 4, generator=generator), initial)]

    def gradients() -> tuple[torch.Tensor, ...]:
        mask = masks.decay(inputs[3]).scale(rows=inputs[3].exp())
        y, state = ssd(*inputs[:3], mask, initial_state=initial, return_state=True, backend="triton")
        return torch.autograd.grad(y.square().sum() + state.sum(), inputs)

    wanted = gradients()
    monkeypatch.setattr("ssdops.backends.triton.backward.ROOM", 1)
    for name, x, y in zip(("q", "k", "v", "log_a", "initial"), gradients(), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(("seqlen", "every"), [(96, 16), (100, 48), (96, 96), (40, 64)])
def test_states_between_are_those_of_prefixes_in_segments_too(seqlen: int, every: int, segments: int) -> None:
    """Of both rows of a batch, from initial states, and rounded where they leave."""
    made = Make(seqlen=seqlen, dtype=torch.bfloat16)
    case = replace(made.case(masks.decay(made.log())), operands=torch.bfloat16)
    double = case.map(lambda _, x: torch.cat([x, x.flip(1)]))
    initial = torch.randn(2, made.nheads, made.headdim, made.dstate, generator=torch.Generator().manual_seed(0))
    double = replace(double, initial=(initial,))
    (term,) = terms_of(double.mask.tree)
    assert isinstance(term, Linear)
    p = replace(double.problem, state_every=every, state_dtype=torch.bfloat16)
    x = bind(term, p, double.q, double.k, double.v, double.mask.operands, initial, double.scale)
    out = Scan(term, x, Config(16, segments)).forward()
    assert out.every is not None and out.every.shape[1] == seqlen // every and out.every.dtype == torch.bfloat16
    for index in range(seqlen // every):
        left = laws.part(double, 0, (index + 1) * every)
        wanted, allowed = outputs(left, True)["state[0]"], output_bounds(left, True)["state[0]"]
        rounding = torch.finfo(torch.bfloat16).eps * wanted.abs().max().item()
        assert_close(out.every[:, index].float(), wanted, allowed + rounding, f"the state after {(index + 1) * every} tokens")


def test_a_chunk_that_ends_where_states_are_wanted_is_chosen() -> None:
    """The default chunk of 32 tokens unless it would run past one; one that the user fixed is not replaced."""
    x = torch.zeros(1, 100, 1, 4)
    steps = [explain(x, x, x, backend="triton", state_every=every).plan.steps[0] for every in (96, 48)]
    assert [step.config.chunk_size for step in steps] == [32, 16]
    with pytest.raises(UnsupportedError, match=r"chunks of 32 tokens end, and state_every=48.*32 and 64 are nearest"):
        ssd(x, x, x, backend="triton", state_every=48, chunk_size=32)
    with pytest.raises(UnsupportedError, match=r"state_every=100 .*96 and 112 are nearest.*'chunked'"):
        ssd(x, x, x, backend="triton", state_every=100)


@pytest.mark.parametrize("strength", [0.01, 1.0, 10.0, 100.0])
def test_decays_in_factors_and_by_pairs(strength: float) -> None:
    """In bfloat16 decays are taken apart into factors, unless those of a chunk span too much: both keep to the oracle."""
    made = Make(seqlen=130, nheads=4, dtype=torch.bfloat16)
    case = replace(made.case(masks.decay(strength * made.log())), operands=torch.bfloat16)
    laws.equals_oracle(Runner("triton"), case)
    laws.gradients_equal_oracle(Runner("triton"), case)
