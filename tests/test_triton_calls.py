"""How Triton kernels are launched: looked up by everything that Triton would look at, and refused with the sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from ssdops import masks, ssd
from ssdops.backends.triton import backend, launch
from ssdops.backends.triton.calls import Kernel
from ssdops.errors import UnsupportedError

GRID = (3, 1, 1)


class Fake:
    """A kernel f(x, y, n, scale, A, B) that notes how it is called, by name, and what it was compiled for."""

    arg_names = ("x", "y", "n", "scale", "A", "B")

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.ran: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def call(*args: Any, **constants: Any) -> Any:
            self.compiled.append({"grid": grid, **dict(zip(self.arg_names, args, strict=False)), **constants})
            return self.Compiled(self)

        return call

    class Compiled:
        def __init__(self, owner: Fake) -> None:
            self.owner = owner

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *args: self.owner.ran.append({"grid": grid, **dict(zip(Fake.arg_names, args, strict=True))})


def test_the_second_call_is_looked_up_and_passes_the_same_arguments() -> None:
    fake = Fake()
    kernel, x, y = Kernel(fake), torch.zeros(4), torch.zeros(4)
    kernel(GRID, (x, y), (7, 0.5), B=2, A=True)
    kernel(GRID, (x, y), (7, 0.25), B=2, A=True)
    assert len(fake.compiled) == 1 and len(fake.ran) == 1
    assert fake.ran[0] == {**fake.compiled[0], "scale": 0.25}


@pytest.mark.parametrize("change", ["dtype", "alignment", "number", "constant"])
def test_what_triton_specialises_on_is_compiled_anew(change: str) -> None:
    fake = Fake()
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
