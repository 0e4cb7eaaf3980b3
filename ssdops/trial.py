"""The process in which the tuner tries candidates: inputs for a workload, one candidate run as a call runs it, checked, timed.

It reads requests as lines of JSON from its standard input and answers each with a line: `{"do": "expect"}` works out what the
float64 oracle says, `{"do": "check"}` compares outputs and gradients with it, `{"do": "time"}` gives the seconds of the fastest
sample, and `{"do": "compile"}` only runs once, so that what is compiled is kept for other processes.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from queue import Queue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from . import ops, run
from .autotune import formulas
from .autotune.policy import mode
from .autotune.workload import Workload
from .backends import registry
from .backends.base import Config
from .errors import SsdopsError
from .ir import nodes as n
from .ir.contraction import Contraction
from .ir.text import parse
from .plan import terms_of
from .run import Call, Prepared
from .steps import Plan, Step
from .testing import oracle
from .testing.case import Case
from .testing.tolerance import assert_close
from .trial_inputs import case_of

LONGEST_CHECK = 544
"""Tokens up to which a candidate is compared with the oracle, whose matrices are dense: two chunks of 256, and a part."""
MOST_ENTRIES = 2**24
"""Of those matrices, where heads or tokens can be fewer: of all rows, heads and channels, 128 MiB in each tensor of float64."""
SAMPLE_SECONDS = 2e-3
"""The least that a sample lasts, so that clocks and synchronization do not count."""


class Session:
    """What a process of trials remembers between requests: where it runs, and inputs that are made already."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.case = lru_cache(maxsize=1)(self._case)
        self.expected = lru_cache(maxsize=2)(self._expected)

    def _case(self, work: Workload, seed: int) -> tuple[Case, Tensor]:
        case = case_of(work, self.device, seed)
        generator = torch.Generator(self.device).manual_seed(seed + 1)
        shape = (work.batch, work.seqlen, work.nheads, work.headdim)
        dy = torch.randn(shape, generator=generator, device=self.device).to(case.problem.dtype)
        return case, dy

    def _expected(self, work: Workload, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the oracle says of a workload, and how far from it a result may be."""
        case, dy = self.case(work, seed)
        states = bool(case.initial)
        values, bounds = oracle.outputs(case, states), oracle.output_bounds(case, states)
        if work.direction == "backward":
            values |= {f"gradient of {name}": x for name, x in oracle.gradients(case, [dy]).items()}
            bounds |= {f"gradient of {name}": x for name, x in oracle.gradient_bounds(case, [dy]).items()}
        return values, bounds

    def expect(self, work: Workload, seed: int) -> None:
        """Work out what `check` compares with."""
        self.expected(reduced(work), seed)

    def check(self, work: Workload, backend: str, config: Config, seed: int) -> None:
        """Compare a candidate with the oracle.

        Raises:
            AssertionError: it is wrong; what is off, and where.
        """
        small = reduced(work)
        case, dy = self.case(small, seed)
        got = dict(candidate(case, dy, small, backend, config)())
        values, bounds = self.expected(small, seed)
        for name, value in values.items():
            assert_close(got[name], value, bounds[name], name)
        if work.state_every:
            assert torch.isfinite(got["every"]).all(), "the states between are not finite"

    def compile(self, work: Workload, backend: str, config: Config, seed: int) -> None:
        """Run a candidate once as `check` does and at its own sizes, for both of which compilers may specialise what they
        make, and hold no memory after it."""
        for sizes in (reduced(work), work):
            case, dy = self.case(sizes, seed)
            list(candidate(case, dy, sizes, backend, config)())
        self._wait()
        self.case.cache_clear()
        del case, dy
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # others compile on the same GPU, and all its memory is wanted when times are taken

    def seconds(self, work: Workload, backend: str, config: Config, seed: int, at_least: float) -> float:
        """The fastest of as many samples as take that long; a first call, whose results must be finite, is not counted."""
        case, dy = self.case(work, seed)
        call = candidate(case, dy, work, backend, config)
        for name, x in call():
            assert torch.isfinite(x).all(), f"{name} is not finite"
        return fastest(lambda: list(call()), self._wait, at_least)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def reduced(work: Workload) -> Workload:
    """The same dimensions over fewer rows, tokens and heads, which keep their pattern: what the oracle can afford."""
    batch = min(work.batch, 2)
    seqlen = min(work.seqlen, max(LONGEST_CHECK, 2 * work.state_every))
    counts = (work.nheads, work.q_heads, work.k_heads, work.v_heads)
    groups = min(counts)
    by = next((f for f in range(groups // 2, 1, -1) if all(count % f == 0 for count in counts)), 1)
    groups = groups // by
    channels = work.dstate if any(isinstance(node, n.ChannelDecay) for node in n.walk(parse(work.term))) else 1

    def few(f: int) -> bool:
        return batch * (work.nheads // (by * f)) * seqlen**2 * channels <= MOST_ENTRIES

    # heads of a group, for which kernels are compiled: as many as can be, and several wherever there were
    larger = [count // by for count in counts if count // by > groups]
    factors = [f for f in range(1, max(larger, default=1)) if all(x % (f * groups) == 0 and x // f > groups for x in larger)]
    each = next((f for f in factors if few(f)), factors[-1] if factors else 1)
    nheads, q, k, v = (count // by // (each if count // by > groups else 1) for count in counts)
    longest = math.isqrt(MOST_ENTRIES // max(batch * nheads * channels, 1))
    return replace(
        work, batch=batch, seqlen=max(min(seqlen, longest), 2 * work.state_every), nheads=nheads, q_heads=q, k_heads=k,
        v_heads=v, documents=min(work.documents, 3 * batch),
    )  # fmt: skip


def candidate(
    case: Case, dy: Tensor, work: Workload, backend: str, config: Config
) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """A call that runs a candidate as `ssd` would: Y by name, then the state of a step, or those between, then gradients."""
    (term,) = terms_of(case.mask.tree)
    every = work.state_every or None
    states, names = list(case.initial), n.operand_names(case.mask.tree)
    contraction = Contraction(case.mask.tree, state_every=every, return_state=bool(states))
    problem = replace(case.problem, state_every=every)
    prepared = Prepared(contraction, problem, Plan((Step(term, backend, config, 0.0),)), names, False)
    operands = [case.mask.operands[name] for name in names]
    given = Call(case.q, case.k, case.v, operands, states, str(contraction), case.scale)
    learnt = work.direction == "backward"
    save = learnt and ops.worth_saving(case.q)

    def call() -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            y, *rest = run.forward_as(prepared, given, save)
            yield "y", y
            if states:
                yield "state[0]", rest.pop(0)
            if every is not None:
                yield "every", rest.pop(0)
            if learnt:
                grads = run.backward_as(prepared, given, [dy], rest)
                for name, grad in zip(("q", "k", "v", *names), grads, strict=True):
                    if grad.numel() or not dy.numel():
                        yield f"gradient of {name}", grad

    return call


def fastest(call: Callable[[], object], wait: Callable[[], None], at_least: float) -> float:
    """Seconds of a call, in the fastest sample of as many as take `at_least` seconds together."""
    best, repeats, began = float("inf"), 1, time.perf_counter()
    wait()
    while True:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        taken = time.perf_counter() - start
        best = min(best, taken / repeats)
        if taken < SAMPLE_SECONDS:
            repeats = min(2 * repeats, 1024)
        elif time.perf_counter() - began >= at_least:
            return max(best, 1e-9)


def answer(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request. Whatever a candidate raises is what is wrong with it."""
    config = Config(**request["config"])
    try:
        formulas.load(request["masks"])
        work = Workload.from_json(request["workload"])
        if request["do"] == "expect":
            session.expect(work, request["seed"])
            return {}
        if request["do"] == "check":
            session.check(work, request["backend"], config, request["seed"])
            return {}
        if request["do"] == "compile":
            session.compile(work, request["backend"], config, request["seed"])
            return {}
        return {"seconds": session.seconds(work, request["backend"], config, request["seed"], request["seconds"])}
    except AssertionError as error:
        return {"error": f"wrong: {error}"}
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {"error": f"out of memory: {str(error)[:200]}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    """Answer requests until there are no more."""
    private = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    requests: Queue[str] = Queue()
    Thread(target=_listen, args=(requests,), daemon=True).start()
    session: Session | None = None
    with mode("off"):
        while True:
            request = json.loads(requests.get())
            if session is None:
                session, reply = _begin(request)
            else:
                reply = answer(session, request)
            private.write(json.dumps(reply) + "\n")
            private.flush()


def _begin(hello: dict[str, Any]) -> tuple[Session | None, dict[str, Any]]:
    registry.BACKENDS.clear()
    registry.BACKENDS.update(hello["backends"])
    torch.set_num_threads(hello["threads"])
    try:
        torch.empty(1, device=hello["device"]).item()
    except (RuntimeError, AssertionError, SsdopsError) as error:
        return None, {"error": f"{hello['device']} cannot be used: {str(error).splitlines()[0]}"}
    return Session(hello["device"]), {}


def _listen(requests: Queue[str]) -> None:
    """Read requests apart, so that the process ends with the one that asks, whatever a candidate is doing."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)
