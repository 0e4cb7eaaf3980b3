"""Scans on GPUs, where there is none: what TVM writes, what nvcc makes of it, and which programs are asked for.

What the programs mean is in `test_tvm_gpu_programs.py`, and what a GPU makes of them in `test_cuda_tvm.py`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssdops.backends.base import Config, Cotangents, bind
from ssdops.backends.tvm import backend, build, cuda, passes, toolkit
from ssdops.backends.tvm.machine import gpu
from ssdops.backends.tvm.tile import Tile
from ssdops.errors import UnsupportedError
from ssdops.ir.problem import Target, problem_of
from ssdops.ir.terms import Linear
from ssdops.ir.text import parse

needs_tvm = pytest.mark.skipif(not backend.installed().ok, reason="TVM is not installed; it writes what GPUs run")

DECAY = Linear(log_a="log_a")
PROGRAMS = {
    "lines": {},
    "scores": {"inner": 128, "whole": True},
    "settle": {},
    "between": {},
    "collect": {},
    "collect added": {"mode": "added"},
    "walk": {"inner": 128, "outer": 64, "whole": True, "ahead": True},
    "walk late": {"inner": 256, "outer": 64, "whole": True, "ahead": True, "late": True},
    "walk states": {"inner": 128, "outer": 64, "whole": True, "mode": "states"},
    "walk starts": {"inner": 64, "outer": 64, "mode": "starts", "ahead": True, "shared": 2},
    "walk kept": {"inner": 64, "outer": 16, "whole": True, "mode": "kept", "flipped": True},
    "walk every": {"inner": 64, "outer": 64, "whole": True, "mode": "every", "ahead": True},
    "group": {"inner": 64, "outer": 64, "whole": True, "ahead": True},
    "group exchange": {"inner": 64, "outer": 32, "mode": "exchange"},
}
PRODUCTS = ("scores", "walk", "walk late", "walk states", "walk starts", "walk kept", "walk every", "group", "group exchange")
"""Those that multiply matrices."""
BARRIERS = {
    "lines": 3, "scores": 1, "settle": 4, "collect": 1, "collect added": 1, "between": 2, "walk": 4, "walk late": 4,
    "walk states": 4, "walk starts": 7, "walk kept": 4, "walk every": 6, "group": 4, "group exchange": 6,
}  # fmt: skip
"""Of each: no test without a GPU sees one that is missing. After a change of them, see `race_tvm.py`."""


def cuda_source(name: str, target: str, data: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What TVM writes for a GPU, here, where there is none."""
    from ssdops.backends.tvm import compiler

    monkeypatch.setattr(toolkit, "prepare", lambda: None)
    tile = Tile(target, data, "float32", 32 if data == "float32" else 64, **PROGRAMS[name])
    program = name.split()[0]
    source: str = compiler.compiled(program, compiler.lowered(program, tile), tile).mod.imports[0].inspect_source("cuda")
    return source


@needs_tvm
@pytest.mark.tvm
@pytest.mark.parametrize(
    ("target", "data"), [("sm_80", "bfloat16"), ("sm_90", "bfloat16"), ("sm_90", "float16"), ("sm_90", "float32")]
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_compiled_for_gpus(name: str, target: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores multiply what has 16 bits, and barriers are the program's own."""
    source = cuda_source(name, target, data, monkeypatch)
    assert ("ssdops_multiply(" in source) == (name in PRODUCTS and data != "float32")
    assert source.count("__syncthreads()") == BARRIERS[name]
    assert "int64_t" in source  # addresses may pass 2^31


@needs_tvm
@pytest.mark.tvm
def test_nvcc_takes_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk of 16-bit numbers, and hardly anything of it spilled."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc; that the text is written is tested without, and the GPU's tests compile it")
    path = tmp_path / "walk.cu"
    path.write_text(cuda_source("walk", "sm_90", "bfloat16", monkeypatch))
    command = [nvcc, "-arch=sm_90", "-std=c++17", "--use_fast_math", "-w", "-cubin", "-Xptxas=-v", "-o", str(tmp_path / "o")]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert spilled and int(spilled[1]) <= 64


@needs_tvm
@pytest.mark.tvm
@pytest.mark.parametrize(
    ("capability", "data", "dstate", "mode"),
    [
        ((9, 0), torch.bfloat16, 256, ""), ((9, 0), torch.float32, 256, "every"), ((8, 0), torch.bfloat16, 192, "every"),
        ((8, 0), torch.bfloat16, 128, "every"), ((8, 6), torch.bfloat16, 128, "kept"),
    ],
    ids=str,
)  # fmt: skip
def test_walks_have_room(capability: tuple[int, int], data: torch.dtype, dstate: int, mode: str) -> None:
    """Tiles that a GPU is said to have room for: TVM lays no more shared memory out than it has, and no GPU need be there."""
    from ssdops.backends.tvm import compiler

    made = gpu(capability, data)
    inner = made.inner(dstate)
    outer, ahead = made.outer(inner, 64, made.chunk, inner == dstate, mode == "every")
    dtype = str(data).removeprefix("torch.")
    tile = Tile(
        made.target, dtype, "float32", made.chunk, inner=inner, outer=outer, whole=inner == dstate, mode=mode, **ahead.fields()
    )
    text = compiler.cuda_text(compiler.lowered("walk", tile), tile)
    size = re.search(r"MaxDynamicSharedMemorySize, (\w+)\)", text)
    assert size is not None
    taken = re.search(rf"auto {size[1]} = \(int64_t\)(\d+);", text)
    assert taken is not None and made.shared is not None
    assert int(taken[1]) <= made.shared * 1024


def test_no_compiler_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA's headers, or without a compiler, it is said what to install."""
    monkeypatch.setattr(toolkit, "home", lambda: None)
    with pytest.raises(UnsupportedError, match="set CUDA_PATH"):
        toolkit.prepare()
    monkeypatch.setattr(toolkit, "home", lambda: Path("cuda"))
    monkeypatch.setattr(toolkit, "nvrtc", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install cuda-bindings"):
        toolkit.prepare()


@needs_tvm
@pytest.mark.tvm
@pytest.mark.parametrize("segments", [1, 4])
def test_what_a_gpu_would_be_asked_for(segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes on tensors without memory: the programs that they want, and results of the right shapes."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    q, v, dy = empty(2, 512, 1, 128), empty(2, 512, 6, 64), empty(2, 512, 6, 64)
    operands, states = {"log_a": torch.empty(2, 512, 6, device="meta")}, torch.empty(2, 6, 64, 128, device="meta")
    problem = replace(problem_of(parse("decay(log_a)"), q, q, v, operands), target=Target("cuda", "H100", (9, 0), 132))
    x = bind(DECAY, problem, q, q, v, operands, states, 1.0, torch.bfloat16)
    monkeypatch.setattr(cuda.OnGpu, "segments", lambda self, roles, heads: segments)
    with build.collecting() as wanted:
        out = passes.forward(DECAY, x, Config(64), True)
        grads = passes.backward(DECAY, x, Config(64), Cotangents(dy, states))
    assert out.state is not None and grads.initial is not None
    assert (out.y.shape, out.state.shape) == (v.shape, states.shape)
    assert [g.shape for g in (grads.q, grads.k, grads.v)] == [q.shape, q.shape, v.shape]
    assert (grads.initial.shape, grads.values["log_a"].shape) == (states.shape, operands["log_a"].shape)
    between = {"between"} if segments > 1 else set()
    assert {name for name, _ in wanted} == {"lines", "scores", "walk", "group", "collect", "settle"} | between
    assert {tile.mode for name, tile in wanted if name == "walk"} == {"", "kept", "starts"} | (
        {"states"} if segments > 1 else set()
    )
    assert all(tile.target == "sm_90" for _, tile in wanted)
