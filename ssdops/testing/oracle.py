"""What a call should give: the float64 oracle of `ssdops.ir.evaluate`, its gradients, and how far off is fair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir import nodes as n
from ..ir.evaluate import contract, linear_state
from ..plan import state_terms
from .absolute import EXPONENTS, absolute, factor
from .case import TIME_AXIS, Case, uses
from .tolerance import tolerance


def outputs(case: Case, states: bool, nheads: int | None = None) -> dict[str, Tensor]:
    """Y and, on request, the final states, in float64, differentiably; nheads as the case says, if it is not given."""
    mask, nheads = case.mask, case.problem.nheads if nheads is None else nheads
    y = contract(mask.tree, mask.operands, case.q, case.k, case.v, nheads, case.scale)
    finals: dict[str, Tensor] = {}
    for i, term in enumerate(state_terms(mask.tree) if states or case.initial else ()):
        initial = case.initial[i] if case.initial else None
        entered, final = linear_state(term, mask.operands, case.q, case.k, case.v, nheads, initial)
        y = y + case.scale * entered
        finals[f"state[{i}]"] = final
    return {"y": y, **(finals if states else {})}


def gradients(case: Case, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of every float tensor of the call, for cotangents of Y and (if there are more) of the final states."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in case.floats().items()}
    exact = case.map(lambda name, x: leaves.get(name, x))
    return _autograd(outputs(exact, len(cotangents) > 1), cotangents, leaves)


def _autograd(out: dict[str, Tensor], cotangents: Sequence[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    pairs = [(y, dy.double()) for y, dy in zip(out.values(), cotangents, strict=True) if y.requires_grad]
    if not pairs:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    ys, dys = [y for y, _ in pairs], [dy for _, dy in pairs]
    found = torch.autograd.grad(ys, list(leaves.values()), dys, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


# --- how far off is fair --------------------------------------------------------------------------------------------


def output_bounds(case: Case, states: bool) -> dict[str, float]:
    """For Y and the states, how far from the oracle a result may be."""
    problem = case.problem
    big = outputs(absolute(case).case, states, problem.nheads)
    dtypes = {name: problem.dtype if name == "y" else problem.state_dtype for name in big}
    return {name: _allowed(case, name, x, dtypes[name]) for name, x in big.items()}


def gradient_bounds(case: Case, cotangents: Sequence[Tensor]) -> dict[str, float]:
    """For every gradient, how far from the oracle's it may be: from the gradient of the problem on absolute values."""
    big = absolute(case)
    results = outputs(big.case, len(cotangents) > 1, case.problem.nheads)
    sizes = [dy.abs().double() for dy in cotangents]
    found = _autograd(results, sizes, big.leaves)
    through = big.through_entries(found)
    # autograd sums what ρ_i and κ_j feel before it subtracts one from the other: the oracle itself rounds there
    pairing = sum(float((x.detach() * dx).sum()) for x, dx in zip(results.values(), sizes, strict=True))
    exponents = {name for name, use in uses(n.lowered(case.mask.tree)) if use.slot in (*EXPONENTS, "dt", "A")} | through.keys()
    out = {}
    for name, x in case.floats().items():
        parts = [found[part].abs() for part in (name, factor(name)) if part in found] + [*through.get(name, ())]
        out[name] = _allowed(case, name, torch.stack(parts).sum(0), x.dtype, pairing if name in exponents else 0.0)
    return out


def magnitudes(case: Case, states: bool) -> dict[str, float]:
    """The greatest elements of the outputs on absolute values."""
    found = outputs(absolute(case).case, states, case.problem.nheads)
    return {name: float(x.detach().max()) if x.numel() else 0.0 for name, x in found.items()}


def _allowed(case: Case, name: str, big: Tensor, dtype: torch.dtype, uncancelled: float = 0.0) -> float:
    if not big.numel():
        return 0.0
    p = case.problem
    products = p.batch * p.nheads * p.seqlen * p.headdim * p.dstate * (1 if "state" in name else p.seqlen)
    magnitude = float(big.detach().abs().max())
    return tolerance(
        dtype, p.accumulate, products / big.numel(), magnitude, span(case) * magnitude + uncancelled, case.operands
    )


def span(case: Case) -> float:
    """The greatest sum of absolute log decays along the tokens."""
    total, seqlen = 0.0, case.q.shape[1]
    for name, use in set(uses(n.lowered(case.mask.tree))):
        x = case.mask.operands[name]
        if use.slot in (*EXPONENTS, "dt") and x.numel():
            axis = TIME_AXIS.get(use.axes, 0)
            per_token = axis < 0 and x.ndim >= -axis and x.shape[axis] == seqlen
            sums = x.double().abs().sum(axis) if per_token else x.double().abs() * seqlen
            total += float(sums.detach().max())
    return total
