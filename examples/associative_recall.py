"""Multi-query associative recall: how many pairs a state of each size holds, beside attention.

A sequence begins with key-value pairs; later some of its tokens are those keys again, in random order among random tokens, and
at each the model is to say the key's value (Arora et al. 2023, "Zoology", whose generator this follows). Attention looks the
pair up; a scan has to have it in its state, `headdim × dstate` a head.

    python examples/associative_recall.py                            # a small task, minutes on a CPU
    python examples/associative_recall.py --full --device cuda       # 64 pairs in 512 tokens, three seeds
    python examples/associative_recall.py --plot recall.png          # draws the results, with matplotlib
"""

import argparse
import json
import time
from pathlib import Path

import torch
from environment import environment
from torch import nn
from torch.nn import functional as F

from ssdops.nn import Mamba2, causal_conv1d

SMALL = {"vocab": 64, "pairs": 8, "length": 48, "d_model": 64, "batch": 32, "steps": 400, "rate": 3e-3, "seeds": 1}
FULL = {"vocab": 512, "pairs": 64, "length": 512, "d_model": 128, "batch": 128, "steps": 1500, "rate": 3e-3, "seeds": 3}
MODELS = {"dstate 16": 16, "dstate 64": 64, "dstate 128": 128, "attention": None}


def recall(rows: int, pairs: int, task: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens `(rows, length)`, where the keys come again `(rows, pairs)`, and the values to say there, alike."""
    half, space, device = task.vocab // 2, (task.length - 2 * pairs) // 2, task.device
    keys = torch.rand(rows, half - 1, device=device).topk(pairs).indices + 1  # no key twice
    values = torch.randint(half, task.vocab, (rows, pairs), device=device)
    near = torch.arange(1, space + 1, device=device).float() ** (0.01 - 1)  # most queries soon after the pairs
    at = 2 * pairs + 2 * torch.multinomial(near.expand(rows, -1), pairs)
    tokens = torch.randint(task.vocab, (rows, task.length), device=device)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], -1).flatten(1)
    return tokens.scatter(1, at, keys), at, values


class Attention(nn.Module):
    """Causal softmax attention of four heads, after the same short convolution as a Mamba-2 block has."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.conv1d = nn.Conv1d(3 * d_model, 3 * d_model, 4, groups=3 * d_model)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        qkv = causal_conv1d(self.qkv(u), self.conv1d.weight[:, 0], self.conv1d.bias)
        q, k, v = qkv.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Recaller(nn.Module):
    """Two mixers of tokens, and nothing between them; attention is told positions, a scan has its order."""

    def __init__(self, task: argparse.Namespace, dstate: int | None) -> None:
        super().__init__()
        d_model = task.d_model
        self.tokens = nn.Embedding(task.vocab, d_model)
        self.positions = nn.Embedding(task.length, d_model) if dstate is None else None
        # Recall wants memory: states begin by hardly decaying, and by taking tokens in at full weight.
        held = {"headdim": 32, "A_init_range": (0.01, 0.1), "dt_min": 0.1, "dt_max": 1.0}
        make = (lambda: Attention(d_model)) if dstate is None else (lambda: Mamba2(d_model, dstate, **held))
        self.mixers = nn.ModuleList(make() for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(3))
        self.head = nn.Linear(d_model, task.vocab, bias=False)

    def forward(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Logits at some of the tokens, `(rows, pairs, vocab)`."""
        h = self.tokens(tokens)
        if self.positions is not None:
            h = h + self.positions.weight
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            h = h + mixer(norm(h))
        h = self.norms[-1](h).gather(1, at[..., None].expand(-1, -1, h.shape[-1]))
        return self.head(h)


def train(task: argparse.Namespace, dstate: int | None, seed: int) -> list[tuple[int, float]]:
    """(step, accuracy) along the training; every batch is new, and half of them have fewer pairs, which are learnt first."""
    torch.manual_seed(seed)
    model = Recaller(task, dstate).to(task.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.1)
    warm = 0.05 * task.steps
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm, 1.0) * (1 - step / task.steps))
    curve = []
    for step in range(1, task.steps + 1):
        pairs = task.pairs >> (0, 0, 1, 2)[step % 4]
        tokens, at, values = recall(task.batch, pairs, task)
        with torch.autocast(task.device, torch.bfloat16, enabled=task.device == "cuda"):
            logits = model(tokens, at)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), values.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % max(1, task.steps // 20) == 0:
            curve.append((step, accuracy(model, task)))
    return curve


@torch.no_grad()
def accuracy(model: Recaller, task: argparse.Namespace) -> float:
    """The share of values said right, in new sequences with all of the pairs."""
    hits = []
    for _ in range(4):
        tokens, at, values = recall(task.batch, task.pairs, task)
        with torch.autocast(task.device, torch.bfloat16, enabled=task.device == "cuda"):
            hits.append((model(tokens, at).argmax(-1) == values).float().mean())
    return torch.stack(hits).mean().item()


def plot(results: dict, path: str) -> None:
    """A line a seed, in the colour of its model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for colour, (name, curves) in enumerate(results["accuracy"].items()):
        for seed, curve in enumerate(curves):
            axes.plot(*zip(*curve, strict=True), color=f"C{colour}", label=None if seed else name)
    task = results["task"]
    axes.set(
        xlabel="training step", ylabel="accuracy", ylim=(0, 1.02), title=f"{task['pairs']} pairs in {task['length']} tokens"
    )
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """One run for every model and seed, or the drawing of earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the harder task, for a GPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", default="recall.json", help="where results are written, and drawn from")
    parser.add_argument("--commit", help="the commit to name there")
    parser.add_argument("--plot", metavar="PNG", help="draw what --json has, and train nothing")
    for name, value in SMALL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"{value}, with --full {FULL[name]}")
    task = parser.parse_args()
    if task.plot:
        return plot(json.loads(Path(task.json).read_text()), task.plot)
    for name, value in (FULL if task.full else SMALL).items():
        setattr(task, name, getattr(task, name) or value)
    about = {"environment": environment(task.device, task.commit), "seconds": {}}
    results = about | {"task": {name: getattr(task, name) for name in SMALL}, "accuracy": {}}
    for name, dstate in MODELS.items():
        start = time.perf_counter()
        curves = results["accuracy"][name] = [train(task, dstate, seed) for seed in range(task.seeds)]
        last = ", ".join(f"{curve[-1][1]:.3f}" for curve in curves)
        seconds = results["seconds"][name] = time.perf_counter() - start
        print(f"{name:11} accuracy {last}   ({seconds:.0f} s)", flush=True)
        Path(task.json).write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
