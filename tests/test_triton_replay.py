"""A pass that is launched again at other addresses gives what it would have given anew.

Kernels are interpreted here and pass for compiled ones: launched again, they find their tensors by address alone.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_uint8
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssdops import masks, run, ssd
from ssdops.backends.triton import backend, backward, calls, launch, replay
from ssdops.backends.triton.calls import Kernel
from ssdops.backends.triton.launch import Scan
from ssdops.ir.contraction import Contraction
from ssdops.ir.nodes import operand_names
from ssdops.masks import Mask

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
BATCH, SEQLEN, NHEADS, NGROUPS, DIM = 2, 150, 2, 1, 8


class Interpreted:
    """A kernel for the interpreter, called as one for the compiler is."""

    def __init__(self, fn: Any, streams: list[int]) -> None:
        self._fn, self.arg_names, self._streams = fn, fn.arg_names, streams

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
        def call(*args: Any, **constants: Any) -> Compiled:
            self._fn[grid](*args, **constants)
            return Compiled(partial(self._again, [x.dtype for x in args if isinstance(x, Tensor)]))

        return call

    def _again(self, dtypes: list[torch.dtype], x: int, y: int, z: int, stream: int, *args: Any) -> None:
        """As Triton's launchers are called: five facts that mean nothing here, then addresses, numbers, constants."""
        self._streams.append(stream)
        addresses, rest = args[5 : 5 + len(dtypes)], args[5 + len(dtypes) :]
        at = [
            torch.frombuffer((c_uint8 * 8).from_address(address), dtype=dtype, count=1)
            for address, dtype in zip(addresses, dtypes, strict=True)
        ]
        self._fn[x, y, z](*at, **dict(zip(self.arg_names[len(dtypes) :], rest, strict=True)))


class Compiled(SimpleNamespace):
    """What Triton gives for a kernel, as far as it is used."""

    function = packed_metadata = None

    def __init__(self, run: Callable[..., None]) -> None:
        super().__init__(run=run)


class Seen:
    """What happened: passes worked out, how many of them will be launched again, and the stream of each launch."""

    def __init__(self) -> None:
        self.passes, self.streams, self.current = 0, list[int](), 1


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Nothing has been planned or launched yet."""
    seen = Seen()

    def counted(kind: type[Scan]) -> type[Scan]:
        def init(self: Scan, *args: Any) -> None:
            seen.passes += 1
            kind.__init__(self, *args)

        return type(kind.__name__, (kind,), {"__init__": init})

    active = SimpleNamespace(get_current_stream=lambda index: seen.current)
    monkeypatch.setattr(calls, "driver", SimpleNamespace(active=active))
    for name in ("Notes", "BackwardNotes"):
        monkeypatch.setattr(replay, name, counted(getattr(replay, name)))
    monkeypatch.setattr(replay, "_replays", {})
    monkeypatch.setattr(run, "_prepared", {})
    backwards = ("GRADIENTS", "FINISH", "TOKENS", "DIAGONAL")
    for module, names in ((launch, ("PREPARE", "STATES", "SCAN", "LEAVING")), (backward, backwards)):
        for name in names:
            monkeypatch.setattr(module, name, Kernel(Interpreted(getattr(module, name)._fn, seen.streams)))
    return seen


def drawn(seed: int, dim: int = DIM) -> list[Tensor]:
    """q, k, v, log_a."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((NGROUPS, dim), (NGROUPS, dim), (NHEADS, dim), (NHEADS,))
    q, k, v, log_a = (torch.randn(BATCH, SEQLEN, *shape, generator=generator) for shape in shapes)
    return [q, k, v, -log_a.abs()]


def decay(log_a: Tensor) -> Mask:
    return masks.decay(log_a)


def without(log_a: Tensor) -> Mask:
    return masks.causal()


def later(log_a: Tensor) -> Mask:
    """Anticausal, of an expression, and sums of logs that are told apart."""
    return (masks.decay(log_a) * masks.decay(log_a)).shift(1).T


def everything(log_a: Tensor) -> Mask:
    """Factors of which two are one tensor, and documents."""
    factor, ids = log_a.sin(), torch.arange(SEQLEN).expand(BATCH, -1) // 70
    documents = masks.documents(segment_ids=ids.contiguous(), n_segments=3)
    return masks.decay(log_a).scale(factor, factor, log_a.cos()) * documents


def both_ways(log_a: Tensor) -> Mask:
    """Two scans, of which the second adds to the first."""
    return masks.decay(log_a) + masks.decay(log_a).strict().T


def with_diagonal(log_a: Tensor) -> Mask:
    """A scan that takes a diagonal along."""
    return masks.decay(log_a).strict() + masks.diagonal(log_a.sin())


def check(inputs: list[Tensor], mask: Callable[[Tensor], Mask] = decay, **options: Any) -> None:
    """'triton' gives what 'chunked' does."""
    q, k, v, log_a = inputs
    found, wanted = (ssd(q, k, v, mask(log_a), backend=name, return_state=True, **options) for name in ("triton", "chunked"))
    close = 1e-3 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, atol=close, rtol=close)


def call_of(qkv: list[Tensor], mask: Mask, states: list[Tensor]) -> run.Call:
    """As `ssd` makes it, for 'triton'."""
    program = str(Contraction(mask.tree, return_state=True, backend="triton"))
    return run.Call(*qkv, [mask.operands[name] for name in operand_names(mask.tree)], states, program, 1.0)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("mask", [decay, without, later, everything])
def test_launched_again_it_gives_what_it_would_anew(
    mask: Callable[[Tensor], Mask], segments: int, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.Triton, "_splits", lambda *args: [backend.Config(16, segments)])
    for seed in range(3):
        check(drawn(seed), mask)
    assert seen.passes == 1 and len(seen.streams) == 2 * (1 + segments)


@pytest.mark.parametrize(("mask", "scans"), [(both_ways, 2), (with_diagonal, 1)])
def test_sums_are_launched_again(mask: Callable[[Tensor], Mask], scans: int, seen: Seen) -> None:
    """What is added to, and what a diagonal has, is found anew."""
    for seed in range(3):
        check(drawn(seed), mask)
    assert seen.passes == scans and len(seen.streams) == 2 * 2 * scans


@pytest.mark.parametrize(("mask", "scans"), [(both_ways, 2), (with_diagonal, 1)])
def test_backward_passes_of_sums_are_launched_again(mask: Callable[[Tensor], Mask], scans: int, seen: Seen) -> None:
    for seed in range(2):
        check_gradients(drawn(seed, 16), mask)
    diagonals = 1 if mask is with_diagonal else 0
    known = scans - 1  # `finish` of the second scan is that of the first, so that it goes to a stream the first time, too
    assert seen.passes == 2 * scans and len(seen.streams) == (2 + 5) * scans + diagonals + known


def test_a_sum_that_begins_before_its_states_are_there(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its terms begin apart, and are summed as they go on, launched again too."""
    monkeypatch.setattr(backend.Triton, "_splits", lambda *args: [backend.Config(16, 2)])
    for seed in range(2):
        q, k, v, log_a = (x[:1, :40].contiguous() for x in drawn(seed, 16))
        wanted = torch.full((2, 1, NHEADS, 16, 16), seed + 1.0)
        given = torch.full_like(wanted, torch.nan)
        mask = masks.decay(log_a) + masks.decay(log_a.cos() - 1).strict() + masks.diagonal(log_a.sin())
        whole, begun = (call_of([q, k, v], mask, list(states)) for states in (wanted, given))
        found = run.begin(begun, learnt=False).finish(False, lambda wanted=wanted, given=given: given.copy_(wanted))
        torch.testing.assert_close(found, run.forward(whole), atol=1e-3, rtol=1e-3)
        exact = ssd(q, k, v, mask, initial_state=tuple(wanted), return_state=True, backend="naive")
        torch.testing.assert_close(found[0], exact[0], atol=1e-3, rtol=1e-3)
    assert seen.passes == 2 + 2 + 2  # what begins, what goes on from that, and what does all of it


@pytest.mark.parametrize(("mask", "segments"), [(decay, 2), (later, 1)])
def test_one_that_begins_before_its_states_are_there(
    mask: Callable[[Tensor], Mask], segments: int, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched again, it too calls for them between its launches, and in time; going back likewise."""
    monkeypatch.setattr(backend.Triton, "_splits", lambda *args: [backend.Config(16, segments)])
    for seed in range(2):
        q, k, v, log_a = (x[:1, :40].contiguous() for x in drawn(seed, 16))  # of sizes that are not filled up
        shape = (2, 1, NHEADS, 16, 16)
        wanted, given = torch.full(shape, seed + 1.0), torch.full(shape, torch.nan)
        calls, launched = [call_of([q, k, v], mask(log_a), [x]) for x in (wanted[0], given[0])], []

        def arrive(wanted: Tensor = wanted, given: Tensor = given, launched: list[int] = launched) -> None:
            launched.append(len(seen.streams))
            given.copy_(wanted)

        started = run.begin(calls[1], learnt=True)
        before, found = len(seen.streams), started.finish(False, arrive)
        assert seed == 0 or (launched == [before + 1] and len(seen.streams) == before + 2)
        torch.testing.assert_close(found, run.forward(calls[0]), atol=1e-3, rtol=1e-3)
        expected = run.backward(calls[0], [q.new_ones(v.shape), wanted[1]], [])
        given.fill_(torch.nan)
        given[0] = wanted[0]
        launched.clear()
        before = len(seen.streams)
        torch.testing.assert_close(run.backward(calls[1], [q.new_ones(v.shape), given[1]], [], arrive), expected)
        assert seed == 0 or launched == [before + segments]


def unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def strided(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


CHANGES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "alignment": lambda x: [x[0], unaligned(x[1]), *x[2:]],
    "alignment of an operand": lambda x: [*x[:3], unaligned(x[3])],
    "strides": lambda x: [strided(x[0]), *x[1:]],
    "strides of an operand": lambda x: [*x[:3], strided(x[3])],
    "shapes": lambda x: [t[:, :100].contiguous() for t in x],
    "shape of an operand": lambda x: [*x[:3], x[3][:1].contiguous()],
    "dtype": lambda x: [t.half() for t in x[:3]] + x[3:],
    "dtype of an operand": lambda x: [*x[:3], x[3].double().float().bfloat16()],
    "one tensor": lambda x: [x[0], x[0], *x[2:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_launches_depend_on_is_worked_out_anew(change: str, seen: Seen) -> None:
    """And then replayed as well, and the first as before."""
    for _ in range(2):
        for inputs in (drawn(0), CHANGES[change](drawn(1))):
            check(inputs)
    assert seen.passes == 2


def test_options_that_launches_depend_on_are_told_apart(seen: Seen) -> None:
    q, k, v, log_a = drawn(0)
    for _ in range(2):
        check(drawn(0))
        check(drawn(0), scale=0.5)
        check(drawn(0), state_dtype=torch.float16)
        check(drawn(0), initial_state=torch.ones(BATCH, NHEADS, DIM, DIM))
        without_state = ssd(q, k, v, decay(log_a), backend="triton")
        torch.testing.assert_close(without_state, ssd(q, k, v, decay(log_a), backend="chunked"), atol=1e-3, rtol=1e-3)
    assert seen.passes == 5


def test_it_goes_to_the_stream_that_is_current_then(seen: Seen) -> None:
    for seen.current in (1, 2, 3):
        check(drawn(0))
    assert seen.streams == [2, 2, 3, 3]


def test_copies_of_inputs_are_made_anew(seen: Seen) -> None:
    """Of what has no unit stride; their addresses are no input's, so such passes are not launched again."""
    for seed in range(2):
        q, k, v, log_a = drawn(seed)
        check([q, k, v.mT.contiguous().mT, log_a])
    assert seen.passes == 2


def test_nothing_to_launch_is_nothing_to_launch_again(seen: Seen) -> None:
    for _ in range(2):
        q, k, v, log_a = (x[:, :0] for x in drawn(0))
        assert ssd(q, k, v, decay(log_a), backend="triton").shape == (BATCH, 0, NHEADS, DIM)
    assert seen.passes == 2


def test_outputs_and_rooms_of_calls_are_their_own() -> None:
    """What a call gave is not what the next one writes."""
    q, k, v, log_a = drawn(0)
    first, second, third = (ssd(q, k, v * n, decay(log_a), backend="triton") for n in (1, 2, 3))
    torch.testing.assert_close((second, third), (2 * first, 3 * first), atol=1e-3, rtol=1e-3)


def gradients(inputs: list[Tensor], dy: Tensor, mask: Callable[[Tensor], Mask], backend: str, **options: Any) -> Any:
    """Of all four inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(ssd(*leaves[:3], mask(leaves[3]), backend=backend, **options), leaves, dy, allow_unused=True)


def check_gradients(inputs: list[Tensor], mask: Callable[[Tensor], Mask] = decay, change: Any = None, **options: Any) -> None:
    """'triton' gives those that 'chunked' does."""
    dy = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(9))
    dy = dy if change is None else change(dy)
    found, wanted = (gradients(inputs, dy, mask, name, **options) for name in ("triton", "chunked"))
    for x, y in zip(found, wanted, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("mask", [decay, without, later, everything])
def test_a_backward_pass_is_launched_again_too(
    mask: Callable[[Tensor], Mask], segments: int, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.Triton, "_splits", lambda *args: [backend.Config(16, segments)])
    for seed in range(2):
        check_gradients(drawn(seed, 16), mask)
    sums_and_tokens = 0 if mask is without else 2
    assert seen.passes == 2 and len(seen.streams) == (1 + segments) + (segments + 2 + sums_and_tokens)


def test_a_backward_pass_is_worked_out_anew_for_another_cotangent(seen: Seen) -> None:
    """Of other strides; and an unaligned one is copied first, so that such passes are not launched again."""
    for _ in range(2):
        check_gradients(drawn(0, 16))
        check_gradients(drawn(1, 16), change=unaligned)
        check_gradients(drawn(2, 16), change=strided)
    assert seen.passes == 1 + 1 + 2 + 1


def test_sizes_that_are_filled_up_are_not_launched_again(seen: Seen) -> None:
    for seed in range(2):
        check_gradients(drawn(seed, 8))
    assert seen.passes == 1 + 2


def test_rows_in_turns_are_not_launched_again(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "ROOM", 1)
    for seed in range(2):
        check_gradients(drawn(seed, 16))
    assert seen.passes == 1 + 2
