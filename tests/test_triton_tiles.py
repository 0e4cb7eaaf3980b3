"""Quadratic terms by tiles, in Triton's interpreter (on a machine with a GPU `test_cuda_tiles.py` runs them there)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic_masks import MASKS, products, toeplitz

from ssdops import masks as m
from ssdops import ssd
from ssdops.backends.quadratic.form import read
from ssdops.backends.triton import tiles
from ssdops.errors import UnsupportedError
from ssdops.ir.problem import Target
from ssdops.ir.terms import Quadratic
from ssdops.plan import terms_of
from ssdops.testing import laws, strategies
from ssdops.testing.case import Case
from ssdops.testing.laws import Runner
from ssdops.testing.oracle import output_bounds
from ssdops.testing.source import problems
from ssdops.testing.structures import Make
from ssdops.testing.tolerance import assert_close

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and test_cuda_tiles.py runs on it"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]
RUN = Runner("triton")


@pytest.mark.parametrize("seqlen", [1, 6, 65])
@pytest.mark.parametrize("name", MASKS)
def test_equals_oracle(name: str, seqlen: int) -> None:
    """Y and all gradients, in float32."""
    make = Make(seqlen=seqlen, dtype=torch.float32)
    case = make.case(MASKS[name](make))
    scans = [term for term in terms_of(case.mask.tree) if not isinstance(term, Quadratic)]
    assert name == "sum" or not scans
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@pytest.mark.parametrize("seqlen", [15, 63, 64, 130])
def test_lengths_around_tiles(seqlen: int) -> None:
    make = Make(seqlen=seqlen, dtype=torch.float32, nheads=1)
    case = make.case(m.decay(make.log()) * m.window(20, 3) * make.cu)
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


def test_rows_share_logs_but_not_documents() -> None:
    """The gradient of a log sums what tokens to its right give, of the document that it is in: another one in every row."""
    make = Make(seqlen=9, dtype=torch.float32, nheads=2)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 2, 2]])
    one = make.case(m.decay(make.log()) * m.window(5, 2) * m.documents(segment_ids=ids, n_segments=3))
    q, k, v = (torch.cat([x, x.flip(1)]) for x in (one.q, one.k, one.v))
    case = Case(q, k, v, one.mask, one.scale)
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@pytest.mark.parametrize("dims", [(40, 3), (3, 140), (100, 70)])
def test_dims_in_steps(dims: tuple[int, int]) -> None:
    """dstate and headdim beyond what is taken at a time in 32 bits."""
    make = Make(seqlen=20, dtype=torch.float32, dstate=dims[0], headdim=dims[1])
    case = make.case(m.decay(make.log()) * toeplitz(make))
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@pytest.mark.parametrize("heads", [(4, 1, 1), (1, 2, 4)], ids=str)
def test_heads_that_share_a_gradient_share_a_program(heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU would be busy enough without one for each; no other test is large enough to get there."""
    monkeypatch.setattr(tiles, "ENOUGH", 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 30, count, dim, generator=generator) for count, dim in zip(heads, (5, 5, 3), strict=True))
    log_a = -torch.rand(2, 30, 4, generator=generator)
    laws.gradients_equal_oracle(RUN, Case(q, k, v, m.decay(log_a) * m.window(8), 0.7))


SIXTEEN_AND_32 = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=25)
@given(strategies.cases(make=products, dtypes=SIXTEEN_AND_32))
def test_any_product_equals_oracle(case: Case) -> None:
    """Y of drawn calls: every head pattern, strides, dtypes, empty sizes."""
    laws.equals_oracle(RUN, case)


@settings(max_examples=10)
@given(strategies.cases(make=products, dtypes=SIXTEEN_AND_32, sizes=problems(max_seqlen=24, max_dim=6)))
def test_any_products_gradients_equal_oracle(case: Case) -> None:
    laws.gradients_equal_oracle(RUN, case)


@settings(max_examples=5)
@given(strategies.cases(make=products, dtypes=SIXTEEN_AND_32, sizes=problems(max_seqlen=24, max_dim=6)))
def test_deterministic(case: Case) -> None:
    laws.deterministic(RUN, case)


# --- what is never read ---------------------------------------------------------------------------------------------


def test_blocks_outside_the_band_are_not_visited() -> None:
    """A row's tile reads keys of the band only: NaN further away, in another tile, changes nothing."""
    make = Make(seqlen=200, dtype=torch.float32)
    case = make.case(m.window(10))
    poisoned = case.map(lambda name, x: x.index_fill(1, torch.arange(20), torch.nan) if name in "qkv" else x)
    whole, part = RUN(case)["y"], RUN(poisoned)["y"]
    tile = 64
    assert_close(part[:, tile:], whole[:, tile:], 0.0, "y of the tiles that do not see the poison")
    assert part[:, 20].isnan().all()


def test_an_infinite_column_exponent_is_zero_or_infinite() -> None:
    """log_cols = −inf leaves a token out, as the definition has it."""
    make = Make(seqlen=9, dtype=torch.float32)
    log = make.log()
    log[:, 4] = -torch.inf
    case = make.case(m.window(3).scale(log_cols=log))
    laws.equals_oracle(RUN, case)


def test_poison_stays_in_its_document_in_gradients_too() -> None:
    """NaN in one document's q, k, v and log decays changes no gradient of another."""
    make = Make(seqlen=40, dtype=torch.float32)
    cu = m.documents(torch.tensor([0, 13, 13, 40]))
    case = make.case(m.decay(make.log()) * m.window(9) * cu)

    def gradients(case: Case) -> dict[str, torch.Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in case.floats().items()}
        call = case.map(lambda name, x: leaves.get(name, x))
        y = ssd(call.q, call.k, call.v, call.mask, backend="triton")
        weights = laws.noise(y, 0)
        (torch.where(y.isnan(), 0.0, y) * weights).sum().backward()
        return {name: x.grad for name, x in leaves.items()}  # type: ignore[misc]

    def poison(start: int, stop: int) -> dict[str, torch.Tensor]:
        rows = torch.arange(start, stop)
        return gradients(case.map(lambda name, x: x.index_fill(1, rows, torch.nan) if x.is_floating_point() else x))

    clean = gradients(case)
    for own, other in (((0, 13), slice(13, 40)), ((13, 40), slice(0, 13))):
        for name, x in poison(*own).items():
            assert_close(x[:, other], clean[name][:, other], 1e-5, f"gradient of {name} with NaN in tokens {own}")


def test_slow_decays_are_exact_far_into_a_sequence() -> None:
    """Differences of long sums keep what slow decays are made of."""
    make = Make(seqlen=100, dtype=torch.float32, nheads=1)
    log_a = torch.full((1, 100, 1), -1e-4)
    log_a[:, 30] = -3000.0  # from here on the sums are long, and float32 would have steps of 2⁻¹²
    case = make.case(m.decay(log_a) * m.window(64))
    laws.equals_oracle(RUN, case)


def test_a_log_that_is_not_finite_spoils_what_it_spans() -> None:
    make = Make(seqlen=30, dtype=torch.float32, nheads=1)
    log_a = make.log()
    clean = make.case(m.decay(log_a) * m.window(29))
    broken = log_a.clone()
    broken[:, 12] = torch.nan
    y = RUN(make.case(m.decay(broken) * m.window(29)))["y"]
    expected = RUN(clean)["y"]
    assert_close(y[:, :12], expected[:, :12], 2 * output_bounds(clean, False)["y"], "y before the NaN")
    assert y[:, 12:].isnan().all()
    short = RUN(make.case(m.decay(broken) * m.window(3)))["y"]
    assert short[:, 16:].isfinite().all() and short[:, 12:15].isnan().all()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask, reason",
    [
        (lambda s: m.fenwick(s.log(), s.ranked(4)).T.scale(log_cols=s.log()), "fenwick"),
        (lambda s: m.channel_decay(-s.ranked(s.dstate).abs()) * m.window(4, -2), "channel_decay"),
        (lambda s: m.window(4, 4).strict() * m.window(5, 5).shift(1).strict().shift(1), "2 diagonals"),
    ],
)
def test_refusals_say_why(mask, reason: str) -> None:
    make = Make(dtype=torch.float32)
    case = make.case(mask(make))
    with pytest.raises(UnsupportedError, match=reason) as refusal:
        RUN(case)
    assert "naive" in str(refusal.value)


def test_other_targets_and_dtypes_are_refused() -> None:
    term = Quadratic(m.window(3).tree)
    problem = Make(dtype=torch.float32).case(m.window(3)).problem
    assert tiles.supports(term, problem).ok
    assert tiles.supports(term, replace(problem, target=Target("cuda", "", (9, 0)))).ok
    for other, reason in (
        (replace(problem, target=Target("cuda", "", (7, 5))), "8.0"),
        (replace(problem, target=Target("mps")), "GPU"),
        (replace(problem, accumulate=torch.float64), "float64"),
        (replace(problem, dstate=257), "256"),
    ):
        found = tiles.supports(term, other)
        assert not found.ok and reason in found.reason and "naive" in found.reason


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 4))
def test_work_counts_the_pairs_of_the_band(seqlen: int, left: int, right: int, shift: int) -> None:
    form = read(m.window(left, right).shift(shift).tree, seqlen)
    lags = range(max(-right + shift, 1 - seqlen), min(left + shift, seqlen - 1) + 1)
    assert form.pairs(seqlen) == sum(seqlen - abs(lag) for lag in lags)


def test_kernels_compile_for_gpus_without_one() -> None:
    """In another process, as this one interprets: shared memory, registers and tensor cores for sm_80 and sm_90."""
    script = Path(__file__).with_name("compile_tiles.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
