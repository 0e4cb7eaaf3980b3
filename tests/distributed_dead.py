"""What every rank of tests/test_distributed.py checks of ranks that die: the last of them, at three places."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ssdops import distributed, masks
from ssdops.errors import RankError


def dies(rank: int, world: int, late: bool, calls: int = 0) -> None:
    """The others get an error that names it: late, between its passes; or at a call, after as many that went well."""
    x, log_a = torch.randn(1, 6, 2, 4, requires_grad=True), -torch.rand(1, 6, 2)
    gone = rank == world - 1
    for _ in range(calls):
        distributed.ssd(x, x, x, masks.decay(log_a))
    if gone and not late:
        os._exit(1)
    try:
        y = distributed.ssd(x, x, x, masks.decay(log_a))
        if gone:
            os._exit(1)
        y.sum().backward()
    except RankError as error:
        assert f"rank {world - 1} of {world} did not come within 5 s" in str(error), str(error)
        assert ("lost in a collective" in str(error)) == late
    else:
        raise AssertionError("nobody missed the rank that died")


CHECKS: dict[str, Callable[[int, int], None]] = {"dies": lambda rank, world: dies(rank, world, late=False)}
