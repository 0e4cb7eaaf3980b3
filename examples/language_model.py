"""A Mamba-2 language model of bytes: trained on Python's standard library, measured on files that it has not seen.

The text is the source of whichever Python runs this; every twentieth file is held out. What counts is bits per byte there,
beside gzip, xz and the bigram model. Then the model writes on, a byte at a time by `step`.

    python examples/language_model.py                            # minutes on a CPU
    python examples/language_model.py --full --device cuda       # better than gzip and xz, in minutes on a GPU
"""

import argparse
import gzip
import json
import lzma
import math
import sysconfig
import time
from pathlib import Path

import torch
from environment import environment
from torch import nn
from torch.nn import functional as F

from ssdops.nn import Mamba2

SMALL = {"d_model": 128, "layers": 2, "dstate": 32, "length": 256, "batch": 16, "steps": 600, "rate": 4e-3, "held_out": 100_000}
FULL = {
    "d_model": 512,
    "layers": 8,
    "dstate": 128,
    "length": 1024,
    "batch": 32,
    "steps": 2000,
    "rate": 1e-3,
    "held_out": 1_000_000,
}


def read(root: Path, held_out: int) -> tuple[bytes, bytes]:
    """The training text, and at most that many bytes of held-out text, from the Python files of a folder."""
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = [file for file in sorted(root.rglob("*.py")) if not skipped & set(file.relative_to(root).parts)]
    texts = [file.read_bytes() for file in files]
    train = b"".join(text for at, text in enumerate(texts) if at % 20)
    return train, b"".join(texts[::20])[:held_out]


class Model(nn.Module):
    """Mamba-2 blocks with residual connections; the embedding of bytes is also what reads them off."""

    def __init__(self, sizes: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, sizes.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Mamba2(sizes.d_model, sizes.dstate) for _ in range(sizes.layers))
        self.norms = nn.ModuleList(nn.RMSNorm(sizes.d_model) for _ in range(sizes.layers + 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the byte after each, `(batch, length, 256)`."""
        return self.read_off(self.through(tokens, [None] * len(self.blocks), whole=True)[0])

    def through(self, tokens: torch.Tensor, caches: list, whole: bool) -> tuple[torch.Tensor, list]:
        """Hidden states and caches: of whole sequences `(batch, length)`, or a step `(batch,)` after what the caches have."""
        h, after = self.embedding(tokens), []
        for block, norm, cache in zip(self.blocks, self.norms, caches, strict=False):
            u = norm(h)
            y, cache = block(u, cache, return_cache=True) if whole else block.step(u, cache)
            h = h + y
            after.append(cache)
        return h, after

    def read_off(self, h: torch.Tensor) -> torch.Tensor:
        return self.norms[-1](h) @ self.embedding.weight.T

    @torch.no_grad()
    def write(self, prompt: bytes, count: int, temperature: float = 0.5) -> bytes:
        """The prompt in one call, and then a byte a step."""
        tokens = torch.tensor([list(prompt)], device=self.embedding.weight.device)
        h, caches = self.through(tokens, [None] * len(self.blocks), whole=True)
        h, written = h[:, -1], []
        for _ in range(count):
            token = torch.multinomial((self.read_off(h) / temperature).float().softmax(-1), 1)[:, 0]
            written.append(int(token))
            h, caches = self.through(token, caches, whole=False)
        return bytes(written)


def fit(model: Model, text: torch.Tensor, sizes: argparse.Namespace) -> float:
    """Train on random stretches of the text; the seconds that it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = 0.05 * sizes.steps
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm, 1.0) * (1 - step / sizes.steps))
    start = time.perf_counter()
    for step in range(1, sizes.steps + 1):
        at = torch.randint(len(text) - sizes.length, (sizes.batch, 1), device=text.device)
        stretch = text[at + torch.arange(sizes.length + 1, device=text.device)].long()
        with torch.autocast(sizes.device, torch.bfloat16, enabled=sizes.device == "cuda"):
            logits = model(stretch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), stretch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % max(1, sizes.steps // 10) == 0:
            bits = loss.item() / math.log(2)
            print(f"step {step:5}   {bits:.2f} bits per byte in training   {time.perf_counter() - start:.0f} s", flush=True)
    if sizes.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def bits_of(model: Model, text: torch.Tensor, length: int) -> float:
    """Bits per byte of the text, cut into stretches that begin with nothing before them."""
    total = 0.0
    for stretch in text.long().split(length):
        before = F.pad(stretch[:-1], (1, 0))[None]  # a zero byte begins each
        total += F.cross_entropy(model(before)[0].float(), stretch, reduction="sum").item()
    return total / len(text) / math.log(2)


def bigram_bits(train: torch.Tensor, text: torch.Tensor) -> float:
    """Bits per byte of the text by counts of pairs in the training text, one added to each."""
    counts = torch.bincount(train[:-1].long() * 256 + train[1:].long(), minlength=65536).view(256, 256) + 1.0
    bits = -(counts / counts.sum(1, keepdim=True)).log2()
    return bits[text[:-1].long(), text[1:].long()].mean().item()


def main() -> None:
    """Read, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="a model for a GPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--commit", help="the commit to name there")
    parser.add_argument("--text", type=Path, default=sysconfig.get_path("stdlib"), help="the folder of Python files to learn")
    for name, value in SMALL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"{value}, with --full {FULL[name]}")
    sizes = parser.parse_args()
    for name, value in (FULL if sizes.full else SMALL).items():
        setattr(sizes, name, getattr(sizes, name) or value)
    torch.manual_seed(0)
    train, held_out = read(Path(sizes.text), sizes.held_out)
    text, unseen = (torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (train, held_out))
    model = Model(sizes).to(sizes.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(train):,} bytes to train on, {len(held_out):,} held out; {count:,} parameters", flush=True)
    seconds = fit(model, text.to(sizes.device), sizes)
    bits = {
        "bigram": bigram_bits(text, unseen),
        "gzip": 8 * len(gzip.compress(held_out, 9)) / len(held_out),
        "xz": 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out),
        "xz after the training text": 8 * (len(lzma.compress(train + held_out)) - len(lzma.compress(train))) / len(held_out),
        "mamba2": bits_of(model, unseen.to(sizes.device), 4 * sizes.length),
    }
    for name, value in bits.items():
        print(f"{name:28}{value:.3f} bits per byte of held-out text")
    print(model.write(b"def main(", 400).decode("utf-8", "replace"))
    if sizes.json:
        settings = {name: getattr(sizes, name) for name in SMALL}
        about = {"environment": environment(sizes.device, sizes.commit), "seconds": {"training": seconds}}
        Path(sizes.json).write_text(json.dumps(about | {"sizes": settings, "bits_per_byte": bits}) + "\n")


if __name__ == "__main__":
    main()
