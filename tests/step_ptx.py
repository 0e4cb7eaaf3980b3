"""Compile the decode kernel with no GPU, and print what became of it: a script, as the interpreter must be off for it."""

from __future__ import annotations

import json
import re
from typing import Any

from compiled import ALIGNED, Compiled, build

from ssdops.backends.triton.kernels.step import step_kernel
from ssdops.backends.triton.step import Strided, tile_of

NAMES = step_kernel.arg_names


def compiled(capability: int, state: str, tokens: int) -> tuple[Compiled, int]:
    """A step of 64 rows of 80 heads, headdim 64, dstate 128, from a pool; and the tile's bytes."""
    itemsize = 4 if state == "fp32" else 2
    tile = tile_of(64 * 80, 64, 128, itemsize, 132)
    sizes = {"NHEADS": 80, "HEADDIM": 64, "DSTATE": 128, "BLOCK_P": tile.block_p, "BLOCK_N": tile.block_n}
    given: dict[str, Any] = {**sizes, "DECAY_AT": "first", "READ_FIRST": False, **({"tokens": 1} if tokens == 1 else {})}
    signature: dict[str, Any] = dict.fromkeys(NAMES, "constexpr")
    constants: dict[Any, Any] = {(i,): given.get(name) for i, name in enumerate(NAMES)}
    attributes: dict[Any, Any] = {}

    def pointer(name: str, kind: str, strides: str | None) -> None:
        at = NAMES.index(name)
        del constants[(at,)]
        if strides is None:
            signature[name], attributes[(at,)] = kind, ALIGNED
            return
        fields = [kind, *("i32" if one == "i" else "constexpr" for one in strides)]
        signature[name] = Strided(*fields)
        attributes.update({(at, i): ALIGNED for i, field in enumerate(fields) if field != "constexpr"})
        constants.update({(at, i): int(strides[i - 1]) for i, field in enumerate(fields) if field == "constexpr"})

    for name in ("q", "k", "v", "log_a"):
        pointer(name, "*fp32" if name == "log_a" else "*bf16", "iii011")
    for name in ("before", "after"):
        pointer(name, f"*{state}", "i0ii11")
    pointer("slots", "*i64", "100001")
    pointer("y", "*bf16", None)
    if tokens > 1:
        pointer("every", f"*{state}", None)
    for name, kind in (("n_slots", "i32"), ("scale", "fp32"), *((("tokens", "i32"),) if tokens > 1 else ())):
        signature[name] = kind
        del constants[(NAMES.index(name),)]
    kernel = build(step_kernel, signature, constants, attributes, capability, {"num_warps": tile.warps})
    return kernel, tile.block_p * tile.block_n * itemsize


if __name__ == "__main__":
    for capability, state, tokens in ((90, "fp32", 1), (90, "bf16", 1), (90, "fp32", 4), (80, "fp32", 1)):
        kernel, size = compiled(capability, state, tokens)
        loads, stores = (len(re.findall(rf"{way}\.global\.v4", kernel.ptx)) for way in ("ld", "st"))
        fact = {
            "sm": capability, "state": state, "registers": kernel.registers, "spilt": kernel.stack, "shared": kernel.shared,
            "threads": kernel.kernel.metadata.num_warps * 32, "state bytes": size, "wide loads": loads,
            "wide stores": stores if tokens == 1 else stores // 2,  # each state after each token too
        }  # fmt: skip
        print(json.dumps(fact))
