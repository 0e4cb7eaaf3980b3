"""Masks that `chunked` runs by their structure, against pair by pair and against a plain decay: `cpu.py --only structures`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from measure import Call, Paired, paired
from report import Figure, Section
from torch import Tensor

from ssdops import masks, ssd
from ssdops.ir.problem import fenwick_levels
from ssdops.masks import Mask

HEADS = 4
PASSES = ("forward", "forward + backward")


def structures(quick: bool) -> Section:
    """Bands, Fenwick and Toeplitz masks: how many times faster than by entries, and what they cost against plain decay."""
    return Section("Masks by structure", [*_against_naive(quick), *_against_decay(quick)])


def _against_naive(quick: bool) -> Iterator[Figure]:
    cases = {
        "fenwick": (_fenwick, 1024, 64, 128, 5.0),
        "decay in a window of 64": (_window(63), 1024, 64, 128, 5.0),
        "decay in a window of 512": (_window(511), 1024, 64, 128, 5.0),
        "toeplitz": (_toeplitz, 1024, 4, 4, 2.0),
        "decay per channel in a window of 64": (_window(63, _channels, 16), 256, 16, 16, 5.0),
        "causal toeplitz": (lambda seqlen: _toeplitz(seqlen) * masks.causal(), 1024, 4, 4, 2.0),
    }
    for name, (make, seqlen, headdim, dstate, target) in cases.items():
        inputs = _inputs(seqlen, headdim, dstate)
        for direction in PASSES:
            sides = (_call(backend, make(seqlen), inputs, direction) for backend in ("chunked", "naive"))
            times = paired(*sides, rounds=1 if quick else 5)
            size = f"{name}, {seqlen} tokens, headdim {headdim}, dstate {dstate}, {direction}: times as fast as naive"
            yield Figure(size, times.ratio, "×", "at least", target, _milliseconds(times, "chunked", "naive"))


def _against_decay(quick: bool) -> Iterator[Figure]:
    windows = [
        (f"decay{kind} in a window of {width}", alone, _window(width - 1, alone), target)
        for kind, alone, target in (("", _decay, 2.5), (" per channel", _channels, 3.0))
        for width in (64, 512)
    ]
    windows.append(("decay in documents in a window of 512", _documents, _window(511, _documents), 2.5))
    for name, alone, make, target in (("fenwick", _decay, _fenwick, 4.0), *windows):
        seqlen = 4096
        inputs = _inputs(seqlen, 64, 128)
        for direction in PASSES:
            plain, ours = (_call("chunked", m(seqlen), inputs, direction) for m in (alone, make))
            times = paired(plain, ours, rounds=3 if quick else 9)
            size = f"{name}, {seqlen} tokens, {direction}: time against the decay's"
            yield Figure(size, times.ratio, "×", "at most", target, _milliseconds(times, "decay", "this"))


def _log(seqlen: int) -> Tensor:
    return -0.1 * torch.rand(1, seqlen, HEADS)


def _decay(seqlen: int, dstate: int = 128) -> Mask:
    """A scalar one, whatever dstate is."""
    return masks.decay(_log(seqlen))


def _channels(seqlen: int, dstate: int = 128) -> Mask:
    return masks.channel_decay(-0.1 * torch.rand(1, seqlen, HEADS, dstate))


def _documents(seqlen: int, dstate: int = 128) -> Mask:
    """Four of 64 to 2,560 tokens, over and over."""
    lengths = [64, 960, 512, 2560] * (seqlen // 4096)
    return _decay(seqlen, dstate) * masks.documents(torch.tensor([0, *accumulate(lengths)]))


def _fenwick(seqlen: int) -> Mask:
    return masks.fenwick(_log(seqlen), torch.rand(1, seqlen, HEADS, fenwick_levels(seqlen)))


def _window(left: int, alone: Callable[..., Mask] = _decay, dstate: int = 128) -> Callable[[int], Mask]:
    return lambda seqlen: alone(seqlen, dstate) * masks.window(left)


def _toeplitz(seqlen: int) -> Mask:
    return masks.toeplitz(torch.randn(HEADS, 2 * seqlen - 1))


def _inputs(seqlen: int, headdim: int, dstate: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, seqlen, heads, dim) for heads, dim in ((1, dstate), (1, dstate), (HEADS, headdim)))
    return q, k, v


def _call(backend: str, mask: Mask, inputs: tuple[Tensor, Tensor, Tensor], direction: str) -> Call:
    q, k, v = (x.clone().requires_grad_(direction != "forward") for x in inputs)
    learnt = [q, k, v]
    if direction == "forward":
        return lambda: ssd(q, k, v, mask, backend=backend)
    dy = torch.randn_like(v)
    return lambda: torch.autograd.grad(ssd(q, k, v, mask, backend=backend), learnt, dy)


def _milliseconds(times: Paired, first: str, second: str) -> dict[str, float]:
    low, high = times.spread
    return {f"{first} ms": times.first * 1e3, f"{second} ms": times.second * 1e3, "lowest ratio": low, "highest": high}
