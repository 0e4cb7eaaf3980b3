"""Windows that run as scans, on a GPU: blocks whole and not, both directions and sides, every dtype, all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ssdops import explain, ssd
from ssdops import masks as m
from ssdops.backends.tvm.backend import installed
from ssdops.masks import Mask
from ssdops.testing import laws
from ssdops.testing.case import Case
from ssdops.testing.laws import Runner
from ssdops.testing.structures import Make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_banded.py interprets the kernels"),
]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
RUN = Runner("triton")


class Sizes(NamedTuple):
    """Of a call."""

    batch: int
    seqlen: int
    nheads: int
    headdim: int
    ngroups: int
    dstate: int


MASKS: dict[str, Callable[[Make], Mask]] = {
    "window": lambda s: m.window(140, 150),
    "decay * window": lambda s: m.decay(s.log()) * m.window(127),
    "retention * window": lambda s: m.retention(-s.normal(s.nheads).abs() / 30) * m.window(128),
    "T": lambda s: (m.decay(s.log(1)) * m.window(150)).T,
    "strict": lambda s: (m.decay(s.log() / 30) * m.window(130)).strict(),
    "shift": lambda s: m.decay(s.log() / 30).shift(1) * m.window(200),
    "documents": lambda s: (
        m.decay(s.log() / 30) * m.window(130) * m.documents(torch.tensor([0, 40, 40, s.seqlen], device="cuda"))
    ),
    "per channel": lambda s: m.channel_decay(-s.ranked(s.dstate).abs() / 30) * m.window(127),
    "per channel, T": lambda s: (m.channel_decay(-s.ranked(s.dstate).abs() / 30) * m.window(150)).T,
    "scale": lambda s: (m.decay(s.log() / 30) * m.window(129)).scale(rows=s.factor(), cols=s.factor(1), log_cols=s.log()),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("seqlen", [100, 384, 500])
@pytest.mark.parametrize("name", MASKS)
def test_equals_oracle(name: str, seqlen: int, dtype: torch.dtype) -> None:
    make = Make(seqlen=seqlen, dtype=dtype, dstate=64, headdim=32, device="cuda")
    case = make.case(MASKS[name](make), scale=1 / 8)
    laws.equals_oracle(RUN, case)
    laws.gradients_equal_oracle(RUN, case)


ONE_PASS: dict[str, tuple[Sizes, float, Callable[[Tensor], Mask]]] = {
    "512 tokens": (Sizes(2, 1000, 16, 64, 1, 128), 0.1, lambda a: m.sliding_window(511, a)),
    "513 tokens": (Sizes(1, 900, 32, 64, 2, 128), 0.1, lambda a: m.sliding_window(512, a)),
    "129 tokens": (Sizes(1, 700, 9, 64, 1, 64), 0.1, lambda a: m.sliding_window(128, a)),
    "130 tokens": (Sizes(1, 384, 8, 64, 1, 64), 0.1, lambda a: m.sliding_window(129, a)),
    "strong decays": (Sizes(1, 900, 10, 64, 1, 128), 3.0, lambda a: m.sliding_window(399, a)),
    "one strong decay": (
        Sizes(1, 900, 8, 64, 1, 128),
        0.1,
        lambda a: m.sliding_window(399, a - 3.0 * (torch.arange(8, device="cuda") == 0)),
    ),
    "from the right": (Sizes(1, 900, 8, 64, 1, 128), 0.1, lambda a: m.sliding_window(399, a).T),
    "strong, from the right": (Sizes(1, 600, 8, 64, 1, 128), 3.0, lambda a: m.sliding_window(399, a).reverse()),
    "strict": (Sizes(1, 900, 8, 64, 1, 128), 0.1, lambda a: m.sliding_window(399, a).strict()),
    "shift": (Sizes(1, 900, 8, 64, 1, 128), 3.0, lambda a: m.decay(a).shift(1) * m.window(200)),
    "both sides": (Sizes(1, 900, 8, 64, 1, 128), 0.0, lambda a: m.window(255, 300)),
    "odd sizes": (Sizes(2, 515, 24, 40, 3, 80), 0.1, lambda a: m.sliding_window(256, a)),
    "headdim 16": (Sizes(1, 515, 20, 16, 1, 16), 3.0, lambda a: m.sliding_window(256, a)),
    "dstate 256": (Sizes(1, 515, 11, 32, 1, 256), 0.1, lambda a: m.sliding_window(300, a)),
}


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU, whose kernel this is; windows by scans have the same laws above")
@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows by pairs, of heads that share scores: tiles whole or not, near pairs by factors or one by one."""
    from ssdops.backends.triton import band

    launched, kernel = list[object](), band.BAND
    monkeypatch.setattr(band, "BAND", lambda *args, **constants: launched.append(args) or kernel(*args, **constants))
    sizes, strength, make = ONE_PASS[name]
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(sizes.batch, sizes.seqlen, *shape, device="cuda", generator=generator)

    q, k = (normal(sizes.ngroups, sizes.dstate).bfloat16() for _ in range(2))
    v, log_a = normal(sizes.nheads, sizes.headdim).bfloat16(), -strength * normal(sizes.nheads).abs()
    laws.equals_oracle(RUN, Case(q, k, v, make(log_a), 1 / 8))
    assert launched


@pytest.mark.tvm
@pytest.mark.skipif(not installed().ok, reason="no TVM on this machine; on CPUs test_banded.py has its scans of windows")
@pytest.mark.parametrize("name", ["window", "scale"])
def test_tvm_equals_oracle(name: str) -> None:
    make = Make(seqlen=500, dtype=torch.bfloat16, dstate=64, headdim=32, device="cuda")
    case = make.case(MASKS[name](make), scale=1 / 8)
    laws.equals_oracle(Runner("tvm"), case)
    laws.gradients_equal_oracle(Runner("tvm"), case)


@pytest.mark.parametrize("name", ["decay * window", "window"])
def test_deterministic_and_in_several_rows(name: str) -> None:
    """The same bits twice, replayed or not; rows of a batch as they are alone."""
    make = Make(seqlen=700, dtype=torch.bfloat16, dstate=64, headdim=64, device="cuda")
    one = make.case(MASKS[name](make), scale=1 / 8)
    laws.deterministic(RUN, one)
    rows = Case(*(torch.cat([t, t.flip(1)]) for t in (one.q, one.k, one.v)), one.mask, one.scale)
    laws.equals_oracle(RUN, rows)
    laws.batch_order_does_not_matter(RUN, rows, bits=False)


def test_auto_takes_scans_for_wide_windows() -> None:
    x, log_a = torch.zeros(1, 8192, 8, 64, device="cuda", dtype=torch.bfloat16), torch.zeros(1, 8192, 8, device="cuda")
    for width, growth in ((1024, "T"), (16, "T · band")):
        mask = m.decay(log_a) * m.window(width - 1)
        (step,) = explain(x, x, x, mask).plan.steps
        assert (step.backend, step.growth) == ("triton", growth)
        assert ssd(x, x, x, mask).shape == x.shape
