"""What holds of the causal convolution on any backend and device: it is its formula, and windows and documents leak nothing."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given as given_each
from hypothesis import strategies as st
from torch import Tensor

from ssdops import masks, nn
from ssdops.nn.packing import packing
from ssdops.testing import assert_close, tolerance
from ssdops.testing.tolerance import assert_same

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (4, 0, 1, 2, 6)
CU = torch.tensor([0, 4, 4, 5, 7, 13])
IDS = torch.arange(5).repeat_interleave(torch.tensor(LENGTHS))[None]


def drawn(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(sizes))
    return torch.randn(sizes, dtype=torch.float64, generator=generator).to(device, dtype)


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


class PackingLaws:
    """Where documents lie, by the kernel and by torch; subclass it, and name a device."""

    device: str = "cpu"

    @given_each(st.data())
    def test_the_kernel_finds_what_torch_finds(self, data: st.DataObject) -> None:
        """Of boundaries and of ids of either dtype, also of ids that rows share and that leave open how many there are."""
        batch, seqlen, n_segments = (data.draw(st.integers(0, most)) for most in (3, 600, 400))
        dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
        ids = [sorted(data.draw(some(st.integers(0, max(n_segments - 1, 0)), seqlen))) for _ in range(batch)]
        ids = torch.tensor(ids, dtype=dtype, device=self.device).view(batch, seqlen)
        x = torch.empty(batch, seqlen, 2, device=self.device)
        for count in (None, max(n_segments, 1)):
            self.same(masks.documents(segment_ids=ids, n_segments=count), x)
            self.same(masks.documents(segment_ids=ids.repeat_interleave(2, 1)[:, ::2], n_segments=count), x)
            if batch:
                self.same(masks.documents(segment_ids=ids[:1], n_segments=count), x)
        bounds = [0, *sorted(data.draw(some(st.integers(0, seqlen), n_segments))), seqlen]
        cu = torch.tensor(bounds if n_segments else [0] * (not seqlen) or [0, seqlen], dtype=dtype, device=self.device)
        self.same(masks.documents(cu), x[:1] if batch else torch.empty(1, seqlen, 2, device=self.device))

    def same(self, documents: masks.Mask, x: Tensor) -> None:
        ours, plain = (packing(documents, x, by_kernel) for by_kernel in (True, False))
        assert ours.n_rows == plain.n_rows
        for name, found, value in zip(("position", "row", "starts", "stops"), ours.tensors, plain.tensors, strict=True):
            assert found.dtype == value.dtype and torch.equal(found, value), name

    def test_what_is_out_of_order_is_in_range(self) -> None:
        """As nothing looks at values on a GPU, and other kernels read memory by these."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ssdops.nn.packing.check_values", lambda *given: None)
            for wrong in ([9, 3, -4, 99, 2], [0, 0, 2, 3, 5], [3, 4, 4, 4, 40], [-2, -1, 7, 8, 9]):
                tensor = torch.tensor(wrong, device=self.device)
                for documents, n_rows in (
                    (masks.documents(tensor), 4), (masks.documents(segment_ids=tensor[None], n_segments=3), 3)
                ):  # fmt: skip
                    found = packing(documents, torch.empty(1, 5, 2, device=self.device), by_kernel=True)
                    position, row, starts, stops = (t.tolist() for t in found.tensors)
                    assert all(0 <= place <= t for t, place in enumerate(position[0])), wrong
                    assert all(0 <= number < n_rows for number in row[0]), wrong
                    assert all(0 <= bound <= 5 for bound in (*starts, *stops)), wrong


def some(values: st.SearchStrategy[int], count: int) -> st.SearchStrategy[list[int]]:
    """So many of them; few drawn, as many are slow, and each as often as it comes."""
    few = st.lists(values, min_size=1, max_size=9)
    return st.tuples(few, st.randoms(use_true_random=False)).map(lambda drawn: drawn[1].choices(drawn[0], k=count))


class ConvolutionLaws:
    """Subclass it, and name a backend and a device."""

    backend: str
    device: str = "cpu"
    rounds_once = True
    """Whether casts to fewer bits round to the nearest: Triton's interpreter cuts off."""

    @property
    def causal_conv1d(self) -> Any:
        return partial(nn.causal_conv1d, backend=self.backend)

    def drawn(self, *sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        return drawn(*sizes, dtype=dtype, seed=seed, device=self.device)

    @property
    def packings(self) -> tuple[masks.Mask, masks.Mask]:
        """The same documents, told in both ways."""
        ids = IDS.int().to(self.device)
        return masks.documents(CU.to(self.device)), masks.documents(segment_ids=ids, n_segments=5)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [1, 2, 4, 7])
    @pytest.mark.parametrize("bare", [False, True])
    def test_it_is_its_sum(self, bare: bool, width: int, dtype: torch.dtype) -> None:
        """Of a view with strides of its own, shorter and longer than the window."""
        for seqlen in (0, 1, 3, 9):
            x = self.drawn(2, 5, seqlen + 2, dtype=dtype).transpose(1, 2)[:, 1 : 1 + seqlen]
            weight, bias = self.drawn(5, width, dtype=dtype), self.drawn(5, dtype=dtype)
            window = self.drawn(2, 5, width - 1, dtype=dtype)
            options = {} if bare else {"bias": bias, "activation": "silu", "window": window}
            y, after = self.causal_conv1d(x, weight, return_window=True, **options)
            value, size = by_formula(x, weight, options.get("bias"), options.get("window"), silu=not bare)
            assert y.dtype == dtype and y.shape == x.shape
            if seqlen:
                assert_close(y, value, allowed(dtype, width, size), f"y of {seqlen} tokens")
            whole = torch.cat([torch.zeros_like(window) if bare else window, x.transpose(1, 2)], 2)
            assert_same(after, whole[:, :, seqlen:], "the window")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_is_its_sum_on_a_slice_of_a_projection(self, dtype: torch.dtype) -> None:
        """Channels last in memory and more of them than a program has, tokens of several blocks, odd strides."""
        for channels, columns, first in ((300, 640, 128), (33, 71, 3)):
            x = self.drawn(2, 37, columns, dtype=dtype)[:, :, first : first + channels]
            weight, bias = self.drawn(channels, 4, dtype=torch.float32), self.drawn(channels, dtype=torch.float32)
            window = self.drawn(2, channels, 3, dtype=dtype)
            y = self.causal_conv1d(x, weight, bias, activation="silu", window=window)
            value, size = by_formula(x, weight, bias, window, silu=True)
            assert y.is_contiguous()
            assert_close(y, value, allowed(dtype, 4, size), f"y of {channels} channels")

    @pytest.mark.parametrize("entering", [False, True])
    @pytest.mark.parametrize("width", [1, 4])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_packed_is_separate(self, dtype: torch.dtype, width: int, entering: bool) -> None:
        x, weight, bias = self.drawn(1, 13, 3, dtype=dtype), self.drawn(3, width, dtype=dtype), self.drawn(3, dtype=dtype)
        window = self.drawn(5, 3, width - 1, dtype=dtype) if entering else None
        for documents in self.packings:
            y, after = self.causal_conv1d(x, weight, bias, window=window, documents=documents, return_window=True)
            assert_same(self.causal_conv1d(x, weight, bias, window=window, documents=documents), y, "y without a window")
            for row, (start, stop) in enumerate(pairwise(CU.tolist())):
                own = None if window is None else window[row, None]
                alone, last = self.causal_conv1d(x[:, start:stop], weight, bias, window=own, return_window=True)
                _, size = by_formula(x[:, start:stop], weight, bias, own, silu=False)
                if start < stop:
                    assert_close(y[:, start:stop], alone, allowed(dtype, width, size), f"document {row}")
                assert_same(after[row, None], last, f"the window of document {row}")

    @pytest.mark.parametrize("width", [2, 4])
    def test_parts_are_the_whole(self, width: int) -> None:
        """To the bit: a prompt, a chunk, and token after token; and what a caller handed in is as it was."""
        x, weight, bias = (self.drawn(*sizes, dtype=torch.float32) for sizes in ((2, 40, 6), (6, width), (6,)))
        convolve = partial(self.causal_conv1d, weight=weight, bias=bias, activation="silu", return_window=True)
        whole, last = convolve(x)
        window, parts = None, []
        for part in x.split([17, 19, 1, 1, 1, 1], 1):
            given = None if window is None else window.clone()
            y, after = convolve(part, window=window)
            assert given is None or torch.equal(window, given)
            window = after
            parts.append(y)
        assert_close(torch.cat(parts, 1), whole, allowed(torch.float32, width, whole.abs()), "parts")
        assert_same(window, last, "the last window")

    def test_gradients(self) -> None:
        """Of everything, in one sequence and in documents; those of a NaN's document stay in it."""
        x, weight, bias = self.drawn(1, 13, 2), self.drawn(2, 3), self.drawn(2)
        for documents, rows in ((None, 1), (self.packings[0], 5)):
            inputs = [t.requires_grad_() for t in (x, weight, bias, self.drawn(rows, 2, 2))]

            def run(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, documents=documents) -> tuple[Tensor, Tensor]:
                options = {"activation": "silu", "window": window, "documents": documents}
                return self.causal_conv1d(x, weight, bias, return_window=True, **options)

            assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(lambda *given, run=run: run(*given)[0], inputs, fast_mode=True)
        bad = x.detach().clone()
        bad[0, 5:7] = float("nan")
        bad.requires_grad_()
        y = self.causal_conv1d(bad, weight, activation="silu", documents=self.packings[0])
        (slope,) = torch.autograd.grad(y.sum(), bad)
        assert slope[0, 5:7].isnan().all() and slope[0, :5].isfinite().all() and slope[0, 7:].isfinite().all()

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(
        ("dtype", "width"),
        [(torch.float32, 4), (torch.float32, 8), (torch.bfloat16, 4), (torch.bfloat16, 2), (torch.float16, 1)],
        ids=str,
    )
    def test_gradients_are_those_of_float64(self, dtype: torch.dtype, width: int, packed: bool) -> None:
        """Autograd's of plain torch, on the same rounded inputs; x is a slice, in which several programs work."""
        documents = self.packings[0] if packed else None
        rows, seqlen = (5, 13) if packed else (2, 21)
        x = self.drawn(1 if packed else 2, seqlen, 300, dtype=dtype)[..., 8:280]
        given = [x, self.drawn(272, width), self.drawn(272), self.drawn(rows, 272, width - 1, dtype=dtype)]
        given = [t.detach().to(dtype).requires_grad_() for t in given]
        wide = [t.detach().double().requires_grad_() for t in given]
        dy = self.drawn(*x.shape, dtype=dtype, seed=1)

        def gradients(inputs: list[Tensor], backend: str, dy: Tensor) -> tuple[Tensor, ...]:
            x, weight, bias, window = inputs
            options = {"activation": "silu", "window": window, "documents": documents, "backend": backend}
            y = nn.causal_conv1d(x, weight, bias, **options)
            return torch.autograd.grad(y, inputs, dy.to(y.dtype), materialize_grads=True)

        found, exact = gradients(given, self.backend, dy), gradients(wide, "torch", dy)
        summed = {"x": width, "weight": x[..., 0].numel(), "bias": x[..., 0].numel(), "window": width}
        size = [dy.abs().max() * t.double().abs().max() for t in (given[1], given[0], torch.ones(()), given[1])]
        for (name, count), ours, value, largest in zip(summed.items(), found, exact, size, strict=True):
            # of each product, the slope of silu is the sum of width + 1 numbers, and then of four operations
            limit = tolerance(dtype, torch.promote_types(dtype, torch.float32), width + 6, count * largest.item())
            assert_close(ours, value, limit, f"the gradient of {name}")

    def test_poison_stays_in_its_document(self) -> None:
        x, weight, window = self.drawn(1, 13, 3), self.drawn(3, 4), self.drawn(5, 3, 3)
        bad, bad_window = x.clone(), window.clone()
        bad[0, 5:7] = float("nan")
        bad_window[3] = float("inf")
        options = {"documents": self.packings[0], "return_window": True}
        clean, after = self.causal_conv1d(x, weight, window=window, **options)
        dirty, dirty_after = self.causal_conv1d(bad, weight, window=bad_window, **options)
        assert dirty[:, 5:7].isnan().all() and not dirty_after[3].isfinite().any()
        for at in (slice(0, 5), slice(7, 13)):
            assert_same(dirty[:, at], clean[:, at], "other documents")
        assert_same(dirty_after[[0, 1, 2, 4]], after[[0, 1, 2, 4]], "other windows")

    def test_nothing_is_of_the_window_of_an_empty_document(self) -> None:
        """Whatever is in it: the first, as tokens that there are not have no other."""
        bad, documents = self.drawn(2, 5, 3), masks.documents(torch.tensor([0, 0, 7], device=self.device))
        bad[0] = float("nan")
        given = [t.requires_grad_() for t in (self.drawn(1, 7, 5), self.drawn(5, 4), self.drawn(5), bad)]
        y = self.causal_conv1d(*given[:3], activation="silu", window=bad, documents=documents)
        *grads, dwindow = torch.autograd.grad(y.sum(), given)
        assert all(t.isfinite().all() for t in (y, *grads)) and not dwindow[0].any() and dwindow[1].isfinite().all()

    def test_the_last_document_s_nan_stays_in_it(self) -> None:
        """Though it is shorter than the window, and what would come after it is in reach of the one before."""
        documents, x = masks.documents(torch.tensor([0, 8, 9], device=self.device)), self.drawn(1, 9, 5)
        x[0, 8] = float("nan")
        y = self.causal_conv1d(x.requires_grad_(), self.drawn(5, 4), activation="silu", documents=documents)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y[0, :8].isfinite().all() and dx[0, :8].isfinite().all() and dx[0, 8].isnan().all()

    def test_rows_do_not_see_one_another(self) -> None:
        """A row's bits are the same in any batch, and whatever the other rows hold."""
        x, weight = self.drawn(3, 20, 5, dtype=torch.float32), self.drawn(5, 4, dtype=torch.float32)
        bad = x.clone()
        bad[1] = float("nan")
        y, dirty = self.causal_conv1d(x, weight), self.causal_conv1d(bad, weight)
        assert_same(dirty[::2], y[::2], "rows beside a NaN")
        assert_same(self.causal_conv1d(x[:1], weight), y[:1], "a row alone")

    def test_low_precision_is_float32_rounded_once(self) -> None:
        if not self.rounds_once:
            pytest.skip("Triton's interpreter cuts bits off where the GPU rounds; test_cuda_conv.py has the same test")
        x, weight, bias = (self.drawn(*sizes, dtype=torch.bfloat16) for sizes in ((1, 13, 3), (3, 4), (3,)))
        for documents in (None, self.packings[0]):
            convolve = partial(self.causal_conv1d, activation="silu", documents=documents)
            low, wide = convolve(x, weight, bias), convolve(x.float(), weight.float(), bias.float())
            assert_same(low, wide.bfloat16(), "the convolution")

    def test_windows_take_the_dtype_of_x(self) -> None:
        x, weight = self.drawn(2, 5, 3, dtype=torch.bfloat16), self.drawn(3, 4, dtype=torch.float32)
        for part in (x, x[:, :1]):
            y, after = self.causal_conv1d(part, weight, window=self.drawn(2, 3, 3, dtype=torch.float32), return_window=True)
            assert y.dtype == after.dtype == torch.bfloat16 and after.is_contiguous()

    @pytest.mark.parametrize("packed", [False, True])
    def test_compiles_whole(self, packed: bool) -> None:
        """Forward, backward, a window and a step, as one graph each."""
        documents = self.packings[0] if packed else None
        rows = 5 if packed else 1

        def loss(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
            options = {"activation": "silu", "documents": documents, "return_window": True}
            y, after = self.causal_conv1d(x, weight, bias, window=window, **options)
            return y.square().sum() + after.sum(), y

        sizes = ((1, 13, 6), (6, 4), (6,), (rows, 6, 3))
        given = [self.drawn(*size, dtype=torch.float32).requires_grad_() for size in sizes]
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        (ours, y), (expected, plain) = compiled(*given), loss(*given)
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(torch.autograd.grad(ours, given), torch.autograd.grad(expected, given))
        if not packed:
            with torch.no_grad():
                token = [given[0][:, :1], *given[1:]]
                torch.testing.assert_close(compiled(*token), loss(*token))
