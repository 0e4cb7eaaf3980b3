"""Compile kernels for GPUs that are not here, and read what comes out: resources, and the instructions of the PTX.

For scripts that tests run with the interpreter off (`TRITON_INTERPRET=0` before triton is imported).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]
OPTIONS = ("num_warps", "num_stages", "maxnreg")
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""Architecture → the instruction that feeds its tensor cores best."""


@dataclass(frozen=True)
class Compiled:
    """A kernel for an architecture."""

    kernel: Any

    @property
    def ptx(self) -> str:
        """Its PTX."""
        return self.kernel.asm["ptx"]

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a program."""
        return self.kernel.metadata.shared

    @cached_property
    def usage(self) -> dict[str, int]:
        """What the assembler says of a thread: REG is registers, STACK and LOCAL bytes that did not fit there."""
        text = self._read("cuobjdump", "--dump-resource-usage")
        return {name: int(x) for name, x in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}

    @property
    def reloads(self) -> int:
        """Instructions that read registers back from memory, in the loops around products: each turn waits for them."""
        if not self.stack:
            return 0
        lines = self._read("nvdisasm", "-c").splitlines()
        labels = {found[1]: at for at, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
        jumps = ((found[1], at) for at, line in enumerate(lines) if (found := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)))
        loops = [range(labels[name], at) for name, at in jumps if labels.get(name, at) < at]
        hot = {at for loop in loops if any("MMA" in lines[at] for at in loop) for at in loop}
        return sum("LDL" in lines[at] for at in hot)

    def _read(self, tool: str, option: str) -> str:
        """What a tool that comes with Triton says of the binary."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            command = [str(Path(triton.__file__).parent / "backends/nvidia/bin" / tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self.usage["REG"]

    @property
    def stack(self) -> int:
        """Bytes of a thread's registers that went to memory."""
        return self.usage["STACK"] + self.usage["LOCAL"]

    @property
    def tensor_memory(self) -> int:
        """Columns of tensor memory of a program, of sm_100 and later."""
        return getattr(self.kernel.metadata, "tmem_size", None) or 0

    @property
    def tensor_cores(self) -> str:
        """The instructions of tensor cores that the PTX has, or a dash."""
        return ",".join(name for name in TENSOR_CORES.values() if name in self.ptx) or "-"


def build(
    fn: Any,
    signature: Mapping[str, Any],
    constants: Mapping[Any, Any],
    attributes: Mapping[Any, Any],
    arch: int,
    options: Mapping[str, Any],
) -> Compiled:
    """The kernel of a signature, for sm_{arch}."""
    source = (GluonASTSource if fn.is_gluon() else ASTSource)(fn, dict(signature), dict(constants), dict(attributes))
    return Compiled(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options)))


def compiled(fn: Any, arguments: Sequence[Any], given: Mapping[str, Any], arch: int) -> Compiled:
    """The kernel that a launch with these arguments and keywords runs on sm_{arch}."""
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    signature = {
        param.name: "i32" if param.do_not_specialize else _typed(x, (i,), constants, attributes)
        for i, (param, x) in enumerate(zip(fn.params, arguments, strict=False))
    }
    for i, param in enumerate(fn.params):
        if param.name in given:
            signature[param.name], constants[i,] = "constexpr", given[param.name]
    options = {key: given[key] for key in OPTIONS if given.get(key) is not None}
    return build(fn, signature, constants, attributes, arch, options)


def _typed(x: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The type of an argument as the just-in-time compiler sees it."""
    if x is None or (isinstance(x, int) and x == 1):
        constants[path] = x
        return "constexpr"
    if isinstance(x, tuple):
        return tuple(_typed(part, (*path, i), constants, attributes) for i, part in enumerate(x))
    if isinstance(x, float):
        return "fp32"
    if isinstance(x, torch.Tensor) or x % 16 == 0:
        attributes[path] = ALIGNED
    return "*" + TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32"
