"""The rewrite driver: named passes of small rules, the tree verified after each.

A rule takes a node and returns a new node, or None where it does not apply. A pass is a named tuple of rules, applied
from the leaves up until none applies. `run` takes a callback that sees the tree after every pass, which is all that
printing needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ...errors import MaskError
from .. import nodes as n
from ..verify import MAX_NODES, verify

Rule: TypeAlias = Callable[[n.Node], "n.Node | None"]
OnPass: TypeAlias = Callable[[str, n.Node], None]


@dataclass(frozen=True)
class Pass:
    """A name and the rules that make the pass."""

    name: str
    rules: tuple[Rule, ...]

    def __call__(self, node: n.Node) -> n.Node:
        """Rewrite node until no rule applies anywhere.

        Raises:
            MaskError: distributing products over sums made the expression larger than verify() allows.
        """
        try:
            return _rewrite(node, self.rules, _Budget())
        except RecursionError:
            raise MaskError(f"the mask expression nests too deeply for pass {self.name!r}; write it flatter") from None


class _Budget:
    """Bounds the work of one pass: every rule application counts, so that no rule set can run away."""

    def __init__(self) -> None:
        self.left = 64 * MAX_NODES

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise MaskError("the mask expression grows too large when its products are multiplied out; split the sum")


def _rewrite(node: n.Node, rules: tuple[Rule, ...], budget: _Budget) -> n.Node:
    before = n.children(node)
    after = tuple(_rewrite(child, rules, budget) for child in before)
    if after != before:
        node = n.rebuild(node, after)
    for rule in rules:
        new = rule(node)
        if new is not None and new != node:
            budget.spend()
            return _rewrite(new, rules, budget)
    return node


def run(node: n.Node, passes: Sequence[Pass], on_pass: OnPass | None = None) -> n.Node:
    """Apply the passes in order, verifying before the first and after each; on_pass sees each result by name."""
    verify(node)
    for step in passes:
        node = verify(step(node))
        if on_pass is not None:
            on_pass(step.name, node)
    return node
