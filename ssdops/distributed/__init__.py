"""Sequences and heads over the ranks of torch.distributed: `ssd` on slices of a sequence."""

from .scan import ssd

__all__ = ["ssd"]
