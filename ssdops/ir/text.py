"""Masks as text: `show` prints a tree, `parse` reads it back to an equal tree.

The grammar is that of Python expressions over the mask constructors, read with `ast` and never evaluated:
`decay(log_a).strict() + decay(log_a_1).strict().T + diagonal(d)`.
"""

from __future__ import annotations

import ast
import sys
from functools import lru_cache

from .. import plugins
from ..errors import ParseError
from . import nodes as n
from . import operands as ops
from .operands import Operand

SUM, PRODUCT, UNARY, POSTFIX = range(4)
_CALLS: dict[str, type[ops.Exp | ops.Flip | ops.Advance | ops.Delay | ops.Centre | ops.Main | ops.Mirror]] = {
    "exp": ops.Exp,
    "flip": ops.Flip,
    "advance": ops.Advance,
    "delay": ops.Delay,
    "centre": ops.Centre,
    "main": ops.Main,
    "mirror": ops.Mirror,
}
_POSTFIX = {"reverse": n.Reverse, "strict": n.Strict}


# --- printing -------------------------------------------------------------------------------------------------------


def show(node: n.Node, outer: int = SUM) -> str:
    """The text of a mask; parse(show(m)) == m."""
    text, binding = _show(node)
    return f"({text})" if binding < outer else text


def _show(node: n.Node) -> tuple[str, int]:
    match node:
        case n.Sum(()):
            return "zero()", POSTFIX
        case n.Sum(terms):
            return _join_signed(terms), SUM
        case n.Product(factors):
            return " * ".join(show(f, UNARY) for f in factors), PRODUCT
        case n.Neg(m):
            return f"-{show(m, UNARY)}", UNARY
        case n.Transpose(m):
            return f"{show(m, POSTFIX)}.T", POSTFIX
        case n.Reverse(m) | n.Strict(m):
            return f"{show(m, POSTFIX)}.{node.op}()", POSTFIX
        case n.Shift(m, count):
            return f"{show(m, POSTFIX)}.shift({count})", POSTFIX
        case n.Scale(m, rows, cols, log_cols):
            given = {"rows": rows, "cols": cols, "log_cols": log_cols}
            inner = ", ".join(f"{key}={show_operand(x)}" for key, x in given.items() if x is not None)
            return f"{show(m, POSTFIX)}.scale({inner})", POSTFIX
        case _:
            return f"{node.op}({_arguments(node)})", POSTFIX


def _join_signed(terms: tuple[n.Node, ...]) -> str:
    out = show(terms[0], PRODUCT)
    for term in terms[1:]:
        if isinstance(term, n.Neg):
            out += f" - {show(term.mask, UNARY)}"
        else:
            out += f" + {show(term, PRODUCT)}"
    return out


def _arguments(leaf: n.Node) -> str:
    """Operands by position until one is missing, then everything by name."""
    out: list[str] = []
    by_name = False
    slots = dict(n.SLOTS[type(leaf)])
    for name in n.FIELDS[type(leaf)]:
        value = getattr(leaf, name)
        if value is None:
            by_name = True
            continue
        by_name = by_name or name not in slots
        text = show_operand(value) if name in slots else str(value)
        out.append(f"{name}={text}" if by_name else text)
    return ", ".join(out)


def show_operand(x: Operand, outer: int = SUM) -> str:
    """The text of an operand expression."""
    match x:
        case str():
            return x
        case ops.Add(a, b):
            text = f"{show_operand(a, SUM)} + {show_operand(b, PRODUCT)}"
            return f"({text})" if outer > SUM else text
        case ops.Mul(a, b):
            text = f"{show_operand(a, PRODUCT)} * {show_operand(b, UNARY)}"
            return f"({text})" if outer > PRODUCT else text
        case ops.Scaled(a, factor):
            text = f"{show_operand(a, PRODUCT)} * {factor!r}"
            return f"({text})" if outer > PRODUCT else text
        case ops.Select(a, index):
            return f"select({show_operand(a)}, {index})"
        case ops.Mirror(a, int(count)):
            return f"mirror({show_operand(a)}, {count})"
        case ops.ChannelLog(dt, big_a):
            return f"channel_log({show_operand(dt)}, {show_operand(big_a)})"
        case _:
            return f"{type(x).__name__.lower()}({show_operand(x.x)})"


# --- parsing --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def parse(text: str) -> n.Node:
    """The mask that `text` spells.

    Raises:
        ParseError: the text is not a mask expression; the message shows the place.
    """
    return parse_tree(parse_expression(text), text)


def parse_expression(text: str) -> ast.expr:
    """The Python syntax tree of one expression, or a ParseError that shows the place."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ParseError(f"mask text {abridged(text)} is not an expression: {error}") from None


def parse_tree(tree: ast.expr, text: str) -> n.Node:
    """The mask that a part of the text spells, given as `parse_expression(text)` or a part of it."""
    try:
        return _node(tree, text)
    except RecursionError:
        raise ParseError(f"mask text {abridged(text)} nests too deeply to be a mask") from None


def abridged(text: str, length: int = 300) -> str:
    """The text quoted for a message, its middle left out if it is long."""
    return repr(text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}")


def _fail(tree: ast.AST, text: str, expected: str) -> ParseError:
    place = ast.get_source_segment(text.strip(), tree) or text
    return ParseError(f"in mask text {abridged(text)}: expected {expected}, got {abridged(place)}")


def _node(tree: ast.expr, text: str) -> n.Node:
    match tree:
        case ast.BinOp(left, ast.Add(), right):
            return n.sum_of(_node(left, text), _node(right, text))
        case ast.BinOp(left, ast.Sub(), right):
            return n.sum_of(_node(left, text), n.Neg(_node(right, text)))
        case ast.BinOp(left, ast.Mult(), right):
            return n.product_of(_node(left, text), _node(right, text))
        case ast.UnaryOp(ast.USub(), inner):
            return n.Neg(_node(inner, text))
        case ast.Attribute(inner, "T"):
            return n.Transpose(_node(inner, text))
        case ast.Call(ast.Attribute(inner, method), args, keywords):
            return _method(_node(inner, text), method, args, keywords, tree, text)
        case ast.Call(ast.Name("zero"), [], []):
            return n.ZERO
        case ast.Call(ast.Name(name), args, keywords) if (kind := n.leaf_named(name)) is not None:
            return _leaf(kind, args, keywords, tree, text)
        case ast.Call(ast.Name(name)) if (loaded := plugins.load(plugins.MASKS, name)) is not None:
            reason = loaded.error or "it registers no mask of that name"
            raise ParseError(
                f"mask {name!r} is an entry point that cannot be used: {reason}; 'ssdops doctor' shows all of them"
            )
        case _:
            raise _fail(tree, text, f"a mask (one of {', '.join([*n.LEAVES, *n.REGISTERED])})")


def _method(mask: n.Node, method: str, args: list[ast.expr], keywords: list[ast.keyword], tree: ast.expr, text: str) -> n.Node:
    match method, args, keywords:
        case (("reverse" | "strict"), [], []):
            return _POSTFIX[method](mask)
        case "shift", [], []:
            return n.Shift(mask, 1)
        case "shift", [count], []:
            return n.Shift(mask, _integer(count, text))
        case "scale", [], [_, *_] if distinct(keywords, ("rows", "cols", "log_cols")):
            return n.Scale(mask, **{str(kw.arg): _operand(kw.value, text) for kw in keywords})
        case _:
            raise _fail(tree, text, ".T, .reverse(), .strict(), .shift(n) or .scale(rows=, cols=, log_cols=)")


def distinct(keywords: list[ast.keyword], known: tuple[str, ...]) -> bool:
    """Whether every keyword is a known one and none is given twice (which `ast` lets pass)."""
    given = [kw.arg for kw in keywords]
    return len(set(given)) == len(given) and set(given) <= set(known)


def _leaf(kind: type[n.Leaf], args: list[ast.expr], keywords: list[ast.keyword], tree: ast.expr, text: str) -> n.Node:
    slots, known = dict(n.SLOTS[kind]), n.FIELDS[kind]
    named = dict(zip(known, args, strict=False)) | {str(kw.arg): kw.value for kw in keywords}
    if len(args) > len(known) or len(named) < len(args) + len(keywords) or not named.keys() <= set(known):
        raise _fail(tree, text, f"{kind.op}({', '.join(known)})")
    values = {key: _operand(x, text) if key in slots else _integer(x, text) for key, x in named.items()}
    try:
        return kind(**values)
    except TypeError:
        raise _fail(tree, text, f"{kind.op}({', '.join(known)}) with nothing missing") from None


def _integer(tree: ast.expr, text: str) -> int:
    match tree:
        case ast.Constant(int(value)) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int(value))):
            return -value
        case _:
            raise _fail(tree, text, "an integer")


def _number(tree: ast.expr) -> float | None:
    """The finite number that a literal is; None if it is none."""
    match tree:
        case ast.UnaryOp(ast.USub(), ast.Constant() as inner):
            value = _number(inner)
            return None if value is None else -value
        case ast.Constant(int(value) | float(value)) if not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
        case _:
            return None


def _operand(tree: ast.expr, text: str) -> Operand:
    match tree:
        case ast.Name(name):
            return name
        case ast.BinOp(left, ast.Add(), right):
            return ops.Add(_operand(left, text), _operand(right, text))
        case ast.BinOp(left, ast.Mult(), right) if (factor := _number(right)) is not None:
            return ops.Scaled(_operand(left, text), factor)
        case ast.BinOp(left, ast.Mult(), right):
            return ops.Mul(_operand(left, text), _operand(right, text))
        case ast.Call(ast.Name("select"), [inner, index], []):
            return ops.Select(_operand(inner, text), _integer(index, text))
        case ast.Call(ast.Name("mirror"), [inner, count], []):
            return ops.Mirror(_operand(inner, text), _integer(count, text))
        case ast.Call(ast.Name("channel_log"), [dt, big_a], []):
            return ops.ChannelLog(_operand(dt, text), _operand(big_a, text))
        case ast.Call(ast.Name(name), [inner], []) if name in _CALLS:
            return _CALLS[name](_operand(inner, text))
        case _:
            raise _fail(tree, text, "an operand name or expression")
