"""The backends, in the order in which ties are broken: a literal table, and what others add; imported when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module

from .. import plugins
from ..errors import RegistrationError, UnknownBackendError, UnsupportedError
from .base import Backend

BACKENDS: dict[str, str] = {
    "triton": "ssdops.backends.triton.backend:Triton",
    "chunked": "ssdops.backends.chunked:Chunked",
    "recurrent": "ssdops.backends.recurrent:Recurrent",
    "naive": "ssdops.backends.naive:Naive",
    "tvm": "ssdops.backends.tvm.backend:Tvm",
}
BY_NAME = {"tvm": "compiles for seconds at its first call, so it runs where it is named, measured, or was compiled before"}
"""Backends that "auto" does not take on a prediction, but where they are a `Compiler` and ready; and why."""
METHODS = ("supports", "configs", "work", "forward", "backward")


@dataclass(frozen=True)
class Added:
    """A backend from outside: its class, or where that is; and whether "auto" may take it."""

    target: str | type
    auto: bool


_added: dict[str, Added] = {}


def register_backend(name: str, target: str | type, *, auto: bool = False) -> None:
    """Add a backend: a way to run terms, with the methods of `ssdops.backends.base.Backend`.

    Args:
        name: what calls ask for, `ssd(…, backend=name)`; an identifier that no other backend has.
        target: the class, or "module:Class", which is imported when the backend is first asked for; made without arguments.
        auto: whether "auto" weighs it by the time that it predicts; calls that are planned already keep their plans.

    Raises:
        RegistrationError: the name is taken or no identifier, or the class lacks a method.

    >>> from ssdops import register_backend
    >>> register_backend("naive", "their_package:Naive")
    Traceback (most recent call last):
        ...
    ssdops.errors.RegistrationError: backend 'naive' is ssdops.backends.naive:Naive already, ...
    """
    where = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    if not isinstance(name, str) or not name.isidentifier() or name == "auto":
        raise RegistrationError(f"register_backend({name!r}) needs an identifier other than 'auto'")
    taken = BACKENDS.get(name) or (_where(name) if name in _added or name in plugins.found(plugins.BACKENDS) else None)
    if taken is not None:
        raise RegistrationError(f"backend {name!r} is {taken} already, and {where} cannot take its name; choose another")
    if isinstance(target, str) and target.count(":") != 1:
        raise RegistrationError(f'backend {name!r} has target {target!r}, expected a class or "module:Class"')
    if not isinstance(target, str):
        _check(name, target)
    _added[name] = Added(target, auto)


def names() -> tuple[str, ...]:
    """Every backend's name: the table's, then those registered, then those of entry points; nothing is imported."""
    return tuple(dict.fromkeys([*BACKENDS, *_added, *plugins.found(plugins.BACKENDS)]))


def automatic() -> tuple[str, ...]:
    """Those that "auto" takes on a prediction."""
    return tuple(name for name in names() if by_name(name) is None)


def weighed() -> tuple[str, ...]:
    """Those that "auto" weighs: also what it takes only where it was measured to be the fastest."""
    return tuple(name for name in names() if name in BACKENDS or by_name(name) is None)


def targets() -> dict[str, str]:
    """Where the classes of these are, "module:Class", for another process."""
    return {name: BACKENDS.get(name) or _where(name) for name in weighed()}


def by_name(name: str) -> str | None:
    """Why "auto" does not take a backend; None if it may."""
    if name in BACKENDS:
        return BY_NAME.get(name)
    if name in _added and _added[name].auto:
        return None
    return f"comes from {_where(name)}, so it runs only where it is named; register_backend(…, auto=True) lets 'auto' take it"


@cache
def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UnknownBackendError: there is none; the message lists those there are.
        UnsupportedError: it comes from outside and cannot be imported.
    """
    if name in BACKENDS:
        backend: Backend = _imported(BACKENDS[name])()
        return backend
    if name not in names():
        raise UnknownBackendError(f"unknown backend {name!r}; the known ones are {', '.join(names())}, or 'auto'")
    try:
        cls = _found(name)
        _check(name, cls)
        made: Backend = cls()
    except Exception as error:  # whatever a foreign module may raise
        raise UnsupportedError(f"backend {name!r} ({_where(name)}) cannot be used: {type(error).__name__}: {error}") from error
    return made


@cache
def is_factored(name: str) -> bool:
    """`Backend.factored`, which a backend from outside need not have."""
    return getattr(get(name), "factored", False)


@cache
def compiles(name: str) -> bool:
    """`Backend.compiles`, which a backend need not have."""
    return getattr(get(name), "compiles", False)


def _found(name: str) -> type:
    """The class of a backend from outside."""
    if name in _added:
        target = _added[name].target
        return _imported(target) if isinstance(target, str) else target
    loaded = plugins.load(plugins.BACKENDS, name)
    if loaded is None or loaded.error:
        raise ImportError(loaded.error if loaded is not None else "its entry point is gone")
    found: type = loaded.value
    return found


def _where(name: str) -> str:
    """Where a backend from outside comes from."""
    if name not in _added:
        return f"the entry point {plugins.found(plugins.BACKENDS)[name].value}"
    target = _added[name].target
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


def _imported(path: str) -> type:
    module, cls = path.split(":")
    found: type = getattr(import_module(module), cls)
    return found


def _check(name: str, cls: object) -> None:
    missing = [method for method in METHODS if not callable(getattr(cls, method, None))]
    if not isinstance(cls, type) or missing:
        lacks = f"lacks {', '.join(missing)}" if isinstance(cls, type) else f"is {type(cls).__name__}, no class"
        raise RegistrationError(f"backend {name!r} {lacks}; see ssdops.backends.base.Backend for what one has")
