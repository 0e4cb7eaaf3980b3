"""The Triton backend: kernels for NVIDIA GPUs, and for tests, in Triton's interpreter, for CPUs."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ... import config
from ...ir.problem import Problem
from ...ir.terms import Diagonal, Linear, Term
from ..base import Config, Cotangents, Gradients, Inputs, Output, StepInputs, Support, Work

MAX_DSTATE = 256
"""A row of the state is one power of two of registers."""


class Triton:
    """Kernels in Triton."""

    name = "triton"

    def supports(self, term: Term, problem: Problem) -> Support:
        """No term yet: there is only the decode kernel."""
        return Support.no("'triton' has only its decode kernel yet, for ssd_step; 'chunked' runs scans and 'naive' any mask")

    def configs(self, term: Term, problem: Problem) -> tuple[Config, ...]:
        """Nothing to choose."""
        return (Config(),)

    def work(self, term: Term, problem: Problem, config: Config) -> Work:
        """Nothing runs."""
        raise NotImplementedError("supports() refuses every term")

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """Nothing runs."""
        raise NotImplementedError("supports() refuses every term")

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """Nothing runs."""
        raise NotImplementedError("supports() refuses every term")

    def supports_step(self, terms: tuple[Term, ...], problem: Problem) -> Support:
        """Causal scans, with a diagonal beside each at most, up to float32."""
        if find_spec("triton") is None:
            return Support.no("'triton' needs the package triton, which is not installed; 'recurrent' steps without it")
        device = problem.target.device
        if device != "cuda" and not (device == "cpu" and config.triton_interpreted()):
            return Support.no(f"'triton' runs on CUDA devices, and q is on {device}; 'recurrent' steps anywhere")
        if problem.accumulate != torch.float32:
            return Support.no("'triton' steps in float32, and an input is float64; convert it, or step with 'recurrent'")
        if problem.dstate > MAX_DSTATE:
            return Support.no(f"dstate={problem.dstate} exceeds {MAX_DSTATE}; 'recurrent' has no such limit")
        scans = [term for term in terms if isinstance(term, Linear) and term.causal and term.documents is None]
        diagonals = [term for term in terms if isinstance(term, Diagonal)]
        if len(scans) + len(diagonals) < len(terms) or len(diagonals) > len(scans):
            return Support.no("'triton' steps causal scans, each with a diagonal beside it at most; 'recurrent' takes any sum")
        return Support.yes()

    def step(self, terms: tuple[Term, ...], problem: Problem, x: StepInputs) -> None:
        """One launch per scan."""
        from .step import run  # imports triton, which need not be there

        run(terms, problem, x)
