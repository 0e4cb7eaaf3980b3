"""The causal convolution on each backend, and arguments that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_laws import CU, IDS, ConvolutionLaws, PackingLaws, drawn
from torch.utils._python_dispatch import TorchDispatchMode

from ssdops import config, masks
from ssdops.errors import DtypeError, MaskError, ShapeError, UnsupportedError, ValueRangeError
from ssdops.nn import causal_conv1d, conv, launching
from ssdops.testing import assert_close, tolerance
from ssdops.testing.tolerance import assert_same


class Launched(TorchDispatchMode):
    """What would run on a GPU, in order: kernels instead of running, and torch's operators but for views and memory.

    Values are not looked at, as none are on a GPU.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        patch.setattr(
            "ssdops.backends.triton.calls.Kernel.__call__", lambda kernel, *_, **__: self.names.append(kernel._fn.__name__)
        )
        patch.setattr("ssdops.nn.packing.check_values", lambda *given: None)
        for module in ("conv_ops", "packing_ops"):  # which would hand over to torch, as this mode is on
            patch.setattr(f"ssdops.nn.{module}.is_plain", lambda tensors: True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = str(func.overloadpacket), func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor | tuple) and not (func.is_view or "empty" in name or name == "aten.detach"):
            self.names.append(name)
        return out


class TestTorch(ConvolutionLaws):
    backend = "torch"


@pytest.mark.skipif(not launching.HAS_TRITON, reason="no Triton, whose kernels these are; torch has the same laws here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_conv.py tests the compiled kernels here")
class TestTriton(ConvolutionLaws):
    """In Triton's interpreter."""

    backend = "triton"
    rounds_once = False

    def test_a_step_is_one_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where nothing is learnt; and what it gives is what the other kernels give."""
        x, weight, bias, window = (drawn(*size, dtype=torch.float32) for size in ((3, 1, 5), (5, 4), (5,), (3, 5, 3)))
        given = {"activation": "silu", "window": window, "return_window": True, "backend": "triton"}
        wanted = causal_conv1d(x, weight.clone().requires_grad_(), bias, **given)
        with monkeypatch.context() as patch:
            patch.setattr("ssdops.nn.conv_triton.CONV", None)
            y, after = causal_conv1d(x, weight, bias, **given)
        assert_close(y, wanted[0], tolerance(torch.float32, torch.float32, 4, 8.0), "y")
        assert_same(after, wanted[1], "the window")

    @pytest.mark.parametrize("name", ["none", "boundaries", "ids"])
    @pytest.mark.parametrize("entering", [False, True])
    def test_what_is_launched(self, monkeypatch: pytest.MonkeyPatch, entering: bool, name: str) -> None:
        """Forward one kernel, and one that finds documents; backward what sums, and a kernel for windows."""
        documents = {"none": None, "boundaries": self.packings[0], "ids": self.packings[1]}[name]
        sizes = ((1, 13, 6), (6, 4), (6,), (1 if documents is None else 5, 6, 3))
        x, weight, bias, window = given = [drawn(*size, dtype=torch.float32).requires_grad_() for size in sizes]
        options = {"window": window if entering else None, "documents": documents, "activation": "silu"}
        with monkeypatch.context() as patch, Launched(patch) as forward:
            y = causal_conv1d(x, weight, bias, **options, backend="triton")
        with monkeypatch.context() as patch, Launched(patch) as prefill, torch.no_grad():
            causal_conv1d(x, weight, bias, **options, backend="triton", return_window=True)
        with monkeypatch.context() as patch, Launched(patch) as backward:
            torch.autograd.grad(y, given if entering else given[:3], x)
        assert forward.names == (["conv"] if documents is None else ["places", "conv"])
        assert documents is None or prefill.names == ["places", "conv", "windows_after"]
        windows = [*([] if documents else ["aten.zeros", "aten.full_like"]), "window_gradients"]
        assert backward.names == ["conv_gradients", "aten.sum", *["aten._to_copy"] * 2, *windows * entering]

    @pytest.mark.parametrize("packed", [False, True])
    def test_opcheck(self, packed: bool) -> None:
        x, weight, bias = (drawn(*size, dtype=torch.float32) for size in ((1, 13, 6), (6, 4), (6,)))
        window = drawn(5 if packed else 1, 6, 3, dtype=torch.float32)
        documents = conv.packing(masks.documents(CU), x).tensors if packed else []
        given = [t.requires_grad_() for t in (x, weight, bias, window)]
        for bounds, per_row in ((CU, 5), (IDS.int(), 5), (IDS, 0)):
            torch.library.opcheck(torch.ops.ssdops.places.default, (bounds, 1, 13, per_row))
        if packed:
            for entering in (given[3], None):
                torch.library.opcheck(torch.ops.ssdops.conv_windows.default, (given[0], entering, documents, 3))
        torch.library.opcheck(torch.ops.ssdops.conv.default, (*given, documents, True))
        plain = [t.detach() for t in given]
        torch.library.opcheck(torch.ops.ssdops.conv_backward.default, (plain[0], *plain, documents, True, True))
        if not packed:
            torch.library.opcheck(torch.ops.ssdops.conv_step.default, (plain[0][:, :1], *plain[1:], True))

    def test_how_it_is_cut_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not even the bits, but for sums over tokens."""
        from ssdops.nn import conv_triton

        x, weight = drawn(2, 37, 20, dtype=torch.float32), drawn(20, 4, dtype=torch.float32)
        found = []
        for tile in (conv_triton.Tile(32, 16, 16, 1), conv_triton.Tile(16, 4, 32, 1), conv_triton.Tile(8, 1, 3, 1)):
            monkeypatch.setattr(conv_triton, "tile_of", lambda *sizes, tile=tile: tile)
            given = [t.clone().requires_grad_() for t in (x, weight)]
            y = causal_conv1d(*given, activation="silu", backend="triton")
            found.append((y, *torch.autograd.grad(y.square().sum(), given)))
        for y, dx, dweight in found[1:]:
            assert_same(y, found[0][0], "y")
            assert_same(dx, found[0][1], "dx")
            assert_close(dweight, found[0][2], tolerance(torch.float32, torch.float32, 74, 74 * 4.0), "dweight")


@pytest.mark.skipif(not launching.HAS_TRITON, reason="no Triton, whose kernel this is; torch's answer is what it is held to")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_conv.py tests the compiled kernel here")
class TestPacking(PackingLaws):
    """In Triton's interpreter."""


def test_backends_that_do_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(1, 13, 3), drawn(3, 9)
    with pytest.raises(UnsupportedError, match="backend must be one of 'auto', 'triton', 'torch', got 'cuda'"):
        causal_conv1d(x, weight, backend="cuda")
    assert_same(causal_conv1d(x, weight), causal_conv1d(x, weight, backend="torch"), "auto")
    monkeypatch.setattr(launching, "HAS_TRITON", True)
    with monkeypatch.context() as patch:
        patch.setattr(config, "triton_interpreted", lambda: True)
        with pytest.raises(UnsupportedError, match="width=9 exceeds 8; backend='torch' does"):
            causal_conv1d(x, weight, backend="triton")
        with pytest.raises(UnsupportedError, match="no rules for torch"):
            torch.func.grad(lambda x: causal_conv1d(x, weight[:, :4], backend="triton").sum())(x)
    with monkeypatch.context() as patch:
        patch.setattr(config, "triton_interpreted", lambda: False)
        with pytest.raises(UnsupportedError, match="on GPUs, and the tensors are on cpu"):
            causal_conv1d(x, weight[:, :4], backend="triton")
        patch.setattr(launching, "HAS_TRITON", False)
        with pytest.raises(UnsupportedError, match="triton is not installed"):
            causal_conv1d(x, weight[:, :4], backend="triton")


def test_convolutions_that_do_not_fit() -> None:
    x, weight = drawn(1, 13, 3), drawn(3, 4)
    documents = masks.documents(CU)
    for call, error, message in [
        (lambda: causal_conv1d(x[0], weight), ShapeError, r"x must be \(batch, seqlen, channels\), got \(13, 3\)"),
        (lambda: causal_conv1d(x, weight[:2]), ShapeError, r"weight must be .* channels=3, got \(2, 4\)"),
        (lambda: causal_conv1d(x, weight[:, None]), ShapeError, r"drop the middle axis of nn.Conv1d's, weight\[:, 0\]"),
        (lambda: causal_conv1d(x, weight, weight[:, :1]), ShapeError, r"bias must be \(channels,\) = \(3,\), got \(3, 1\)"),
        (lambda: causal_conv1d(x.long(), weight), DtypeError, "x must be a tensor of floating dtype, got torch.int64"),
        (lambda: causal_conv1d(x, weight, activation="relu"), UnsupportedError, "activation must be .* got 'relu'"),
        (
            lambda: causal_conv1d(x, weight, window=x),
            ShapeError,
            r"\(batch, channels, width − 1\) = \(1, 3, 3\), got \(1, 13, 3\)",
        ),
        (lambda: causal_conv1d(x, weight, window=[x]), DtypeError, "window must be a tensor of floating dtype, got list"),
        (
            lambda: causal_conv1d(x, weight, window=drawn(1, 3, 3), documents=documents),
            ShapeError,
            r"\(documents, .*\(5, 3, 3\)",
        ),
        (lambda: causal_conv1d(x, weight, documents=CU), MaskError, "documents must be made by masks.documents.*got Tensor"),
        (lambda: causal_conv1d(x, weight, documents=masks.causal()), MaskError, r"got causal\(\)"),
        (lambda: causal_conv1d(x, weight, documents=masks.documents(CU.double())), DtypeError, "must be int32 or int64"),
        (lambda: causal_conv1d(x, weight, documents=masks.documents(CU[1:])), ValueRangeError, "cu_seqlens must start at 0"),
        (
            lambda: causal_conv1d(x, weight, documents=masks.documents(CU[0])),
            ShapeError,
            r"must be \(n_segments \+ 1,\), got \(\)",
        ),
        (lambda: causal_conv1d(x, weight, documents=masks.documents(segment_ids=IDS.flip(1))), ValueRangeError, "not decrease"),
        (
            lambda: causal_conv1d(x, weight, documents=masks.documents(segment_ids=IDS), return_window=True),
            ShapeError,
            "windows of packed documents need n_segments",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
