"""The backends, in the order in which ties are broken: a literal table, imported when first asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from ..errors import UnknownBackendError
from .base import Backend

BACKENDS: dict[str, str] = {
    "triton": "ssdops.backends.triton.backend:Triton",
    "chunked": "ssdops.backends.chunked:Chunked",
    "recurrent": "ssdops.backends.recurrent:Recurrent",
    "naive": "ssdops.backends.naive:Naive",
    "tvm": "ssdops.backends.tvm.backend:Tvm",
}
BY_NAME = {"tvm": "compiles for seconds at its first call, so it runs where it is named, or was measured to be the fastest"}
"""Backends that "auto" does not take on a prediction, and why."""


def names() -> tuple[str, ...]:
    """Every backend's name."""
    return tuple(BACKENDS)


@cache
def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UnknownBackendError: there is none; the message lists those there are.
    """
    if name not in BACKENDS:
        raise UnknownBackendError(f"unknown backend {name!r}; the known ones are {', '.join(BACKENDS)}, or 'auto'")
    module, cls = BACKENDS[name].split(":")
    backend: Backend = getattr(import_module(module), cls)()
    return backend
