"""Programs for this GPU, compiled ahead, where TVM is not: both passes in a process that cannot import it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ssdops.backends.tvm import backend
from ssdops.cli import app

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_tvm_export_gpu.py exports without one"),
    pytest.mark.skipif(not backend.installed().ok, reason="TVM is not installed, and it compiles what is exported"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc, which makes libraries of programs for GPUs"),
]
WITHOUT_TVM = """
import sys
from importlib.metadata import PackageNotFoundError
sys.modules["tvm"] = None  # as if it were not installed
from ssdops.backends.tvm import backend
installed = backend.version
def version(package):
    if package == "apache-tvm":
        raise PackageNotFoundError(package)
    return installed(package)
backend.version = version
import torch
from ssdops import masks, ssd
from ssdops.errors import UnsupportedError
def gradients(name, batch, seqlen, nheads, dtype=torch.bfloat16):
    torch.manual_seed(0)
    q, k = (torch.randn(batch, seqlen, 1, 64, device="cuda", dtype=dtype) for _ in range(2))
    v = torch.randn(batch, seqlen, nheads, 32, device="cuda", dtype=dtype)
    log_a = -0.1 * torch.rand(batch, seqlen, nheads, device="cuda")
    leaves = [x.float().requires_grad_() if name == "chunked" else x.requires_grad_() for x in (q, k, v, log_a)]
    y = ssd(*leaves[:3], masks.decay(leaves[3]), backend=name)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
for sizes in ((3, 150, 4), (1, 4096, 2)):  # the second is walked in segments
    for x, y in zip(gradients("tvm", *sizes), gradients("chunked", *sizes)):
        assert (x.float() - y.float()).norm() <= 1e-2 * y.float().norm()
try:
    gradients("tvm", 1, 64, 1, torch.float32)
except UnsupportedError as error:
    print(error)
"""


def test_programs_run_without_tvm(tmp_path: Path) -> None:
    """What was exported is enough for any batch, length and number of heads; what was not is named."""
    major, minor = torch.cuda.get_device_capability()
    programs, cache = tmp_path / "programs", tmp_path / "cache"
    order = ["--shape", "1,64,4,32,1,64", "--dtype", "bfloat16", "--gpu", f"sm_{major}{minor}"]
    done = CliRunner().invoke(app, ["export", str(programs), *order])
    assert done.exit_code == 0, done.output
    environment = {**os.environ, "SSDOPS_TVM_PROGRAMS": str(programs), "SSDOPS_CACHE_DIR": str(cache)}
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TVM], capture_output=True, text=True, env=environment)
    assert not ran.returncode, ran.stderr
    assert "float32" in ran.stdout and "pip install 'ssdops[tvm]'" in ran.stdout
    assert not (cache / "tvm").exists()
