"""Masks that are no scans, by tiles on LLVM: the laws, what is never read, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from quadratic_masks import MASKS, toeplitz
from traced_masks import BITS, EXPM1, MANY, TANH
from traced_masks import MASKS as TRACED

from ssdops import masks as m
from ssdops.autotune.workload import Workload
from ssdops.backends.base import Config
from ssdops.backends.quadratic.formula import DERIVATIVES, Leaf, derivative
from ssdops.backends.tvm import backend
from ssdops.backends.tvm.backend import Tvm
from ssdops.errors import UnsupportedError
from ssdops.ir.trace import Call
from ssdops.plan import candidates, terms_of
from ssdops.testing import Conformance, laws
from ssdops.testing.laws import Runner
from ssdops.testing.source import Source
from ssdops.testing.structures import Make
from ssdops.testing.tolerance import assert_close

needs_tvm = pytest.mark.skipif(not backend.installed().ok, reason="TVM is not installed; 'naive' keeps the laws without it")
RUN = Runner("tvm")


def banded(s: Source) -> m.Mask:
    """Decays in a band, turned or cut into documents: always of the same factors, as each set of them is compiled anew."""
    mask = m.decay(s.token_log()) * m.window(s.pick([0, 3, 40]), s.pick([0, 2]))
    if s.chance(2):
        mask = mask * s.documents(s.pick([True, False]))
    match s.pick(["", "T", "reverse", "strict", "shift", "-m"]):
        case "T":
            mask = mask.T
        case "reverse":
            mask = mask.reverse()
        case "strict":
            mask = mask.strict()
        case "shift":
            mask = mask.shift(s.pick([1, 2]))
        case "-m":
            mask = -mask
    return mask.scale(cols=s.normal(s.sizes.nheads))


@needs_tvm
@pytest.mark.tvm
class TestTvmBands(Conformance):
    backend = "tvm"
    make_mask = banded
    has_states = False


NAMES = {
    torch.float32: ("window", "scale", "toeplitz * toeplitz.T", "reverse", "two documents", "empty"),
    torch.float64: ("dense over heads",),  # others take seconds more to compile
}


@needs_tvm
@pytest.mark.tvm
@pytest.mark.parametrize(("dtype", "name"), [(dtype, name) for dtype, names in NAMES.items() for name in names])
def test_equals_oracle(dtype: torch.dtype, name: str) -> None:
    """Y and all gradients, over several tiles."""
    make = Make(seqlen=70, dtype=dtype)
    case = make.case(MASKS[name](make))
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@needs_tvm
@pytest.mark.tvm
@pytest.mark.parametrize("name", ["growth"])
def test_formulas_of_users(name: str) -> None:
    """Masks by their entries alone, over several tiles."""
    make = Make(seqlen=40, dtype=torch.float32)
    case = make.case(TRACED[name](make))
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@needs_tvm
@pytest.mark.tvm
def test_a_formula_that_is_no_product() -> None:
    """It is an expression of TIR, with the gradients of all that it reads, also under combinators."""
    make = Make(seqlen=40, dtype=torch.float32)
    case = make.case(TANH(make.factor(), make.factor()).T)
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@needs_tvm
@pytest.mark.tvm
@pytest.mark.parametrize("mask", [MANY, BITS], ids=["many", "bits"])
def test_operations_that_tir_has(mask: Callable[..., m.Mask]) -> None:
    make = Make(seqlen=40, dtype=torch.float64)
    laws.equals_oracle(RUN, make.case(mask(make.factor(), make.factor())))


def test_an_operation_that_tir_lacks_is_named() -> None:
    make = Make(dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"TIR has no operation expm1; 'naive' runs any mask"):
        RUN(make.case(EXPM1(make.factor())))


@pytest.mark.parametrize("name", [*DERIVATIVES, "where", "floor"])
def test_derivatives_are_those_of_torch(name: str) -> None:
    """Each rule against autograd, of the operation alone and inside another one."""
    x, y = (torch.tensor([0.3, 0.7, 1.6], dtype=torch.float64).roll(by).requires_grad_() for by in (0, 1))
    leaves, count = (
        (Leaf("row", 0), Leaf("col", 0)),
        1 if name in ("where", "floor") else DERIVATIVES[name].__code__.co_argcount,
    )

    def value(e: object) -> torch.Tensor:
        match e:
            case Leaf(which, _):
                return x if which == "row" else y
            case Call("where", (condition, a, b)):
                return torch.where(value(condition).bool(), value(a), value(b))
            case Call(op, args):
                return getattr(torch, op)(*map(value, args))
        return torch.as_tensor(e, dtype=torch.float64)

    e: Call = Call(name, leaves[:count])
    if name == "where":
        e = Call("where", (Call("lt", leaves), Call("exp", leaves[:1]), Call("mul", leaves)))
    e = Call("mul", (e, leaves[1]))
    for leaf, tensor in zip(leaves, (x, y), strict=True):
        (wanted,) = torch.autograd.grad(value(e).sum(), tensor, materialize_grads=True, allow_unused=True)
        assert torch.allclose(value(derivative(e, leaf)).expand(3), wanted, rtol=1e-12, atol=1e-12)


@needs_tvm
@pytest.mark.tvm
def test_blocks_outside_the_band_are_not_visited() -> None:
    """A tile of rows reads keys of the band only: NaN further away changes nothing, in Y and in gradients."""
    make = Make(seqlen=200, dtype=torch.float32)
    case = make.case(m.window(10))
    poisoned = case.map(lambda name, x: x.index_fill(1, torch.arange(20), torch.nan) if name in "qkv" else x)
    whole, part = RUN(case)["y"], RUN(poisoned)["y"]
    assert_close(part[:, 32:], whole[:, 32:], 0.0, "y of the tiles that do not see the poison")
    assert part[:, 20].isnan().all()


@needs_tvm
@pytest.mark.tvm
def test_one_program_serves_every_band_and_length() -> None:
    """Neither bounds, lengths, heads nor documents are compiled in; what a mask is a product of is."""
    from ssdops.backends.tvm.build import MADE

    def run(seqlen: int, mask: Callable[[Make], m.Mask]) -> int:
        make = Make(seqlen=seqlen, dtype=torch.float32, nheads=2 if seqlen % 2 else 4)
        RUN(make.case(mask(make)))
        return len(MADE)

    compiled = run(33, lambda s: m.window(3))
    assert run(140, lambda s: m.window(30, 5).strict()) == compiled
    assert run(51, lambda s: (m.window(9) * s.cu).T.shift(2)) == compiled
    run(20, toeplitz)
    assert ("lags",) in {tile.factors for _, tile in MADE}


@needs_tvm
@pytest.mark.tvm
def test_a_log_that_is_not_finite_spoils_what_it_spans() -> None:
    make = Make(seqlen=30, dtype=torch.float32, nheads=1)
    log_a = make.log()
    clean = RUN(make.case(m.decay(log_a) * m.window(3)))["y"]
    broken = log_a.clone()
    broken[:, 12] = torch.nan
    y = RUN(make.case(m.decay(broken) * m.window(3)))["y"]
    assert torch.equal(y[:, :12], clean[:, :12]) and y[:, 12:15].isnan().all() and y[:, 16:].isfinite().all()


@needs_tvm
@pytest.mark.tvm
def test_an_infinite_column_exponent_leaves_a_token_out() -> None:
    make = Make(seqlen=40, dtype=torch.float32)
    log = make.log()
    log[:, 4] = -torch.inf
    laws.equals_oracle(RUN, make.case((m.decay(make.log()) * m.window(30)).scale(cols=make.factor(), log_cols=log)))


@pytest.mark.parametrize("mask", [m.window(5), m.causal()])
def test_tile_sizes_are_for_the_tuner_to_choose(mask: m.Mask) -> None:
    """Of scans and of what is none, the default first; what is not worth compiling is left out, but may be asked for."""
    (term,) = terms_of(mask.tree)
    problem = replace(Make(dtype=torch.float32, seqlen=512).case(mask).problem, headdim=64, dstate=128)

    def sizes(**changes: object) -> list[int | None]:
        return [config.chunk_size for config in Tvm().configs(term, replace(problem, **changes))]

    assert sizes() == [32, 16, 64]
    assert sizes(seqlen=20) == [32, 16]
    assert sizes(headdim=256, dstate=256, accumulate=torch.float64) == [32, 16]
    assert "20 tokens leave half of a chunk of 64 empty" in str(backend.pruned(replace(problem, seqlen=20), 64))
    assert "KiB, and a core's own caches have 1024" in str(
        backend.pruned(replace(problem, headdim=256, dstate=256, accumulate=torch.float64), 64)
    )
    assert list(Tvm().configs(term, replace(problem, seqlen=20), 64)) == [Config(64)]


@needs_tvm
def test_the_tuner_is_given_them() -> None:
    """Each is a candidate for `ssdops tune`, with a prediction of its own; planning compiles nothing."""
    mask = m.window(5)
    (term,) = terms_of(mask.tree)
    problem = Make(dtype=torch.float32, seqlen=512).case(mask).problem
    found = [c for c in candidates(Workload.of(term, problem, "backward"), problem.target) if c.backend == "tvm"]
    assert [c.config.chunk_size for c in found] == [32, 16, 64]
    assert len({c.seconds for c in found}) == 3


@pytest.mark.parametrize(
    "mask, reason",
    [
        (lambda s: m.fenwick(s.log(), s.ranked(4)), "fenwick"),
        (lambda s: m.channel_decay(-s.ranked(s.dstate).abs()) * m.window(3), "channel_decay"),
        (lambda s: m.window(4, 4).strict() * m.window(5, 5).shift(1).strict().shift(1), "2 diagonals"),
    ],
)
def test_refusals_say_why(mask: Callable[[Make], m.Mask], reason: str) -> None:
    make = Make(dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=rf"{reason}(.|\n)*'naive' runs any mask"):
        RUN(make.case(mask(make)))
