"""The contraction: everything about a call that is not a tensor or a number, as a value with a text.

`contract(decay(log_a), return_state=True)` is the program that a custom op carries: it parses back to an equal value in
another process, and with the shapes and dtypes it is the key of every cache.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from ..errors import ParseError
from . import nodes as n
from .text import abridged, distinct, parse_expression, parse_tree, show


@dataclass(frozen=True, slots=True)
class Contraction:
    """Y = scale · (L ∘ QKᵀ)V with these choices.

    Attributes:
        mask: the structure of L.
        return_state: whether the final states are wanted.
        state_dtype: the dtype of final states by name, or None for float32 (float64 if any input is).
        backend: a backend's name, or "auto".
        chunk_size: the chunk length if the user fixed it.
        state_every: tokens after which the states between are wanted, or None for none of them.
        tune: a mode of the tuner, or None for that of the context.
    """

    mask: n.Node
    return_state: bool = False
    state_dtype: str | None = None
    backend: str = "auto"
    chunk_size: int | None = None
    state_every: int | None = None
    tune: str | None = None

    def __str__(self) -> str:
        options = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return f"contract({', '.join([show(self.mask), *options])})"


@lru_cache(maxsize=4096)
def parse_contraction(text: str) -> Contraction:
    """The contraction that `text` spells; parse_contraction(str(c)) == c."""
    tree = parse_expression(text)
    options = tuple(f.name for f in fields(Contraction)[1:])
    match tree:
        case ast.Call(ast.Name("contract"), [mask], keywords) if distinct(keywords, options):
            values = {str(kw.arg): _constant(kw.value, text) for kw in keywords}
            return Contraction(parse_tree(mask, text), **values)
        case _:
            raise ParseError(f"{abridged(text)} is not a contraction; expected contract(mask, {', '.join(options)})")


def _constant(tree: ast.expr, text: str) -> Any:
    match tree:
        case ast.Constant(value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int(value))):
            return -value
        case _:
            place = ast.get_source_segment(text.strip(), tree) or text
            raise ParseError(f"in contraction {abridged(text)}: expected a constant, got {abridged(place)}")
