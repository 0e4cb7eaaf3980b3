"""Backends that run those terms of a mask that another backend can, and `naive` the rest: any mask meets its kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from ssdops.backends import registry
from ssdops.backends.base import Adder, Backend, Config, Cotangents, Gradients, Inputs, Output, Support, Work
from ssdops.ir.problem import Problem
from ssdops.ir.terms import Linear, Quadratic, Term


class Preferring:
    """`first` where it runs a term, else `naive`."""

    first: str
    name: str

    @property
    def factored(self) -> bool:
        return registry.is_factored(self.first)

    def of(self, term: Term, problem: Problem) -> Backend:
        """Who runs the term."""
        bare = replace(term, diagonal=None) if isinstance(term, Linear) else term
        if registry.get(self.first).supports(bare, problem).ok:
            return registry.get(self.first)
        assert isinstance(term, Quadratic) or not self.factored  # naive takes no decays in factors
        return registry.get("naive")

    def supports(self, term: Term, problem: Problem) -> Support:
        return self.of(term, problem).supports(term, problem)

    def configs(self, term: Term, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        return self.of(term, problem).configs(term, problem, chunk_size)

    def work(self, term: Term, problem: Problem, config: Config, direction: str = "forward") -> Work:
        return self.of(term, problem).work(term, problem, config, direction)

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        return self.of(term, x.problem).forward(term, x, config, save)

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        return self.of(term, x.problem).backward(term, x, config, cotangents)

    def adds(self, term: Term, problem: Problem, direction: str) -> bool:
        backend = self.of(term, problem)
        return isinstance(backend, Adder) and backend.adds(term, problem, direction)

    def takes_diagonal(self, term: Linear, problem: Problem) -> bool:
        backend = self.of(term, problem)
        return isinstance(backend, Adder) and backend.takes_diagonal(term, problem)


@contextmanager
def preferring(first: str) -> Iterator[str]:
    """The name of such a backend, which is known until the block ends."""
    name = f"{first}_or_naive"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_added", dict(registry._added))
        registry.register_backend(name, type(name, (Preferring,), {"first": first, "name": name}))
        yield name
