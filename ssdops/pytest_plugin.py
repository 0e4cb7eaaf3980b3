"""A plugin for pytest: `pytest --ssdops-mask my_package.masks:MyMask` holds a registered mask to every law, a test for each.

In a configuration file, `ssdops_masks = my_package.masks:MyMask`, one a line. Nothing of ssdops is imported without either.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option and the setting."""
    group = parser.getgroup("ssdops", "masks registered with ssdops")
    group.addoption("--ssdops-mask", action="append", default=[], metavar="MODULE:CLASS", help="a mask to check (repeatable)")
    parser.addini("ssdops_masks", "masks to check, as MODULE:CLASS", type="linelist", default=[])


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test for each mask and law, after all others."""
    for path in dict.fromkeys([*config.getini("ssdops_masks"), *config.getoption("--ssdops-mask")]):
        items.extend(_tests(session, path))


def _tests(session: pytest.Session, path: str) -> Iterator[pytest.Item]:
    from .testing.mask import LAWS, MaskCheck

    module, _, name = path.partition(":")
    try:
        check = MaskCheck(getattr(import_module(module), name))
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"{path!r} is no registered mask, expected MODULE:CLASS: {error}") from error
    for law in LAWS:
        yield MaskLaw.from_parent(session, name=f"{path}::{law}", check=check, law=law)


class MaskLaw(pytest.Item):
    """One law, held by one mask."""

    def __init__(self, *, check: Any, law: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check, self.law = check, law

    def runtest(self) -> None:
        """Draw calls and look."""
        from .testing.mask import hold

        hold(self.check, self.law)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The smallest call as a program; where it went wrong inside ssdops says nothing of the mask."""
        return str(excinfo.value) if isinstance(excinfo.value, AssertionError) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Where the class is."""
        return self.path, None, self.name
