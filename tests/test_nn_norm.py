"""The gated norm on each backend, its module, and arguments that do not fit."""

from __future__ import annotations

import pytest
import torch
from conv_laws import drawn
from norm_laws import NormLaws

from ssdops.errors import ShapeError, UnsupportedError
from ssdops.nn import GatedRMSNorm, gated_rms_norm, launching
from ssdops.testing.tolerance import assert_same


class TestTorch(NormLaws):
    backend = "torch"


@pytest.mark.skipif(not launching.HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_conv.py tests the compiled kernels here")
class TestTriton(NormLaws):
    """In Triton's interpreter."""

    backend = "triton"
    rounds_once = False

    @pytest.mark.parametrize("heads", [None, 3])
    def test_opcheck(self, heads: int | None) -> None:
        given, skip = self.operands(torch.float32, heads)
        D, x = skip or (None, None)
        given = [None if t is None else t.detach().requires_grad_() for t in (*given, x, D)]
        torch.library.opcheck(torch.ops.ssdops.gated_norm.default, (*given, 0.1, 2, False))
        plain = [None if t is None else t.detach() for t in given]
        torch.library.opcheck(torch.ops.ssdops.gated_norm_backward.default, (plain[0], *plain, 0.1, 2, False))

    def test_wider_groups_are_torch_s(self) -> None:
        y, weight = drawn(1, 8200, dtype=torch.float32), torch.ones(8200)
        with pytest.raises(UnsupportedError, match="a group has 8200 channels, more than 8192; backend='torch' does"):
            gated_rms_norm(y, y, weight, backend="triton")
        assert_same(
            gated_rms_norm(y, y, weight, groups=2, backend="auto"),
            gated_rms_norm(y, y, weight, groups=2, backend="torch"),
            "auto",
        )


def test_the_module() -> None:
    y, z, D = drawn(2, 4), drawn(2, 4, seed=1), drawn(2)
    norm = GatedRMSNorm(4, 0.5, groups=2, norm_before_gate=True, dtype=torch.float64)
    assert (norm.weight == 1).all() and "groups=2" in repr(norm)
    torch.nn.init.normal_(norm.weight)
    options = {"eps": 0.5, "groups": 2, "norm_before_gate": True}
    assert_same(norm(y, z), gated_rms_norm(y, z, norm.weight, **options), "the module")
    assert_same(norm(y, z, (D, z)), gated_rms_norm(y, z, norm.weight, skip=(D, z), **options), "with a skip connection")


def test_norms_that_do_not_fit() -> None:
    y = drawn(2, 6)
    for call, message in [
        (lambda: gated_rms_norm(y, y[:, :3], y[0]), r"z must have the shape of y, \(2, 6\), got \(2, 3\)"),
        (lambda: gated_rms_norm(y, y, y), r"weight must be \(channels,\) = \(6,\), got \(2, 6\)"),
        (lambda: gated_rms_norm(y, y, y[0], groups=4), "groups must divide channels=6, got 4"),
        (lambda: GatedRMSNorm(6, groups=0), "groups must divide channels=6, got 0"),
        (lambda: gated_rms_norm(y, y, y[0], skip=(y[0], y[:1])), r"x of skip=\(D, x\) must have the shape of y"),
        (lambda: gated_rms_norm(y, y, y[0], skip=(y[0, :4], y)), r"D of skip=.* that divide channels=6, got \(4,\)"),
    ]:
        with pytest.raises(ShapeError, match=message):
            call()
