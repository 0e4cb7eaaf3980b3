"""`register_mask`: a structure from outside, as a class that gives its entries.

A class becomes a constructor of masks. Its node is a frozen value like that of a built-in structure, so that it composes,
prints, parses and is a cache's key; its formula is run by `ir/definition.py`, and its `lower` is a rule of the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

from .errors import MaskError, RegistrationError
from .ir import nodes as n
from .ir import operands as ops
from .ir.definition import Definition
from .ir.operands import Operand
from .ir.verify import check_fields
from .masks import Mask, leaf
from .symbols import Symbol, symbols

KINDS = (
    n.TOKEN, n.HEAD, n.CHANNEL, n.RANK, n.LEVEL, n.LAG, n.MATRIX, n.HEAD_CHANNEL, n.BOUNDARIES, n.IDS,
)  # fmt: skip
"""The axes that an operand may have: those of the built-in structures."""
RESERVED = ("zero", "contract", *ops.CALLS)


@dataclass(frozen=True)
class Declared:
    """An operand of a class, as `operand` declares it: its axes, or None for an integer."""

    axes: str | None


def operand(axes: str | type[int]) -> Any:
    """An operand of a registered mask, for the body of its class.

    Args:
        axes: the names of its axes, one of those that built-in masks have: "batch seqlen nheads" (per token; read it at
            tokens, `self.x[i]`), "nheads" (per head; a tensor that broadcasts), "batch seqlen nheads dstate" and
            "nheads dstate" (the same per state channel), "batch seqlen nheads rank" and "batch seqlen nheads n_levels"
            (`self.x[i, r]`), "nheads 2*seqlen-1" (per lag, `self.x[i - j]`), "batch nheads seqlen seqlen" (`self.x[i, j]`),
            "batch seqlen" (integers per token) and "n_segments+1" (integer boundaries). Or `int`: a number that is a part
            of the mask's structure, as the width of a window is.

    Raises:
        RegistrationError: no operand has such axes.

    >>> operand("nheads").axes
    'nheads'
    """
    if axes is int:
        return Declared(None)
    if axes not in KINDS:
        known = ", ".join(f'"{kind}"' for kind in KINDS)
        raise RegistrationError(f"operand({axes!r}) is not among the axes that operands have: {known}, or int")
    return Declared(str(axes))


class RegisteredMask:
    """The constructor that `register_mask` makes of a class: called with tensors and integers, it gives a `Mask`.

    Attributes:
        name: the mask's name in text.
        cls: the class as it was written.
        node: the class of its nodes.
    """

    def __init__(self, definition: Definition, node: type[n.Registered]) -> None:
        self.name, self.cls, self.node, self.definition = definition.name, definition.cls, node, definition
        self.__doc__, self.__module__ = definition.cls.__doc__, definition.cls.__module__
        self.__name__, self.__qualname__ = definition.cls.__name__, definition.cls.__qualname__

    def __call__(self, *args: Any, **kwargs: Any) -> Mask:
        """The mask of these operands, by position in the order of the class, or by name.

        Raises:
            TypeError: not every operand is given, or one that there is not.
            MaskError: an operand is no tensor, or an integer is none.
        """
        names = n.FIELDS[self.node]
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or given.keys() & kwargs.keys() or (given | kwargs).keys() != set(names):
            raise TypeError(f"{self.name}({', '.join(names)}) takes each of these once, got {[*given, *kwargs]}")
        given |= kwargs
        mask = leaf(self.node, {x: given[x] for x in names if x in self.definition.operands},
                    **{x: given[x] for x in self.definition.integers})  # fmt: skip
        check_fields(mask.tree)
        return mask

    def __repr__(self) -> str:
        return f"<registered mask {self.name}({', '.join(n.FIELDS[self.node])}) of {self.definition.where}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return registered, (self.name,)


_KNOWN: dict[str, RegisteredMask] = {}


def registered(name: str) -> RegisteredMask:
    """The constructor registered under a name, its entry point loaded if it has one.

    Raises:
        RegistrationError: there is none.
    """
    n.leaf_named(name)
    if name not in _KNOWN:
        raise RegistrationError(f"no mask is registered as {name!r}; registered are {', '.join(_KNOWN) or 'none'}")
    return _KNOWN[name]


def register_mask(name: str) -> Callable[[type], RegisteredMask]:
    """Make a mask of a class that gives the formula of its entries.

        L[i, j] = entries(i, j)   where support(i, j), and i ≥ j if the class says `causal = True`; else 0

    The class declares operands with `operand` and has

    - `entries(self, i, j)`: torch arithmetic, elementwise, on i `(rows, 1)` and j `(1, cols)`, which are integers, and on
      operands read at them. It is asked for blocks of rows. Where an entry is selected away an exponent may overflow:
      select before exp, as in `torch.where(i >= j, x, 0.0).exp()`, or its gradient is NaN.
    - optionally `support(self, i, j)`: where there are entries at all; values elsewhere take no part, NaN included.
    - optionally `causal = True`: none above the diagonal.
    - optionally `lower(self)`: the same mask by built-in structures over the operands, or over sums, products and
      exponentials of them. It then runs wherever those run; with entries alone it runs on 'naive', in blocks of rows, and
      on 'triton' and 'tvm' by tiles, where the formula can be traced: elementwise arithmetic, and reads of operands at
      tokens, at lags or of a matrix.

    `ssdops.testing.check_mask` holds all of it to the laws that built-in masks keep.

    Args:
        name: what the mask is called in text; an identifier that no other mask has.

    Returns:
        A decorator, which makes the class a constructor of masks (`RegisteredMask`).

    Raises:
        RegistrationError: the name is taken, or the class lacks something.

    >>> import torch
    >>> from ssdops import masks, ssd
    >>> @register_mask("doctest_alibi")
    ... class Alibi:
    ...     log_gamma = operand("nheads")
    ...
    ...     def entries(self, i, j):
    ...         return torch.exp(self.log_gamma * (i - j).abs())
    ...
    ...     def lower(self):
    ...         return masks.retention(self.log_gamma) + masks.retention(self.log_gamma).strict().T
    >>> mask = Alibi(torch.tensor([0.5]).log()) * masks.window(1, 1)
    >>> print(mask)
    doctest_alibi(log_gamma) * window(left=1, right=1)
    >>> x = torch.ones(1, 3, 1, 1)
    >>> ssd(x, x, x, mask).flatten()
    tensor([1.5000, 2.0000, 1.5000])
    """
    return partial(_register, name)


def _register(name: str, cls: type) -> RegisteredMask:
    _check_name(name, cls)
    declared = {key: x for kind in reversed(cls.__mro__) for key, x in vars(kind).items() if isinstance(x, Declared)}
    operands = {key: x.axes for key, x in declared.items() if x.axes is not None}
    integers = tuple(key for key, x in declared.items() if x.axes is None)
    if not callable(getattr(cls, "entries", None)):
        raise RegistrationError(
            f"{cls.__qualname__} has no entries(self, i, j): the formula of L[i, j] is what a mask is made of"
        )
    causal = getattr(cls, "causal", False)
    if not isinstance(causal, bool):
        raise RegistrationError(f"{cls.__qualname__}.causal must be True or False, got {causal!r}")
    lower = _lower if callable(getattr(cls, "lower", None)) else None
    definition = Definition(name, cls, operands, integers, causal, lower)
    # operands first, as in the built-in structures: text gives them by position and integers by name
    columns = [(key, Any, n.axes(axes)) for key, axes in operands.items()] + [(key, int, field()) for key in integers]
    node = make_dataclass(
        cls.__name__, columns, bases=(n.Registered,), frozen=True, slots=True,
        namespace={"op": name, "definition": definition, "__doc__": cls.__doc__, "__reduce__": n.Registered.__reduce__},
    )  # fmt: skip
    n.add_leaf(node)
    _KNOWN[name] = RegisteredMask(definition, node)
    return _KNOWN[name]


def _check_name(name: str, cls: type) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise RegistrationError(f"register_mask({name!r}) needs an identifier, as the mask is written {name}(…) in text")
    if not isinstance(cls, type):
        raise RegistrationError(f"register_mask({name!r}) decorates a class, got {type(cls).__name__}")
    if name in RESERVED:
        raise RegistrationError(f"{name!r} has a meaning of its own in the text of masks; choose another name")
    taken = (
        _KNOWN[name].definition.where
        if name in _KNOWN
        else f"{n.__name__}.{n.LEAVES[name].__name__}"
        if name in n.LEAVES
        else ""
    )
    if taken:
        raise RegistrationError(
            f"mask {name!r} is {taken} already, and {cls.__module__}.{cls.__qualname__} cannot take its name; choose another"
        )


def _lower(definition: Definition, node: n.Registered) -> n.Node:
    """What `lower` of the class gives for a node, over the node's own operand expressions."""
    axes = definition.operands
    with _disable_current_modes():  # symbols have no values that tracing could fake
        stand_ins = symbols({name: (getattr(node, name), axes[name]) for name in axes}, n.rank_of(node))
        mask = definition.instance(node, stand_ins).lower()
    if not isinstance(mask, Mask):
        raise MaskError(f"lower() of {definition.name!r} gave {type(mask).__name__}, expected a Mask made by ssdops.masks")
    table: dict[str, Operand] = {}
    for name, x in mask.operands.items():
        if not isinstance(x, Symbol):
            raise MaskError(
                f"lower() of {definition.name!r} brings a tensor of its own, {name} {tuple(x.shape)}; declare it as an operand"
            )
        table[name] = x.operand
    _check_axes(definition.name, mask)
    return n.rename_operands(mask.tree, table)


def _check_axes(name: str, mask: Mask) -> None:
    """Operands stand where their axes are read; one per head also where one per token may."""
    for x, wanted in n.operands_of(mask.tree):
        for symbol in (mask.operands[used] for used in ops.names(x)):
            have = symbol.axes if isinstance(symbol, Symbol) else wanted
            if have != wanted and (have, wanted) != (n.HEAD, n.TOKEN):
                given, read = (", ".join(axes.split()) for axes in (have, wanted))
                raise MaskError(
                    f"lower() of {name!r} gives an operand of axes ({given}) where ({read}) is read; "
                    "declare it with those axes, or use another structure"
                )
