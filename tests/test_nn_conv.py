"""The causal convolution and the gated norm are their formulas; windows and documents cut nothing and leak nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ssdops import masks
from ssdops.errors import DtypeError, MaskError, ShapeError, UnsupportedError, ValueRangeError
from ssdops.nn import GatedRMSNorm, causal_conv1d, gated_rms_norm
from ssdops.testing import assert_close, tolerance
from ssdops.testing.tolerance import assert_same

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LENGTHS = (4, 0, 1, 2, 6)
CU = torch.tensor([0, 4, 4, 5, 7, 13])
IDS = torch.arange(5).repeat_interleave(torch.tensor(LENGTHS))[None]


def drawn(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(sizes))
    return torch.randn(sizes, dtype=torch.float64, generator=generator).to(dtype)


def by_formula(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """The sum, a token and a tap at a time in float64; and what absolute values give."""
    x, weight, width = x.double(), weight.double(), weight.shape[1]
    y, size = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(x.shape[1]):
        for lag in range(width):
            before = torch.zeros_like(x[:, 0]) if window is None or t >= lag else window[:, :, width - 1 + t - lag].double()
            term = weight[:, width - 1 - lag] * (x[:, t - lag] if t >= lag else before)
            y[:, t], size[:, t] = y[:, t] + term, size[:, t] + term.abs()
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return (y / (1 + torch.exp(-y)) if silu else y), size


def allowed(dtype: torch.dtype, width: int, size: Tensor) -> float:
    """silu's slope is less than 1.1, and it rounds once more."""
    return 1.1 * tolerance(dtype, torch.promote_types(dtype, torch.float32), width + 2, size.max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("bare", [False, True])
def test_the_convolution_is_its_sum(bare: bool, width: int, dtype: torch.dtype) -> None:
    """Of a view with strides of its own, shorter and longer than the window."""
    for seqlen in (0, 1, 3, 9):
        x = drawn(2, 5, seqlen + 2, dtype=dtype).transpose(1, 2)[:, 1 : 1 + seqlen]
        weight, bias, window = drawn(5, width, dtype=dtype), drawn(5, dtype=dtype), drawn(2, 5, width - 1, dtype=dtype)
        options = {} if bare else {"bias": bias, "activation": "silu", "window": window}
        y, after = causal_conv1d(x, weight, return_window=True, **options)
        value, size = by_formula(x, weight, options.get("bias"), options.get("window"), silu=not bare)
        assert y.dtype == dtype and y.shape == x.shape
        if seqlen:
            assert_close(y, value, allowed(dtype, width, size), f"y of {seqlen} tokens")
        whole = torch.cat([torch.zeros_like(window) if bare else window, x.transpose(1, 2)], 2)
        assert_same(after, whole[:, :, seqlen:], "the window")


@pytest.mark.parametrize("entering", [False, True])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_is_separate(dtype: torch.dtype, width: int, entering: bool) -> None:
    x, weight, bias = drawn(1, 13, 3, dtype=dtype), drawn(3, width, dtype=dtype), drawn(3, dtype=dtype)
    window = drawn(5, 3, width - 1, dtype=dtype) if entering else None
    for documents in (masks.documents(CU), masks.documents(segment_ids=IDS.int(), n_segments=5)):
        y, after = causal_conv1d(x, weight, bias, window=window, documents=documents, return_window=True)
        assert_same(causal_conv1d(x, weight, bias, window=window, documents=documents), y, "y without a window")
        for row, (start, stop) in enumerate(pairwise(CU.tolist())):
            own = None if window is None else window[row, None]
            alone, last = causal_conv1d(x[:, start:stop], weight, bias, window=own, return_window=True)
            _, size = by_formula(x[:, start:stop], weight, bias, own, silu=False)
            if start < stop:
                assert_close(y[:, start:stop], alone, allowed(dtype, width, size), f"document {row}")
            assert_same(after[row, None], last, f"the window of document {row}")


def test_gradients() -> None:
    """Of everything, in one sequence and in documents; those of a NaN's document stay in it."""
    x, weight, bias = drawn(1, 13, 2), drawn(2, 3), drawn(2)
    for documents, rows in ((None, 1), (masks.documents(CU), 5)):
        inputs = [t.requires_grad_() for t in (x, weight, bias, drawn(rows, 2, 2))]

        def run(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents=documents) -> tuple[Tensor, Tensor]:
            options = {"activation": "silu", "window": window, "documents": documents}
            return causal_conv1d(x, weight, bias, return_window=True, **options)

        assert torch.autograd.gradcheck(run, inputs)
    bad = x.detach().clone()
    bad[0, 5:7] = float("nan")
    bad.requires_grad_()
    (slope,) = torch.autograd.grad(causal_conv1d(bad, weight, activation="silu", documents=masks.documents(CU)).sum(), bad)
    assert slope[0, 5:7].isnan().all() and slope[0, :5].isfinite().all() and slope[0, 7:].isfinite().all()


def test_poison_stays_in_its_document() -> None:
    x, weight, window = drawn(1, 13, 3), drawn(3, 4), drawn(5, 3, 3)
    bad, bad_window = x.clone(), window.clone()
    bad[0, 5:7] = float("nan")
    bad_window[3] = float("inf")
    documents = masks.documents(CU)
    clean, after = causal_conv1d(x, weight, window=window, documents=documents, return_window=True)
    dirty, dirty_after = causal_conv1d(bad, weight, window=bad_window, documents=documents, return_window=True)
    assert dirty[:, 5:7].isnan().all() and not dirty_after[3].isfinite().any()
    for at in (slice(0, 5), slice(7, 13)):
        assert_same(dirty[:, at], clean[:, at], "other documents")
    assert_same(dirty_after[[0, 1, 2, 4]], after[[0, 1, 2, 4]], "other windows")


def test_low_precision_is_float32_rounded_once() -> None:
    x, weight, bias = (drawn(*sizes, dtype=torch.bfloat16) for sizes in ((1, 13, 3), (3, 4), (3,)))
    for documents in (None, masks.documents(CU)):
        y, wide = (causal_conv1d(*t, activation="silu", documents=documents) for t in _both_dtypes(x, weight, bias))
        assert_same(y, wide.bfloat16(), "the convolution")
    out, wide = (gated_rms_norm(*t, groups=3) for t in _both_dtypes(x, x.flip(1), bias))
    assert_same(out, wide.bfloat16(), "the norm")


def _both_dtypes(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tensors, tuple(x.float() for x in tensors)


def test_windows_take_the_dtype_of_x() -> None:
    x, weight = drawn(2, 5, 3, dtype=torch.bfloat16), drawn(3, 4, dtype=torch.float32)
    y, after = causal_conv1d(x, weight, window=drawn(2, 3, 3, dtype=torch.float32), return_window=True)
    assert y.dtype == after.dtype == torch.bfloat16 and after.is_contiguous()


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


# --- the norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_its_formula(dtype: torch.dtype, groups: int, before: bool) -> None:
    y, z, weight = drawn(2, 3, 6, dtype=dtype), drawn(2, 3, 6, dtype=dtype, seed=1), drawn(6, dtype=dtype)
    out = gated_rms_norm(y, z, weight, eps=0.1, groups=groups, norm_before_gate=before)
    gate = z.double() / (1 + torch.exp(-z.double()))
    value, size = y.double() * (1 if before else gate), 6 // groups
    for start in range(0, 6, size):
        part = value[..., start : start + size].clone()
        value[..., start : start + size] = part / ((part**2).sum(-1, keepdim=True) / size + 0.1).sqrt()
    value = value * weight.double() * (gate if before else 1)
    assert out.dtype == dtype
    # Eight operations in the accumulation dtype, each with its rounding, and the sum of squares.
    limit = tolerance(dtype, torch.promote_types(dtype, torch.float32), 8 + size, value.abs().max().item())
    assert_close(out, value, limit, "the norm")


def test_the_norm_has_gradients_and_a_module() -> None:
    y, z, weight = (x.requires_grad_() for x in (drawn(2, 4), drawn(2, 4, seed=1), drawn(4)))
    for before in (False, True):
        assert torch.autograd.gradcheck(lambda *x, b=before: gated_rms_norm(*x, groups=2, norm_before_gate=b), (y, z, weight))
    norm = GatedRMSNorm(4, 0.5, groups=2, norm_before_gate=True, dtype=torch.float64)
    assert (norm.weight == 1).all() and "groups=2" in repr(norm)
    torch.nn.init.normal_(norm.weight)
    assert_same(norm(y, z), gated_rms_norm(y, z, norm.weight, eps=0.5, groups=2, norm_before_gate=True), "the module")


def test_norms_that_do_not_fit() -> None:
    y = drawn(2, 6)
    with pytest.raises(ShapeError, match=r"z must have the shape of y, \(2, 6\), got \(2, 3\)"):
        gated_rms_norm(y, y[:, :3], y[0])
    with pytest.raises(ShapeError, match=r"weight must be \(channels,\) = \(6,\), got \(2, 6\)"):
        gated_rms_norm(y, y, y)
    with pytest.raises(ShapeError, match="groups must divide channels=6, got 4"):
        gated_rms_norm(y, y, y[0], groups=4)
    with pytest.raises(ShapeError, match="groups must divide channels=6, got 0"):
        GatedRMSNorm(6, groups=0)
