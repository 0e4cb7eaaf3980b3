"""What `chunked` runs by structure keeps every law at every chunk size: bands, Fenwick masks and Toeplitz masks."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ssdops import explain, masks, ssd
from ssdops.errors import UnsupportedError
from ssdops.ir.passes.structure import structure_of
from ssdops.ir.problem import fenwick_levels
from ssdops.masks import Mask
from ssdops.plan import terms_of
from ssdops.testing import Conformance, laws
from ssdops.testing.case import Case
from ssdops.testing.source import Source
from ssdops.testing.strategies import QUADRATIC, SCANS, scaled
from ssdops.testing.structures import Make

SIZES = (4, 1, 2, 16, 64)


def band(s: Source) -> Mask:
    """A window on both sides or one, alone or times a scan of either direction."""
    mask = masks.window(s.draw(st.integers(-1, 6)), s.draw(st.integers(1, 5)))
    if s.chance(2):
        scan = SCANS[s.pick(list(SCANS))](s)
        mask = mask * (scan.shift(1) if s.chance(4) else scan)
    return mask


def fenwick(s: Source) -> Mask:
    """A Fenwick mask, alone or times a scan."""
    mask = QUADRATIC["fenwick"](s)
    return mask * SCANS[s.pick(list(SCANS))](s) if s.chance(3) else mask


def lags(s: Source) -> Mask:
    """A Toeplitz mask, in one direction, in a band, or neither."""
    mask = QUADRATIC["toeplitz"](s)
    return mask * s.pick([masks.causal(), masks.causal().T, masks.window(4, 2), masks.full()]) if s.chance(2) else mask


def turned(s: Source, make: str) -> Mask:
    """One of them strict, turned, scaled or not; the transpose of a Fenwick mask has its levels by column, and is no tree."""
    mask = {"band": band, "fenwick": fenwick, "lags": lags}[make](s)
    mask = mask.strict() if s.chance(4) else mask
    mask = mask.reverse() if s.chance(4) else mask
    mask = mask.T if make != "fenwick" and s.chance(4) else mask
    if s.chance(3):
        mask = mask.scale(rows=s.token(), cols=s.token()) if make == "lags" else scaled(s, mask)
    return -mask if s.chance(6) else mask


class TestStructured(Conformance):
    backend = "chunked"
    has_states = False
    chunk_sizes = SIZES

    def make_mask(s: Source) -> Mask:  # type: ignore[misc]  # an attribute of the suite, called with a source alone
        return turned(s, s.pick(["band", "fenwick", "lags"]))

    def _packed(self, data: st.DataObject) -> tuple[Case, Mask]:
        """Bands: of a Fenwick mask a part of the tokens is another mask, and Toeplitz masks in documents run by entries."""
        made = type("Bands", (Conformance,), {"backend": self.backend, "make_mask": lambda s: turned(s, "band")})
        return made()._packed(data)


# --- documents in a Fenwick mask: its levels are those of the whole row ----------------------------------------------


def packed(seqlen: int, cuts: list[int], dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(seqlen)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    mask = masks.fenwick(-normal(1, seqlen, 2).abs(), normal(1, seqlen, 2, fenwick_levels(seqlen)))
    documents = masks.documents(torch.tensor([0, *cuts, seqlen]))
    return Case(normal(1, seqlen, 1, 3), normal(1, seqlen, 1, 3), normal(1, seqlen, 2, 4), mask * documents)


@pytest.mark.parametrize("cuts", [[], [5], [8], [3, 3, 17, 24, 29]])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_fenwick_with_documents_equals_oracle(cuts: list[int], chunk_size: int) -> None:
    run = laws.Runner("chunked", chunk_size)
    laws.equals_oracle(run, packed(37, cuts))
    laws.gradients_equal_oracle(run, packed(37, cuts))


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_poison_stays_in_its_document_of_a_fenwick_mask(chunk_size: int) -> None:
    case, cuts = packed(37, [5, 18, 30]), [0, 5, 18, 30, 37]
    clean = laws.Runner("chunked", chunk_size)(case)["y"]
    for value in (float("nan"), float("inf")):
        for start, stop in pairwise(cuts):
            poisoned = case.map(
                lambda name, x, a=start, b=stop, value=value: (
                    torch.cat([x[:, :a], torch.full_like(x[:, a:b], value), x[:, b:]], 1) if name in ("q", "k", "v") else x
                )
            )
            y = laws.Runner("chunked", chunk_size)(poisoned)["y"]
            assert not y[:, start:stop].isfinite().any()
            for part in (slice(0, start), slice(stop, None)):
                torch.testing.assert_close(y[:, part], clean[:, part], rtol=1e-12, atol=1e-12)


# --- diagonals of other masks -----------------------------------------------------------------------------------------

DIAGONALS: dict[str, tuple[Callable[[Make], Mask], tuple[str, ...]]] = {
    "quasiseparable * window": (
        lambda s: (
            (masks.decay(s.log()).strict() + masks.decay(s.log()).T.strict() + masks.diagonal(s.factor())) * masks.window(9)
        ),
        ("T · band", "T · band", "T"),
    ),
    "trapezoidal * window": (
        lambda s: (
            masks.trapezoidal(s.log(), gamma=s.factor(), beta_over_a=s.factor().flip(1)) * masks.window(9, 1).scale(s.factor(1))
        ),
        ("T · band", "T"),
    ),
    "diagonal * toeplitz": (
        lambda s: masks.diagonal(s.factor()) * -masks.toeplitz(s.normal(s.nheads, 2 * s.seqlen - 1)).T,
        ("T",),
    ),
    "diagonal * dense": (
        lambda s: masks.diagonal(s.factor(1)) * masks.dense(s.normal(1, s.nheads, s.seqlen, s.seqlen)).reverse(),
        ("T",),
    ),
    "causal * anticausal * fenwick": (
        lambda s: (
            masks.decay(s.log()) * masks.causal().T * masks.fenwick(s.log(), s.ranked(fenwick_levels(s.seqlen))).scale(s.log(1))
        ),
        ("T",),
    ),
    "diagonal.shift * documents": (lambda s: masks.diagonal(s.factor()).shift(2) * s.cu, ("T · band",)),
}


@pytest.mark.parametrize("name", DIAGONALS)
def test_diagonals_of_masks_are_linear_and_equal_the_oracle(name: str) -> None:
    make, growth = DIAGONALS[name]
    case = Make(seqlen=37).case(make(Make(seqlen=37)))
    steps = explain(case.q, case.k, case.v, case.mask, backend="chunked").plan.steps
    assert tuple(step.growth for step in steps) == growth
    for backend in ("auto", "naive", "chunked"):
        laws.equals_oracle(laws.Runner(backend), case)
        laws.gradients_equal_oracle(laws.Runner(backend), case)


# --- what is read of a tree -------------------------------------------------------------------------------------------

LOG, LEVELS = torch.zeros(1, 9, 2), torch.zeros(1, 9, 2, 5)
COEFFS, IDS = torch.zeros(2, 17), torch.zeros(1, 9, dtype=torch.int64)
READ = {
    "window(3, 1)": (masks.window(3, 1), (-1, 3)),
    "anticausal": ((masks.window(3, 1) * masks.decay(LOG)).T, (0, 3)),
    "anticausal, in local time": (masks.window(3, 1) * masks.decay(LOG).T, (0, 1)),
    "two windows": (masks.window(3, 1) * masks.window(2, 2), (-1, 2)),
    "later, so that no first row is cut": (masks.window(3).shift(2), (2, 5)),
    "in documents": (masks.window(3, 1).strict() * masks.documents(segment_ids=IDS), (-1, 3)),
    "fenwick": (masks.fenwick(LOG, LEVELS).reverse() * masks.decay(LOG).reverse(), (None, None)),
    "lags": (masks.toeplitz(COEFFS) * masks.causal(), (0, None)),
    "levels by column": (-masks.fenwick(LOG, LEVELS).strict().T * masks.documents(segment_ids=IDS), (None, None)),
}
CHANNELS = masks.channel_decay(torch.zeros(1, 9, 2, 3))
NOT_READ = {
    "cut rows": masks.window(3, 1).shift(1),
    "levels of a row, gates of a column": masks.fenwick(LOG, LEVELS).T.scale(log_cols=LOG),
    "levels in a band": masks.fenwick(LOG, LEVELS) * masks.window(2),
    "lags that decay": masks.toeplitz(COEFFS) * masks.decay(LOG),
    "lags in documents": masks.toeplitz(COEFFS) * masks.documents(segment_ids=IDS),
    "two kinds of lags": masks.toeplitz(COEFFS) * masks.toeplitz(COEFFS.clone()),
    "dense": masks.dense(torch.zeros(9, 9)) * masks.window(2),
    "levels of channels": masks.fenwick(LOG, LEVELS) * CHANNELS,
    "lags of channels": masks.toeplitz(COEFFS) * CHANNELS,
}


@pytest.mark.parametrize("name", READ)
def test_structures_are_read(name: str) -> None:
    mask, bounds = READ[name]
    (term,) = terms_of(mask.tree)
    found = structure_of(term.node())
    assert found is not None and (found.low, found.high) == bounds


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_structured_is_refused_by_chunked(name: str) -> None:
    mask = NOT_READ[name]
    (term,) = terms_of(mask.tree)
    assert structure_of(term.node()) is None
    q = torch.zeros(1, 9, 2, 3)
    with pytest.raises(UnsupportedError, match="naive"):
        ssd(q, q, q, mask, backend="chunked")


@pytest.mark.parametrize(
    "mask", [CHANNELS * masks.window(2) * masks.documents(segment_ids=IDS), CHANNELS * masks.window(4, -2)]
)
def test_bands_of_channels_that_are_no_scans_are_refused_by_chunked(mask: Mask) -> None:
    """In documents, and apart from the diagonal."""
    q = torch.zeros(1, 9, 2, 3)
    with pytest.raises(UnsupportedError, match="naive"):
        ssd(q, q, q, mask, backend="chunked")


def test_fenwick_chunks_are_powers_of_two() -> None:
    q = torch.zeros(1, 9, 2, 3)
    with pytest.raises(UnsupportedError, match="power of two"):
        ssd(q, q, q, masks.fenwick(LOG, LEVELS), backend="chunked", chunk_size=3)
