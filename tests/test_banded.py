"""Bands that run as scans keep every law, on `chunked` and in Triton's interpreter, and cost the same however wide they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from math import log as ln

import pytest
import torch
from hypothesis import strategies as st
from test_conformance_structured import turned
from torch import Tensor

from ssdops import explain, masks, ssd
from ssdops.backends import banded, registry
from ssdops.backends.banded import side
from ssdops.backends.base import Config, Inputs, Output, Support, Work, bind
from ssdops.backends.chunked import structured
from ssdops.backends.tvm.backend import installed
from ssdops.ir.problem import Problem, Target
from ssdops.ir.terms import Linear, Term
from ssdops.masks import Mask
from ssdops.plan import terms_of
from ssdops.testing import Conformance, laws
from ssdops.testing.case import Case
from ssdops.testing.laws import Runner
from ssdops.testing.source import Source
from ssdops.testing.strategies import scaled
from ssdops.testing.structures import Make

LOG = torch.zeros(1, 600, 2)


@pytest.fixture(scope="module", autouse=True)
def narrow_ones_too() -> Iterator[None]:
    """Windows of a few tokens as scans: what is drawn is small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side, "LEAST", 1)
        banded.sides.cache_clear()
        yield
    banded.sides.cache_clear()


class TestBanded(Conformance):
    backend = "chunked"
    has_states = False
    chunk_sizes = (4, 1, 64)

    def make_mask(s: Source) -> Mask:  # type: ignore[misc]  # an attribute of the suite, called with a source alone
        return turned(s, "band")


def channels(s: Source) -> Mask:
    """A decay per channel in a window, alone or times a scalar one, in every direction."""
    mask = masks.channel_decay(s.channel_log()) * masks.window(s.draw(st.integers(0, 6)), s.draw(st.integers(0, 3)))
    mask = mask * masks.decay(s.token_log()) if s.chance(3) else mask
    mask = mask.strict() if s.chance(4) else mask
    mask = mask.reverse() if s.chance(4) else mask
    mask = mask.T if s.chance(3) else mask
    return scaled(s, mask) if s.chance(3) else mask


class TestChannelsInWindows(Conformance):
    backend = "chunked"
    has_states = False
    chunk_sizes = (4, 1, 64)
    share = 0.5

    def make_mask(s: Source) -> Mask:  # type: ignore[misc]  # likewise
        return channels(s)


NEEDS = {
    "chunked": (),
    "triton": (
        pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here; test_cuda_banded.py has these"),
        pytest.mark.skipif(find_spec("triton") is None, reason="no Triton, whose kernels these are; `chunked` as above"),
    ),
    "tvm": (
        pytest.mark.tvm,
        pytest.mark.skipif(not installed().ok, reason="no TVM, whose programs these are; `chunked` has all of this above"),
    ),
}


@pytest.mark.parametrize("backend", [pytest.param(name, marks=marks) for name, marks in NEEDS.items()])
def test_bands_run_as_scans(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes, on every backend that says so: what is compared with the oracle here are scans, not pairs or blocks."""
    ran: list[str] = []
    for name in ("forward", "backward"):
        run = getattr(banded, name)
        monkeypatch.setattr(banded, name, lambda *args, name=name, run=run: ran.append(name) or run(*args))
    x = torch.ones(1, 9, 1, 3, requires_grad=True)
    mask = masks.window(3) * masks.decay(-torch.ones(1, 9, 1))
    y = ssd(x, x, x, mask, backend=backend)
    assert explain(x, x, x, mask, backend=backend).plan.steps[0].growth == "T"
    y.sum().backward()
    assert ran == ["forward", "backward"]


def case_of(batch: int, seqlen: int, width: int, name: str, dtype: torch.dtype) -> Case:
    """q and k with heads of their own; the band of each kind."""
    generator = torch.Generator().manual_seed(seqlen)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    band = masks.window(width - 1) * masks.decay(-normal(batch, seqlen, 4).abs())
    per_channel = masks.window(width - 1) * masks.channel_decay(-normal(batch, seqlen, 4, 16).abs())
    counted = (torch.arange(seqlen).expand(batch, -1) * 5 // max(seqlen, 1)).div(2, rounding_mode="floor")
    mask = {
        "in documents": band * masks.documents(torch.tensor([0, seqlen // 9, seqlen // 2, seqlen // 2, seqlen])),
        "in documents, turned": (
            band.scale(rows=normal(batch, seqlen, 4)) * masks.documents(segment_ids=counted, n_segments=3)
        ).T,
        "causal": band,
        "turned": band.scale(normal(batch, seqlen, 2), normal(batch, seqlen, 4), normal(batch, seqlen, 1)).T,
        "both sides": masks.window(width - 1, width // 2),
        "per channel": per_channel,
        "per channel, turned": per_channel.scale(normal(batch, seqlen, 2), normal(batch, seqlen, 4)).T,
    }[name]
    q, k, v = (normal(batch, seqlen, heads, dim).to(dtype) for heads, dim in ((1, 16), (2, 16), (4, 16)))
    return replace(Case(q, k, v, mask, 0.5), operands=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here; test_cuda_banded.py has these")
@pytest.mark.parametrize(
    ("batch", "seqlen", "width", "name", "dtype"),
    [
        (2, 48, 16, "causal", torch.bfloat16),
        (1, 37, 18, "turned", torch.float16),
        (1, 21, 9, "both sides", torch.float32),
        (0, 4, 2, "causal", torch.float32),
        (1, 0, 2, "both sides", torch.bfloat16),
        (2, 24, 10, "per channel", torch.bfloat16),
        (1, 33, 12, "per channel, turned", torch.float32),
        (1, 29, 11, "in documents", torch.bfloat16),
        (1, 20, 9, "in documents, turned", torch.float32),
    ],
)
def test_triton_equals_oracle(batch: int, seqlen: int, width: int, name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    case = case_of(batch, seqlen, width, name, dtype)
    laws.equals_oracle(Runner("triton", 16), case)
    laws.gradients_equal_oracle(Runner("triton", 16), case)


@pytest.mark.parametrize(("capability", "across"), [((9, 0), 64), ((10, 0), 32)])
def test_the_scan_across_has_chunks_of_its_own_where_those_inside_are_none_of_its(
    capability: tuple[int, int], across: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per channel it is of float32, of which tiles of 64 tokens and headdim 128 do not fit tensor memory."""
    pytest.importorskip("triton")
    ran: list[int | None] = []
    triton = registry.get("triton")
    work = triton.work

    def noted(term: Term, problem: Problem, config: Config, direction: str = "forward") -> Work:
        ran.append(config.chunk_size)
        return work(term, problem, config, direction)

    monkeypatch.setattr(triton, "work", noted)
    q, v = torch.zeros(1, 600, 2, 64, dtype=torch.bfloat16), torch.zeros(1, 600, 2, 128, dtype=torch.bfloat16)
    mask = masks.channel_decay(torch.zeros(1, 600, 2, 64)) * masks.window(200)
    problem = replace(Case(q, q, v, mask, 1.0).problem, target=Target("cuda", "", capability))
    (term,) = terms_of(mask.tree)
    assert triton.supports(term, problem).ok
    configs = triton.configs(term, problem)
    assert not isinstance(configs, Support)
    for config in configs:
        triton.work(term, problem, config)
    assert ran == [64, 64, across]  # the window, the scan inside blocks, and the one across


@pytest.mark.tvm
@pytest.mark.skipif(not installed().ok, reason="no TVM, whose programs these are; `chunked` has all of this above")
@pytest.mark.parametrize("name", ["causal", "turned", "both sides", "in documents, turned", "in documents"])
def test_tvm_equals_oracle(name: str) -> None:
    case = case_of(1 if name == "in documents" else 2, 75, 20, name, torch.float32)
    laws.equals_oracle(Runner("tvm", 16), case)
    laws.gradients_equal_oracle(Runner("tvm", 16), case)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_of_a_document_meet_nothing_of_another(per_channel: bool, turned: bool) -> None:
    """Whatever is NaN in a document, gradients of others are what they were; documents begin and end in blocks, and at ends."""
    cuts, generator = [0, 5, 16, 30, 48], torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, 48, *shape, generator=generator, dtype=torch.float64)

    log = -normal(2, 3).abs() if per_channel else -normal(2).abs()
    tensors = {"q": normal(1, 3), "k": normal(2, 3), "v": normal(2, 4), "log": log, "rows": normal(2), "cols": normal(1)}
    tensors["dy"] = normal(2, 4)

    def gradients(given: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: x.clone().requires_grad_(name != "dy") for name, x in given.items()}
        decay = (masks.channel_decay if per_channel else masks.decay)(leaves["log"])
        mask = (decay * masks.window(7)).scale(leaves["rows"], leaves["cols"]) * masks.documents(torch.tensor(cuts))
        y = ssd(leaves["q"], leaves["k"], leaves["v"], mask.T if turned else mask, backend="chunked", chunk_size=4)
        y.backward(leaves.pop("dy"))
        return {name: x.grad for name, x in leaves.items() if x.grad is not None}

    clean = gradients(tensors)
    for poisoned in ("q", "k", "v", "log", "rows", "cols", "dy"):
        for start, stop in pairwise(cuts):
            own = torch.arange(start, stop)
            found = gradients({**tensors, poisoned: tensors[poisoned].index_fill(1, own, torch.nan)})
            for name, grad in found.items():
                grad, wanted = (x.index_fill(1, own, 0.0) for x in (grad, clean[name]))
                torch.testing.assert_close(grad, wanted, msg=f"{name}, with NaN in {poisoned} of tokens {start} to {stop}")


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_strong_decays_keep_the_gradients_of_their_neighbours(dtype: torch.dtype, per_channel: bool) -> None:
    """Every sum of logs is of tokens between two others: nothing is lost beside what has decayed."""
    case = case_of(1, 40, 8, "causal", dtype)
    strong = torch.tensor([0.0, -1e-9, -300.0, -1e4])[torch.arange(40) % 4].expand(1, 4, 40).mT.double()
    channels = torch.stack([strong, *(strong.roll(shift, 1) for shift in range(15))], 3)
    mask = masks.window(7) * (masks.channel_decay(channels) if per_channel else masks.decay(strong))
    laws.equals_oracle(Runner("chunked", 4), replace(case, mask=mask))
    laws.gradients_equal_oracle(Runner("chunked", 4), replace(case, mask=mask))


# --- which bands they are ---------------------------------------------------------------------------------------------

AS_SCANS = {
    "wide": masks.window(127) * masks.decay(LOG),
    "wide on both sides": masks.window(200, 127),
    "turned": (masks.window(127) * masks.decay(LOG)).strict().T,
    "wider than the row": masks.window(1000) * masks.decay(LOG),
    "in documents": masks.window(127) * masks.documents(torch.tensor([0, 200, 600])),
    "narrow, per channel": masks.window(20) * masks.channel_decay(LOG[..., None].expand(-1, -1, -1, 3)),
}
AS_PAIRS = {
    "narrow": masks.window(126) * masks.decay(LOG),
    "narrow on one side": masks.window(200, 126),
    "apart from the diagonal": masks.window(300, -150) * masks.decay(LOG),
    "in documents that nobody counted": masks.window(127) * masks.documents(segment_ids=torch.zeros(1, 600, dtype=torch.int64)),
}


@pytest.fixture
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No narrow ones."""
    monkeypatch.setattr(side, "LEAST", 128)
    banded.sides.cache_clear()
    yield
    banded.sides.cache_clear()


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("name", [*AS_SCANS, *AS_PAIRS])
def test_wide_bands_run_as_scans(name: str) -> None:
    mask = {**AS_SCANS, **AS_PAIRS}[name]
    (term,) = terms_of(mask.tree)
    assert structured.kind_of(term) == ("scans" if name in AS_SCANS else "band")
    q, v = torch.ones(1, 600, 1, 3), torch.ones(1, 600, 2, 3)
    (step,) = explain(q, q, v, mask, backend="chunked").plan.steps
    assert step.growth == ("T" if name in AS_SCANS else "T · band")
    y, expected = (ssd(q, q, v, mask, backend=backend) for backend in ("chunked", "naive"))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_scans_of_a_band_are_the_same_objects_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends know by them what they have launched or compiled before."""
    ran: list[tuple[int, int]] = []
    chunked = registry.get("chunked")
    forward = chunked.forward

    def noted(term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        ran.append((id(term), id(x.problem)))
        return forward(term, x, config, save)

    monkeypatch.setattr(chunked, "forward", noted)
    case = case_of(1, 30, 5, "both sides", torch.float32)
    for _ in range(2):
        ssd(case.q, case.k, case.v, case.mask, backend="chunked", chunk_size=4)
    (_, *first), (_, *second) = ran[:5], ran[5:]
    assert len(set(first)) == 4 and first == second


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("backend", ["chunked", "triton", "tvm"])
def test_cost_does_not_grow_with_the_window(backend: str) -> None:
    """What the cost model counts, forward and backward: four times the window is no more work."""
    q, v = torch.ones(1, 4096, 1, 16), torch.ones(1, 4096, 2, 16)

    def work(width: int, direction: str) -> float:
        case = Case(q, q, v, masks.window(width - 1) * masks.decay(torch.zeros(1, 4096, 2)), 1.0)
        (term,) = terms_of(case.mask.tree)
        counted = registry.get(backend).work(term, case.problem, Config(32), direction)
        return counted.matmul_flops + counted.elementwise + counted.bytes

    for direction in ("forward", "backward"):
        assert work(1024, direction) < 1.2 * work(256, direction)


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton, whose kernel this is; windows by scans as above")
def test_what_hopper_has_in_one_pass() -> None:
    """A decay or nothing in a window that its shared memory has room for, of heads that share scores, in bfloat16."""
    from ssdops.backends.triton import band

    def taken(width: int = 512, mask: Mask | None = None, capability: tuple[int, int] = (9, 0), **sizes: int) -> bool:
        s = {"seqlen": 700, "ngroups": 1, "headdim": 64, "dstate": 128, **sizes}
        t = s["seqlen"]
        q, v = (torch.zeros(1, t, h, d, dtype=torch.bfloat16) for h, d in ((s["ngroups"], s["dstate"]), (8, s["headdim"])))
        of_scan = masks.decay(torch.zeros(1, t, 8)) if mask is None else mask
        case = Case(q, q, v, masks.window(width - 1) * of_scan)
        problem = replace(case.problem, target=Target("cuda", "", capability))
        (term,) = terms_of(case.mask.tree)
        found = banded.band_of(term)
        assert found is not None
        return band.takes(banded.sides(found)[0].scan, problem, width)

    assert taken() and taken(513) and taken(130) and taken(ngroups=4) and taken(headdim=16, width=256) and taken(dstate=256)
    assert taken(mask=masks.causal())
    assert not taken(514)  # shared memory
    assert not taken(512, seqlen=512)  # one scan
    assert not taken(ngroups=8) and not taken(headdim=128) and not taken(capability=(8, 0)) and not taken(capability=(10, 0))
    assert not taken(mask=masks.decay(torch.zeros(1, 700, 8)).scale(cols=torch.ones(1, 700, 8)))
    assert not taken(mask=masks.channel_decay(torch.zeros(1, 700, 8, 128)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here; test_cuda_banded.py has windows of all these decays")
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton, whose kernel this is")
def test_centers_of_blocks() -> None:
    """What all sums of a block are near to, unless they are far apart or grow."""
    from ssdops.backends.triton import launch
    from ssdops.backends.triton.kernels.prepare import GROWTH

    q, v = torch.zeros(1, 300, 1, 16, dtype=torch.bfloat16), torch.zeros(1, 300, 5, 16, dtype=torch.bfloat16)
    log = torch.tensor([-0.1, -2.0, 0.0, 0.05, 0.3]).expand(1, 300, 5)
    case = Case(q, q, v, masks.decay(log))
    (term,) = terms_of(case.mask.tree)
    assert isinstance(term, Linear)
    x = bind(term, case.problem, q, q, v, case.mask.operands, None, 1.0, torch.bfloat16)
    prepared = launch.Scan(term, x, Config()).prepare(chunks=False, blocks=True, centers=True)
    for block, (center, rho) in enumerate(zip(prepared.center, prepared.blocks.rho, strict=True)):
        tokens = torch.arange(1, 129).clamp(max=300 - 128 * block)
        torch.testing.assert_close(rho, log[0, :1].T * tokens / ln(2), rtol=1e-4, atol=1e-4)
        high, low = rho.amax(1), rho.amin(1)
        near = (high - low <= 2 * launch.BLOCK_SPAN) & (high <= GROWTH.value)
        torch.testing.assert_close(center, torch.where(near, (high + low) / 2, 1e30))
    assert prepared.center[0].tolist()[2] == 0 and (prepared.center[0] > 1e29).tolist() == [False, True, False, False, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here; test_cuda_banded.py has windows of float32")
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton, whose kernel this is")
def test_factors_are_float32_whatever_the_default_is() -> None:
    s = Make(seqlen=40, dtype=torch.float32, nheads=4)
    case = s.case(masks.decay(s.log()) * masks.window(15), scale=1.0)
    torch.set_default_dtype(torch.float64)
    try:
        laws.equals_oracle(Runner("triton"), case)
        laws.gradients_equal_oracle(Runner("triton"), case)
        torch.set_default_dtype(torch.bfloat16)
        y = ssd(case.q, case.k, case.v, case.mask, backend="triton")
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y, ssd(case.q, case.k, case.v, case.mask, backend="naive"), rtol=1e-4, atol=1e-4)
