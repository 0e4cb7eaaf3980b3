"""`ssdops tune --calibrate`: a device's rates, measured once for the cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from rich.console import Console
from rich.text import Text

from .autotune.cost import DEFAULT_RATES, Rates, keep_rates
from .autotune.workload import Workload
from .ir.problem import Target
from .plan import candidates
from .trial import Session, fastest

SECONDS = 0.5
"""That each rate is measured for."""
SCAN = Workload("decay(log_a)", "forward", "bfloat16", "float32", 1, 8192, 8, 64, 128, 1, 1, 8)
"""A scan that leaves a GPU nearly idle: its time is that of its chain of chunks, beyond what launching takes."""


def calibrate(device: torch.device, console: Console) -> None:
    """Measure the rates of a device, keep them, and print them."""
    target = Target.of(device)
    rates = measured(device)
    path = keep_rates(target, rates)
    for field in fields(Rates):
        console.print(Text(f"{field.name:<12} {getattr(rates, field.name):.3g}"))
    console.print(Text(f"kept in {path}"), soft_wrap=True)


def measured(device: torch.device) -> Rates:
    """Rates at the sizes that backends work with: products of chunks, matrices of a span, and memory beyond the caches."""
    on_gpu = device.type == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    def seconds(call: Callable[[], object]) -> float:
        call()
        return fastest(call, wait, SECONDS)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    batch, chunk, dim = (4096, 64, 128) if on_gpu else (64, 64, 128)
    a, b = normal(batch, chunk, dim), normal(batch, dim, chunk)
    matmul = 2 * batch * chunk * chunk * dim / seconds(lambda: a @ b)
    # an exponential takes as long as two operations of the usual kind
    x, out = normal(batch, chunk, chunk), normal(batch, chunk, chunk)
    elementwise = 3 * x.numel() / seconds(lambda: torch.mul(torch.exp(x, out=out), x, out=out))
    big = normal(2**28 // 4 if on_gpu else 2**26 // 4)
    copy = torch.empty_like(big)
    bandwidth = 2 * big.numel() * 4 / seconds(lambda: copy.copy_(big))
    small = normal(16)
    launch = seconds(lambda: small.mul_(1.0))
    step = chain(device) if on_gpu else DEFAULT_RATES["cpu"].step
    return Rates(matmul, elementwise, bandwidth, launch, step)


def chain(device: torch.device) -> float:
    """Seconds of a chunk in a chain of them: what a scan takes longer for longer sequences, by the backend that has chains."""
    session, taken, steps = Session(str(device)), [], []
    for work in (SCAN, replace(SCAN, seqlen=4 * SCAN.seqlen)):
        able = [c for c in candidates(work, Target.of(device)) if c.backend == "triton" and c.config.segments == 1]
        if not able:  # no Triton here, so that nothing is predicted by it
            return DEFAULT_RATES["cuda"].step
        (c,) = able
        taken.append(session.seconds(work, c.backend, c.config, 0, SECONDS))
        steps.append(-(-work.seqlen // (c.config.chunk_size or 64)))
    return max(taken[1] - taken[0], 0.0) / (steps[1] - steps[0])
