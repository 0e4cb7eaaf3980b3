"""What every rank of tests/test_distributed.py checks of `HeadsParallel`: alone, and with FSDP2 and checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from ssdops.errors import DtypeError, ShapeError
from ssdops.nn import HeadsParallel, Mamba2


class Model(nn.Module):
    """Two blocks with residuals."""

    def __init__(self, ngroups: int, checkpointed: bool = False, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = partial(Mamba2, 16, d_state=4, headdim=4, ngroups=ngroups, norm_groups=4, dtype=torch.float64, **options)
        self.layers = nn.ModuleList([make(), make()])
        self.checkpointed = checkpointed

    def forward(self, u: Tensor) -> Tensor:
        for layer in self.layers:
            u = u + (checkpoint(layer, u, use_reentrant=False) if self.checkpointed else layer(u))
        return u


def inputs(rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    u, dy = (torch.randn(rows, 9, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    return u, dy


def close(found: Tensor | None, wanted: Tensor | None, name: str) -> None:
    assert found is not None and wanted is not None
    found = found.full_tensor() if isinstance(found, DTensor) else found
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10, msg=lambda text: f"{name}: {text}")


def reference(ngroups: int, **options: bool) -> tuple[Model, Tensor, Tensor, Tensor]:
    """One process's model after a step, its input's gradient, its output before the step and after."""
    model, (u, dy) = Model(ngroups, **options), inputs()
    u.requires_grad_()
    y = model(u)
    y.backward(dy)
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert u.grad is not None
    return model, u.grad, y.detach(), model(u).detach()


def alone(rank: int, world: int, ngroups: int, **options: bool) -> None:
    """Outputs, gradients and what a step of an optimiser makes of the model are those of one process."""
    _, du, y, after = reference(ngroups, **options)
    mesh, model, (u, dy) = init_device_mesh("cpu", (world,)), Model(ngroups, **options), inputs()
    parallelize_module(model, mesh, {"layers.*": HeadsParallel()})
    assert model.layers[0].nheads == 8 // world
    u.requires_grad_()
    found = model(u)
    found.backward(dy)
    close(found, y, "y")
    close(u.grad, du, "the gradient of u")
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    close(model(u), after, "y after a step")


def composed(rank: int, world: int, ngroups: int) -> None:
    """Tensor parallel over two ranks, FSDP2 over the others with rows of the batch split, every block checkpointed."""
    _, _, y, after = reference(ngroups)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model, (u, dy) = Model(ngroups, checkpointed=True), inputs()
    parallelize_module(model, mesh["tp"], {"layers.*": HeadsParallel()})
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    at = mesh["dp"].get_local_rank()
    mine = slice(2 * at, 2 * at + 2) if world == 4 else slice(0, 4)
    found = model(u[mine])
    close(found, y[mine], "y")
    found.backward(dy[mine] * (world // 2))  # FSDP2 takes the mean over its ranks
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    close(model(u[mine]), after[mine], "y after a step")


def communicates_once(rank: int, world: int) -> None:
    """One all-reduce per block forward; backward one more, and one per parameter with shared rows where groups are shared."""
    for ngroups, least in ((world, 1), (1, 4)):
        mesh, (u, dy) = init_device_mesh("cpu", (world,)), inputs()
        model = parallelize_module(Model(ngroups), mesh, {"layers.*": HeadsParallel()})
        counts = []
        plain = dist.all_reduce

        def counting(
            *args: object, counts: list[int] = counts, plain: Callable[..., object] = plain, **kwargs: object
        ) -> object:
            counts.append(1)
            return plain(*args, **kwargs)

        dist.all_reduce = counting  # type: ignore[assignment]
        try:
            y = model(u.requires_grad_())
            assert len(counts) == 2, len(counts)
            y.backward(dy)
            assert len(counts) == 2 + 2 * least, len(counts)
        finally:
            dist.all_reduce = plain


def refused(rank: int, world: int) -> None:
    """What does not divide says so."""
    mesh = init_device_mesh("cpu", (world,))
    blocks = {
        "nheads=3": Mamba2(12, d_state=4, headdim=8, norm_groups=1), "ngroups=3": Mamba2(24, d_state=4, headdim=4, ngroups=3),
        "groups=1 of the norm": Mamba2(16, d_state=4, headdim=4),
    }  # fmt: skip
    for text, module in blocks.items():
        try:
            parallelize_module(module, mesh, HeadsParallel())
        except ShapeError as error:
            assert text in str(error), str(error)
        else:
            raise AssertionError(f"{text} was split")
    try:
        parallelize_module(nn.Linear(2, 2), mesh, HeadsParallel())
    except DtypeError as error:
        assert "Linear" in str(error)
    else:
        raise AssertionError("a linear layer was split")


CHECKS: dict[str, Callable[[int, int], None]] = {
    **{f"{ngroups} groups": partial(alone, ngroups=ngroups) for ngroups in (1, 2, 4, 8)},
    "biases, D per channel": partial(alone, ngroups=1, bias=True, D_has_hdim=True),
    "no norm": partial(alone, ngroups=2, rmsnorm=False),
    **{f"with FSDP2 and checkpointing, {ngroups} groups": partial(composed, ngroups=ngroups) for ngroups in (1, 2)},
    "all-reduces": communicates_once, "refused": refused,
}  # fmt: skip
