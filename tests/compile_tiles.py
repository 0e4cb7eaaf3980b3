"""Compile the launches of quadratic terms for GPUs that are not here, and look at what comes out: a script, run by a test.

Launches are recorded instead of run, and their arguments give the signatures that the just-in-time compiler would see.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # pytest imports this file too, to look for doctests
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssdops import masks as m
from ssdops.backends.base import Cotangents, bind
from ssdops.backends.triton import tiles
from ssdops.backends.triton.kernels import tiles as kernels
from ssdops.backends.triton.tile_mask import shared_memory
from ssdops.ir.problem import Target
from ssdops.plan import terms_of
from ssdops.testing.structures import Make

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
MASKS = {
    "window": lambda s: m.window(40, 40).strict(),
    "decay * window * documents": lambda s: m.decay(s.log()) * m.window(40) * s.cu,
    "decay * toeplitz": lambda s: m.decay(s.log()) * m.toeplitz(s.normal(s.nheads, 2 * s.seqlen - 1)),
    "dense": lambda s: m.dense(s.normal(1, 1, s.seqlen, s.seqlen)),
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


def typed(x: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The type of an argument as the compiler is told it."""
    if x is None or (isinstance(x, int) and x == 1):
        constants[path] = x
        return "constexpr"
    if isinstance(x, tuple):
        return tuple(typed(part, (*path, i), constants, attributes) for i, part in enumerate(x))
    if isinstance(x, float):
        return "fp32"
    if isinstance(x, torch.Tensor) or x % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "*" + TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32"


def compiled(launch: Launch, arch: int) -> tuple[Any, int]:
    """The kernel, and the bytes of a thread's registers that went to memory."""
    name, arguments, given = launch
    fn = getattr(kernels, name)
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    signature = {
        param.name: "i32" if param.do_not_specialize else typed(x, (i,), constants, attributes)
        for i, (param, x) in enumerate(zip(fn.params, arguments, strict=False))
    }
    for i, param in enumerate(fn.params):
        if param.name in given:
            signature[param.name], constants[i,] = "constexpr", given[param.name]
    options = {key: given[key] for key in ("num_warps", "num_stages")}
    source = ASTSource(fn, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return kernel, int(stack)


def main() -> None:
    """Compile everything; AssertionError for what does not fit."""
    for dtype, dims in ((torch.bfloat16, (128, 64)), (torch.bfloat16, (256, 256)), (torch.float32, (128, 64))):
        for name, mask in MASKS.items():
            make = Make(seqlen=256, dtype=dtype, dstate=dims[0], headdim=dims[1])
            for arch, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async")):
                for launch in launches(mask(make), make, arch):
                    kernel, stack = compiled(launch, arch)
                    what = f"{launch[0]} of {name}, {dtype}, dims {dims}, sm_{arch}"
                    print(what, kernel.metadata.shared, stack)
                    assert kernel.metadata.shared <= shared_memory((arch // 10, arch % 10)), f"shared memory of {what}"
                    assert dims[0] > 128 or stack <= A_FEW, f"{what} spills {stack} bytes"
                    if dtype == torch.bfloat16:
                        assert instruction in kernel.asm["ptx"], f"{what} has no {instruction}"


if __name__ == "__main__":
    main()
