"""What the tests are made of, for users' own masks and backends too: strategies, laws, conformance suite, tolerance.

Needs the `testing` extra (hypothesis).
"""

from .case import Case
from .conformance import Conformance, check_backend
from .source import problems
from .strategies import cases, linear_mask_trees, mask_for, mask_trees, operand_tensors
from .tolerance import C, assert_close, tolerance

__all__ = [
    "C", "Case", "Conformance", "assert_close", "cases", "check_backend", "linear_mask_trees", "mask_for", "mask_trees",
    "operand_tensors", "problems", "tolerance",
]  # fmt: skip
