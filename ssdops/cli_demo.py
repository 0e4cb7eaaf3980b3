"""`ssdops demo`: a real text through a Mamba-2-shaped projection, then through every backend, held to the oracle."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from math import sqrt
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from . import masks
from .api import explain, ssd
from .backends import registry
from .cli_common import dtype_of, present_device
from .errors import UnsupportedError, ValueRangeError
from .ir.evaluate import evaluate
from .ir.resolve import repeat_heads
from .masks import Mask
from .steps import Plan, Step
from .testing.tolerance import C, tolerance

D_MODEL, NHEADS, HEADDIM, DSTATE, CONV = 128, 4, 64, 64, 4
REPEATS, SECONDS = 5, 1.0
"""A time is the median of up to so many runs, as many as fit into so many seconds."""


@dataclass(frozen=True)
class Settings:
    """The options of the command."""

    seqlen: int
    device: str
    dtype: str
    seed: int


@dataclass(frozen=True)
class Call:
    """The tensors of one `ssd` call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask


@dataclass(frozen=True)
class Result:
    """How one backend did; `why` it was or was not chosen, or could not run (then the rest is None).

    Attributes:
        ms: the median time of a run.
        mib: the most memory that its tensors held at once.
        error: the greatest error.
    """

    backend: str
    why: str
    ms: float | None = None
    mib: float | None = None
    error: float | None = None

    def passes(self, allowed: float) -> bool:
        """Whether it did not run, or was within tolerance (NaN is not)."""
        return self.error is None or self.error <= allowed


def run(file: Path | None, settings: Settings, console: Console) -> bool:
    """Print the comparison; whether every backend that ran was within tolerance."""
    if settings.seqlen < 1:
        raise ValueRangeError(f"--seqlen must be at least 1, got {settings.seqlen}")
    text, source = read_text(file, settings.seqlen)
    call = project(text, settings)
    plan = explain(call.q, call.k, call.v, call.mask).plan
    names = registry.names()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("float64 oracle", total=len(names) + 1)
        expected, allowed = oracle(call)
        results = []
        for name in names:
            progress.update(task, advance=1, description=name)
            results.append(try_backend(name, call, plan, expected))
        progress.update(task, advance=1)
    console.print(Text(f"{len(text)} bytes of {source} as q, k {_shape(call.q)} and v {_shape(call.v)}"), soft_wrap=True)
    console.print(Text(f"mask {call.mask}, as auto runs it: {_terms(plan)}"), soft_wrap=True)
    console.print(_table(results, allowed, f"{settings.dtype} on {_where(call.q.device)}"))
    console.print(
        "time: median forward run. peak: tensors alive at once, inputs apart. error: greatest, against float64; "
        f"allowed: {C:.0f} · max(eps(compute) · √(seqlen · dstate), eps(output)) · greatest of (|L| ∘ |Q||K|ᵀ)|V|.",
        style="dim",
    )
    return all(result.passes(allowed) for result in results)


# --- the text and what is made of it --------------------------------------------------------------------------------


def read_text(file: Path | None, limit: int) -> tuple[bytes, str]:
    """The first `limit` bytes of the file, or of the text that ships with the package, and what to call it.

    Raises:
        ValueRangeError: the file cannot be read, or is empty.
    """
    if file is None:
        return resources.files("ssdops.data").joinpath("opticks.txt").read_bytes()[:limit], "Newton's Opticks (1730)"
    try:
        with file.open("rb") as stream:
            text = stream.read(limit)
    except OSError as error:
        raise ValueRangeError(f"cannot read {file}: {error.strerror or error}") from None
    if not text:
        raise ValueRangeError(f"{file} is empty; give a file with at least one byte")
    return text, file.name


def project(text: bytes, settings: Settings) -> Call:
    """Bytes → q, k, v and decays as Mamba-2 makes them (Dao & Gu 2024, section 7), with seeded random weights.

    q = C, k = B, v = x·dt, log_a = −A·dt; D weighs each token's own score ⟨q_i, k_i⟩, as a diagonal term does.
    """
    generator = torch.Generator().manual_seed(settings.seed)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    seqlen, inner = len(text), NHEADS * HEADDIM
    channels = inner + 2 * DSTATE  # x, B and C pass the convolution; dt does not
    embedding = torch.randn(256, D_MODEL, generator=generator)
    projection = torch.randn(D_MODEL, channels + NHEADS, generator=generator) / sqrt(D_MODEL)
    hidden = embedding[torch.tensor(list(text))] @ projection  # [T, channels + H]
    kernel = uniform(channels, 1, CONV, low=-1 / sqrt(CONV), high=1 / sqrt(CONV))
    mixed = F.conv1d(F.pad(hidden[:, :channels].T[None], (CONV - 1, 0)), kernel, groups=channels)[0].T
    x, b, c = F.silu(mixed).split([inner, DSTATE, DSTATE], dim=1)
    start = uniform(NHEADS, low=1e-3, high=1e-1)  # of dt
    dt = F.softplus(hidden[:, channels:] + torch.log(torch.expm1(start)))  # [T, H]
    log_a = -uniform(NHEADS, low=1.0, high=16.0) * dt
    v = x.reshape(1, seqlen, NHEADS, HEADDIM) * dt[None, :, :, None]
    device, dtype = present_device(settings.device), dtype_of(settings.dtype)
    mask = masks.decay(log_a[None].to(device)) + masks.diagonal(torch.ones(NHEADS, device=device))
    q, k = (t.reshape(1, seqlen, 1, DSTATE).to(device, dtype) for t in (c, b))
    return Call(q, k, v.to(device, dtype), mask)


# --- the oracle and the backends ------------------------------------------------------------------------------------


def oracle(call: Call) -> tuple[Tensor, float]:
    """Y from the oracle's mask entries, dense and in float64; and the error allowed, from absolute values."""
    _, seqlen, nheads, _ = call.v.shape
    operands = {name: x.cpu() for name, x in call.mask.operands.items()}
    L = evaluate(call.mask.tree, operands, 1, seqlen, nheads)  # [1, H, T, T]
    q, k, v = (repeat_heads(x.cpu().double(), nheads, 2).transpose(1, 2) for x in (call.q, call.k, call.v))
    y = (L * (q @ k.transpose(2, 3))) @ v
    magnitude = (L.abs() * (q.abs() @ k.abs().transpose(2, 3))) @ v.abs()
    compute = torch.promote_types(call.v.dtype, torch.float32)
    return y.transpose(1, 2), tolerance(call.v.dtype, compute, seqlen * DSTATE, magnitude.max().item())


def try_backend(name: str, call: Call, plan: Plan, expected: Tensor) -> Result:
    """Run one backend if it can: compare its answer, time it, and measure its memory."""

    def forward() -> Tensor:
        y = ssd(call.q, call.k, call.v, call.mask, backend=name)
        assert isinstance(y, Tensor)  # no state was asked for
        return y

    why = _why(name, plan)
    try:
        y = forward()
    except UnsupportedError:
        return Result(name, why)
    error = (y.cpu().double() - expected).abs().max().item()
    return Result(name, why, milliseconds(forward, call.q.device), peak_mib(forward, call.q.device), error)


def _why(name: str, plan: Plan) -> str:
    """What "auto" makes of the backend: the terms that it is chosen for, or the reason why none."""
    chosen = [str(step.term.node()) for step in plan.steps if step.backend == name]
    if len(chosen) == len(plan.steps):
        return "chosen by auto"
    if chosen:
        return f"chosen by auto for {', '.join(chosen)}"
    reasons = [r.reason for step in plan.steps for r in step.rejected if r.backend == name]
    return reasons[0] if reasons else "not considered by auto"


def milliseconds(forward: Callable[[], Tensor], device: torch.device) -> float:
    """The median time of a run."""
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < SECONDS:
        _wait(device)
        start = time.perf_counter()
        forward()
        _wait(device)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(forward: Callable[[], Tensor], device: torch.device) -> float:
    """The most memory that tensors made during a run hold at once, its output included.

    On CUDA the allocator says; elsewhere torch's profiler, which records every allocation of torch's allocator (what
    libraries take past it is not in the figure).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with _quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        forward()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most / 2**20


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Some builds of torch write a line to the stderr of the process whenever profiling starts or stops."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


# --- printing -------------------------------------------------------------------------------------------------------


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _terms(plan: Plan) -> str:
    def text(step: Step) -> str:
        size = f", chunk_size {step.config.chunk_size}" if step.config.chunk_size else ""
        return f"{step.term.node()} [{step.backend}{size}]"

    return " + ".join(text(step) for step in plan.steps)


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads != 1)}"


def _table(results: list[Result], allowed: float, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("backend", no_wrap=True)
    for name in ("time (ms)", "peak (MiB)", "error", "allowed", ""):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column('"auto"', overflow="fold")
    for r in results:
        if r.ms is None or r.mib is None or r.error is None:
            table.add_row(r.backend, "–", "–", "–", "–", "", Text(r.why))
            continue
        verdict = Text("ok", style="green") if r.passes(allowed) else Text("WRONG", style="bold red")
        numbers = f"{r.ms:.1f}", f"{r.mib:.1f}", f"{r.error:.1e}", f"{allowed:.1e}"
        table.add_row(r.backend, *numbers, verdict, Text(r.why))
    return table
