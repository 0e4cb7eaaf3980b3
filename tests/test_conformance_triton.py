"""The Triton backend keeps every law, in Triton's interpreter: what its kernels compute, if not what compilers make of them.

`test_cuda_triton.py` holds what compilers make of them to the same laws.
"""

import pytest
import torch

from ssdops.testing import Conformance

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here; test_cuda_triton.py has these laws")


class TestTriton(Conformance):
    backend = "triton"
    kind = "scalar"
    rounds_operands = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    chunk_sizes = (32, 16, 64)
