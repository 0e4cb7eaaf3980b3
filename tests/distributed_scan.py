"""What every rank of tests/test_distributed.py checks of `ssdops.distributed.ssd`, against the oracle of the whole."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssdops import config, distributed, explain, masks
from ssdops.autotune import mode, store, tuner
from ssdops.autotune.record import Record, Trial
from ssdops.distributed.agree import PATIENCE, team_of
from ssdops.errors import DeviceError, RankError, UnsupportedError
from ssdops.masks import Mask
from ssdops.testing import oracle
from ssdops.testing.case import Case
from ssdops.testing.laws import noise, part
from ssdops.testing.structures import STRUCTURES, Make
from ssdops.testing.tolerance import assert_close

REFUSED = {"window", "toeplitz", "dense", "fenwick", "shift(2)", "decay * window", "channel_decay * window"}
"""Structures that carry no state."""
MORE: dict[str, Callable[[Make], Mask]] = {
    "trapezoidal reverse": lambda s: masks.trapezoidal(s.log(), s.factor(), s.factor().flip(1)).reverse(),
    "trapezoidal T": lambda s: masks.trapezoidal(s.log(), gamma=s.factor(), beta_over_a=s.factor().flip(1)).T,
    "full * documents + decay.T * documents": lambda s: (masks.full() + masks.decay(s.log()).T) * s.ids,
    "decay * documents reverse": lambda s: (masks.decay(s.log()) * s.ids).reverse(),
    "causal + decay of more heads": lambda s: masks.causal() + masks.decay(s.log(2 * s.nheads)).shift(1),
    "quasiseparable * documents": lambda s: (masks.decay(s.log()).strict() + masks.decay(s.log(1)).strict().T) * s.cu,
}


def cuts(seqlen: int, world: int) -> list[tuple[int, int]]:
    """Uneven slices; of four, the second has no tokens."""
    inner = [seqlen * 2 // 5] if world == 2 else [seqlen // 4, seqlen // 4, seqlen * 3 // 4]
    return list(pairwise([0, *inner, seqlen]))


def check(
    case: Case, rank: int, world: int, states: bool, backend: str = "auto", chunk_size: int | None = None, device: str = "cpu"
) -> None:
    """The slice of Y, the final states of the whole, and every gradient are those of the oracle, by the tolerance formula."""
    start, stop = cuts(case.q.shape[1], world)[rank]
    mine = part(case, start, stop)
    leaves = {name: x.to(device, copy=True).requires_grad_() for name, x in mine.floats().items()}
    given = mine.map(lambda name, x: leaves[name] if name in leaves else x.to(device))
    out = distributed.ssd(
        given.q, given.k, given.v, given.mask, scale=given.scale, initial_state=given.initial or None, return_state=states,
        backend=backend, chunk_size=chunk_size,
    )  # fmt: skip
    y, finals = out if isinstance(out, tuple) else (out, ())
    finals = finals if isinstance(finals, tuple) else (finals,)
    expected, allowed = oracle.outputs(case, states), oracle.output_bounds(case, states)
    assert y.dtype == case.problem.dtype
    assert_close(y.cpu(), expected["y"][:, start:stop], allowed["y"], "y")
    for i, state in enumerate(finals):
        assert_close(state.cpu(), expected[f"state[{i}]"], allowed[f"state[{i}]"], f"state[{i}]")
    like = {"y": expected["y"].to(y.dtype)} | {
        name: x.to(case.problem.state_dtype) for name, x in expected.items() if name != "y"
    }
    of_rank = [[noise(x, 10 * r + i) for i, x in enumerate(like.values())] for r in range(world)]  # every rank has a loss
    found = torch.autograd.grad(
        [y, *finals], list(leaves.values()), [x.to(device) for x in (of_rank[0][0][:, start:stop], *of_rank[rank][1:])],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    cotangents = [
        of_rank[0][0],
        *(torch.stack([c.double() for c in each]).sum(0) for each in zip(*(x[1:] for x in of_rank), strict=True)),
    ]
    grads, bounds = oracle.gradients(case, cotangents), oracle.gradient_bounds(case, cotangents)
    wanted = part(case.map(lambda name, x: grads.get(name, x)), start, stop).floats()
    for (name, x), grad in zip(wanted.items(), found, strict=True):
        assert grad.dtype == mine.floats()[name].dtype
        total = grad.double()
        if x.shape == case.floats()[name].shape:  # of the whole: each rank has the part of its tokens
            dist.all_reduce(total)
        assert_close(total.cpu(), x, bounds[name], f"the gradient of {name}")


def on_two(check: Callable[..., None]) -> Callable[..., None]:
    """Of what has nothing to do with the number of ranks."""
    return lambda rank, world, **given: check(rank, world, **given) if world == 2 else None


def structure(rank: int, world: int, name: str, make: Make, device: str = "cpu", backend: str = "auto") -> None:
    """One structure, with states in and out where it has them."""
    case = make.case({**STRUCTURES, **MORE}[name](make))
    case = case if device == "cpu" else replace(case, operands=make.dtype)  # tensor cores take products of these
    if case.carried:
        p = case.problem
        assert p.n_states is not None
        shape = (p.n_states, p.nheads, p.headdim, p.dstate)
        case = replace(case, initial=tuple(make.normal(*shape).flip(0) * (i + 1) for i in range(len(case.carried))))
    check(case, rank, world, states=bool(case.carried), device=device, backend=backend)


def refused(rank: int, world: int, name: str) -> None:
    """A mask without a state says so on every rank, before anything moves."""
    make = Make(seqlen=4 + rank)
    case = make.case(STRUCTURES[name](make))
    try:
        distributed.ssd(case.q, case.k, case.v, case.mask)
    except UnsupportedError as error:
        assert "has no recurrence" in str(error) and f"rank {rank}" in str(error)
    else:
        raise AssertionError(f"{name} ran")


def long_case(dtype: torch.dtype, seqlen: int = 150, decay: float = 0.05) -> Case:
    """Two rows, shared heads, slow decay."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    q, k, v = normal(2, seqlen, 2, 8).to(dtype), normal(2, seqlen, 1, 8).to(dtype), normal(2, seqlen, 4, 8).to(dtype)
    log_a, w = -decay * normal(2, seqlen, 4).abs(), normal(2, seqlen, 4)
    mask = masks.decay(log_a).scale(cols=w) + masks.decay(log_a.flip(2)).strict().T
    return Case(q, k, v, mask, 0.3, (normal(2, 4, 8, 8), normal(2, 4, 8, 8)))


def backends(rank: int, world: int, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Every backend serves."""
    size = 32 if backend == "chunked" else None
    check(long_case(dtype), rank, world, states=True, backend=backend, chunk_size=size, device=device)


def interpreted(rank: int, world: int) -> None:
    """Triton's passes, both ways, which go on while the exchange is under way; on GPUs `distributed_cuda.py` has them."""
    if config.triton_interpreted():
        structure(rank, world, "quasiseparable", Make(seqlen=40, headdim=16, dstate=16, dtype=torch.float32), backend="triton")


def unlike_slices(rank: int, world: int) -> None:
    """A rank whose slice does not fit: all raise, name it and show its shapes; the next call goes well."""
    heads = 3 if rank == 1 else 2
    x, log_a = torch.randn(1, 5, heads, 4), -torch.rand(1, 5, heads)
    try:
        distributed.ssd(x, x, x, masks.decay(log_a))
    except RankError as error:
        assert f"rank 1 of {world}" in str(error) and "nheads is 3 and not 2" in str(error) and "(1, 5, 3, 4)" in str(error)
    else:
        raise AssertionError("unlike slices ran")
    x = torch.randn(1, 5, 2, 4)
    assert distributed.ssd(x, x, x).shape == x.shape


def calls_in_a_row(rank: int, world: int) -> None:
    """What all have said before is only counted, and what is new, or unlike, or wrong is still found out, and got over."""
    team = team_of(None)
    assert team is not None
    said, exchange = [0], team._exchange

    def counting(*args: Any) -> list[str]:
        said[0] += 1
        return exchange(*args)

    def call(seqlen: int = 5, heads: int = 2) -> int:
        """How often all said what they do."""
        said[0] = 0
        x = torch.randn(1, seqlen, heads, 4)
        distributed.ssd(x, x, x)
        return said[0]

    team._exchange = counting  # type: ignore[method-assign]
    try:
        assert call(7) == 1 and [call(7), call(7), call(7)] == [0, 0, 0]
        if rank == 1:
            time.sleep(1.5 * PATIENCE)  # the others have said it meanwhile
        assert call(7) == 0
        assert call(7 + rank) == 1 and call(7 + rank) == 1, "slices of unlike lengths"
        assert call(7) == 0 and call(6) == 1 and call(7) == call(6) == 0
        try:
            call(7, heads=3 if rank == world - 1 else 2)
        except RankError as error:
            assert f"rank {world - 1} of {world} makes another call" in str(error) and "(1, 7, 3, 4)" in str(error)
        else:
            raise AssertionError("unlike slices ran")
        assert call(7) == 1 and call(7) == 0
        assert kept_at_the_store(lambda: call(7)) <= 2, "counts leave more and more at the store"
    finally:
        del team._exchange


def kept_at_the_store(call: Callable[[], object]) -> int:
    """How many keys ten calls leave there that five have not."""
    at_the_store, kept = dist.distributed_c10d._get_default_store(), list[int]()
    for _ in range(2):
        for _ in range(5):
            call()
        dist.barrier()  # all have come to the last call
        kept.append(at_the_store.num_keys())
        dist.barrier()
    return kept[1] - kept[0]


def bad_slice(rank: int, world: int) -> None:
    """A rank whose tensors do not even fit one another tells the others."""
    x, k = torch.randn(1, 5, 2, 4), torch.randn(1, 5 + rank // (world - 1), 2, 4)
    try:
        distributed.ssd(x, k, x)
    except (RankError, ValueError) as error:
        assert f"rank {world - 1} of {world}" in str(error) and f"(1, {5 + 1})" in str(error)
        assert isinstance(error, RankError) == (rank != world - 1)
    else:
        raise AssertionError("a bad slice ran")


def other_masks(rank: int, world: int) -> None:
    """Ranks that ask for unlike things."""
    x, log_a = torch.randn(1, 5, 2, 4), -torch.rand(1, 5, 2)
    for change in ({"mask": masks.decay(log_a).T if rank else masks.decay(log_a)}, {"return_state": bool(rank)}):
        try:
            distributed.ssd(x, x, x, **change)  # type: ignore[call-overload]
        except RankError as error:
            assert f"rank 1 of {world} makes another call than rank 0" in str(error)
        else:
            raise AssertionError("unlike calls ran")


def foreign_device(rank: int, world: int) -> None:
    """Tensors of a device that the group has no backend for, as a CPU's are to NCCL."""
    x = torch.empty(1, 5, 2, 4, device="meta")
    try:
        distributed.ssd(x, x, x)
    except DeviceError as error:
        assert f"rank {rank} of {world}" in str(error) and "'gloo' moves none of meta" in str(error)
    else:
        raise AssertionError("tensors of another device ran")


def subgroups(rank: int, world: int) -> None:
    """Groups of some ranks, and of one, which is the plain op."""
    alone = [dist.new_group([r]) for r in range(world)]
    pairs = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]
    x, log_a = torch.randn(1, 8, 2, 4, generator=torch.Generator().manual_seed(0)), -torch.full((1, 8, 2), 0.1)
    whole = distributed.ssd(x, x, x, masks.decay(log_a), group=alone[rank])
    at = slice(4 * (rank % 2), 4 * (rank % 2) + 4)
    y = distributed.ssd(x[:, at], x[:, at], x[:, at], masks.decay(log_a[:, at]), group=pairs[rank // 2])
    assert torch.allclose(y, whole[:, at], atol=1e-5)
    try:
        distributed.ssd(x, x, x, group=alone[1 - rank if rank < 2 else 0])
    except RankError as error:
        assert "not in the group" in str(error)
    else:
        raise AssertionError("a stranger ran")


def one_plan(rank: int, world: int) -> None:
    """One rank measures, all run its plan, though measuring would come out differently on each."""
    calls = []

    def measure(worker: object, key: object, work: object, candidates: list, budget: float) -> Record:  # type: ignore[type-arg]
        calls.append(key)
        time.sleep(0.3)
        ours = ("recurrent", "naive")[rank % 2]
        trials = tuple(Trial(c.backend, c.config, "measured", 1.0 + (c.backend != ours)) for c in candidates)
        return store.keep(Record(key, trials, time.time()))  # type: ignore[arg-type]

    config.cache_dir = lambda: Path(tempfile.mkdtemp())  # type: ignore[assignment]  # what others have measured is not ours
    tuner.measure = measure  # type: ignore[assignment]
    x, log_a = torch.randn(1, 300, 2, 4), -torch.rand(1, 300, 2)
    with mode("on"):
        distributed.ssd(x, x, x, masks.decay(log_a))
    (step,) = explain(x, x, x, masks.decay(log_a)).plan.steps
    found: list[tuple[int, str, str]] = [(0, "", "")] * world
    dist.all_gather_object(found, (len(calls), step.backend, step.origin))
    assert sum(count for count, _, _ in found) == 1, found
    assert len({found[1:] for found in found}) == 1 and step.origin == "tuned", found


def checkpointed(rank: int, world: int) -> None:
    """Activation checkpointing runs the exchange again in the backward pass, and gives the same gradients."""

    def gradient(run: Callable[..., Tensor]) -> Tensor:
        x = torch.randn(1, 9, 2, 4, generator=torch.Generator().manual_seed(rank), requires_grad=True)
        log_a = torch.full((1, 9, 2), -0.1, requires_grad=True)
        y = run(lambda x, log_a: distributed.ssd(x, x, x, masks.decay(log_a)), x, log_a)
        (found,) = torch.autograd.grad(y.square().sum(), x)
        return found

    plain = gradient(lambda f, *args: f(*args))
    assert torch.equal(gradient(lambda f, *args: checkpoint(f, *args, use_reentrant=False)), plain)


def short() -> dict[str, Callable[[int, int], None]]:
    """Every structure in float64, and some of them in float32."""
    names = [name for name in {**STRUCTURES, **MORE} if name not in REFUSED]
    single = Make(seqlen=23, dtype=torch.float32)
    some = ("decay", "quasiseparable", "decay * documents(segment_ids)", "trapezoidal(beta)", "channel_decay(dt, A)")
    return {
        **{f"{name}, float64": partial(structure, name=name, make=Make(seqlen=11)) for name in names},
        **{f"{name}, float32": partial(on_two(structure), name=name, make=single) for name in some},
        **{f"{name} is refused": partial(on_two(refused), name=name) for name in sorted(REFUSED)},
    }


CHECKS: dict[str, Callable[[int, int], None]] = {
    **short(),
    **{
        f"{backend} in {dtype}": partial(on_two(backends), backend=backend, dtype=dtype)
        for backend, dtype in (("chunked", torch.float32), ("chunked", torch.bfloat16), ("recurrent", torch.float32))
    },
    "triton": on_two(interpreted), "one plan": one_plan, "checkpointed": checkpointed,
    "calls in a row": calls_in_a_row, "unlike slices": unlike_slices, "a bad slice": bad_slice, "other masks": other_masks,
    "foreign device": foreign_device, "subgroups": subgroups,
}  # fmt: skip
