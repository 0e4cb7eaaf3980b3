"""The backend: quadratic terms by tiles."""

from __future__ import annotations

from ...ir.problem import Problem
from ...ir.terms import Quadratic, Term
from ..base import Config, Cotangents, Gradients, Inputs, Output, Support, Work
from . import tiles


class Triton:
    """Triton kernels."""

    name = "triton"

    def supports(self, term: Term, problem: Problem) -> Support:
        """Quadratic terms of the form that tiles read."""
        if not isinstance(term, Quadratic):
            return Support.no("'triton' runs quadratic terms only here; 'chunked' and 'recurrent' run scans")
        return tiles.supports(term, problem)

    def configs(self, term: Term, problem: Problem) -> tuple[Config, ...]:
        """Tile sizes follow from the sizes of the call."""
        return (Config(),)

    def work(self, term: Term, problem: Problem, config: Config) -> Work:
        """What a forward pass costs."""
        assert isinstance(term, Quadratic)  # supports() refuses the rest
        return tiles.work(term, problem)

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """By tiles."""
        assert isinstance(term, Quadratic)  # supports() refuses the rest
        return tiles.forward(term, x)

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """By tiles."""
        assert isinstance(term, Quadratic)  # supports() refuses the rest
        return tiles.backward(term, x, cotangents)
