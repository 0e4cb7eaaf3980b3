"""Compile the convolution's kernels with no GPU, and print what became of them: a script, as the interpreter must be off."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from compiled import compiled
from torch import Tensor

from ssdops.backends.triton.calls import Kernel
from ssdops.nn import conv_triton
from ssdops.nn.conv_triton import Convolution

LAUNCHES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []


def record(kernel: Any, grid: Any, tensors: Sequence[Tensor], numbers: Sequence[float], **constants: Any) -> None:
    """Instead of a launch."""
    LAUNCHES.append((kernel._fn, (*tensors, *numbers), constants))


def launched(dtype: torch.dtype, width: int, packed: bool, entering: bool) -> None:
    """Every kernel on 8 rows of 2048 tokens, a slice of a projection's output as mamba2-130m has it, with all switches on."""
    x = torch.empty(8, 2048, 3352, dtype=dtype, device="meta")[..., 1536:3328]
    weight, bias = torch.empty(x.shape[2], width, device="meta"), torch.empty(x.shape[2], device="meta")
    window = torch.empty(16 if packed else 8, x.shape[2], width - 1, dtype=dtype, device="meta")
    per_token, per_row = (torch.empty(size, dtype=torch.int64, device="meta") for size in ((8, 2048), (16,)))
    documents = [per_token, per_token, per_row, per_row] if packed else []
    c = Convolution(x, weight, bias, window if entering else None, documents, True)
    c.forward()
    c.backward(torch.empty(x.shape, dtype=dtype, device="meta"))
    if packed and entering:
        c.backward_window(torch.empty(x.shape, dtype=dtype, device="meta"))
    if not packed:
        Convolution(x[:, :1], weight, bias, window, [], True).step()


if __name__ == "__main__":
    Kernel.__call__ = record
    conv_triton._processors = lambda device: 132
    for dtype, width, packed, entering, architectures in (
        (torch.bfloat16, 4, False, False, (80, 90)), (torch.bfloat16, 4, True, True, (80, 90)),
        (torch.bfloat16, 4, False, True, (90,)), (torch.float32, 4, False, False, (90,)),
        (torch.bfloat16, 8, True, False, (90,)),
    ):  # fmt: skip
        LAUNCHES.clear()
        launched(dtype, width, packed, entering)
        for arch in architectures:
            for fn, arguments, given in LAUNCHES:
                kernel = compiled(fn, arguments, given, arch)
                bits = 4 * 8 * dtype.itemsize  # of a thread's four channels
                vector = {64: r"v2\.b32", 128: r"v4\.b32"}[bits]
                fact = {
                    "sm": arch, "kernel": fn.__name__, "dtype": str(dtype).removeprefix("torch."), "width": width,
                    "packed": packed, "window": entering, "registers": kernel.registers, "spilt": kernel.stack,
                    "wide loads": len(re.findall(rf"ld\.global\.{vector}", kernel.ptx)),
                    "wide stores": len(re.findall(rf"st\.global\.{vector}", kernel.ptx)),
                }  # fmt: skip
                print(json.dumps(fact))
