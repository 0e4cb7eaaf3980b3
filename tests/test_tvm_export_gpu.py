"""Programs for GPUs that are compiled ahead: what is written, for whom, and who may not run it. No GPU is needed for that.

`test_cuda_tvm_export.py` runs them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssdops.backends.tvm import backend, build, exported, toolkit
from ssdops.backends.tvm.tile import Tile
from ssdops.cli import app
from ssdops.errors import UnsupportedError

pytestmark = [
    pytest.mark.tvm,
    pytest.mark.skipif(not backend.installed().ok, reason="TVM is not installed, and it compiles what is exported"),
]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc, which makes libraries of programs for GPUs")
LOADED = """
import sys
sys.modules["tvm"] = None  # as if it were not installed
from pathlib import Path
from ssdops.backends.tvm import build
for path in Path(sys.argv[1]).glob("*.so"):
    try:
        build._load(path)()
    except Exception as error:
        print("runs" if "arguments" in str(error) and "main(" in str(error) else error)
"""


def export(directory: Path, *options: str) -> tuple[int, str]:
    """The status and what the command says."""
    done = CliRunner().invoke(app, ["export", str(directory), "--shape", "1,64,4,16,1,16", *options])
    return done.exit_code, done.output


@needs_nvcc
def test_programs_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that both passes call, found by their tiles, loaded without TVM; refused on another GPU."""
    status, said = export(tmp_path, "--mask", "causal()", "--gpu", "sm_90")
    assert not status, said
    libraries = sorted(path.name for path in tmp_path.glob("*.so"))
    assert all(name in said for name in libraries)
    programs = ("lines", "scores", "walk", "between", "group", "collect")
    assert {name.rsplit("-", 1)[0] for name in libraries} == {f"{name}-sm_90" for name in programs}
    collected = {exported.file("collect", Tile("sm_90", "float32", "float32", 32, mode=mode)) for mode in ("", "added")}
    assert collected <= set(libraries)
    told = json.loads((tmp_path / "programs.json").read_text())
    assert (told["targets"], told["flags"]) == (["sm_90"], [])
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == ["runs"] * len(libraries), done.stdout + done.stderr
    monkeypatch.setattr(exported, "tvm_programs", lambda: tmp_path)
    lines = Tile("sm_90", "float32", "float32", 32)
    assert exported.place("lines", lines) == tmp_path / exported.file("lines", lines)
    other = Tile("sm_80", "float32", "float32", 32)
    with pytest.warns(UserWarning, match="they are for sm_90, and this GPU is sm_80; export them with --gpu sm_80"):
        assert exported.place("lines", other) is None
    assert build.export("lines", other, tmp_path, None).exists()
    exported.describe(tmp_path, "sm_80", [])
    exported._usable.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exported.place("lines", other) is not None and exported.place("lines", lines) is not None
        assert exported.place("lines", Tile("cpu", "float32", "float32", 32)) is None


def test_what_is_for_whom(tmp_path: Path) -> None:
    """Commands add up, until sources change."""
    for target, features in (("cpu", ["avx2"]), ("sm_90", []), ("sm_80", []), ("cpu", ["fma"])):
        exported.describe(tmp_path, target, features)
    path = tmp_path / "programs.json"
    told = json.loads(path.read_text())
    assert (told["targets"], told["flags"]) == (["cpu", "sm_80", "sm_90"], ["avx2", "fma"])
    path.write_text(json.dumps(told | {"sources": "0"}))
    exported.describe(tmp_path, "sm_90", [])
    assert json.loads(path.read_text())["targets"] == ["sm_90"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--gpu", "h100"), "--gpu h100 is no architecture of CUDA's; one is sm_90"),
        (("--gpu", "sm_75"), "needs compute capability 8.0"),
        (("--gpu", "sm_90", "--dtype", "float64"), "no float64 on GPUs"),
        (("--gpu", "sm_90", "--cpu", "x86-64-v3"), "for --cpu or for --gpu"),
        (("--gpu", "sm_90", "--mask", "fenwick(log_a, levels)"), "fenwick"),
        pytest.param(("--gpu", "sm_81"), "nvcc made no program for sm_81", marks=needs_nvcc),
    ],
)
def test_refusals(options: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    status, said = export(tmp_path, *options)
    assert status == 2 and reason in " ".join(said.split()), said


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with pytest.raises(UnsupportedError, match="exported by nvcc, and it is not here: install a CUDA toolkit"):
        toolkit.make_library("", "sm_90", Path("nowhere"))
