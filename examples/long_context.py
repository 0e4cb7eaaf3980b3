"""A small model learns one long text that is split over ranks: `torchrun --nproc-per-node=2 examples/long_context.py`.

The text is the standard library's own sources, one after another, as bytes. Each rank has a slice of them, and of every
activation; the blocks' convolutions and scans reach over the slices' ends, so that the model is that of the whole text.
Parameters are the same on all ranks, and their gradients are summed. On GPUs it runs over NCCL, elsewhere over gloo.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ssdops.nn import Mamba2


class Model(nn.Module):
    """Bytes → logits of the next byte."""

    def __init__(self, d_model: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, d_model)
        self.blocks = nn.ModuleList(Mamba2(d_model, d_state=32, headdim=32) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(layers))
        self.head = nn.Linear(d_model, 256)

    def forward(self, text: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        x = self.embedding(text)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x), group=group)
        return self.head(x)


def read(count: int) -> Tensor:
    """The first bytes of Python's standard library, file by file."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) > count:
            break
    return torch.tensor(list(text[: count + 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of the whole text (default: 16384)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    text = read(options.tokens)
    total = len(text) - 1
    start, stop = total * rank // world, total * (rank + 1) // world
    given, wanted = text[None, start:stop].to(device), text[start + 1 : stop + 1].to(device)

    torch.manual_seed(0)  # the same parameters everywhere
    model = Model(options.d_model, options.layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(options.steps):
        loss = F.cross_entropy(model(given, dist.group.WORLD)[0], wanted, reduction="sum") / total
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        dist.all_reduce(whole := loss.detach())
        if rank == 0 and (step % 4 == 3 or step == 0):
            print(f"step {step + 1:3d}: {float(whole):.3f} nats a byte, {total} bytes on {world} ranks", flush=True)
    dist.barrier()  # a rank that leaves early takes its connections with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
