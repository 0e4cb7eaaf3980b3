"""Compile the launches of quadratic terms for GPUs that are not here, and look at what comes out: a script, run by a test.

Launches are recorded instead of run, and their arguments give the signatures that the just-in-time compiler would see.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # pytest imports this file too, to look for doctests
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from compiled import TENSOR_CORES, compiled
from traced_masks import TANH

from ssdops import masks as m
from ssdops.backends.base import Cotangents, bind
from ssdops.backends.triton import tiles
from ssdops.backends.triton.kernels import tiles as kernels
from ssdops.backends.triton.tile_mask import shared_memory
from ssdops.ir.problem import Target
from ssdops.plan import terms_of
from ssdops.testing.structures import Make

MASKS = {
    "window": lambda s: m.window(40, 40).strict(),
    "decay * window * documents": lambda s: m.decay(s.log()) * m.window(40) * s.cu,
    "decay * toeplitz": lambda s: m.decay(s.log()) * m.toeplitz(s.normal(s.nheads, 2 * s.seqlen - 1)),
    "dense": lambda s: m.dense(s.normal(1, 1, s.seqlen, s.seqlen)),
    "tanh": lambda s: TANH(s.factor(), s.factor()),
}
A_FEW = 128
"""Bytes of registers a thread may keep in memory: what some versions of ptxas leave there outside the inner loop."""
Launch = tuple[str, tuple[Any, ...], dict[str, Any]]


def launches(mask: m.Mask, make: Make, arch: int) -> list[Launch]:
    """The launches of a forward and a backward pass: of each kernel at most two, Y and the gradient of a shared q."""
    found: list[Launch] = []

    def record(kernel: str, grid: int, *arguments: Any, **constants: Any) -> None:
        if sum(name == kernel for name, _, _ in found) < 2:
            found.append((kernel, arguments, constants))

    tiles._launch = record
    tiles.ENOUGH = 1  # so that heads share programs
    case = make.case(mask)
    problem = replace(case.problem, target=Target("cuda", "", (arch // 10, arch % 10)))
    (term,) = terms_of(mask.tree)
    x = bind(term, problem, case.q, case.k, case.v, mask.operands, None, 1.0)
    tiles.forward(term, x)
    tiles.backward(term, x, Cotangents(case.v))
    return found


def main() -> None:
    """Compile everything; AssertionError for what does not fit."""
    for dtype, dims in ((torch.bfloat16, (128, 64)), (torch.bfloat16, (256, 256)), (torch.float32, (128, 64))):
        for name, mask in MASKS.items():
            make = Make(seqlen=256, dtype=dtype, dstate=dims[0], headdim=dims[1])
            for arch in (80, 90) if dims == (128, 64) and dtype == torch.bfloat16 else (90,):
                for fn, arguments, given in launches(mask(make), make, arch):
                    kernel = compiled(getattr(kernels, fn), arguments, given, arch)
                    what = f"{fn} of {name}, {dtype}, dims {dims}, sm_{arch}"
                    print(what, kernel.shared, kernel.stack)
                    assert kernel.shared <= shared_memory((arch // 10, arch % 10)), f"shared memory of {what}"
                    assert dims[0] > 128 or kernel.stack <= A_FEW, f"{what} spills {kernel.stack} bytes"
                    if dtype == torch.bfloat16:
                        assert TENSOR_CORES[arch] in kernel.ptx, f"{what} has no {TENSOR_CORES[arch]}"


if __name__ == "__main__":
    main()
