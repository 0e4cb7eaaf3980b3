"""What `compute-sanitizer` looks at on a GPU: calls and gradients of the TVM backend, small, in tiles that are whole or not.

    compute-sanitizer --tool racecheck python tests/race_tvm.py    # and --tool memcheck

Its programs have barriers of their own (`walk.py`), and tiles that lie over one another: no result shows a race that
happens to end well.
"""

import torch

from ssdops import masks, ssd
from ssdops.backends.tvm.cuda import OnGpu


def walks_of_several(headdim: int, dstate: int) -> None:
    """Groups that walk over heads, rows in segments, and states between chunks, as on a device with less to do."""
    walked, segments = OnGpu.walked, OnGpu.segments
    OnGpu.walked, OnGpu.segments = (lambda scan, count, parts: count), (lambda scan, roles, heads: 2)  # type: ignore[method-assign]
    q, k = (torch.randn(1, 256, 1, dstate, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    v = torch.randn(1, 256, 4, headdim, device="cuda").bfloat16().requires_grad_()
    log_a = (-torch.rand(1, 256, 4, device="cuda")).requires_grad_()
    y = ssd(q, k, v, masks.decay(log_a), backend="tvm")
    torch.autograd.grad(y, [q, k, v, log_a], torch.ones_like(y))
    OnGpu.walked, OnGpu.segments = walked, segments  # type: ignore[method-assign]
    with torch.no_grad():
        ssd(q, k, v, masks.decay(log_a), state_every=64, return_state=True, backend="tvm")


if __name__ == "__main__":
    walks_of_several(64, 128)
    walks_of_several(64, 256)
    for dtype in (torch.bfloat16, torch.float32):
        for headdim, dstate in ((64, 128), (64, 256), (16, 33)):
            q, k = (torch.randn(1, 200, 1, dstate, device="cuda").to(dtype).requires_grad_() for _ in range(2))
            v = torch.randn(1, 200, 2, headdim, device="cuda").to(dtype).requires_grad_()
            log_a = (-torch.rand(1, 200, 2, device="cuda")).requires_grad_()
            y = ssd(q, k, v, masks.decay(log_a), backend="tvm")
            torch.autograd.grad(y, [q, k, v, log_a], torch.ones_like(y))
            lags, entries = (torch.randn(*shape, device="cuda").requires_grad_() for shape in ((399,), (200, 200)))
            mask = masks.decay(log_a) * masks.window(90, 30) * masks.toeplitz(lags) * masks.dense(entries)
            y = ssd(q, k, v, mask, backend="tvm")
            torch.autograd.grad(y, [q, k, v, log_a, lags, entries], torch.ones_like(y))
    torch.cuda.synchronize()
    print("ran")
