"""Sequences over the ranks of torch.distributed: `ssd` on slices."""

from .scan import ssd

__all__ = ["ssd"]
