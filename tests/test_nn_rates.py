"""`discretize` on each backend, what its kernel does not take, and arguments that do not fit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conv_laws import drawn
from rates_laws import RatesLaws
from torch._subclasses.fake_tensor import FakeTensorMode

from ssdops.errors import DeviceError, DtypeError, ShapeError, UnsupportedError
from ssdops.nn import discretize, launching
from ssdops.testing.tolerance import assert_same


class TestTorch(RatesLaws):
    backend = "torch"


@pytest.mark.skipif(not launching.HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_conv.py tests the compiled kernels here")
class TestTriton(RatesLaws):
    """In Triton's interpreter."""

    backend = "triton"

    def test_what_is_traced_is_torch_s(self) -> None:
        given = [drawn(2, 4, dtype=torch.float32), *(drawn(4, dtype=torch.float32, seed=seed) for seed in (1, 2))]
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) for x in given]
            assert discretize(*fake)[0].shape == (2, 4)
            with pytest.raises(UnsupportedError, match="its tensors are traced or wrapped"):
                discretize(*fake, backend="triton")
        compiled = torch.compile(discretize, fullgraph=True, backend="aot_eager")
        for x, y in zip(compiled(*given), discretize(*given, backend="torch"), strict=True):
            assert_same(x, y, "compiled")
        batched = torch.func.vmap(partial(discretize, A=given[1]))(given[0])
        assert_same(batched[1], discretize(*given[:2], backend="torch")[1], "by rows")

    def test_wide_tokens_are_torch_s(self) -> None:
        dt, A = drawn(1, 8200, dtype=torch.float32), -torch.ones(100)
        with pytest.raises(UnsupportedError, match="a token has 8200 columns, more than 8192; backend='torch' does"):
            discretize(dt, A, backend="triton")
        assert_same(discretize(dt, A)[0], discretize(dt, A, backend="torch")[0], "auto")


def test_operands_that_do_not_fit() -> None:
    dt = drawn(2, 6)
    for call, message in [
        (lambda: discretize(dt, dt), r"A must be \(nheads,\) that divide the columns of dt, \(2, 6\), got \(2, 6\)"),
        (lambda: discretize(dt, dt[0, :4]), r"A must be \(nheads,\) that divide the columns of dt, \(2, 6\), got \(4,\)"),
        (lambda: discretize(dt, dt[0, :0]), r"A must be \(nheads,\) that divide"),
        (lambda: discretize(dt[0, 0], dt[0]), r"A must be \(nheads,\) that divide the columns of dt, \(\), got \(6,\)"),
        (lambda: discretize(dt, dt[0, :3], dt[0]), r"bias must have the shape of A, \(3,\), got \(6,\)"),
    ]:
        with pytest.raises(ShapeError, match=message):
            call()
    with pytest.raises(DeviceError, match="A is on meta, but dt is on cpu; move it to dt's device"):
        discretize(dt, dt[0].to("meta"))
    with pytest.raises(DtypeError, match=r"dtype must be torch.float32 or torch.float64, got torch.bfloat16"):
        discretize(dt, dt[0], dtype=torch.bfloat16)


def test_rows() -> None:
    """Of a tensor whose rows are evenly spaced nothing is copied; others are right."""
    whole = torch.arange(2 * 3 * 4 * 10.0).view(2, 3, 4, 10)
    even = [whole[..., 2:7], whole[0, :, 1:2], whole[..., :1], whole[:1, :, 0], whole[0, 0, 0], whole[:0], whole[..., :0]]
    odd = [whole.transpose(0, 1), whole.mT, whole[:, :, 1:3], whole[0, 0, 0, ::2], whole.transpose(0, 1)[:, :, 0]]
    for x, copied in [*((x, False) for x in even), *((x, True) for x in odd)]:
        rows, step = launching.by_rows(x)
        count = x.shape[:-1].numel()
        assert (rows.data_ptr() != x.data_ptr()) == copied or not x.numel(), x.shape
        read = torch.as_strided(rows, (count, x.shape[-1]), (step, 1), rows.storage_offset())
        assert_same(read, x.reshape(count, x.shape[-1]), str(tuple(x.shape)))
