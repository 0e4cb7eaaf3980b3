"""Whole Mamba-2 models on a GPU, with ssdops' scan and with mamba_ssm's: `PYTHONPATH=.:.peers python benchmarks/model.py`.

One model, whose blocks compute their scan (bias and softplus of dt, the scan, the skip connection) by the one or the other;
everything else is the same modules on the same weights: embedding, projections, convolution, gated norm, loss. Weights are
float32, under bf16 autocast. A training step is forward, backward and AdamW; a prefill is one pass without gradients that
leaves every layer's cache and the last token's logits. Sides are timed in turn, by the wall clock to the end of the GPU's work.
Each row names its convolution: `nn.causal_conv1d`, or `F.conv1d`, which mamba_ssm's block has without compiled parts.
mamba_ssm tunes its kernels at first use, for minutes. Exits with status 1 if a target is missed or a side refuses.
`--device cpu --tiny` tries the script out where there is no GPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import peers
import torch
from device import Machine, Row, relative_error
from measure import environment, paired
from report import Figure, Section, print_figure, write_json
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from ssdops.nn import Mamba2, Mamba2Cache, causal_conv1d, mamba2

RESULTS = Path(__file__).parent / "results" / "gpu_model.json"
AT_LEAST = 1.0
CLOSE = 0.03  # between the logits of two sides, each rounded to bfloat16 on the way through all layers
OURS, THEIRS = "ssdops", "mamba_ssm"


@dataclass(frozen=True)
class Size:
    """A model, by the names of mamba_ssm's checkpoints, and the tokens that it is given."""

    layers: int
    d_model: int
    batch: int
    seqlen: int = 2048
    vocabulary: int = 50288
    d_state: int = 128
    headdim: int = 64

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.d_model}, ({self.batch}, {self.seqlen}) tokens"


SIZES = {
    "mamba2-130m": Size(24, 768, 8),
    "mamba2-780m": Size(48, 1536, 2),
}
TINY = Size(2, 32, 2, 48, 64, 16, 16)


class Block(Mamba2):
    """The Mamba-2 block, whose scan is one side's or the other's."""

    side = OURS

    def forward(self, u: Tensor, cache: Any = None, *, return_cache: bool = False, **options: Any) -> Any:
        """`(batch, seqlen, d_model)` → the same shape, and on request the cache after it."""
        if self.side == OURS:
            return super().forward(u, cache, return_cache=return_cache, **options)
        z, xBC, dt = self._project(u)
        xBC = mamba2.causal_conv1d(xBC, *self._taps(), activation="silu", return_window=return_cache)
        xBC, window = xBC if return_cache else (xBC, None)
        (x, (B, C)), A = self._parts(xBC), -self.A_log.float().exp()
        y = peers.mamba_scan(x, dt, A, B, C, D=self.D, dt_bias=self.dt_bias, return_final_states=return_cache)
        y, state = y if return_cache else (y, None)
        out = self.out_proj(self.norm(y.flatten(-2), z))
        return (out, Mamba2Cache(window, state)) if return_cache else out


class Model(nn.Module):
    """Embedding, residual blocks behind RMS norms, and logits by the embedding's own weights."""

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.d_model, device=device)
        nn.init.normal_(self.embedding.weight, std=0.02)
        make = partial(Block, size.d_model, d_state=size.d_state, headdim=size.headdim, device=device)
        self.blocks = nn.ModuleList(make() for _ in range(size.layers))
        self.norms = nn.ModuleList(nn.RMSNorm(size.d_model, device=device) for _ in range(size.layers + 1))

    def forward(self, tokens: Tensor, caches: list[Mamba2Cache] | None = None) -> Tensor:
        """Logits of every token; or, leaving caches in the list, of the last one."""
        x = self.embedding(tokens)
        for norm, block in zip(self.norms, self.blocks, strict=False):
            if caches is None:
                x = x + block(norm(x))
            else:
                y, cache = block(norm(x), return_cache=True)
                caches.append(cache)
                x = x + y
        x = self.norms[-1](x if caches is None else x[:, -1])
        return F.linear(x, self.embedding.weight)


def library(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str, return_window: bool = False, **absent: object
) -> Any:
    """`causal_conv1d` of whole sequences by `F.conv1d`."""
    count = weight.shape[1] - 1
    bias = None if bias is None else bias.to(x.dtype)
    padded = F.conv1d(x.mT, weight[:, None].to(x.dtype), bias, padding=count, groups=x.shape[2])
    y = F.silu(padded[..., : x.shape[1]]).mT
    return (y, x[:, x.shape[1] - count :].mT.contiguous()) if return_window else y


CONVOLUTIONS: dict[str, Callable[..., Any]] = {"nn.causal_conv1d": causal_conv1d, "F.conv1d": library}


class Trial:
    """A model of some size, ready to be run by either side."""

    def __init__(self, size: Size, machine: Machine) -> None:
        torch.manual_seed(0)
        self.machine, self.size, self.model = machine, size, Model(size, machine.device)
        shape = size.batch, size.seqlen + 1
        self.tokens = torch.randint(size.vocabulary, shape, device=machine.device, generator=machine.generator(1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=machine.cuda)

    def forward(self, side: str, caches: list[Mamba2Cache] | None = None) -> Tensor:
        """Logits by a side."""
        for block in self.model.blocks:
            block.side = side
        with torch.autocast(self.machine.device.type, torch.bfloat16):
            return self.model(self.tokens[:, :-1], caches)

    def train(self, side: str) -> None:
        """One step."""
        logits = self.forward(side)
        F.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.wait()

    def prefill(self, side: str) -> None:
        """A pass that leaves caches."""
        with torch.no_grad():
            self.forward(side, [])
        self.wait()

    def wait(self) -> None:
        """Until the GPU is done."""
        if self.machine.cuda:
            torch.cuda.synchronize()

    def difference(self) -> float:
        """Between the sides' last logits."""
        with torch.no_grad():
            return relative_error(*(self.forward(side, []) for side in (OURS, THEIRS)))


def figures(machine: Machine, names: Sequence[str], rounds: int) -> Iterator[Figure]:
    """Training step and prefill of each model, against mamba_ssm's scan, with either convolution."""
    for name, size in ({"tiny": TINY} if machine.tiny else {name: SIZES[name] for name in names}).items():
        trial = Trial(size, machine)
        for convolution, run in CONVOLUTIONS.items():
            with patch.object(mamba2, "causal_conv1d", run):
                row = Row()
                difference = row.measure("relative difference of logits", "", trial.difference)
                if difference is not None and not difference <= CLOSE:
                    row.notes["ssdops"] = f"logits differ by {difference:.3g} from mamba_ssm's, more than {CLOSE}"
                for what, call in (("prefill", trial.prefill), ("training step", trial.train)):
                    yield compared(f"{name} ({size}), {what}, convolution {convolution}", call, trial, row, rounds)
                    row = Row()
        del trial
        machine.free()


def compared(name: str, call: Callable[[str], None], trial: Trial, row: Row, rounds: int) -> Figure:
    """How many times as fast our side is; if theirs is missing, our own time."""
    ours, theirs = partial(call, OURS), partial(call, THEIRS)
    tokens = trial.size.batch * trial.size.seqlen
    if row.measure(THEIRS, "first call s", lambda: _seconds(theirs)) is None:
        row.measure(OURS, "ms", lambda: 1e3 * paired(ours, ours, rounds, 0.0).first)
        return Figure(name, None, "×", "at least", AT_LEAST, row.parts, row.notes)

    def timed() -> dict[str, float]:
        times = paired(ours, theirs, rounds, 0.0)
        low, high = times.spread
        parts = {f"{OURS} ms": 1e3 * times.first, f"{THEIRS} ms": 1e3 * times.second, "least": low, "most": high}
        return {**parts, "ratio": times.ratio, f"{OURS} k tokens/s": 1e-3 * tokens / times.first}

    row.measure_all(OURS, timed)
    if trial.machine.cuda:
        for side, run in ((OURS, ours), (THEIRS, theirs)):
            row.measure(f"{side} peak", "GiB", lambda run=run: trial.machine.peak_bytes(run) / 2**30)
    return Figure(name, row.parts.pop("ratio", None), "×", "at least", AT_LEAST, row.parts, row.notes)


def _seconds(call: Callable[[], None]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print each figure as it comes, and say by the exit status whether all is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out (default: cuda)")
    parser.add_argument("--sizes", default=",".join(SIZES), metavar="A,B", help=", ".join(SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write; results/gpu_model.json if the run is whole")
    parser.add_argument("--commit", help="the commit to name in FILE, where the source has no git")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script out; nothing is held to a target")
    options = parser.parse_args(argv)
    machine = Machine(torch.device(options.device), tiny=options.tiny)
    console = Console(width=None if sys.stdout.isatty() else 150)
    facts: dict[str, object] = {**environment(options.commit), **machine.facts(), **peers.versions(), "tiny": machine.tiny}
    facts["norm on both sides"] = "nn.GatedRMSNorm, and torch.nn.RMSNorm before blocks"
    console.print(facts)
    whole = options.sizes == ",".join(SIZES) and machine.cuda and not machine.tiny
    path, found = options.json or (RESULTS if whole else None), list[Figure]()
    for figure in figures(machine, options.sizes.split(","), options.rounds):
        found.append(replace(figure, target=None) if machine.tiny else figure)
        print_figure(console, found[-1])
        if path:
            write_json(path, facts, [Section("models", found)])
    return 0 if all(figure.ok and OURS not in figure.notes for figure in found) else 1


if __name__ == "__main__":
    sys.exit(main())
