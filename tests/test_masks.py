"""Masks as users make them: nothing is computed or copied, names are deterministic, mistakes are named."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssdops import Mask, masks
from ssdops.errors import MaskError
from ssdops.ir import nodes as n
from ssdops.ir.text import parse
from ssdops.ir.verify import MAX_DEPTH, MAX_NODES


class NoArithmetic(TorchDispatchMode):
    """Refuses every torch operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


def token(device: str = "cpu") -> Tensor:
    return torch.zeros(2, 5, 3, device=device)


def every_mask(device: str) -> dict[str, Callable[[], Mask]]:
    t, h = token(device), torch.zeros(3, device=device)
    r, levels = torch.zeros(2, 5, 3, 2, device=device), torch.zeros(2, 5, 3, 4, device=device)
    cu, ids = torch.tensor([0, 2, 5], device=device), torch.zeros(2, 5, dtype=torch.int64, device=device)
    lags, matrix = torch.zeros(3, 9, device=device), torch.zeros(2, 3, 5, 5, device=device)
    return {
        "causal()": lambda: masks.causal(),
        "full()": lambda: masks.full(),
        "decay(log_a)": lambda: masks.decay(t),
        "retention(log_gamma)": lambda: masks.retention(h),
        "documents(cu_seqlens)": lambda: masks.documents(cu),
        "documents(segment_ids=segment_ids, n_segments=4)": lambda: masks.documents(segment_ids=ids, n_segments=4),
        "window(left=2, right=0)": lambda: masks.window(2),
        "toeplitz(coeffs)": lambda: masks.toeplitz(lags),
        "dense(L)": lambda: masks.dense(matrix),
        "diagonal(d)": lambda: masks.diagonal(t),
        "semiseparable(log_a, b, b, rank=2)": lambda: masks.semiseparable(t, r, r),
        "fenwick(log_a, levels)": lambda: masks.fenwick(t, levels),
        "trapezoidal(log_a, log_a, gamma)": lambda: masks.trapezoidal(t, t, h),
        "trapezoidal(log_a, gamma=log_a, beta_over_a=beta_over_a)": (
            lambda: masks.trapezoidal(t, gamma=t, beta_over_a=h)
        ),
        "channel_decay(log_a)": lambda: masks.channel_decay(r),
        "channel_decay(dt=dt, A=A)": lambda: masks.channel_decay(dt=t, A=lags),
        "-decay(log_a).T.strict().reverse().shift(2)": lambda: -masks.decay(t).T.strict().reverse().shift(2),
        "decay(log_a).scale(rows=log_a, cols=cols, log_cols=cols)": (
            lambda: masks.decay(t).scale(rows=t, cols=h, log_cols=h)
        ),
        "causal() * decay(log_a) - (full() - diagonal(d))": (
            lambda: masks.causal() * masks.decay(t) - (masks.full() - masks.diagonal(h))
        ),
    }  # fmt: skip


TEXTS = list(every_mask("cpu"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("text", TEXTS)
def test_making_a_mask_computes_and_copies_nothing(text, device):
    make = every_mask(device)[text]
    with NoArithmetic():
        mask = make()
        assert str(mask) == text
        assert repr(mask).startswith(f"Mask({text}")
    given = [cell.cell_contents for cell in make.__closure__ or ()]
    assert all(any(x is t for t in given) for x in mask.operands.values())
    assert parse(str(mask)) == mask.tree
    assert set(mask.operands) == set(n.operand_names(mask.tree))


def test_every_constructor_is_tried():
    assert {text.split("(")[0].lstrip("-") for text in TEXTS} == set(masks.__all__) - {"Mask"}


# --- names ----------------------------------------------------------------------------------------------------------


def test_the_same_tensor_is_one_operand():
    t, u = token(), token()
    mask = masks.decay(t) * masks.diagonal(t) + masks.decay(u).scale(rows=t, cols=u)
    assert str(mask) == "decay(log_a) * diagonal(log_a) + decay(log_a_1).scale(rows=log_a, cols=log_a_1)"
    assert mask.operands["log_a"] is t and mask.operands["log_a_1"] is u and len(mask.operands) == 2


def test_equal_tensors_are_not_the_same_tensor():
    assert len((masks.decay(token()) + masks.decay(token())).operands) == 2


def test_clashing_names_get_suffixes_in_the_order_of_writing():
    a, b, c, d = (token() for _ in range(4))

    def build() -> Mask:
        return masks.decay(a) * masks.decay(b) + masks.decay(c).T * masks.decay(d) * masks.decay(a)

    assert str(build()) == "decay(log_a) * decay(log_a_1) + decay(log_a_2).T * decay(log_a_3) * decay(log_a)"
    assert [*build().operands.items()] == [("log_a", a), ("log_a_1", b), ("log_a_2", c), ("log_a_3", d)]
    assert build().tree == build().tree


def test_a_name_that_looks_like_a_suffixed_one_is_kept_apart():
    a, b, c = (token() for _ in range(3))
    left = masks.decay(a) + masks.decay(b)  # log_a, log_a_1
    right = masks.decay(c) + masks.decay(b)  # log_a, log_a_1: the first clashes, the second is b again
    both = left * right
    assert str(both) == "(decay(log_a) + decay(log_a_1)) * (decay(log_a_2) + decay(log_a_1))"
    assert [both.operands[name] is x for name, x in (("log_a", a), ("log_a_1", b), ("log_a_2", c))] == [True] * 3


def test_combining_leaves_the_parts_as_they_were():
    a, b = masks.decay(token()), masks.decay(token())
    before = (str(a), dict(a.operands), str(b), dict(b.operands))
    a + b, a * b, -a, a.T, a.scale(rows=token()), b.shift(1)
    assert before == (str(a), dict(a.operands), str(b), dict(b.operands))


def test_trees_hash_and_compare_by_value():
    one, other = masks.decay(token()) * masks.causal(), masks.decay(token("meta")) * masks.causal()
    assert one.tree == other.tree and hash(one.tree) == hash(other.tree)
    assert len({one.tree, other.tree, (one + one).tree, one.T.tree}) == 3
    assert masks.window(2).tree != masks.window(3).tree
    with pytest.raises(AttributeError):
        one.tree.factors = ()


def test_repr_shows_shapes():
    assert repr(masks.decay(token())) == "Mask(decay(log_a); log_a: (2, 5, 3))"
    assert repr(masks.causal()) == "Mask(causal())"


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_masks_can_be_copied_and_sent(through):
    mask = masks.decay(torch.randn(1, 4, 2)) * masks.documents(torch.tensor([0, 1, 4])) + masks.diagonal(torch.randn(2))
    again = through(mask)
    assert again.tree == mask.tree and again.operands.keys() == mask.operands.keys()
    assert all(torch.equal(again.operands[name], x) for name, x in mask.operands.items())
    assert str(again + mask)  # and goes on being a mask


# --- mistakes -------------------------------------------------------------------------------------------------------

ROWS = token()
CU, IDS = torch.tensor([0, 5]), torch.zeros(2, 5, dtype=torch.int64)
MISTAKES = {
    "both kinds of documents": (
        lambda: masks.documents(CU, segment_ids=IDS),
        "exactly one of cu_seqlens and segment_ids, got both",
    ),
    "no documents": (lambda: masks.documents(), "exactly one of cu_seqlens and segment_ids, got neither"),
    "n_segments with cu_seqlens": (lambda: masks.documents(CU, n_segments=1), "drop n_segments"),
    "negative n_segments": (
        lambda: masks.documents(segment_ids=IDS, n_segments=-1),
        r"n_segments=-1\) must not be negative",
    ),
    "float n_segments": (
        lambda: masks.documents(segment_ids=IDS, n_segments=2.0),
        r"n_segments\) must be an int, got float: 2.0",
    ),
    "gamma missing": (lambda: masks.trapezoidal(token(), token()), "needs gamma"),
    "no beta": (lambda: masks.trapezoidal(token(), gamma=token()), "exactly one of beta and beta_over_a"),
    "both betas": (
        lambda: masks.trapezoidal(token(), token(), token(), beta_over_a=token()),
        "exactly one of beta and beta_over_a",
    ),
    "no channel decay": (lambda: masks.channel_decay(), "either log_a, or dt and A"),
    "dt without A": (lambda: masks.channel_decay(dt=token()), "either log_a, or dt and A"),
    "log_a and A": (lambda: masks.channel_decay(token(), A=token()), "not both"),
    "a number": (lambda: masks.decay(0.5), "log_a must be a torch.Tensor, got float; wrap it with torch.as_tensor"),
    "a list": (lambda: masks.documents([0, 5]), "cu_seqlens must be a torch.Tensor, got list"),
    "None": (lambda: masks.decay(None), "log_a must be a torch.Tensor, got None"),
    "None levels": (lambda: masks.fenwick(token(), None), "levels must be a torch.Tensor, got None"),
    "a number as a scale": (lambda: masks.causal().scale(rows=2.0), "rows must be a torch.Tensor, got float"),
    "scale without factors": (lambda: masks.causal().scale(), "at least one of rows, cols and log_cols"),
    "ranks of b and c": (
        lambda: masks.semiseparable(token(), torch.ones(1, 5, 3, 2), torch.ones(1, 5, 3, 1)),
        r"b and c .* got \(1, 5, 3, 2\) and \(1, 5, 3, 1\)",
    ),
    "b without a rank": (
        lambda: masks.semiseparable(token(), token(), token()),
        r"b and c must be \(batch, seqlen, nheads, rank\)",
    ),
    "b is a number": (lambda: masks.semiseparable(token(), 1.0, token()), "b must be a torch.Tensor, got float"),
    "rank 0": (lambda: masks.semiseparable(token(), torch.ones(1, 5, 3, 0), torch.ones(1, 5, 3, 0)), "rank"),
    "an empty window": (lambda: masks.window(1, -2), "empty; left \\+ right must be at least 0"),
    "a float window": (lambda: masks.window(1.5), r"window\(left\) must be an int, got float: 1.5"),
    "a bool window": (lambda: masks.window(True), r"window\(left\) must be an int, got bool"),
    "a negative shift": (lambda: masks.causal().shift(-1), "must not be negative"),
    "a float shift": (lambda: masks.causal().shift(1.0), r"shift\(n\) must be an int, got float: 1.0"),
    "a shift by a word": (lambda: masks.causal().shift("one"), r"shift\(n\) must be an int, got str: 'one'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_mask_errors_that_say_what_to_do(name):
    make, words = MISTAKES[name]
    for _ in range(2):
        with pytest.raises(MaskError, match=words):
            make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: masks.documents(cu_seqlen=CU),
        lambda: masks.causal().scale(row=token()),
        lambda: masks.window(2, rigth=1),
        lambda: masks.documents(CU, IDS),
        lambda: masks.decay(),
        lambda: masks.causal() + 1,
        lambda: 2.0 * masks.causal(),
        lambda: masks.causal() * token(),
        lambda: masks.causal() - None,
    ],
)
def test_misspelt_options_and_foreign_operands_are_type_errors(make):
    with pytest.raises(TypeError):
        make()


# --- growth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grow",
    [lambda m: m.T, lambda m: -m, lambda m: m.strict(), lambda m: m.shift(1), lambda m: m.reverse(),
     lambda m: m + m, lambda m: m * m, lambda m: (m + m.T) * m, lambda m: m - m, lambda m: m.scale(rows=ROWS)],
)  # fmt: skip
def test_growth_ends_in_a_mask_error_at_once(grow):
    mask, started = masks.decay(ROWS), time.perf_counter()
    with pytest.raises(MaskError, match=rf"at most {MAX_NODES} nodes and {MAX_DEPTH} levels"):
        for _ in range(5000):
            mask = grow(mask)
    assert time.perf_counter() - started < 5
    assert parse(str(mask)) == mask.tree  # the last one that was allowed is whole


def test_the_documented_sizes_can_be_reached():
    """Flat sums and products add no level: 511 terms are 512 nodes, two deep."""
    for join in (lambda a, b: a + b, lambda a, b: a * b):
        wide = masks.causal()
        for _ in range(MAX_NODES - 2):
            wide = join(wide, masks.causal())
        assert sum(1 for _ in n.walk(wide.tree)) == MAX_NODES
        with pytest.raises(MaskError, match=f"has {MAX_NODES + 1} nodes, 2 deep"):
            join(wide, masks.causal())
        with pytest.raises(MaskError, match=f"{MAX_NODES + 1} nodes"):
            join(masks.causal(), wide)
    deep = masks.causal()
    for _ in range(MAX_DEPTH - 1):
        deep = deep.T
    with pytest.raises(MaskError, match=f"{MAX_DEPTH + 1} deep"):
        deep.T  # noqa: B018
