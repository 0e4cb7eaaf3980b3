"""Tiles of pairs of the TVM backend on a GPU: the laws in every dtype, what is never read, graphs, the same bits every time.

What each program means is tested without a GPU in `test_tvm_gpu_programs.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quadratic_masks import MASKS
from test_cuda_tiles import MASKS as OF_SEVERAL_TILES
from test_tvm_tiles import banded
from torch import Tensor
from traced_masks import MASKS as TRACED
from traced_masks import TANH

from ssdops import masks as m
from ssdops import ssd
from ssdops.backends.tvm import backend
from ssdops.backends.tvm.quadratic import OnPairs
from ssdops.testing import Conformance, isolation, laws
from ssdops.testing.case import Case
from ssdops.testing.laws import Runner
from ssdops.testing.structures import Make
from ssdops.testing.tolerance import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; the same programs keep the laws on LLVM"),
    pytest.mark.skipif(not backend.installed().ok, reason="TVM is not installed"),
]
RUN = Runner("tvm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMULAS = {
    "alibi": TRACED["alibi"],
    "gates": TRACED["gates"],
    "matrix": TRACED["matrix"],
    "tanh": lambda s: TANH(s.factor(), s.factor()).T * m.window(90, 40),
}


class TestTvmBands(Conformance):
    backend = "tvm"
    make_mask = banded
    has_states = False
    rounds_operands = True
    device = "cuda"
    dtypes = DTYPES


def case_of(mask: str, dtype: torch.dtype, seqlen: int = 200, dims: tuple[int, int] = (64, 32)) -> Case:
    """A call of a batch of one, q and k sharing a head."""
    make = Make(seqlen=seqlen, dtype=dtype, dstate=dims[0], headdim=dims[1], device="cuda")
    return replace(make.case(({**MASKS, **OF_SEVERAL_TILES, **FORMULAS}[mask])(make), scale=dims[0] ** -0.5), operands=dtype)


def check(case: Case) -> None:
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["window", "toeplitz", "dense", "dense over heads", "decay * documents * toeplitz", "scale"])
def test_structures(name: str, dtype: torch.dtype) -> None:
    """Y and all gradients, over several tiles."""
    check(case_of(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_of_users(name: str, dtype: torch.dtype) -> None:
    check(case_of(name, dtype, seqlen=150))


@pytest.mark.parametrize("name", ["window strict", "two documents", "reverse", "T", "shift T", "empty"])
def test_more_structures(name: str) -> None:
    check(case_of(name, torch.float32, seqlen=130))


@pytest.mark.parametrize("dims", [(1, 1), (16, 16), (33, 7), (192, 96), (192, 192), (256, 256)], ids=str)
def test_dims(dims: tuple[int, int]) -> None:
    """dstate and headdim that fill tiles or not, in either role."""
    for dtype in (torch.bfloat16, torch.float32):
        check(case_of("decay * window", dtype, 150, dims))


@pytest.mark.parametrize("seqlen", [1, 31, 64, 65, 257])
def test_lengths(seqlen: int) -> None:
    check(case_of("window", torch.bfloat16, seqlen))


def test_many_tiles_and_heads() -> None:
    """Programs that sum up several heads, and several tiles; rows of many tiles."""
    make = Make(seqlen=4096, nheads=16, dtype=torch.bfloat16, dstate=32, headdim=32, device="cuda")
    for mask in (m.window(300), m.decay(make.log() / 50) * m.toeplitz(make.normal(2 * 4096 - 1)) * m.window(500)):
        q, k, v = make.case(mask).q, make.case(mask).k, make.case(mask).v
        found, wanted = (gradients(name, q, k, v, mask) for name in ("tvm", "triton"))
        for x, y in zip(found, wanted, strict=True):
            assert (x.float() - y.float()).norm() <= 1e-2 * y.float().norm()


def gradients(name: str, q: Tensor, k: Tensor, v: Tensor, mask: m.Mask) -> list[Tensor]:
    """Y and the gradients of everything."""
    operands = {key: x.detach().requires_grad_() for key, x in mask.operands.items()}
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = ssd(*leaves, m.Mask(mask.tree, operands), scale=0.2, backend=name)
    dy = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *operands.values()], dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    """Nothing is left of a race: on a full device, too."""
    make = Make(seqlen=1000, nheads=40, dtype=dtype, dstate=128, headdim=64, device="cuda")
    case = make.case(m.decay(make.log() / 50) * m.toeplitz(make.normal(2 * 1000 - 1)) * m.window(200, 50))
    first = gradients("tvm", case.q, case.k, case.v, case.mask)
    for _ in range(3):
        for x, y in zip(gradients("tvm", case.q, case.k, case.v, case.mask), first, strict=True):
            assert torch.equal(x, y)


def test_blocks_outside_the_band_are_not_visited() -> None:
    """NaN further away than a tile changes nothing."""
    case = case_of("window", torch.bfloat16, 500)
    poisoned = case.map(lambda name, x: x.index_fill(1, torch.arange(20, device="cuda"), torch.nan) if name in "qkv" else x)
    whole, part = RUN(case)["y"], RUN(poisoned)["y"]
    assert_close(part[:, 256:], whole[:, 256:], 0.0, "y of the tiles that do not see the poison")
    assert part[:, 20].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poison_stays_in_its_document(value: float) -> None:
    make = Make(seqlen=150, dtype=torch.float32, dstate=32, headdim=32, device="cuda")
    case = make.case(m.decay(make.log()) * m.window(100))
    isolation.poison_stays_in_its_document(RUN, case, make.cu, value)
    isolation.documents_equal_separate_runs(RUN, case, make.cu)


@pytest.mark.parametrize("heads", [(4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 4)], ids=str)
def test_heads_and_batch(heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared heads, several batch rows, any strides; sums over heads that a program walks, or several make."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).cuda()

    q, k, v = (normal(3, count, 150, dim).transpose(1, 2) for count, dim in zip(heads, (32, 32, 24), strict=True))
    mask = m.decay(-normal(3, 150, 2).abs()) * m.window(70) * m.dense(normal(3, 1, 150, 150))
    case = Case(q, k, v, mask, 0.2)
    check(case)
    laws.batch_order_does_not_matter(RUN, case, bits=True)
    laws.strides_do_not_matter(RUN, case)
    monkeypatch.setattr(OnPairs, "enough", 2)
    laws.gradients_equal_oracle(RUN, case)


def test_no_t_by_t_memory() -> None:
    """Forward and backward of a long window hold no more than a few tensors of the sizes of the inputs."""
    q, k, v = (torch.randn(1, 32768, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    log_a = (-torch.rand(1, 32768, 4, device="cuda")).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ssd(q, k, v, m.decay(log_a) * m.window(512), backend="tvm").float().square().mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 40 * q.numel() * q.element_size()  # one T × T is 128 times q
    assert q.grad is not None and q.grad.isfinite().all()


def test_offsets_beyond_32_bits() -> None:
    """A sequence of more than 2³¹ elements: its last rows are those of the same window alone."""
    seqlen, part, dim = 2**17 + 128, 320, 128  # apart by whole tiles, so that sums run in one order
    x = torch.randn(1, seqlen, 128, dim, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31 and (seqlen - part) % 64 == 0
    y, alone = (ssd(t, t, t, m.window(63), backend="tvm") for t in (x, x[:, -part:]))
    assert torch.equal(y[:, -part + 64 :], alone[:, 64:])


def test_a_graph() -> None:
    """A CUDA graph of a call and its gradients, replayed on other numbers: nothing is copied to the device on the way."""
    make = Make(seqlen=300, nheads=4, dtype=torch.bfloat16, dstate=64, headdim=64, device="cuda")
    case = make.case(m.decay(make.log() / 10) * m.window(90))
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, *case.mask.operands.values())]

    def run() -> list[Tensor]:
        y = ssd(case.q, case.k, case.v, case.mask, backend="tvm")
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    stream = torch.cuda.Stream()  # a leaf remembers the stream of its first use, and that must not be the default one
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    with torch.no_grad():
        for x in leaves:
            x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(found, run(), strict=True):
        assert torch.equal(x, y)
