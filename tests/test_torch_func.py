"""`torch.func` over ssdops: grad, vmap, jacrev, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch_cases import H, N, P, attend, inputs

from ssdops import masks, ssd
from ssdops.errors import UnsupportedError


def loss(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return ssd(q, k, v, masks.decay(a) + masks.diagonal(a)).square().sum()


def test_func_grad():
    args = [inputs()[name].requires_grad_() for name in ("q", "k", "v", "a")]
    want = torch.autograd.grad(loss(*args), args)
    got = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(t.detach() for t in args))
    torch.testing.assert_close(got, want)


def test_func_grad_of_grad():
    q, k, v, a = (inputs(5)[name] for name in ("q", "k", "v", "a"))
    got = torch.func.grad(lambda x: torch.func.grad(loss)(x, k, v, a).square().sum())(q)
    q.requires_grad_()
    (first,) = torch.autograd.grad(loss(q, k, v, a), q, create_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(first.square().sum(), q)[0])


MAPPED = ("decay", "quasiseparable", "scaled", "ids", "trapezoidal", "band", "channel", "fenwick")
SUBSETS = {
    "all": set(inputs()) - {"cu"}, "v": {"v"}, "a": {"a"}, "q, k": {"q", "k"}, "a, ids": {"a", "ids"},
    "others": {"d", "b", "levels", "c"},
}  # fmt: skip
M = 3


def _stacked(batch: int) -> dict[str, Tensor]:
    """M problems; a mapped axis at another place in each tensor."""
    each = [inputs(7, batch, seed=seed) for seed in range(M)]
    return {name: torch.stack([x[name] for x in each], _at(t)) for name, t in each[0].items()}


def _at(x: Tensor) -> int:
    return x.ndim % 2


def _picked(x: dict[str, Tensor], mapped: set[str], m: int) -> dict[str, Tensor]:
    return {name: t.select(_axis(t), m if name in mapped else 0) for name, t in x.items()}


def _axis(stacked: Tensor) -> int:
    return (stacked.ndim - 1) % 2


def _mapped(f: Callable, x: dict[str, Tensor], mapped: set[str]) -> Tensor:
    given = {name: t if name in mapped else t.select(_axis(t), 0) for name, t in x.items()}
    return torch.func.vmap(f, in_dims=({name: _axis(t) if name in mapped else None for name, t in x.items()},))(given)


@pytest.mark.parametrize("mapped", SUBSETS)
@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("batch", [1, 2])
def test_vmap_is_the_loop(name, mapped, batch):
    x, mapped = _stacked(batch), SUBSETS[mapped]
    want = torch.stack([attend(name)(_picked(x, mapped, m)) for m in range(M)])
    torch.testing.assert_close(_mapped(attend(name), x, mapped), want)


@pytest.mark.parametrize("mapped", ["all", "v", "a"])
@pytest.mark.parametrize("name", ["quasiseparable", "scaled"])
@pytest.mark.parametrize("batch", [1, 2])
def test_vmap_of_grad_and_grad_of_vmap_are_the_loop(name, mapped, batch):
    x, mapped = _stacked(batch), SUBSETS[mapped]
    of = ("q", "k", "v", "a", "d", "b")

    def gradients(one: dict[str, Tensor]) -> dict[str, Tensor]:
        rest = {key: t for key, t in one.items() if key not in of}
        return torch.func.grad(lambda y: attend(name)({**y, **rest}).square().sum())({key: one[key] for key in of})

    each = [gradients(_picked(x, mapped, m)) for m in range(M)]
    got = _mapped(gradients, x, mapped)
    for key in of:
        torch.testing.assert_close(got[key], torch.stack([grads[key] for grads in each]))
    whole = torch.func.grad(lambda a: _mapped(attend(name), {**x, "a": a}, mapped).square().sum())(x["a"])
    for m in range(M if "a" in mapped else 1):
        want = each[m]["a"] if "a" in mapped else sum(grads["a"] for grads in each)
        torch.testing.assert_close(whole.select(_axis(x["a"]), m), want)


def test_vmap_of_states_is_the_loop():
    x, s = _stacked(2), torch.randn(M, 2, H, P, N, dtype=torch.float64)
    others = {name: _axis(t) for name, t in x.items()}

    def run(one: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(one["q"], one["k"], one["v"], masks.decay(one["a"]), initial_state=state, return_state=True)

    for dim, states in ((0, s), (None, s[0])):
        got = torch.func.vmap(run, in_dims=(others, dim))(x, states)
        want = [run(_picked(x, set(x), m), s[m] if dim == 0 else s[0]) for m in range(M)]
        torch.testing.assert_close(got, tuple(torch.stack(part) for part in zip(*want, strict=True)))


def test_vmap_of_states_between_is_the_loop():
    x = _stacked(2)

    def run(one: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return ssd(one["q"], one["k"], one["v"], masks.decay(one["a"]), state_every=4)

    got = torch.func.vmap(run, in_dims=({name: _axis(t) for name, t in x.items()},))(x)
    want = [run(_picked(x, set(x), m)) for m in range(M)]
    torch.testing.assert_close(got, tuple(torch.stack(part) for part in zip(*want, strict=True)))


def test_jacrev_is_the_gradient_of_each_output():
    q, k, v, a = (inputs(3)[name] for name in ("q", "k", "v", "a"))
    f = lambda a: ssd(q, k, v, masks.decay(a))  # noqa: E731
    jacobian = torch.func.jacrev(f)(a)
    a.requires_grad_()
    want = [torch.autograd.grad(y, a, retain_graph=True)[0] for y in f(a).flatten()]
    torch.testing.assert_close(jacobian.flatten(0, 3), torch.stack(want))


def test_what_vmap_cannot_fold_is_refused_with_a_reason():
    x = _stacked(1)
    with pytest.raises(UnsupportedError, match=r"documents\(cu_seqlens\) takes a batch of one; use segment_ids"):
        _mapped(attend("packed"), x, set(x) - {"cu"})
    with pytest.raises(UnsupportedError, match=r"log_gamma \(nheads\) has no batch axis"):
        _mapped(attend("retention"), x, {"d"})
    torch.testing.assert_close(  # but shared by all calls it is fine
        _mapped(attend("retention"), x, {"v"}),
        torch.stack([attend("retention")(_picked(x, {"v"}, m)) for m in range(M)]),
    )


@pytest.mark.parametrize("of", ["v", "a"])
def test_forward_mode_is_refused_rather_than_zero(of):
    x = inputs()
    f = lambda t: attend("decay")({**x, of: t})  # noqa: E731
    with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
        torch.func.jvp(f, (x[of],), (x[of],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(UnsupportedError, match="no forward-mode derivative"):
        f(torch.autograd.forward_ad.make_dual(x[of], x[of]))
