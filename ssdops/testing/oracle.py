"""What a call should give: the float64 oracle of `ssdops.ir.evaluate`, its gradients, and how far off is fair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir import nodes as n
from ..ir import operands as ops
from ..ir.evaluate import contract, linear_state
from ..ir.resolve import resolve
from ..masks import Mask
from ..plan import state_terms
from .case import TIME_AXIS, Case, uses
from .tolerance import tolerance

EXPONENTS = ("log_a", "log_gamma", "log_cols")
"""Slots whose values are exponents: they keep their signs, as what they scale is positive anyway."""


def outputs(case: Case, states: bool) -> dict[str, Tensor]:
    """Y and, on request, the final states, in float64, differentiably."""
    p, mask = case.problem, case.mask
    y = contract(mask.tree, mask.operands, case.q, case.k, case.v, p.nheads, case.scale)
    finals: dict[str, Tensor] = {}
    for i, term in enumerate(state_terms(mask.tree) if states or case.initial else ()):
        initial = case.initial[i] if case.initial else None
        entered, final = linear_state(term, mask.operands, case.q, case.k, case.v, p.nheads, initial)
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
    big = outputs(_absolute(case)[0], states)
    dtypes = {name: problem.dtype if name == "y" else problem.state_dtype for name in big}
    return {name: _allowed(case, name, x, dtypes[name]) for name, x in big.items()}


def gradient_bounds(case: Case, cotangents: Sequence[Tensor]) -> dict[str, float]:
    """For every gradient, how far from the oracle's it may be: from the gradient of the problem on absolute values."""
    big, leaves = _absolute(case)
    results, sizes = outputs(big, len(cotangents) > 1), [dy.abs().double() for dy in cotangents]
    found = _autograd(results, sizes, leaves)
    # autograd sums what ρ_i and κ_j feel before it subtracts one from the other: the oracle itself rounds there
    pairing = sum(float((x.detach() * dx).sum()) for x, dx in zip(results.values(), sizes, strict=True))
    exponents = {name for name, use in uses(case.mask.tree) if use.slot in (*EXPONENTS, "dt", "A")}
    out = {}
    for name, x in case.floats().items():
        parts = [found[part] for part in (name, _factor(name)) if part in found]
        out[name] = _allowed(case, name, torch.stack(parts).sum(0), x.dtype, pairing if name in exponents else 0.0)
    return out


def magnitudes(case: Case, states: bool) -> dict[str, float]:
    """The greatest elements of the outputs on absolute values."""
    return {name: float(x.detach().max()) if x.numel() else 0.0 for name, x in outputs(_absolute(case)[0], states).items()}


def _allowed(case: Case, name: str, big: Tensor, dtype: torch.dtype, uncancelled: float = 0.0) -> float:
    if not big.numel():
        return 0.0
    p = case.problem
    products = p.batch * p.nheads * p.seqlen * p.headdim * p.dstate * (1 if "state" in name else p.seqlen)
    magnitude = float(big.detach().abs().max())
    return tolerance(
        dtype, p.accumulate, products / big.numel(), magnitude, _span(case) * magnitude + uncancelled, case.operands
    )


def _span(case: Case) -> float:
    """The greatest sum of absolute log decays along the tokens."""
    total, seqlen = 0.0, case.q.shape[1]
    for name, use in set(uses(case.mask.tree)):
        x = case.mask.operands[name]
        if use.slot in (*EXPONENTS, "dt") and x.numel():
            axis = TIME_AXIS.get(use.axes, 0)
            per_token = axis < 0 and x.ndim >= -axis and x.shape[axis] == seqlen
            sums = x.double().abs().sum(axis) if per_token else x.double().abs() * seqlen
            total += float(sums.detach().max())
    return total


def _absolute(case: Case) -> tuple[Case, dict[str, Tensor]]:
    """The call on absolute values, where nothing cancels, and its leaves: exponents stay, factors lose their signs."""
    inputs = [name for name in case.floats() if name not in case.mask.operands]
    floats = {name: x.detach().double() for name, x in case.floats().items()}
    leaves = {name: floats[name].abs().requires_grad_() for name in inputs}
    for name in case.mask.operands:
        if name in floats:
            leaves[name] = floats[name].clone().requires_grad_()
            leaves[_factor(name)] = floats[name].abs().requires_grad_()
    operands = {**case.mask.operands, **{k: x for k, x in leaves.items() if k not in inputs}}
    for node in n.walk(case.mask.tree):
        if isinstance(node, n.ChannelDecay) and node.log_a is None:
            operands[_product(node)] = _signless_product(node, operands, case.problem.seqlen)
    mask = Mask(_positive(case.mask.tree), operands)
    initial = tuple(leaves[f"initial_state[{i}]"] for i in range(len(case.initial)))
    return Case(leaves["q"], leaves["k"], leaves["v"], mask, abs(case.scale), initial), leaves


def _factor(name: str) -> str:
    return f"{name}__factor"


def _product(node: n.ChannelDecay) -> str:
    return f"{node.dt}__times__{node.A}"


def _signless_product(node: n.ChannelDecay, operands: dict[str, Tensor], seqlen: int) -> Tensor:
    """dt · A, whose gradients with respect to |dt| and |A| have no signs."""
    assert isinstance(node.dt, str) and isinstance(node.A, str)  # user-made masks name their operands
    value = resolve(ops.ChannelLog(node.dt, node.A), operands, n.CHANNEL, seqlen).detach()
    big = resolve(ops.ChannelLog(_factor(node.dt), _factor(node.A)), operands, n.CHANNEL, seqlen)
    return value + big - big.detach()


def _positive(node: n.Node) -> n.Node:
    """The same expression with + for every −, over the signless factors."""
    match node:
        case n.Neg(m):
            return _positive(m)
        case n.ChannelDecay(log_a=None):
            return n.ChannelDecay(log_a=_product(node))
    node = n.rebuild(node, tuple(_positive(child) for child in n.children(node)))
    axes = dict(n.SLOTS[type(node)])
    values = {name: getattr(node, name) for name in n.FIELDS[type(node)]}
    factors = {
        slot: _factor(x)
        for slot, x in values.items()
        if slot in axes and isinstance(x, str) and slot not in EXPONENTS and axes[slot] not in n.INTEGER_AXES
    }
    return type(node)(**{**values, **factors}) if factors else node
