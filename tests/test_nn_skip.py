"""The skip connection and the gate on each backend, and where something traces."""

from __future__ import annotations

import pytest
import torch
from skip_laws import SkipLaws

from ssdops.errors import UnsupportedError
from ssdops.nn import launching
from ssdops.nn.skip import gated_skip
from ssdops.testing.tolerance import assert_same


class TestTorch(SkipLaws):
    backend = "torch"


@pytest.mark.skipif(not launching.HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_conv.py tests the compiled kernels here")
class TestTriton(SkipLaws):
    """In Triton's interpreter."""

    backend = "triton"

    def test_what_is_traced_is_torch_s(self) -> None:
        given = self.operands(torch.float32, "by heads", True)
        compiled = torch.compile(gated_skip, fullgraph=True, backend="aot_eager")
        assert_same(compiled(*given), gated_skip(*given, backend="torch"), "compiled")
        with pytest.raises(UnsupportedError, match=r"no rules for torch\.func"):
            torch.func.vmap(lambda y, x: gated_skip(y, x, given[2], None, backend="triton"))(*given[:2])


def test_nothing_to_do() -> None:
    y, x = torch.randn(2, 3, 4), torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert_same(gated_skip(y, x, None, None), y.to(torch.bfloat16), "y alone")
