"""The laws that every backend keeps: functions of a runner and a call that raise AssertionError where broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..api import ssd, ssd_step
from ..ir import nodes as n
from ..ir.evaluate import dense_block
from . import oracle
from .case import Case, extend, map_operands, restrict, token
from .tolerance import assert_close, assert_same


@dataclass(frozen=True)
class Runner:
    """`ssd` on one backend."""

    backend: str
    chunk_size: int | None = None

    def __call__(self, case: Case, states: bool | None = None, every: int | None = None) -> dict[str, Tensor]:
        """Y, the final states where the mask has them (or as `states` says), and those after every so many tokens."""
        wanted = bool(case.carried) if states is None else states
        out = ssd(
            case.q, case.k, case.v, case.mask, scale=case.scale, initial_state=case.initial or None,
            return_state=wanted, state_every=every, backend=self.backend, chunk_size=self.chunk_size,
        )  # fmt: skip
        if isinstance(out, Tensor):
            return {"y": out}
        found = {"y": out[0]}
        for name, states_of in zip(("state", "every"), out[1:], strict=False):
            each = states_of if isinstance(states_of, tuple) else (states_of,)
            found |= {f"{name}[{i}]": state for i, state in enumerate(each)}
        return found


def noise(like: Tensor, seed: int) -> Tensor:
    """Standard normal values of that shape, dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], allowed: dict[str, float]) -> None:
    """Every named tensor is close."""
    assert actual.keys() == expected.keys(), f"got {list(actual)}, expected {list(expected)}"
    for name, x in actual.items():
        assert_close(x, expected[name], allowed[name], name)


# --- against the oracle ---------------------------------------------------------------------------------------------


def equals_oracle(run: Runner, case: Case) -> None:
    """Y and the final states are what the mask means, and come in the promised dtypes."""
    states = bool(case.carried)
    out = run(case)
    compare(out, oracle.outputs(case, states), oracle.output_bounds(case, states))
    for name, x in out.items():
        assert x.dtype == (case.problem.dtype if name == "y" else case.problem.state_dtype), f"{name} is {x.dtype}"


def gradients_equal_oracle(run: Runner, case: Case) -> None:
    """Gradients of q, k, v, every float operand and the states are those of the dense contraction, and so are the outputs."""
    out, found, cotangents = _passes(run, case)
    states = bool(case.carried)
    compare(out, oracle.outputs(case, states), oracle.output_bounds(case, states))
    compare(found, oracle.gradients(case, cotangents), oracle.gradient_bounds(case, cotangents))
    for name, x in case.floats().items():
        assert found[name].dtype == x.dtype, f"the gradient of {name} is {found[name].dtype}"


def _gradients(run: Runner, case: Case) -> tuple[dict[str, Tensor], list[Tensor]]:
    return _passes(run, case)[1:]


def _passes(run: Runner, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """Outputs of a call that learns, gradients, and the cotangents that they are for."""
    leaves = {name: x.detach().requires_grad_() for name, x in case.floats().items()}
    out = run(case.map(lambda name, x: leaves.get(name, x)))
    cotangents = [noise(x, seed) for seed, x in enumerate(out.values())]
    found = torch.autograd.grad(
        list(out.values()), list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return out, dict(zip(leaves, found, strict=True)), cotangents


# --- of one backend with itself -------------------------------------------------------------------------------------


def chunk_size_does_not_matter(run: Runner, case: Case, sizes: Sequence[int]) -> None:
    """Any chunk size gives the same Y, states and gradients, within rounding."""
    expected, (grads, cotangents) = run(case), _gradients(run, case)
    allowed = oracle.output_bounds(case, bool(case.carried))
    grads_allowed = oracle.gradient_bounds(case, cotangents)
    for size in sizes:
        other = replace(run, chunk_size=size)
        compare(other(case), expected, twice(allowed))
        compare(_gradients(other, case)[0], grads, twice(grads_allowed))


def batch_order_does_not_matter(run: Runner, case: Case, bits: bool) -> None:
    """Rows in another order, and rows alone, give the same rows; the same bits of them if that is claimed."""
    batch = case.q.shape[0]
    whole, allowed = run(case), twice(oracle.output_bounds(case, bool(case.carried)))
    for rows in (list(reversed(range(batch))), [batch - 1] if batch else []):
        part = run(rows_of(case, rows))
        for name, x in part.items():
            expected = state_rows(whole[name], rows, batch)
            if bits:
                assert_same(x, expected, f"{name} of rows {rows}")
            else:
                assert_close(x, expected, allowed[name], f"{name} of rows {rows}")


def rows_of(case: Case, rows: list[int]) -> Case:
    """The call on some of its batch rows."""
    batch = case.q.shape[0]
    if batch == 1 and rows == [0]:
        return case
    ranks = {n.TOKEN: 3, n.CHANNEL: 4, n.RANK: 4, n.LEVEL: 4, n.MATRIX: 4, n.IDS: 2}
    mask = map_operands(
        case.mask,
        lambda x, use: x[rows] if x.ndim == ranks.get(use.axes) and x.shape[0] == batch > 1 else x,
    )
    q, k, v = (x[rows] for x in (case.q, case.k, case.v))
    initial = tuple(state_rows(s, rows, batch) for s in case.initial)
    return replace(case, q=q, k=k, v=v, mask=mask, initial=initial)


def state_rows(x: Tensor, rows: list[int], batch: int) -> Tensor:
    """Rows of a tensor that has one, or one per document, for each batch row."""
    return x.unflatten(0, (batch, -1))[rows].flatten(0, 1) if batch and x.shape[0] != batch else x[rows]


def deterministic(run: Runner, case: Case) -> None:
    """The same call gives the same bits, forward and backward, and writes to none of its inputs."""
    kept = {name: (x.clone(), x._version) for name, x in case.tensors()}
    first, second = run(case), run(case)
    grads, _ = _gradients(run, case)
    again, _ = _gradients(run, case)
    for one, other in ((first, second), (grads, again)):
        for name, x in one.items():
            assert_same(other[name], x, f"{name}, the second time")
    for name, x in case.tensors():
        assert_same(x, kept[name][0], f"the input {name}")
        assert x._version == kept[name][1], f"the input {name} was written to"


def strides_do_not_matter(run: Runner, case: Case) -> None:
    """Strided inputs give what contiguous ones give."""
    dense = case.map(lambda _, x: x.contiguous())
    compare(run(case), run(dense), twice(oracle.output_bounds(case, bool(case.carried))))
    grads, cotangents = _gradients(run, case)
    compare(grads, _gradients(run, dense)[0], twice(oracle.gradient_bounds(case, cotangents)))


def linear_in_v(run: Runner, case: Case) -> None:
    """With no initial state, 2 · Y(v) − 3 · Y(w) = Y(2 v − 3 w)."""
    case = replace(case, initial=())
    w = noise(case.v, 1)
    one, other, both = (run(replace(case, v=x)) for x in (case.v, w, 2 * case.v - 3 * w))
    size = replace(case, v=2 * case.v.abs() + 3 * w.abs())
    difference = {name: 2 * one[name] - 3 * other[name] for name in one}
    compare(difference, both, twice(oracle.output_bounds(size, len(one) > 1)))


def causal(run: Runner, case: Case) -> None:
    """Finite inputs of later tokens never change a bit of what comes before (vacuous unless the mask is causal)."""
    p = case.problem
    _, support = dense_block(case.mask.tree, case.mask.operands, p.batch, p.seqlen, p.nheads, case.q.device)
    above = torch.ones(p.seqlen, p.seqlen, dtype=torch.bool).triu(1).to(support.device)
    if bool((support[..., 0] & above).any()):
        return
    cut = p.seqlen // 2
    case = replace(case, q=case.q.contiguous(), k=case.k.contiguous(), v=case.v.contiguous())  # other strides round otherwise
    q, k, v = (torch.cat([x[:, :cut], 8 * noise(x[:, cut:], 2)], 1) for x in (case.q, case.k, case.v))
    changed = run(replace(case, q=q, k=k, v=v))["y"]
    assert_same(changed[:, :cut], run(case)["y"][:, :cut], f"y before token {cut}")


# --- states ---------------------------------------------------------------------------------------------------------


def split_and_carry(run: Runner, case: Case, cut: int) -> None:
    """Two parts, causal states carried to the right and anticausal ones to the left, are the whole."""
    assert case.carried is not None
    seqlen, whole = case.q.shape[1], run(case)
    start = case.initial or tuple(torch.zeros_like(x) for name, x in whole.items() if name != "y")
    left, right = part(case, 0, cut), part(case, cut, seqlen)

    def go(piece: Case, causal_from: Sequence[Tensor], anticausal_from: Sequence[Tensor]) -> dict[str, Tensor]:
        both = zip(case.carried or (), causal_from, anticausal_from, strict=True)
        return run(replace(piece, initial=tuple(a if term.causal else b for term, a, b in both)))

    nothing = [torch.zeros_like(x) for x in start]
    from_left = _states(go(left, start, nothing))  # the causal ones are right
    from_right = _states(go(right, nothing, start))  # the anticausal ones are right
    left_out, right_out = go(left, start, from_right), go(right, from_left, start)
    joined = {"y": torch.cat([left_out["y"], right_out["y"]], 1)}
    finals = zip(case.carried, _states(right_out), _states(left_out), strict=True)
    joined |= {f"state[{i}]": a if term.causal else b for i, (term, a, b) in enumerate(finals)}
    compare(joined, whole, twice(oracle.output_bounds(case, True)))


def _states(out: dict[str, Tensor]) -> list[Tensor]:
    return [x for name, x in out.items() if name != "y"]


def part(case: Case, start: int, stop: int) -> Case:
    """The call on tokens [start, stop).

    Raises:
        Unsliceable: the mask means nothing there.
    """
    q, k, v = (x[:, start:stop] for x in (case.q, case.k, case.v))
    return replace(case, q=q, k=k, v=v, mask=restrict(case.mask, start, stop, case.q.shape[1]))


def states_every_equal_prefixes(run: Runner, case: Case, every: int) -> None:
    """The states after every so many tokens are those that prefixes leave, and going on from any of them gives the rest."""
    assert case.carried is not None
    p, whole, allowed = case.problem, run(case, every=every), twice(oracle.output_bounds(case, True))
    kept = [whole.pop(f"every[{i}]") for i in range(len(case.carried))]
    compare(whole, run(case), allowed)
    count = p.seqlen // every
    for i, x in enumerate(kept):
        assert x.shape == (p.batch, count, p.nheads, p.headdim, p.dstate), f"every[{i}] is {tuple(x.shape)}"
        assert x.dtype == p.state_dtype, f"every[{i}] is {x.dtype}"
        if count and p.seqlen % every == 0:
            assert_same(x[:, -1], whole[f"state[{i}]"], f"every[{i}], the last")
    for index in sorted({0, count - 1}) if count else ():
        cut, states = (index + 1) * every, tuple(x[:, index] for x in kept)
        prefix = part(case, 0, cut)
        bounds, left = twice(oracle.output_bounds(prefix, True)), run(prefix)
        for i, state in enumerate(states):
            assert_close(state, left[f"state[{i}]"], bounds[f"state[{i}]"], f"every[{i}] after {cut} tokens")
        compare(run(replace(part(case, cut, p.seqlen), initial=states)), {**whole, "y": whole["y"][:, cut:]}, allowed)


def state_equals_prefix(run: Runner, case: Case, count: int = 3) -> None:
    """An initial state Σ v_s k_sᵀ is `count` tokens s before the sequence (behind it, if anticausal), undecayed."""
    assert case.carried is not None and len({term.causal for term in case.carried}) == 1
    p, left = case.problem, case.carried[0].causal
    mask = extend(case.mask, count, left, p.seqlen)
    shape = (p.batch, count)
    q0 = case.q.new_zeros(*shape, *case.q.shape[2:])
    k0, v0 = (noise(x.new_empty(*shape, *x.shape[2:]), seed) for seed, x in enumerate((case.k, case.v)))
    heads = [x.repeat_interleave(p.nheads // x.shape[2], 2).to(p.accumulate) for x in (v0, k0)]
    state = torch.einsum("bthp,bthn->bhpn", *heads)
    pairs = ((q0, case.q), (k0, case.k), (v0, case.v))
    q, k, v = (torch.cat([new, x] if left else [x, new], 1) for new, x in pairs)
    longer = Case(q, k, v, mask, case.scale, operands=case.operands)
    carried = run(replace(case, initial=(state,) * len(case.carried)))
    whole = run(longer)
    whole["y"] = whole["y"][:, count:] if left else whole["y"][:, : p.seqlen]
    compare(carried, whole, twice(oracle.output_bounds(longer, True)))


def steps_equal_scan(run: Runner, case: Case) -> None:
    """`ssd_step` token by token gives what `ssd` gives at once, and leaves its state."""
    whole = run(case)
    state: tuple[Tensor, ...] | Tensor | None = case.initial or None
    ys = []
    for t in range(case.q.shape[1]):
        q, k, v = (x[:, t] for x in (case.q, case.k, case.v))
        y, state = ssd_step(q, k, v, token(case.mask, t), state, scale=case.scale, backend=run.backend)
        ys.append(y)
    finals = state if isinstance(state, tuple) else (() if state is None else (state,))
    stepped = {"y": torch.stack(ys, 1), **{f"state[{i}]": s for i, s in enumerate(finals)}}
    compare(stepped, whole, twice(oracle.output_bounds(case, True)))


def twice(allowed: dict[str, float]) -> dict[str, float]:
    """Two results, each as close to the oracle as that, may be twice as far apart."""
    return {name: 2 * x for name, x in allowed.items()}
