"""torch's own check of first and second derivatives, for every structure on every backend that runs it."""

import pytest
import torch

from ssdops.backends import registry
from ssdops.errors import UnsupportedError
from ssdops.testing.laws import Runner
from ssdops.testing.structures import STRUCTURES, Make

BACKENDS = ("naive", "recurrent", "chunked")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_derivatives(structure: str, backend: str) -> None:
    """Of q, k, v, every float operand and the states."""
    assert backend in registry.names()
    make = Make()
    case = make.case(STRUCTURES[structure](make))
    run = Runner(backend, 4 if backend == "chunked" and structure != "diagonal" else None)
    try:
        states = [torch.randn_like(s) for name, s in run(case).items() if name != "y"]
    except UnsupportedError as error:
        pytest.skip(str(error))  # the support matrix says that this is as it should be
    case = type(case)(case.q, case.k, case.v, case.mask, case.scale, tuple(states))
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.floats().items()}

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        new = dict(zip(leaves, tensors, strict=True))
        return tuple(run(case.map(lambda name, x: new.get(name, x))).values())

    inputs = tuple(leaves.values())
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
