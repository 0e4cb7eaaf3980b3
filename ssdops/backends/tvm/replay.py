"""Passes called again: with the same term and sizes only the addresses of tensors differ.

To work out tiles, shapes and numbers, and to make tensors for all that programs hand on, takes Python longer than a short pass
takes its programs. So what a pass calls is noted the first time; another one makes its outputs, one room for the rest, and one
call of `threads.c`. Where torch does something to tensors in between, as with documents, that is not noted, and the pass is
made the first way each time.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from itertools import accumulate
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...ir.resolve import repeat_heads
from ...ir.terms import Linear
from ..base import Config, Cotangents, Inputs
from . import build, threads
from .scan import ALIGNED, VECTOR, Notes, Outputs, Scan

ARGUMENTS = 64
"""Of a program at most, as `threads.c` has it."""
MOST = 256
"""Passes that are remembered."""
NO_TENSOR, OF_ROOM, FIXED = -1, -2, -3
"""Sources of an argument, beside tensors that differ from call to call, as `threads.c` has them."""
INT, FLOAT, TENSOR = 1, 3, 7
"""Kinds of arguments of TVM's FFI."""
DEVICES = {"cpu": 1, "cuda": 2}
"""DLPack's."""
CODES = {
    dtype: kind | 8 * dtype.itemsize << 8 | 1 << 16
    for dtype, kind in (
        (torch.int64, 0), (torch.float16, 2), (torch.float32, 2), (torch.float64, 2), (torch.bfloat16, 4),
    )
}  # fmt: skip
"""DLPack's dtypes: a kind of number, its bits, and one lane."""


class Value(ctypes.Union):
    """A number, or the address of a tensor."""

    _fields_ = (("number", ctypes.c_int64), ("real", ctypes.c_double))


class Argument(ctypes.Structure):
    """`Argument` of `threads.c`."""

    _fields_ = (("kind", ctypes.c_int32), ("padding", ctypes.c_int32), ("value", Value))


class Layout(ctypes.Structure):
    """`Tensor` of `threads.c`; its data are so many bytes behind the address of its source."""

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


class Steps(ctypes.Structure):
    """`Pass` of `threads.c`."""

    _fields_ = (
        ("programs", ctypes.c_void_p), ("count", ctypes.c_int64), ("room", ctypes.c_int64), ("set_stream", ctypes.c_void_p),
        ("device", ctypes.c_int32), ("stream", ctypes.c_int32),
    )  # fmt: skip


class Watch(TorchFunctionMode):
    """A context that sees whether a pass asks torch for anything but to make tensors, and to look at them in another way.

    Attributes:
        idle: whether it does not.
        filled: what torch fills: to be called again, programs must not write there.
    """

    def __init__(self) -> None:
        self.idle, self.filled = True, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if name in FILLS:
            self.filled.append(found)
        elif name not in ASKS and not (name in LOOKS and same_memory(found, args[0])):
            self.idle = False
        return found


FILLS = ("zeros", "zeros_like", "ones", "full")
ASKS = (
    "__get__", "__hash__", "__len__", "data_ptr", "dim", "element_size", "empty", "empty_like", "is_contiguous", "new_empty",
    "numel", "size", "storage_offset", "stride",
)  # fmt: skip
LOOKS = (
    "__getitem__", "contiguous", "detach", "expand", "flatten", "reshape", "select", "to", "transpose", "unflatten", "view",
)  # fmt: skip
"""What torch is asked for: to fill a tensor; what it does without touching one; and what may give another look at one."""


def same_memory(found: Tensor, given: Tensor) -> bool:
    """Whether one tensor is a look at another."""
    return found.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


class Unable(Exception):
    """A pass cannot be called again: torch has made some of what programs read."""


class Replay:
    """A pass less the addresses: of what is given, and of outputs.

    What is handed on is in one room, which is C's on a CPU. On a GPU it is torch's, which gives it to another pass of the same
    stream once this one has been launched.
    """

    def __init__(
        self, notes: Notes, given: Sequence[Tensor], outputs: Outputs, keeps: tuple[Any, ...], filled: Sequence[Tensor] = ()
    ) -> None:
        """Raises: Unable where a program's tensor is none of these, or one that torch has filled is made."""
        places = [*given, *[x for x in outputs if x is not None]]
        device = places[0].device
        self.device, on_gpu = device, device.type == "cuda"
        self.regions = [(x.data_ptr(), x.nbytes, at, 0) for at, x in enumerate(places)]
        handed_on = [x for x in notes.made if x.nbytes and self.found(x.data_ptr()) is None]
        *offsets, size = accumulate((-(-x.nbytes // ALIGNED) * ALIGNED for x in handed_on), initial=0)
        room = len(places) if on_gpu else OF_ROOM
        self.regions += [(x.data_ptr(), x.nbytes, room, at) for x, at in zip(handed_on, offsets, strict=True)]
        unread = [x for x in notes.unread if self.found(x.data_ptr()) is None]
        self.regions += [(x.data_ptr(), x.nbytes, FIXED, x.data_ptr()) for x in unread]
        if any(found[0] != FIXED for x in filled if (found := self.found(x.data_ptr())) is not None):
            raise Unable
        self.parts: list[Any] = []  # of what C reads
        run = next(run for run, _ in notes.calls if run is not widen)
        self.widener, self.run = build.widener(run), build.replayer(run)
        programs = (Program * len(notes.calls))(*[self.program(*call) for call in notes.calls])
        self.steps = Steps(
            ctypes.addressof(programs), len(programs), 0 if on_gpu else size, build.setter_of_streams() if on_gpu else None,
            device.index or 0, len(places) + 1 if on_gpu else -1,
        )  # fmt: skip
        self.address = ctypes.addressof(self.steps)
        self.pack = struct.Struct(f"{len(places) + 2 * on_gpu}q").pack
        self.outputs = [None if x is None else like(x) for x in outputs]
        self.room = like(torch.empty(0, dtype=torch.uint8, device=device), size) if on_gpu else None
        self.keeps = keeps, unread, programs  # while this is here, no others can have their ids and addresses
        del self.regions  # of one call

    def found(self, address: int) -> tuple[int, int] | None:
        """What begins at an address, or else has it inside: where C finds that, and how far in; None if nothing does."""
        for begin, _, source, offset in self.regions:
            if begin == address:
                return source, offset
        inside = (region for region in self.regions if 0 < address - region[0] < region[1])
        return next(((source, offset + address - begin) for begin, _, source, offset in inside), None)

    def program(self, run: Callable[..., None], arguments: tuple[Any, ...]) -> Program:
        """One call, as C makes it."""
        count = len(arguments)
        assert count <= ARGUMENTS  # `threads.c` has room for no more
        values, layouts, sources = (Argument * count)(), (Layout * count)(), (ctypes.c_int32 * count)(*[NO_TENSOR] * count)
        for at, (x, value) in enumerate(zip(arguments, values, strict=True)):
            if isinstance(x, Tensor):
                if (found := self.found(x.data_ptr())) is None:
                    raise Unable
                value.kind, (sources[at], offset) = TENSOR, found
                shape, strides = ((ctypes.c_int64 * x.ndim)(*sizes) for sizes in (x.shape, x.stride()))
                self.parts += [shape, strides]
                layouts[at] = Layout(
                    offset, (DEVICES[x.device.type], x.device.index or 0), x.ndim, CODES[x.dtype], ctypes.addressof(shape),
                    ctypes.addressof(strides), 0,
                )  # fmt: skip
            elif isinstance(x, float):
                value.kind, value.value.real = FLOAT, x
            else:
                value.kind, value.value.number = INT, x
        self.parts += [values, layouts, sources]
        code = self.widener if run is widen else build.entry(run)
        return Program(code, *[ctypes.addressof(x) for x in (values, layouts, sources)], count)

    def __call__(self, given: Sequence[int]) -> Outputs | None:
        """The outputs; None if a program failed, which says why when it is called by itself."""
        outputs = [None if x is None else torch.empty_like(x) for x in self.outputs]
        made = [x.data_ptr() for x in outputs if x is not None]
        if self.room is None:
            return None if self.run(self.address, self.pack(*given, *made)) else outputs
        room = torch.empty_like(self.room)
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        return None if self.run(self.address, self.pack(*given, *made, room.data_ptr(), stream)) else outputs


_replays: dict[tuple[Any, ...], Replay] = {}


class Call:
    """A pass of a linear term that may be made again: with what it follows from, and addresses of what it reads."""

    __slots__ = ("addresses", "keeps", "key", "read")

    def __init__(
        self, kind: tuple[Any, ...], scan: type[Scan], term: Linear, x: Inputs, config: Config, others: Sequence[Tensor] = ()
    ) -> None:
        self.keeps = term, x.problem
        found, dtypes = tensors(scan, x)
        self.read = read = [*found, *others]
        self.addresses = addresses = [t.data_ptr() for t in read]
        if reduce(or_, addresses) % VECTOR:
            self.read = read = [t if t.data_ptr() % VECTOR == 0 else t.clone() for t in read]
            self.addresses = addresses = [t.data_ptr() for t in read]
        alike = None if len(set(addresses)) == len(addresses) else (*map(addresses.index, addresses),)
        self.key = (
            kind, scan, config.chunk_size, x.initial is None, x.wants_state, x.scale, x.out, threads.count(), id(term),
            id(x.problem), alike, dtypes, x.q.get_device(),
        )  # fmt: skip

    def again(self) -> Outputs | None:
        """Its outputs, if it was made before and no program fails; one that does says why when it is called by itself."""
        found = _replays.get(self.key)
        return None if found is None else found(self.addresses)

    def given(self, cotangents: Cotangents) -> Cotangents:
        """The same, of tensors as they are read."""
        count = len(cotangents.saved)
        *_, y, state = self.read if cotangents.state is not None else (*self.read, None)
        assert y is not None  # only a state may be missing
        at = len(self.read) - count - (1 if state is None else 2)
        return Cotangents(y, state, self.read[at : at + count])

    def keep(self, outputs: Outputs, notes: Notes, watch: Watch) -> Outputs:
        """The outputs; what was made and called by then is remembered, if it can be called again."""
        callable_ = notes.calls and all(run is widen or build.entry(run) for run, _ in notes.calls)
        captured = self.read[0].is_cuda and torch.cuda.is_current_stream_capturing()  # what it was given is the graph's
        if callable_ and watch.idle and not captured and build.collected() is None:
            if len(_replays) >= MOST:
                _replays.clear()
            with suppress(Unable):
                _replays[self.key] = Replay(notes, self.read, outputs, self.keeps, watch.filled)
        return outputs


def able(x: Inputs) -> bool:
    """Whether a pass may be made again: of documents torch makes tables in between, and of no tokens nothing is called."""
    p = x.problem
    return x.documents is None and p.state_every is None and p.batch * p.seqlen > 0


def tensors(scan: type[Scan], x: Inputs) -> tuple[list[Tensor], tuple[torch.dtype, ...]]:
    """Those of a term as passes read them: q, k, v, the values, and the initial states. Then dtypes of the values."""
    p, acc, data = x.problem, x.problem.accumulate, scan.dtype_of_data(x.problem)
    found, shape = [as_read(x.q, data), as_read(x.k, data), as_read(x.v, data)], (p.batch, p.seqlen, p.nheads)
    dtypes: tuple[torch.dtype, ...] = ()
    for name, value in x.values.items():
        if value.shape != shape:
            value = repeat_heads(value, p.nheads, 2).expand(shape)
        if "log" not in name:
            dtype = acc
        elif (dtype := value.dtype) is not torch.float32:  # which programs read, or one makes float64
            dtype = torch.float64
        dtypes = (*dtypes, dtype)
        found.append(as_read(value, dtype))
    if x.initial is not None:
        found.append(scan.as_read(x.initial.to(acc)))
    return found, dtypes


def reading(x: Inputs, read: Sequence[Tensor]) -> Inputs:
    """The same term of these tensors."""
    values, initial = dict(zip(x.values, read[3:], strict=False)), None if x.initial is None else read[3 + len(x.values)]
    return replace(x, q=read[0], k=read[1], v=read[2], values=values, initial=initial)


def like(x: Tensor, *shape: int) -> Tensor:
    """A tensor of its shape, or of another, and of hardly any memory: `torch.empty_like` is the quickest way to a new one."""
    return x.new_empty(1).expand(shape or x.shape)


def widen(given: Tensor, out: Tensor, _count: int) -> None:
    """What `ssdops_widen` of threads.c does, in its place the first time."""
    with torch._C.DisableTorchFunction():  # a program's work, which is not watched
        out.copy_(given)


def as_read(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype, and contiguous; torch is asked for what is not so alone."""
    if x.dtype is dtype and x.is_contiguous():
        return x
    return x.to(dtype).contiguous()
