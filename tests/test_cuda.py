"""The torch backends on a GPU: the laws of the conformance suite, device tensors in and device tensors out.

Without a GPU these are skipped, and `test_conformance_*.py` hold the same code to the same laws on the CPU.
"""

import pytest
import torch

from ssdops.testing import Conformance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; the same laws run on the CPU elsewhere"),
]


class TestNaive(Conformance):
    backend = "naive"
    kind = "any"
    device = "cuda"
    row_bits = False  # cuBLAS picks its kernel, and so the order of its sums, by the size of the batch


class TestRecurrent(Conformance):
    backend = "recurrent"
    kind = "linear"
    device = "cuda"


class TestChunked(Conformance):
    backend = "chunked"
    kind = "scalar"
    device = "cuda"
