"""What the tests are made of, for users' own masks and backends too: strategies, laws, conformance suite, tolerance.

The tolerance is plain torch; everything else needs the `testing` extra (hypothesis) and is imported when first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .tolerance import C, assert_close, tolerance

if TYPE_CHECKING:
    from .case import Case
    from .conformance import Conformance, check_backend
    from .mask import check_mask
    from .source import problems
    from .strategies import cases, linear_mask_trees, mask_for, mask_trees, operand_tensors

__all__ = [
    "C", "Case", "Conformance", "assert_close", "cases", "check_backend", "check_mask", "linear_mask_trees", "mask_for",
    "mask_trees", "operand_tensors", "problems", "tolerance",
]  # fmt: skip

_HOMES = {
    "Case": "case", "Conformance": "conformance", "check_backend": "conformance", "check_mask": "mask", "problems": "source",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'strategies')}", __name__), name)
