"""What `compute-sanitizer` looks at on a GPU: calls and gradients of the TVM backend, small, in tiles that are whole or not.

    compute-sanitizer --tool racecheck python tests/race_tvm.py    # and --tool memcheck

Its programs have barriers of their own (`walk.py`), and tiles that lie over one another: no result shows a race that
happens to end well.
"""

import torch

from ssdops import masks, ssd

if __name__ == "__main__":
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
