"""Programs that are compiled ahead run where TVM is not, and are refused where they do not belong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssdops.backends.tvm import backend, threads
from ssdops.cli import app

pytestmark = [
    pytest.mark.tvm,
    pytest.mark.skipif(not backend.installed().ok, reason="TVM is not installed, and it compiles what is exported"),
    pytest.mark.skipif(not threads.of_torch(), reason="export is for torch's OpenMP runtime on Linux"),
]

WITHOUT_TVM = """
import sys, warnings
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
def gradients(name, dtype=torch.float32, seqlen=150):
    torch.manual_seed(0)
    q, v = torch.randn(3, seqlen, 2, 16, dtype=dtype), torch.randn(3, seqlen, 4, 16, dtype=dtype)
    leaves = [q.requires_grad_(), (-torch.rand(3, seqlen, 4)).to(dtype).requires_grad_()]
    y = ssd(q, q, v, masks.decay(leaves[1]).T, backend=name)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]
for x, y in zip(gradients("tvm"), gradients("chunked")):
    assert (x - y).abs().max() <= 1e-5 * y.abs().max()
try:
    gradients("tvm", torch.float64)
except UnsupportedError as error:
    print(error)
"""


def export(directory: Path, *options: str) -> str:
    """What the command says."""
    done = CliRunner().invoke(app, ["export", str(directory), "--shape", "1,64,4,16,1,16", *options])
    assert done.exit_code == 0, done.output
    return done.output


def run(directory: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Another process that has these programs."""
    cache = directory.parent / "cache"
    environment = {**os.environ, "SSDOPS_TVM_PROGRAMS": str(directory), "SSDOPS_CACHE_DIR": str(cache)}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)


def test_programs_run_without_tvm(tmp_path: Path) -> None:
    """Y and gradients, of another batch, length and direction; what was not exported is named. Then: who may not run them."""
    programs = tmp_path / "programs"
    assert "gradients-cpu-" in export(programs)
    done = run(programs, WITHOUT_TVM)
    assert not done.returncode, done.stderr
    assert "float64" in done.stdout and "pip install 'ssdops[tvm]'" in done.stdout
    assert not (tmp_path / "cache").exists()
    told = json.loads((programs / "programs.json").read_text())
    for change, reason in (
        ({"flags": ["fma", "avx1024"]}, "has no avx1024"),
        ({"sources": "0"}, "of other sources; export them again"),
        ({"machine": "vax"}, "they are for Linux vax, and this is"),
        ({"schema": 7}, "schema is 7"),
    ):
        (programs / "programs.json").write_text(json.dumps(told | change))
        done = run(programs, WITHOUT_TVM)
        assert done.returncode and reason in done.stderr and done.stderr.count("are not used") == 1, done.stderr
    (programs / "programs.json").write_text("[")
    assert "cannot be read" in run(programs, WITHOUT_TVM).stderr
    (programs / "programs.json").write_text(json.dumps(told))
    programs.chmod(0o777)
    assert "others can write there" in run(programs, WITHOUT_TVM).stderr


def test_what_is_not_exported(tmp_path: Path) -> None:
    """A backend that compiles nothing, a processor that nobody knows, and a mask that has no program."""
    for options, reason in (
        (["--backend", "chunked"], "'chunked' has nothing to export"),
        (["--cpu", "pdp11"], "no processor 'pdp11'"),
        (["--mask", "diagonal(d)"], "has no scan"),
        (["--mask", "fenwick(log_a, levels)"], "has no tiles for this mask"),
    ):
        done = CliRunner().invoke(app, ["export", str(tmp_path), "--shape", "1,64,4,16,1,16", *options])
        assert done.exit_code == 2 and reason in done.output, done.output
