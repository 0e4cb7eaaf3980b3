"""Tiles of pairs for GPUs, where there is none: what TVM writes, what is asked for, and whom it is refused.

What the programs mean is in `test_tvm_gpu_programs.py`, and what a GPU makes of them in `test_cuda_tvm_pairs.py`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_tvm_tiles import MANY
from traced_masks import TANH

from ssdops import masks as m
from ssdops.backends.tvm import backend, build
from ssdops.backends.tvm.backend import Tvm, chunks
from ssdops.backends.tvm.machine import gpu
from ssdops.backends.tvm.tile import Tile
from ssdops.cli_export import Sizes, example_of_gpu
from ssdops.ir.problem import Problem, Target
from ssdops.ir.terms import Quadratic
from ssdops.ir.text import parse
from ssdops.masks import Mask
from ssdops.testing.structures import Make

pytestmark = pytest.mark.tvm
needs_tvm = pytest.mark.skipif(not backend.installed().ok, reason="TVM is not installed")
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or not backend.installed().ok, reason="no nvcc; that the text is written is tested without"
)
FACTORS = ("logs", "scales", "lags", "entries")
PROGRAMS = {"": FACTORS, "rows": ("logs", "lags", "entries"), "lags": ("logs",), "entries": ("logs", "scales")}
"""What is summed up, and of what factors."""
BARRIERS = {("", False): 6, ("", True): 6, ("rows", False): 6, ("lags", True): 5, ("entries", False): 4}
"""By what is summed up, and whether tiles are loaded ahead: no test without a GPU sees one that is missing (`race_tvm.py`)."""


def written(tile: Tile) -> str:
    """What nvcc is given."""
    from ssdops.backends.tvm import compiler

    return compiler.cuda_text(compiler.lowered("pairs_gpu", tile), tile)


def compiled(text: str, room: Path) -> str:
    """What nvcc says of it."""
    from tvm_ffi import libinfo

    (room / "pairs.cu").write_text(text)
    command = ["nvcc", "-arch=sm_90", "-std=c++17", "--use_fast_math", "-w", "-cubin", "-Xptxas=-v", "-o", str(room / "o")]
    command += [f"-I{libinfo.find_include_path()}", str(room / "pairs.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stderr


@needs_tvm
@pytest.mark.parametrize(
    ("data", "capability"), [("bfloat16", (8, 0)), ("bfloat16", (9, 0)), ("float16", (9, 0)), ("float32", (8, 0))]
)
@pytest.mark.parametrize(("mode", "ahead"), BARRIERS)
def test_programs_are_compiled_for_gpus(mode: str, ahead: bool, data: str, capability: tuple[int, int]) -> None:
    """Tensor cores multiply what has 16 bits, barriers are the program's own, and there is room for the tiles."""
    machine = gpu(capability, getattr(torch, data))
    inner, outer, chunk = 64, 128, machine.chunk
    tile = Tile(
        machine.target, data, "float32", chunk, inner, outer, whole=True, mode=mode, ahead=ahead, factors=PROGRAMS[mode]
    )  # fmt: skip
    text = written(tile)
    kernel = text[text.index("main_kernel(") : text.index("__tvm_ffi_main")]
    assert ("ssdops_multiply(" in kernel) == (data != "float32")
    assert "there_ptr" not in kernel  # which would be out_ptr again, of which CUDA is told that nobody else has it
    assert kernel.count("__syncthreads()") == BARRIERS[mode, ahead]
    (name,) = re.findall(r"dynamicSmemBytes = (\w+);", text)
    (dynamic,) = re.findall(rf"auto {name} = \(int64_t\)(\d+);", text)
    assert int(dynamic) <= machine.pairs_needs(inner, outer, ahead, chunk, not mode) << 10 <= machine.shared << 10


@needs_nvcc
def test_the_largest_heads_stay_in_registers(tmp_path: Path) -> None:
    """Hardly anything is spilled."""
    tile = Tile("sm_90", "bfloat16", "float32", 64, 256, 256, whole=True, ahead=True, factors=("logs",))
    (spilled,) = re.findall(r"(\d+) bytes spill stores", compiled(written(tile), tmp_path))
    assert int(spilled) <= 64


@needs_nvcc
def test_operations_of_formulas(tmp_path: Path) -> None:
    """CUDA has all that TIR has."""
    make = Make(seqlen=40, dtype=torch.float32)
    with build.collecting() as wanted:
        example_of_gpu(MANY(make.factor(), make.factor()).tree, Sizes(1, 40, 2, 16, 1, 16), torch.float32, (9, 0))
    compiled(written(next(tile for _, tile in wanted if not tile.mode)), tmp_path)


@pytest.mark.parametrize(
    ("mask", "modes"),
    [
        ("window(30)", {""}),
        ("toeplitz(c)", {"", "lags"}),
        ("dense(L)", {"", "entries"}),
        ("decay(log_a) * window(30) * documents(segment_ids=ids, n_segments=2)", {"", "rows"}),
    ],
)
def test_what_a_gpu_would_be_asked_for(mask: str, modes: set[str]) -> None:
    """Both passes on tensors without memory: the programs that they want, of both roles of a head's sizes."""
    if not backend.installed().ok:
        pytest.skip("TVM is not installed")
    with build.collecting() as wanted:
        example_of_gpu(parse(mask), Sizes(1, 64, 8, 64, 1, 128), torch.bfloat16, (9, 0))
    assert {name for name, _ in wanted} == {"pairs_gpu"}
    assert {tile.mode for _, tile in wanted} == modes
    assert {(tile.inner, tile.outer) for _, tile in wanted if not tile.mode} == {(128, 64), (64, 128)}
    assert all(tile.target == "sm_90" and tile.data == "bfloat16" and tile.chunk == 64 for _, tile in wanted)


def problem(capability: tuple[int, int], dtype: torch.dtype, **sizes: int) -> Problem:
    found = Make(dtype=dtype).case(m.window(3)).problem
    return replace(found, target=Target("cuda", "", capability), **sizes)


@pytest.mark.parametrize(
    ("mask", "capability", "dtype", "sizes", "reason"),
    [
        (m.window(3), (9, 0), torch.bfloat16, {"headdim": 256, "dstate": 256}, None),
        (m.window(3), (8, 0), torch.float32, {"headdim": 256, "dstate": 256}, None),
        (m.window(3), (8, 6), torch.float32, {"headdim": 128, "dstate": 128}, None),
        (m.window(3), (8, 6), torch.float32, {"headdim": 256, "dstate": 64}, "has no tiles of headdim 256 and dstate 64"),
        (m.window(3), (7, 5), torch.float16, {}, "needs compute capability 8.0"),
        (m.window(3), (9, 0), torch.float64, {}, "no float64 on GPUs"),
    ],
)
def test_what_it_runs(
    mask: Mask, capability: tuple[int, int], dtype: torch.dtype, sizes: dict[str, int], reason: str | None
) -> None:
    given = problem(capability, dtype, **sizes)
    found = Tvm().supports(Quadratic(mask.tree), given)
    if reason is None:
        assert found.ok or not backend.installed().ok
        assert set(chunks(given, True)) <= {64, 32} and chunks(given, True)
    else:
        assert not found.ok and reason in found.reason


def test_a_formula_is_taken() -> None:
    make = Make(dtype=torch.float32)
    given = replace(make.case(m.window(3)).problem, target=Target("cuda", "", (9, 0)))
    assert Tvm().supports(Quadratic(TANH(make.factor(), make.factor()).tree), given) == backend.installed()
