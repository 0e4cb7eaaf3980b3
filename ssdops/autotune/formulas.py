"""Masks that users registered: what of them a measurement holds for, and where another process finds their classes."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re

from ..errors import TuningError
from ..ir import nodes as n
from ..ir.definition import Definition


def digest(text: str) -> str:
    """A hash of the classes of the registered masks in a mask's text, as they are written; empty without any."""
    found = _classes(text)
    return hashlib.sha256("\n".join(map(_source, found.values())).encode()).hexdigest()[:24] if found else ""


def modules(text: str) -> dict[str, str]:
    """The module of each registered mask in a mask's text, by name."""
    return {name: cls.__module__ for name, cls in _classes(text).items()}


def load(masks: dict[str, str]) -> None:
    """Import what `modules` gave in another process.

    Raises:
        TuningError: a class is not in a module that can be imported.
    """
    for name, module in masks.items():
        if name not in n.REGISTERED and module != "__main__":
            importlib.import_module(module)
        if name not in n.REGISTERED:
            where = "the script that runs" if module == "__main__" else module
            raise TuningError(
                f"mask {name!r} is registered by {where}, and candidates are tried in another process; "
                "move its class to a module that can be imported and registers it"
            )


def _classes(text: str) -> dict[str, type]:
    if not n.REGISTERED:
        return {}
    names = sorted(set(re.findall(r"(\w+)\(", text)) & n.REGISTERED.keys())
    known = {name: n.REGISTERED[name].definition for name in names}
    return {name: definition.cls for name, definition in known.items() if isinstance(definition, Definition)}


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # typed in, or made by a program
        code = [x.__code__ for x in vars(cls).values() if inspect.isfunction(x)]
        return repr([(x.co_code, x.co_consts) for x in code])
