"""How Triton kernels are launched: looked up by everything that Triton would look at, and refused with the sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from ssdops import masks, ssd
from ssdops.backends.triton import backend, calls, launch
from ssdops.backends.triton.backward import split_heads
from ssdops.backends.triton.calls import Kernel
from ssdops.errors import UnsupportedError

GRID = (3, 1, 1)


class Fake:
    """A kernel that notes how it is called, by name and with addresses for tensors, and how often it was compiled."""

    def __init__(self, *arg_names: str) -> None:
        self.arg_names = arg_names
        self.compiled: list[dict[str, Any]] = []
        self.ran: list[dict[str, Any]] = []
        self.hooked = 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def call(*args: Any, **constants: Any) -> Any:
            addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
            named = dict(zip(self.arg_names, addresses, strict=False)) | constants
            self.compiled.append({"grid": grid, **{name: named[name] for name in self.arg_names}})
            return self.Compiled(self)

        return call

    class Compiled:
        function, packed_metadata = "function", "packed"

        def __init__(self, owner: Fake) -> None:
            self.owner = owner

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            def call(*args: Any, stream: int) -> None:
                self.owner.hooked += 1
                self.run(*grid, stream, self.function, self.packed_metadata, "launch", "enter", "exit", *args)

            return call

        def run(self, x: int, y: int, z: int, stream: int, function: str, packed: str, *args: Any) -> None:
            assert (function, packed) == (self.function, self.packed_metadata)
            named = dict(zip(self.owner.arg_names, args[3:], strict=True))
            self.owner.ran.append({"grid": (x, y, z), **named, "stream": stream})


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device whose current stream is 7, or what a test makes of it."""
    active = SimpleNamespace(stream=7, get_current_stream=lambda index: active.stream)
    monkeypatch.setattr(calls, "driver", SimpleNamespace(active=active))
    return active


@pytest.fixture
def fake() -> Fake:
    """A kernel f(x, y, n, scale, A, B)."""
    return Fake("x", "y", "n", "scale", "A", "B")


def test_the_second_call_is_looked_up_and_passes_the_same_arguments(fake: Fake) -> None:
    kernel, x, y = Kernel(fake), torch.zeros(4), torch.zeros(4)
    kernel(GRID, (x, y), (7, 0.5), B=2, A=True)
    kernel(GRID, (x, y), (7, 0.25), B=2, A=True)
    assert len(fake.compiled) == 1 and len(fake.ran) == 1
    assert fake.ran[0] == {**fake.compiled[0], "scale": 0.25, "stream": 7}


def test_launches_go_to_the_stream_that_is_current_then(fake: Fake, stream: Any) -> None:
    kernel, x, y = Kernel(fake), torch.zeros(4), torch.zeros(4)
    kernel(GRID, (x, y), (7, 0.5), B=2, A=True)
    for stream.stream in (8, 9):
        kernel(GRID, (x, y), (7, 0.5), B=2, A=True)
    assert [ran["stream"] for ran in fake.ran] == [8, 9]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_who_wants_to_know_of_launches_is_told_as_triton_tells(hook: str, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x, y = Kernel(fake), torch.zeros(4), torch.zeros(4)
    for _ in range(2):
        kernel(GRID, (x, y), (7, 0.5), B=2, A=True)
    assert not fake.hooked
    monkeypatch.setattr(calls.hooks, hook, print)
    kernel(GRID, (x, y), (7, 0.5), B=2, A=True)
    assert fake.hooked == 1 and fake.ran[0] == fake.ran[1]


@pytest.mark.parametrize("change", ["dtype", "alignment", "number", "constant"])
def test_what_triton_specialises_on_is_compiled_anew(change: str, fake: Fake) -> None:
    kernel, x, y = Kernel(fake), torch.zeros(8), torch.zeros(4)
    kernel(GRID, (x, y), (16, 0.5), A=True, B=2)
    x = {"dtype": x.double(), "alignment": x[1:]}.get(change, x)
    kernel(GRID, (x, y), (1 if change == "number" else 16, 0.5), A=change != "constant", B=2)
    assert len(fake.compiled) == 2 and not fake.ran


def test_without_triton_installed_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    q = torch.zeros(1, 7, 1, 3)
    with pytest.raises(UnsupportedError, match=r"'triton' is not installed here.*able: chunked"):
        ssd(q, q, q, masks.causal(), backend="triton")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OutOfResources(300000, 232448, "shared memory"), UnsupportedError),
        (torch.OutOfMemoryError("2 GiB"), torch.OutOfMemoryError),
    ],
)
def test_what_does_not_fit_names_the_sizes(
    raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **constants: Any) -> None:
        raise raised

    monkeypatch.setattr(launch, "SCAN", fail)
    q = torch.zeros(2, 5, 3, 4)
    with pytest.raises(expected, match="batch 2, seqlen 5, nheads 3, headdim 4, dstate 4") as caught:
        ssd(q, q, q, masks.causal(), backend="triton")
    assert str(raised) in str(caught.value)


def test_heads_too_far_apart_for_32_bits_are_brought_together() -> None:
    """Of a tensor laid out by heads, all of which a sequence lies between."""
    shape, seqlen = (1, 1 << 20, 80, 64), 1 << 20
    by_heads = torch.empty_strided(shape, (80 * seqlen * 64, 64, seqlen * 64, 1), dtype=torch.bfloat16, device="meta")
    assert launch.dense_last(by_heads).is_contiguous()
    assert launch.dense_last(by_heads[:, :, :32]) is not by_heads and not launch.dense_last(by_heads[:, :, :32]).is_contiguous()


@pytest.mark.parametrize("heads", [1, 7, 24, 80])
@pytest.mark.parametrize("programs", [0, 1, 8, 32, 263, 264, 10_000])
def test_no_part_of_the_heads_is_empty(heads: int, programs: int) -> None:
    """A program of none would still write the sums of its last head."""
    parts = split_heads(heads, programs, 132)
    each = -(-heads // parts)
    assert (parts - 1) * each < heads <= parts * each
    assert programs < 200 or parts == 1
