"""Three documents packed into one row give what each gives alone, final states included."""

from itertools import pairwise

import torch

from ssdops import masks, ssd

NHEADS, HEADDIM, DSTATE = 4, 32, 16

torch.manual_seed(0)
cu_seqlens = torch.tensor([0, 50, 51, 160])
total = int(cu_seqlens[-1])
q, k = torch.randn(2, 1, total, 1, DSTATE)
v = torch.randn(1, total, NHEADS, HEADDIM)
log_a = -torch.rand(1, total, NHEADS)

packed, states = ssd(q, k, v, masks.decay(log_a) * masks.documents(cu_seqlens), return_state=True)
worst = 0.0
for document, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
    at = (slice(None), slice(start, stop))
    alone, state = ssd(q[at], k[at], v[at], masks.decay(log_a[at]), return_state=True)
    worst = max(worst, (packed[at] - alone).abs().max().item(), (states[document] - state[0]).abs().max().item())
print(f"{len(cu_seqlens) - 1} packed documents differ from each alone by at most {worst:.1e}")
assert worst < 1e-4
