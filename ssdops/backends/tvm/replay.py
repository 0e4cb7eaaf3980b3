"""Passes on a CPU, called again: with the same term and sizes only the addresses of tensors differ.

To work out tiles, shapes and numbers, and to make tensors for all that programs hand on, takes Python longer than a short pass
takes its programs. So what a pass calls is noted the first time; another one makes its outputs, one room for the rest, and one
call of `threads.c`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...ir.resolve import repeat_heads
from ...ir.terms import Linear
from ..base import Config, Inputs
from . import build, threads

ALIGNED, VECTOR = 64, 16
"""Bytes of which the beginning of every part of the room is a multiple, and of every tensor."""
ARGUMENTS = 64
"""Of a program at most, as `threads.c` has it."""
MOST = 256
"""Passes that are remembered."""
INT, FLOAT, TENSOR, CPU = 1, 3, 7, 1
"""Kinds of arguments of TVM's FFI, and DLPack's device."""
CODES = {torch.float32: 2 | 32 << 8 | 1 << 16, torch.float64: 2 | 64 << 8 | 1 << 16, torch.int64: 0 | 64 << 8 | 1 << 16}
"""DLPack's dtypes: a kind of number, its bits, and one lane."""

Outputs = Sequence[Tensor | None]
"""What a pass gives; None for what nobody reads."""


class Value(ctypes.Union):
    """A number, or the address of a tensor."""

    _fields_ = (("number", ctypes.c_int64), ("real", ctypes.c_double))


class Argument(ctypes.Structure):
    """`Argument` of `threads.c`."""

    _fields_ = (("kind", ctypes.c_int32), ("padding", ctypes.c_int32), ("value", Value))


class Layout(ctypes.Structure):
    """`Tensor` of `threads.c`."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("dtype", ctypes.c_int32),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64),
    )  # fmt: skip


class Program(ctypes.Structure):
    """`Program` of `threads.c`."""

    _fields_ = (
        ("run", ctypes.c_void_p), ("arguments", ctypes.c_void_p), ("tensors", ctypes.c_void_p), ("sources", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )  # fmt: skip


@dataclass
class Notes:
    """What a pass made and called.

    Attributes:
        made: tensors that programs fill.
        unread: tensors that programs do not write, and that are the same for every such pass.
        calls: programs and their arguments.
    """

    made: list[Tensor] = field(default_factory=list)
    unread: list[Tensor] = field(default_factory=list)
    calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)


class Replay:
    """A pass less the addresses: of what is given, of outputs, of what is handed on, and of what never changes."""

    def __init__(self, notes: Notes, given: Sequence[int], outputs: Outputs, keeps: tuple[Any, ...]) -> None:
        """Raises: KeyError where a tensor is none of these; then the pass cannot be called so."""
        there = [x for x in outputs if x is not None]
        wanted = {x.data_ptr() for x in there}
        handed_on = [x for x in notes.made if x.data_ptr() not in wanted]
        unread = [x for x in notes.unread if x.data_ptr() not in given]
        self.keeps = keeps, unread  # while this is here, no others can have their ids and addresses
        # to make one like another is quickest
        self.outputs = [None if x is None else torch.empty(1, dtype=x.dtype).expand(x.shape) for x in outputs]
        *self.offsets, self.size = accumulate((-(-x.nbytes // ALIGNED) * ALIGNED for x in handed_on), initial=0)
        self.unread = [x.data_ptr() for x in unread]
        places = [*given, *[x.data_ptr() for x in (*there, *handed_on)], *self.unread]
        index = {address: at for at, address in reversed(list(enumerate(places)))}
        self.room: list[Any] = []  # of what C reads
        self.programs = (Program * len(notes.calls))(*[self.program(*call, index) for call in notes.calls])
        self.addresses = struct.Struct(f"{len(places)}q").pack
        self.run = build.replayer(notes.calls[0][0])
        self.arguments = ctypes.addressof(self.programs), len(self.programs)

    def program(self, run: Callable[..., None], arguments: tuple[Any, ...], index: dict[int, int]) -> Program:
        """One call, as C makes it."""
        count = len(arguments)
        assert count <= ARGUMENTS  # `threads.c` has room for no more
        values, layouts, sources = (Argument * count)(), (Layout * count)(), (ctypes.c_int32 * count)(*[-1] * count)
        for at, (x, value) in enumerate(zip(arguments, values, strict=True)):
            if isinstance(x, Tensor):
                value.kind, sources[at] = TENSOR, index[x.data_ptr()]
                shape, strides = ((ctypes.c_int64 * x.ndim)(*sizes) for sizes in (x.shape, x.stride()))
                self.room += [shape, strides]
                layouts[at] = Layout(
                    None, (CPU, 0), x.ndim, CODES[x.dtype], ctypes.addressof(shape), ctypes.addressof(strides), 0
                )
            elif isinstance(x, float):
                value.kind, value.value.real = FLOAT, x
            else:
                value.kind, value.value.number = INT, x
        self.room += [values, layouts, sources]
        return Program(build.entry(run), *[ctypes.addressof(x) for x in (values, layouts, sources)], count)

    def __call__(self, given: Sequence[int]) -> Outputs | None:
        """The outputs; None if a program failed, which says why when it is called by itself."""
        outputs = [None if x is None else torch.empty_like(x) for x in self.outputs]
        room = torch.empty(self.size, dtype=torch.uint8)
        start = room.data_ptr()
        made = [x.data_ptr() for x in outputs if x is not None]
        places = [*given, *made, *[start + offset for offset in self.offsets], *self.unread]
        return None if self.run(*self.arguments, self.addresses(*places)) else outputs


_replays: dict[tuple[Any, ...], Replay] = {}


class Call:
    """A pass of a linear term on a CPU that may be made again: with what it follows from, and addresses of what it reads."""

    def __init__(self, kind: tuple[Any, ...], term: Linear, x: Inputs, config: Config, read: Sequence[Tensor]) -> None:
        self.keeps = term, x.problem
        self.addresses = [t.data_ptr() for t in read]
        self.key = (
            *kind, config.chunk_size, x.initial is None, x.wants_state, x.scale, threads.count(), *map(id, self.keeps),
            *map(self.addresses.index, self.addresses),  # which are one tensor
        )  # fmt: skip

    def again(self) -> Outputs | None:
        """Its outputs, if it was made before and no program fails; one that does says why when it is called by itself."""
        found = _replays.get(self.key)
        return None if found is None else found(self.addresses)

    def keep(self, notes: Notes, outputs: Outputs) -> Outputs:
        """The outputs; what was made and called is remembered, if it can be called again."""
        if notes.calls and build.collected() is None and all(build.entry(run) for run, _ in notes.calls):
            if len(_replays) >= MOST:
                _replays.clear()
            with suppress(KeyError):  # it reads what torch made of its tensors in between
                _replays[self.key] = Replay(notes, self.addresses, outputs, self.keeps)
        return outputs


def able(x: Inputs) -> bool:
    """Whether a pass may be made again: of documents torch makes tables in between, and of no tokens nothing is called."""
    p = x.problem
    return x.documents is None and p.state_every is None and p.batch * p.seqlen > 0


def tensors(x: Inputs) -> list[Tensor]:
    """Those of a term as programs read them: q, k, v, the values, and the initial states."""
    p, acc = x.problem, x.problem.accumulate
    found = [as_read(x.q, acc), as_read(x.k, acc), as_read(x.v, acc)]
    for name, value in x.values.items():
        if value.shape != (p.batch, p.seqlen, p.nheads):
            value = repeat_heads(value, p.nheads, 2).expand(p.batch, p.seqlen, p.nheads)
        found.append(as_read(value, torch.float64 if "log" in name else acc))
    if x.initial is not None:
        found.append(as_read(x.initial, acc))
    return found


def reading(x: Inputs, read: Sequence[Tensor]) -> Inputs:
    """The same term of these tensors."""
    values, initial = dict(zip(x.values, read[3:], strict=False)), None if x.initial is None else read[3 + len(x.values)]
    return replace(x, q=read[0], k=read[1], v=read[2], values=values, initial=initial)


def as_read(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype, contiguous, where vectors can be read; torch is asked for what is not so alone."""
    if x.dtype != dtype:
        x = x.to(dtype)
    if not x.is_contiguous():
        x = x.contiguous()
    return x if x.data_ptr() % VECTOR == 0 else x.clone()
