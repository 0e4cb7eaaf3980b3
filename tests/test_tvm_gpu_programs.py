"""What TVM's programs for GPUs mean, where there is none: before they are scheduled, on LLVM, held to the reference.

Barriers, tiles in shared memory and tensor cores are what schedules add; `test_cuda_tvm.py` sees those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quadratic_masks import MASKS as of_tiles
from torch import Tensor
from traced_masks import TANH

from ssdops import masks, ssd
from ssdops.backends.tvm import backend, build, passes, replay, scan
from ssdops.backends.tvm.cuda import OnGpu
from ssdops.backends.tvm.machine import Machine
from ssdops.backends.tvm.quadratic import OnPairs
from ssdops.masks import Mask
from ssdops.testing import laws
from ssdops.testing.laws import Runner
from ssdops.testing.structures import Make

pytestmark = [pytest.mark.tvm, pytest.mark.skipif(not backend.installed().ok, reason="TVM is not installed")]
B, T, H, P, N = 2, 70, 4, 20, 33
ENDS = (0, 5, 5, 40, 70)
"""Bounds of documents: one is empty, and none ends where a chunk of the whole row would."""
RELATIVE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}
"""Greatest ‖error‖ / ‖result‖: what rounding operands, scores, weights and states to the dtype gives, about twice."""


class OnGpuOfTwo(OnGpu):
    """As on a GPU with so few multiprocessors that heads are walked together."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.problem = replace(self.problem, target=replace(self.problem.target, multiprocessors=2))


@pytest.fixture(params=RELATIVE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def data(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[torch.dtype]:
    """Calls of the backend run a GPU's programs, of a dtype of products."""
    from ssdops.backends.tvm import compiler

    monkeypatch.setenv("SSDOPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "MADE", {})
    monkeypatch.setattr(scan, "_known", {})
    monkeypatch.setattr(scan, "machine", lambda problem: Machine("cpu", request.param, 32, 227))
    monkeypatch.setattr(passes, "OnCpu", OnGpuOfTwo)
    monkeypatch.setattr(OnPairs, "enough", 6)  # programs: of some sums several are made, others are walked
    monkeypatch.setattr(replay, "_replays", {})
    monkeypatch.setattr(compiler, "lowered", lambda name, tile: compiler.PROGRAMS[name](tile))
    yield request.param


TILES = {
    **{name: of_tiles[name] for name in ("window", "toeplitz", "dense over heads", "reverse", "scale", "empty")},
    "documents": of_tiles["decay * documents * toeplitz"],
    "a formula": lambda s: TANH(s.factor(), s.factor()).T * masks.window(40),
}
"""Masks that are no scans."""


@pytest.mark.parametrize(
    ("data", "name"),
    [
        *((torch.float32, name) for name in TILES),
        *((torch.bfloat16, name) for name in ("window", "documents", "dense over heads")),
    ],
    indirect=["data"], ids=str,
)  # fmt: skip
def test_tiles_of_pairs(name: str, data: torch.dtype) -> None:
    """Y and all gradients, over several tiles, of heads that fill tiles or not; sums of q and k are over two heads."""
    make = Make(seqlen=70, nheads=4, dstate=33, headdim=16, dtype=torch.float32)
    case = replace(make.case(TILES[name](make)), operands=data)
    laws.equals_oracle(Runner("tvm"), case)
    laws.gradients_equal_oracle(Runner("tvm"), case)
    assert all(program == "pairs_gpu" for program, _ in build.MADE)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASKS: dict[str, Callable[[Tensor, Tensor, Tensor], Mask]] = {
    "causal": lambda log_a, u, w: masks.decay(log_a),
    "strict": lambda log_a, u, w: masks.decay(log_a).strict(),
    "anticausal": lambda log_a, u, w: masks.decay(log_a).T,
    "exclusive": lambda log_a, u, w: masks.decay(log_a).strict().T,
    "scales": lambda log_a, u, w: masks.decay(log_a).scale(rows=u, cols=w),
    "log scales": lambda log_a, u, w: masks.decay(log_a).scale(log_cols=-w.abs()),
    "documents": lambda log_a, u, w: masks.decay(log_a) * masks.documents(torch.tensor(ENDS)),
}


def results(name: str, structure: str, heads: tuple[int, int, int], strength: float, seqlen: int = T) -> list[Tensor]:
    """Y, the final state, and every gradient; the reference's in float64."""
    batch = 1 if structure == "documents" else B
    q, k, v = (draw(batch, seqlen, h, size, seed=seed) for seed, (h, size) in enumerate(zip(heads, (N, N, P), strict=True)))
    log_a = -strength * torch.rand(batch, seqlen, H, generator=torch.Generator().manual_seed(3))
    u, w = draw(batch, seqlen, H, seed=4), draw(batch, seqlen, H, seed=5)
    initial = draw(len(ENDS) - 1 if structure == "documents" else B, H, P, N, seed=6)
    dtype = torch.float32 if name == "tvm" else torch.float64
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, initial, log_a, u, w)]
    mask = MASKS[structure](*inputs[4:])
    out = ssd(*inputs[:3], mask, initial_state=inputs[3], return_state=True, backend=name)
    cotangents = [draw(*x.shape, seed=7 + i).to(dtype) for i, x in enumerate(out)]
    return [*out, *(g for g in torch.autograd.grad(out, inputs, cotangents, allow_unused=True) if g is not None)]


@pytest.mark.parametrize(
    ("structure", "heads"),
    [*((structure, (1, 1, H)) for structure in MASKS), *(("causal", heads) for heads in ((2, 1, H), (H, H, 1), (H, 2, 2)))],
    ids=str,
)
def test_programs_mean_what_they_should(structure: str, heads: tuple[int, int, int], data: torch.dtype) -> None:
    """Every kind of walk and chunk, heads shared in every way, a row that no chunk divides."""
    first = results("tvm", structure, heads, 0.5)
    for found, wanted in zip(first, results("naive", structure, heads, 0.5), strict=True):
        assert (found - wanted).norm() <= RELATIVE[data] * wanted.norm()
    noted = 0 if structure == "documents" else 1 if heads[2] < H else 2  # torch makes tables, and sums up gradients of v
    assert_made_again(first, lambda: results("tvm", structure, heads, 0.5), noted)


@pytest.mark.parametrize("structure", ["causal", "exclusive", "scales"])
def test_rows_in_segments(structure: str, data: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments walked side by side, with a pass for the states between them, give what one walk does."""
    monkeypatch.setattr(OnGpuOfTwo, "segments", lambda scan, roles, heads: 4)
    found, wanted = (results(name, structure, (2, 1, H), 0.05, seqlen=256) for name in ("tvm", "naive"))
    for mine, reference in zip(found, wanted, strict=True):
        assert (mine - reference).norm() <= RELATIVE[data] * reference.norm()
    assert_made_again(found, lambda: results("tvm", structure, (2, 1, H), 0.05, seqlen=256), 2)


def assert_made_again(first: list[Tensor], run: Callable[[], list[Tensor]], passes: int) -> None:
    """So many passes of the first call were noted, and another call, of other tensors, gives the same bits by them."""
    noted = dict(replay._replays)
    assert len(noted) == passes
    assert all(torch.equal(x, y) for x, y in zip(run(), first, strict=True))
    assert replay._replays == noted  # else a pass was made the first way, and noted once more


def test_some_heads_at_a_time(data: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for the states of all, gradients are summed up, and such a pass is not called again."""
    monkeypatch.setattr(OnGpuOfTwo, "heads_at_once", lambda scan: 2)
    found, wanted = (results(name, "scales", (1, 1, H), 0.5) for name in ("tvm", "naive"))
    for mine, reference in zip(found, wanted, strict=True):
        assert (mine - reference).norm() <= RELATIVE[data] * reference.norm()
    assert [key[0][0] for key in replay._replays] == ["forward"]
