"""What every rank of tests/test_distributed.py checks of `ssd` on DTensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from ssdops import masks, ssd
from ssdops.distributed.sharding import register_dtensor
from ssdops.errors import UnsupportedError
from ssdops.masks import Mask

BATCH, SEQLEN, NHEADS, DSTATE, HEADDIM = 4, 7, 8, 3, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(groups: int) -> dict[str, Tensor]:
    """q and k of some groups of heads, and operands per token, per head, and per token with one head."""
    per_token = (BATCH, SEQLEN, NHEADS)
    return {
        "q": normal(BATCH, SEQLEN, groups, DSTATE), "k": normal(BATCH, SEQLEN, groups, DSTATE, seed=1),
        "v": normal(*per_token, HEADDIM, seed=2), "log_a": -normal(*per_token, seed=3).abs(),
        "log_gamma": -normal(NHEADS, seed=4).abs(), "w": normal(BATCH, SEQLEN, 1, seed=5), "d": normal(*per_token, seed=6),
        "state": normal(BATCH, NHEADS, HEADDIM, DSTATE, seed=7), "other": normal(BATCH, NHEADS, HEADDIM, DSTATE, seed=8),
    }  # fmt: skip


def run(x: dict[str, Tensor]) -> list[Tensor]:
    mask: Mask = (masks.decay(x["log_a"]) * masks.retention(x["log_gamma"])).scale(cols=x["w"])
    mask = mask + masks.decay(x["log_a"]).strict().T + masks.diagonal(x["d"])
    y, states = ssd(x["q"], x["k"], x["v"], mask, initial_state=(x["state"], x["other"]), return_state=True)
    return [y, *states]


def place(mesh: DeviceMesh, name: str, x: Tensor, kinds: tuple[str, ...]) -> DTensor:
    """The tensor, sharded as the kinds say where it has the axis."""
    heads = {"q": 2, "k": 2, "v": 2, "log_a": 2, "log_gamma": 0, "d": 2, "state": 1, "other": 1}.get(name)
    heads = None if heads is None or x.shape[heads] == 1 else heads
    places: list[Placement] = []
    for kind in kinds:
        axis = 0 if kind == "batch" and name != "log_gamma" else heads if kind == "heads" else None
        places.append(Replicate() if axis is None else Shard(axis))
    return distribute_tensor(x, mesh, places)


def sharded(rank: int, world: int, kinds: tuple[str, ...], groups: int) -> None:
    """Outputs lie where inputs do, and they and all gradients are those of whole tensors."""
    register_dtensor()
    shape = (world,) if len(kinds) == 1 else (2, world // 2)
    mesh, given = init_device_mesh("cpu", shape), tensors(groups)
    whole = {name: x.clone().requires_grad_() for name, x in given.items()}
    parts = {name: place(mesh, name, x, kinds).requires_grad_() for name, x in given.items()}
    expected, found = run(whole), run(dict(parts))
    expected_of_y = {"batch": Shard(0), "heads": Shard(2), "nothing": Replicate()}
    assert isinstance(found[0], DTensor) and found[0].placements == tuple(expected_of_y[kind] for kind in kinds)
    cotangents = [normal(*x.shape, seed=20 + i) for i, x in enumerate(expected)]
    wanted = torch.autograd.grad(expected, list(whole.values()), cotangents)
    of_parts = [distribute_tensor(c, mesh, [Replicate()] * len(kinds)) for c in cotangents]
    grads = torch.autograd.grad(found, list(parts.values()), of_parts)
    for name, x, y in zip(("y", "state", "other", *given), (*found, *grads), (*expected, *wanted), strict=True):
        assert isinstance(x, DTensor), name
        torch.testing.assert_close(x.full_tensor(), y, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def refused(rank: int, world: int) -> None:
    """Shards along the tokens, and heads that do not divide, say so."""
    register_dtensor()
    mesh, x = init_device_mesh("cpu", (world,)), tensors(1)
    by_tokens = {name: distribute_tensor(x[name], mesh, [Shard(1)]) for name in ("q", "k", "v")}
    three = distribute_tensor(normal(2, 4, 3, 2), mesh, [Shard(2)])
    for q, k, v in (tuple(by_tokens.values()), (three, three, three)):
        try:
            ssd(q, k, v)
        except (UnsupportedError, RuntimeError) as error:
            assert "distributed.ssd" in str(error) or "do not divide" in str(error), str(error)
        else:
            raise AssertionError("it ran")


CHECKS: dict[str, Callable[[int, int], None]] = {
    **{
        f"{' × '.join(kinds)}, {groups} groups": partial(sharded, kinds=kinds, groups=groups)
        for kinds in (("heads",), ("batch",), ("nothing",), ("batch", "heads"))
        for groups in (1, 4)
    },
    "refused": refused,
}  # fmt: skip
