"""Backends with planted faults, for the tuner's tests: each is `chunked`, says that it costs nothing, and has one fault."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import torch

from ssdops.backends.base import Config, Work
from ssdops.backends.chunked import Chunked


class _Free(Chunked):
    """So that the search tries it before all others."""

    def configs(self, term, problem, chunk_size=None):
        return (Config(chunk_size or 32),)

    def work(self, term, problem, config, direction="forward"):
        return Work(0.0, 0.0, 0.0, 0.0)


class Sound(_Free):
    """No fault at all."""

    name = "sound"


class Wrong(_Free):
    """The last token is off by a little."""

    name = "wrong"

    def forward(self, term, x, config, save=False):
        out = super().forward(term, x, config, save)
        out.y[:, -1] += 0.1
        return out


class WrongGradient(_Free):
    """One gradient has the wrong sign."""

    name = "wrong gradient"

    def backward(self, term, x, config, cotangents):
        grads = super().backward(term, x, config, cotangents)
        return replace(grads, k=-grads.k)


class NanGradient(_Free):
    """One element of one gradient is NaN."""

    name = "nan gradient"

    def backward(self, term, x, config, cotangents):
        grads = super().backward(term, x, config, cotangents)
        grads.values["log_a"].view(-1)[3] = torch.nan
        return grads


class Raising(_Free):
    """It cannot do what it says."""

    name = "raising"

    def forward(self, term, x, config, save=False):
        raise RuntimeError("no kernel image is available")


class Hungry(_Free):
    """It asks for more memory than there is."""

    name = "hungry"

    def forward(self, term, x, config, save=False):
        raise torch.OutOfMemoryError("tried to allocate 2 TiB")


class Crashing(_Free):
    """It takes the process with it."""

    name = "crashing"

    def forward(self, term, x, config, save=False):
        os.kill(os.getpid(), signal.SIGSEGV)


class Hanging(_Free):
    """It never comes back."""

    name = "hanging"

    def forward(self, term, x, config, save=False):
        time.sleep(3600)


class Printing(_Free):
    """It writes where the answers of the protocol go."""

    name = "printing"

    def forward(self, term, x, config, save=False):
        print('{"seconds": 0.0}', flush=True)
        return super().forward(term, x, config, save)


FAULTS = {
    "wrong": r"wrong: y is off by 0\.1",
    "wrong gradient": "wrong: gradient of k is off by",
    "nan gradient": "wrong: gradient of log_a is off by inf",
    "raising": "RuntimeError: no kernel image is available",
    "hungry": "out of memory: tried to allocate 2 TiB",
    "crashing": "the process ended: SIGSEGV",
    "hanging": "no answer within",
}
CLASSES = {x.name: f"{__name__}:{x.__name__}" for x in (
    Sound, Wrong, WrongGradient, NanGradient, Raising, Hungry, Crashing, Hanging, Printing,
)}  # fmt: skip
