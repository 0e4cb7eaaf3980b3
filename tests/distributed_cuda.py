"""What every rank of tests/test_cuda_distributed.py checks: a slice on a GPU each, over NCCL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from distributed_scan import MORE, structure
from torch import Tensor

from ssdops import distributed, masks, ssd
from ssdops.errors import DeviceError, RankError
from ssdops.masks import Mask
from ssdops.testing.structures import STRUCTURES, Make

NAMES = (
    "decay", "causal", "retention", "scale T", "semiseparable", "quasiseparable", "decay * documents(cu_seqlens)",
    "decay * documents(segment_ids)", "trapezoidal(beta)", "trapezoidal reverse", "channel_decay(dt, A)",
)  # fmt: skip
LONG: dict[str, Callable[[Tensor, int], Mask]] = {
    "decay": lambda log_a, start: masks.decay(log_a),
    "both directions": lambda log_a, start: masks.decay(log_a) + masks.decay(log_a.flip(2)).strict().T,
    "documents": lambda log_a, start: masks.decay(log_a) * _documents(log_a, start),
}


DTYPES = (torch.bfloat16, torch.float32)


def _documents(x: Tensor, start: int) -> Mask:
    """Three documents, the last two of which span ranks; of a slice that begins there."""
    ends = torch.tensor([0, 1000, 5000, 9001], device=x.device)
    return masks.documents((ends - start).clamp(0, x.shape[1]))


def long(rank: int, world: int, name: str, dtype: torch.dtype) -> None:
    """Slices of many chunks, so that the scan runs in segments: as near to float64 as what one GPU gives of the whole."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, 9001, *shape, device="cuda", generator=generator)

    q, k, v = normal(1, 128).to(dtype), normal(1, 128).to(dtype), normal(4, 64).to(dtype)
    log_a, dy = -0.002 * normal(4).abs(), normal(4, 64).to(dtype)
    at = slice(9001 * rank // world, 9001 * (rank + 1) // world)

    def results(run: Callable[..., Any], inputs: list[Tensor], dy: Tensor, start: int) -> tuple[list[Tensor], list[Tensor]]:
        """By token, Y and gradients; and the final states."""
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, states = run(*leaves[:3], LONG[name](leaves[3], start), return_state=True)
        return [y, *torch.autograd.grad(y, leaves, dy)], list(states) if isinstance(states, tuple) else [states]

    inputs = [q, k, v, log_a]
    exact, exact_states = results(partial(ssd, backend="chunked"), [x.double() for x in inputs], dy.double(), 0)
    alone, alone_states = results(ssd, inputs, dy, 0)
    found, found_states = results(distributed.ssd, [x[:, at] for x in inputs], dy[:, at], at.start)
    rows = zip(
        [*found, *found_states], [*(x[:, at] for x in alone), *alone_states], [*(x[:, at] for x in exact), *exact_states],
        strict=True,
    )  # fmt: skip
    for what, (x, one, z) in enumerate(rows):
        error, own, size = ((t.double() - u).norm().item() for t, u in ((x, z), (one, z), (z, torch.zeros_like(z))))
        assert error <= 2 * own + torch.finfo(torch.float32).eps * size, (
            f"result {what}: off by {error:.2e}, and {own:.2e} alone"
        )


def again(rank: int, world: int) -> None:
    """Calls in a row, of which each is under way while the one before is not yet done, do not see one another's states."""
    slices = [torch.randn(1, 4096, 4, 64, device="cuda") for _ in range(3)]
    log_a = torch.full((1, 4096, 4), -1e-3, device="cuda")
    alone = []
    for x in slices:
        alone.append(distributed.ssd(x, x, x, masks.decay(log_a)))
        torch.cuda.synchronize()
    together = [distributed.ssd(x, x, x, masks.decay(log_a)) for x in slices * 4]
    for x, y in zip(alone * 4, together, strict=True):
        assert torch.equal(x, y)


def of_a_cpu(rank: int, world: int) -> None:
    """NCCL moves no tensor of a CPU, and says so on every rank before anything moves."""
    x = torch.randn(1, 5, 2, 4)
    try:
        distributed.ssd(x, x, x)
    except DeviceError as error:
        assert f"rank {rank} of {world}" in str(error) and "'nccl' moves none of cpu" in str(error)
    else:
        raise AssertionError("tensors of a CPU ran")


def unlike(rank: int, world: int) -> None:
    """A slice of another shape is named on every rank, and the next call goes well."""
    x = torch.randn(1, 64, 3 if rank == 1 else 2, 16, device="cuda")
    try:
        distributed.ssd(x, x, x)
    except RankError as error:
        assert f"rank 1 of {world}" in str(error) and "(1, 64, 3, 16)" in str(error)
    else:
        raise AssertionError("unlike slices ran")
    x = x[:, :, :2]
    assert distributed.ssd(x, x, x).shape == x.shape


def halves(rank: int, world: int) -> None:
    """A group of some of the ranks."""
    groups = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]
    x = torch.randn(1, 128, 2, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    at = slice(64 * (rank % 2), 64 * (rank % 2) + 64)
    y = distributed.ssd(x[:, at], x[:, at], x[:, at], group=groups[rank // 2])
    whole = ssd(x, x, x)
    assert (y - whole[:, at]).norm() <= 1e-5 * whole.norm()


def of_structure(rank: int, world: int, name: str) -> None:
    """One structure against the oracle, in float32."""
    structure(rank, world, name, Make(seqlen=150, headdim=16, dstate=16, dtype=torch.float32), device="cuda")


CHECKS: dict[str, Callable[[int, int], None]] = {
    **{name: partial(of_structure, name=name) for name in NAMES if name in {**STRUCTURES, **MORE}},
    **{f"{name}, long, {dtype}": partial(long, name=name, dtype=dtype) for name in LONG for dtype in DTYPES},
    "again": again, "of a CPU": of_a_cpu, "unlike slices": unlike, "halves": halves,
}  # fmt: skip
