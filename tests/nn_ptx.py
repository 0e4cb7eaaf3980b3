"""Compile the kernels beside the scan with no GPU, and print what became of them: a script, as the interpreter must be off."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from compiled import compiled
from torch import Tensor

from ssdops.backends.triton.calls import Kernel
from ssdops.nn import conv_triton, norm_triton, packing_triton, rates_triton, skip_triton
from ssdops.nn.conv_triton import Convolution
from ssdops.nn.norm_triton import Norm
from ssdops.nn.rates_triton import Rates
from ssdops.nn.skip_triton import Skip

LAUNCHES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []


def record(kernel: Any, grid: Any, tensors: Sequence[Tensor], numbers: Sequence[float], **constants: Any) -> None:
    """Instead of a launch."""
    LAUNCHES.append((kernel._fn, (*tensors, *numbers), constants))


def convolved(dtype: torch.dtype, width: int, packed: bool, entering: bool) -> None:
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
        conv_triton.windows_after(x, window, per_row, per_row, width - 1)
    if not packed:
        Convolution(x[:, :1], weight, bias, window, [], True).step()


def placed() -> None:
    """Where documents lie in 8 rows of 2048 tokens, by ids, and in one row, by boundaries; and where 1 is all that is given."""
    for size, batch, seqlen, per_row in (((8, 2048), 8, 2048, 16), ((17,), 1, 2048, 16), ((1, 1), 1, 1, 1), ((2,), 1, 1, 1)):
        given = torch.empty(size, dtype=torch.int32, device="meta")
        found = [(batch, seqlen)] * 2 + [(batch * per_row,)] * 2
        packing_triton.places(given, *(torch.empty(size, dtype=torch.int64, device="meta") for size in found))


def normed(channels: int) -> None:
    """Both kernels of the norm on 8 rows of 2048 tokens, with the skip connection."""
    wide = torch.empty(8, 2048, 2 * channels + 256 + channels // 64, dtype=torch.bfloat16, device="meta")
    y = torch.empty(8, 2048, channels, dtype=torch.bfloat16, device="meta")
    weight, D = torch.empty(channels, device="meta"), torch.empty(channels // 64, device="meta")
    norm = Norm(y, wide[..., :channels], weight, wide[..., channels : 2 * channels], D, 1e-5, 1, False)
    norm.forward()
    norm.backward(y)


def discretized(nheads: int) -> None:
    """Both kernels of `discretize` on 8 rows of 2048 tokens."""
    dt = torch.empty(8, 2048, 130 * nheads + 256, dtype=torch.bfloat16, device="meta")[..., -nheads:]
    A, bias, grads = (torch.empty(size, device="meta") for size in ((nheads,), (nheads,), dt.shape))
    rates = Rates(dt, A, bias, 0.0, math.inf, True, True, torch.float32)
    rates.forward()
    rates.backward(grads, grads)


def skipped(channels: int) -> None:
    """Both kernels of the skip connection and the gate, as `normed` has them."""
    wide = torch.empty(8, 2048, 2 * channels + 256 + channels // 64, dtype=torch.bfloat16, device="meta")
    y = torch.empty(8, 2048, channels, dtype=torch.bfloat16, device="meta")
    skip = Skip(y, wide[..., channels : 2 * channels], torch.empty(channels // 64, device="meta"), wide[..., :channels])
    skip.forward()
    skip.backward(y)


def facts(arch: int, of: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What became of each launch."""
    for fn, arguments, given in LAUNCHES:
        kernel = compiled(fn, arguments, given, arch)
        loads, stores = (re.findall(rf"{way}\.global\.(?:\w+\.)*v(\d)\.b32", kernel.ptx) for way in ("ld", "st"))
        yield {
            "sm": arch, "kernel": fn.__name__, **of, "registers": kernel.registers, "spilt": kernel.stack,
            "wide loads": len(loads), "wide stores": len(stores),
        }  # fmt: skip


def main() -> None:
    """A line of JSON for each kernel."""
    Kernel.__call__ = record
    for module in (conv_triton, norm_triton, rates_triton, skip_triton):
        module.processors = lambda device: 132
    for dtype, width, packed, entering, architectures in (
        (torch.bfloat16, 4, False, False, (80, 90)), (torch.bfloat16, 4, True, True, (80, 90)),
        (torch.bfloat16, 4, False, True, (90,)), (torch.float32, 4, False, False, (90,)),
        (torch.bfloat16, 8, True, False, (90,)),
    ):  # fmt: skip
        LAUNCHES.clear()
        convolved(dtype, width, packed, entering)
        of = {"dtype": str(dtype).removeprefix("torch."), "width": width, "packed": packed, "window": entering}
        for arch in architectures:
            for fact in facts(arch, of):
                print(json.dumps(fact))
    LAUNCHES.clear()
    placed()
    for arch in (80, 90):
        for fact in facts(arch, {}):
            print(json.dumps(fact))
    for around, sizes, architectures in (
        (normed, (1536, 5120), (80, 90)), (skipped, (1536,), (80, 90)), (skipped, (5120,), (90,)),
        (discretized, (24,), (80, 90)), (discretized, (80,), (90,)),
    ):  # fmt: skip
        for size in sizes:
            LAUNCHES.clear()
            around(size)
            for arch in architectures:
                for fact in facts(arch, {"heads" if around is discretized else "channels": size}):
                    print(json.dumps(fact))


if __name__ == "__main__":
    main()
