"""What every rank of tests/test_distributed.py checks of `nn.Mamba2` on slices of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssdops.errors import RankError, ShapeError, UnsupportedError
from ssdops.nn import Mamba2

Packing = Callable[[int, int], dict[str, Any]]
"""The arguments that say how tokens [start, stop) of 24 are packed."""
IDS = torch.tensor([[0] * 5 + [1] * 2 + [3] * 11 + [4] * 6])
CU = torch.tensor([0, 5, 5, 7, 18, 24])
PACKINGS: dict[str, Packing] = {
    "one document": lambda start, stop: {},
    "segment_ids": lambda start, stop: {"segment_ids": IDS[:, start:stop], "n_segments": 6},
    "cu_seqlens": lambda start, stop: {"cu_seqlens": (CU - start).clamp(0, stop - start)},
}


def block() -> Mamba2:
    torch.manual_seed(0)
    return Mamba2(16, d_state=8, headdim=8, ngroups=2, dtype=torch.float64)


def slices(rank: int, world: int, packing: str, lengths: dict[int, list[int]]) -> None:
    """Y, and the gradients of u and of every parameter, are those of the whole; halos reach over slices that are short."""
    start, stop = list(pairwise(accumulate(lengths[world], initial=0)))[rank]
    whole, mine, generator = block(), block(), torch.Generator().manual_seed(1)
    u, dy = (torch.randn(1, 24, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    of_whole, of_slice = u.clone().requires_grad_(), u[:, start:stop].clone().requires_grad_()
    y = whole(of_whole, **PACKINGS[packing](0, 24))
    y.backward(dy)
    part = mine(of_slice, group=dist.group.WORLD, **PACKINGS[packing](start, stop))
    part.backward(dy[:, start:stop])

    def close(found: Tensor | None, wanted: Tensor | None, name: str) -> None:
        assert found is not None and wanted is not None
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10, msg=lambda text: f"{name}: {text}")

    close(part, y[:, start:stop], "y")
    assert of_whole.grad is not None
    close(of_slice.grad, of_whole.grad[:, start:stop], "the gradient of u")
    for (name, wanted), found in zip(whole.named_parameters(), mine.parameters(), strict=True):
        assert found.grad is not None
        dist.all_reduce(found.grad)
        close(found.grad, wanted.grad, f"the gradient of {name}")


def bad_input(rank: int, world: int) -> None:
    """An input that fits no block on one rank is an error on all."""
    u = torch.zeros(1, 4, 16 + (rank == 1), dtype=torch.float64)
    try:
        block()(u, group=dist.group.WORLD)
    except (RankError, ShapeError) as error:
        assert f"rank 1 of {world}" in str(error) and "(1, 4, 17)" in str(error)
    else:
        raise AssertionError("a bad input ran")


def caches(rank: int, world: int) -> None:
    """Caches are refused."""
    try:
        block()(torch.zeros(1, 4, 16, dtype=torch.float64), return_cache=True, group=dist.group.WORLD)
    except UnsupportedError as error:
        assert "leave group out" in str(error)
    else:
        raise AssertionError("a cache was given")


EVEN, SHORT = {2: [10, 14], 4: [6, 6, 6, 6]}, {2: [1, 23], 4: [1, 0, 1, 22]}
CHECKS: dict[str, Callable[[int, int], None]] = {
    **{f"{name}, even": partial(slices, packing=name, lengths=EVEN) for name in PACKINGS},
    **{f"{name}, short": partial(slices, packing=name, lengths=SHORT) for name in PACKINGS},
    "bad input": bad_input, "caches": caches,
}  # fmt: skip
