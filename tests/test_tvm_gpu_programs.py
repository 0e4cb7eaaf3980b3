"""What TVM's programs for GPUs mean, where there is none: before they are scheduled, on LLVM, held to the reference.

Barriers, tiles in shared memory and tensor cores are what schedules add; `test_cuda_tvm.py` sees those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssdops import masks, ssd
from ssdops.backends.tvm import backend, build, passes, scan
from ssdops.backends.tvm.cuda import OnGpu
from ssdops.backends.tvm.machine import Machine
from ssdops.masks import Mask

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
    monkeypatch.setattr(passes, "able", lambda x: False)  # a pass of a GPU is not made again
    monkeypatch.setattr(compiler, "lowered", lambda name, tile: compiler.PROGRAMS[name](tile))
    yield request.param


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


def results(name: str, structure: str, heads: tuple[int, int, int], strength: float) -> list[Tensor]:
    """Y, the final state, and every gradient; the reference's in float64."""
    batch = 1 if structure == "documents" else B
    q, k, v = (draw(batch, T, h, size, seed=seed) for seed, (h, size) in enumerate(zip(heads, (N, N, P), strict=True)))
    log_a = -strength * torch.rand(batch, T, H, generator=torch.Generator().manual_seed(3))
    u, w = draw(batch, T, H, seed=4), draw(batch, T, H, seed=5)
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
    for found, wanted in zip(results("tvm", structure, heads, 0.5), results("naive", structure, heads, 0.5), strict=True):
        assert (found - wanted).norm() <= RELATIVE[data] * wanted.norm()
