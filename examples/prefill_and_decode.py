"""Prefill a prompt in one call, then decode token by token from the state it leaves."""

import torch

from ssdops import masks, ssd, ssd_step

BATCH, PROMPT, NEW, NHEADS, HEADDIM, DSTATE = 2, 128, 8, 4, 32, 16

torch.manual_seed(0)
total = PROMPT + NEW
q, k = torch.randn(2, BATCH, total, 1, DSTATE)
v = torch.randn(BATCH, total, NHEADS, HEADDIM)
log_a = -torch.rand(BATCH, total, NHEADS)

_, state = ssd(q[:, :PROMPT], k[:, :PROMPT], v[:, :PROMPT], masks.decay(log_a[:, :PROMPT]), return_state=True)
decoded = []
for t in range(PROMPT, total):
    y, state = ssd_step(q[:, t], k[:, t], v[:, t], masks.decay(log_a[:, t]), state)
    decoded.append(y)

at_once = ssd(q, k, v, masks.decay(log_a))[:, PROMPT:]
error = (torch.stack(decoded, 1) - at_once).abs().max().item()
print(f"{NEW} decoded tokens differ from the whole sequence by at most {error:.1e}")
assert error < 1e-4
