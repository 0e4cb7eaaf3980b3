"""The cost model: predicted seconds from a term's work and a device's rates.

The rates are defaults for a device type, round figures that order backends rightly rather than predict times; measuring them
on the device at hand is the autotuner's business.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..backends.base import Work


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second, and what a launch costs on it.

    Attributes:
        matmul: float32 matmul FLOP/s, at the tile sizes backends use.
        elementwise: elementwise operations per second.
        bandwidth: bytes per second.
        launch: seconds of host time per torch operation.
        step: seconds of one chunk in a chain of them, at dstate 128.
    """

    matmul: float
    elementwise: float
    bandwidth: float
    launch: float
    step: float = 0.0


DEFAULT_RATES = {
    "cpu": Rates(matmul=8e10, elementwise=1e9, bandwidth=1e10, launch=6e-6),
    "cuda": Rates(matmul=3e13, elementwise=1e12, bandwidth=2e12, launch=8e-6, step=1.2e-6),
}


def predict(work: Work, device: str) -> float:
    """Predicted seconds: the host's launches, then the largest of arithmetic, traffic and the longest chain of chunks."""
    rates = DEFAULT_RATES.get(device, DEFAULT_RATES["cuda"])
    arithmetic = work.matmul_flops / rates.matmul + work.elementwise / rates.elementwise
    return work.launches * rates.launch + max(arithmetic, work.bytes / rates.bandwidth, work.steps * rates.step)
