"""Which functions of which of transformers' files are exchanged, in which of its releases, and how they come back."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType

from ...errors import UnsupportedError
from .functions import REPLACEMENTS, Function

MODELS = ("mamba2", "bamba", "zamba2", "falcon_h1", "granitemoehybrid", "nemotron_h")
FIRST, AFTER_LAST = (5, 20), (5, 25)
"""The releases in which the tests hold: the range of the extra `transformers` in pyproject.toml."""

_exchanged: dict[tuple[str, str], tuple[Function, Function]] = {}
"""(model, function) → transformers' own and ours, for what is exchanged now."""


def enable(*models: str) -> None:
    """Let transformers' models compute their SSD by `ssd` and `ssd_step`, until `disable()`.

    It acts on every instance in the process, made before or after; what is enabled already stays so. Prefill, also in parts,
    and training have gradients of any order; decoding steps have none, as in mamba_ssm. Packed sequences need `seq_idx` beside
    their position_ids, and then neither mamba_ssm nor causal_conv1d. Where mamba_ssm is installed, it is used no more.

    Args:
        models: among "mamba2", "bamba", "zamba2", "falcon_h1", "granitemoehybrid", "nemotron_h"; none is all of them.

    Raises:
        UnsupportedError: transformers is not installed, is of a release that is not known, or has no such model here. Nothing
            is changed then.

    >>> from ssdops.compat.transformers import disable, enable
    >>> enable("mamba2")  # doctest: +SKIP
    >>> disable()
    """
    names = models or MODELS
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise UnsupportedError(f"{', '.join(map(repr, unknown))}: enable() takes {', '.join(map(repr, MODELS))}")
    _check_release()
    modules = {name: _functions_of(name) for name in names}
    for name, module in modules.items():
        for function, make in REPLACEMENTS.items():
            if (name, function) not in _exchanged:
                own = getattr(module, function)
                ours = make(own)
                _exchanged[name, function] = own, ours
                setattr(module, function, ours)


def disable(*models: str) -> None:
    """Put transformers' own functions back: of these models, or all.

    Raises:
        UnsupportedError: something else has exchanged them since; then undo that first. Nothing is changed.
    """
    names = models or MODELS
    ending = {key: functions for key, functions in _exchanged.items() if key[0] in names}
    for (name, function), (_, ours) in ending.items():
        if getattr(_module_of(name), function) is not ours:
            raise UnsupportedError(
                f"{function} of transformers' {name} is no longer what enable() put there; undo what replaced it first"
            )
    for (name, function), (own, _) in ending.items():
        setattr(_module_of(name), function, own)
        del _exchanged[name, function]


@contextmanager
def enabled(*models: str) -> Iterator[None]:
    """`enable(*models)` inside a `with`; after it, what was enabled before.

    Raises:
        UnsupportedError: as `enable` and `disable`.
    """
    before = {name for name, _ in _exchanged}
    enable(*models)
    try:
        yield
    finally:
        now = {name for name, _ in _exchanged}
        if now - before:
            disable(*sorted(now - before))


def _check_release() -> None:
    wanted = f"transformers >= {_text(FIRST)}, < {_text(AFTER_LAST)}"
    try:
        release = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise UnsupportedError(f"transformers is not installed; install 'ssdops[transformers]', that is {wanted}") from None
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None or not FIRST <= (int(numbers[1]), int(numbers[2])) < AFTER_LAST:
        raise UnsupportedError(f"transformers {release} is not a release that ssdops knows; install {wanted}")


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _module_of(model: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def _functions_of(model: str) -> ModuleType:
    """The model's file, which has the functions that are to be exchanged.

    Raises:
        UnsupportedError: it lacks one, as a changed copy of a known release may.
    """
    module = _module_of(model)
    missing = [name for name in REPLACEMENTS if not callable(getattr(module, name, None))]
    if missing:
        raise UnsupportedError(f"transformers' {model} has no {', '.join(missing)}; ssdops knows its released files only")
    return module
