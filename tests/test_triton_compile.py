"""The kernels of scans, compiled for every architecture that they ship for, with no GPU: do they fit, and as committed?

`triton_resources.txt` has what they take. Some configurations keep registers in memory (its column `stack`): those numbers are
known, and a change of any of them is a change of that file. Another version of triton than the table's has other numbers, and
only has to fit. It takes a core twenty minutes to compile them all, so a profile of few examples compiles the first of them:
for sm_90, whose tiles are tuned, what most masks have at one size, for sm_80 a decay and one per channel, for sm_100 a decay.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

pytest.importorskip("triton")

import torch
import triton

from ssdops import explain, masks
from ssdops.backends.triton.sizes import chunks, hopper_stages, relay_of, sizes
from ssdops.backends.triton.tile_mask import shared_memory
from ssdops.ir import nodes as n
from ssdops.ir.problem import Target, problem_of
from ssdops.testing.structures import STRUCTURES, Make

TABLE = Path(__file__).with_name("triton_resources.txt")
SETUPS = {80: 2, 90: 12, 100: 1}
"""Of each architecture, how many of the script's setups a profile of few examples compiles."""
THOROUGH = settings.default.max_examples > 100
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
TENSOR_MEMORY = 512
"""Columns that a multiprocessor of sm_100 has."""
SPILLING = {("80", "64")}
"""Forward scans of 16 bits that keep registers in memory even with all there are: architecture, chunk."""


FEW_RELOADS = {"decay", "undecayed", "diagonal", "onto", "diagonal_onto", "onto_undecayed"}
"""Masks whose gradients by blocks on Hopper have registers enough: a reload for every head costs some ten µs at S1."""


def parsed(lines: list[str]) -> list[dict[str, str]]:
    """Rows by column."""
    names = next(line for line in TABLE.read_text().splitlines() if line.startswith("sm")).split()
    return [dict(zip(names, line.split(), strict=True)) for line in lines]


def compiled() -> list[str]:
    """The table's lines anew: in other processes, as this one interprets, an architecture each."""
    script = Path(__file__).with_name("compile_scan.py")
    wanted = [str(arch) if THOROUGH else f"{arch}:{setups}" for arch, setups in SETUPS.items()]
    commands = [[sys.executable, str(script), each] for each in wanted]
    running = [subprocess.Popen(x, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for x in commands]
    done = [(*process.communicate(), process.returncode) for process in running]
    assert not any(code for *_, code in done), done
    return [line for out, _, _ in done for line in out.splitlines()]


@pytest.mark.slow
def test_kernels_fit_and_take_what_the_table_says() -> None:
    """Memory suffices, products run on tensor cores, the forward scan spills nothing of itself; and nothing has changed."""
    lines = compiled()
    for row in parsed(lines):
        arch = int(row["sm"])
        assert int(row["shared"]) <= shared_memory((arch // 10, arch % 10)), row
        assert int(row["tensor"]) <= TENSOR_MEMORY, row
        kernel, best = row["launch"].split(":")[1], TENSOR_CORES[arch]
        if kernel in ("scan", "states", "gradients", "hopper_gradients", "hopper_band"):
            small = kernel == "gradients" and row["tokens"] == "32"  # tiles of fewer rows than the best instruction takes
            exact = row["instructions"] == best or (small and best in row["instructions"])
            assert row["instructions"] != "-" and (row["dtype"] == "fp32" or exact), row
        if row["mask"] == "channel" and (row["sm"], row["headdim"], row["dstate"]) == ("90", "64", "64"):
            assert row["stack"] == "0" and (row["instructions"] != "-" or kernel == "channel_sums"), row
        if (row["mask"], row["sm"], row["headdim"], row["dstate"]) == ("fenwick", "90", "64", "128"):
            made_of_products = kernel not in ("fenwick_spans", "fenwick_passing") and not row["launch"].endswith("tree:2")
            assert row["instructions"] == (best if made_of_products else "-"), row
            assert int(row["stack"]) <= (200 if kernel == "fenwick_inner" else 0), row
        if kernel == "hopper_gradients" and row["dstate"] == "128" and row["mask"] in FEW_RELOADS:
            assert int(row["reloads"]) <= 20, row
        if kernel == "hopper_band":
            assert row["stack"] == "0", row
        if row["launch"].endswith(":free") and (row["sm"], row["tokens"]) not in SPILLING:
            assert row["stack"] == "0", row
    text = TABLE.read_text()
    (version,) = re.findall(r"^# triton (\S+)$", text, re.MULTILINE)
    if version == triton.__version__:
        for arch in SETUPS:
            found, committed = ([line for line in x if line.startswith(f"{arch} ")] for x in (lines, text.splitlines()))
            assert found and found == committed[: len(found)], "the table's header says how to renew it"
            assert len(found) == len(committed) or not THOROUGH


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("capability", (None, (8, 0), (9, 0), (10, 0)))
@pytest.mark.parametrize("dim", (16, 64, 65, 256))
def test_blocks_hold_whole_chunks(dtype: torch.dtype, capability: tuple[int, int] | None, dim: int) -> None:
    make = Make(dtype=dtype, headdim=dim, dstate=dim)
    problem = make.case(STRUCTURES["decay"](make)).problem
    problem = replace(problem, target=Target("cuda", "", capability))
    for chunk in (None, *chunks(problem)):
        found = sizes(problem, chunk)
        assert found.block % found.chunk == 0 and (chunk is None or found.chunk == chunk)


@pytest.mark.parametrize(
    ("capability", "dtype", "headdim", "dstate", "stages"),
    (
        ((9, 0), torch.bfloat16, 64, 128, 3),
        ((9, 0), torch.bfloat16, 48, 33, 3),
        ((9, 0), torch.bfloat16, 64, 256, 2),
        ((9, 0), torch.bfloat16, 65, 16, 0),  # registers of a block's 128 rows end at 64 columns
        ((9, 0), torch.float16, 64, 128, 0),
        ((9, 0), torch.float32, 64, 128, 0),
        ((8, 0), torch.bfloat16, 64, 128, 0),
        ((10, 0), torch.bfloat16, 64, 128, 0),
        (None, torch.bfloat16, 64, 128, 0),
    ),
)
def test_what_the_hopper_kernel_is_for(
    capability: tuple[int, int] | None, dtype: torch.dtype, headdim: int, dstate: int, stages: int
) -> None:
    make = Make(dtype=dtype, headdim=headdim, dstate=dstate)
    problem = replace(make.case(STRUCTURES["decay"](make)).problem, target=Target("cuda", "", capability))
    assert hopper_stages(problem, dtype, 1) == stages
    assert hopper_stages(problem, dtype, 4) <= stages  # κ, u and w take shared memory, too


@pytest.mark.parametrize(
    ("sizes", "segments", "relay"),
    [
        ((8, 4096, 80, 64, 1, 128), 1, 1),
        ((1, 2048, 80, 64, 1, 128), 4, 1),
        ((1, 65536, 80, 64, 1, 128), 8, 1),
        ((4, 4096, 128, 64, 8, 128), 1, 2),
        ((8, 4096, 80, 64, 1, 256), 1, 1),
        ((8, 4096, 80, 64, 1, 16), 1, 3),
        ((1, 16384, 24, 64, 1, 128), 16, 1),
    ],
)
def test_schedules_are_those_that_were_fastest(sizes: tuple[int, ...], segments: int, relay: int) -> None:
    """On 132 multiprocessors: segments where rows are few, a relay where the last round of programs would be a small one."""
    batch, seqlen, nheads, headdim, groups, dstate = sizes
    q = torch.empty(batch, seqlen, groups, dstate, dtype=torch.bfloat16, device="meta")
    v, log_a = q.new_empty(batch, seqlen, nheads, headdim), torch.empty(batch, seqlen, nheads, device="meta")
    target = Target("cuda", "H100", (9, 0))
    (step,) = explain(q, q, v, masks.decay(log_a), backend="triton", target=target).plan.steps
    problem = replace(problem_of(n.Decay("log_a"), q, q, v, {"log_a": log_a}), target=target)
    assert (step.config.segments, relay_of(problem, batch * nheads)) == (segments, relay)
