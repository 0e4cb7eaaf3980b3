"""Rewriting keeps the meaning: every rule alone, every pass, and the whole normal form, against the dense oracle."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import assume, find, given, settings
from hypothesis import strategies as st
from trees import MORE_TOKENS, SIZES, Sizes, assert_same_meaning, mask_trees

from ssdops.errors import MaskError
from ssdops.ir import nodes as n
from ssdops.ir import operands as ops
from ssdops.ir.passes.driver import Pass, run
from ssdops.ir.passes.normalize import DISTRIBUTE, EXPAND, PASSES, direct_documents, normalize
from ssdops.ir.passes.simplify import SIMPLIFY
from ssdops.ir.terms import Diagonal, Linear, Quadratic
from ssdops.ir.text import parse
from ssdops.ir.verify import MAX_NODES, verify

RULES = {rule.__name__: rule for rule in (*SIMPLIFY.rules, *EXPAND.rules, *DISTRIBUTE.rules, direct_documents)}
APPLIES = {
    "drop_double": {
        "--dense(m)": "dense(m)",
        "dense(m).T.T": "dense(m)",
        "dense(m).reverse().reverse()": "dense(m)",
        "dense(m).strict().strict()": "dense(m).strict()",
    },
    "drop_symmetric": {
        "full().T": "full()",
        "documents(segment_ids=ids).T": "documents(segment_ids=ids)",
        "documents(cu).T": "documents(cu)",
        "diagonal(t).T": "diagonal(t)",
        "full().reverse()": "full()",
        "window(left=3, right=1).reverse()": "window(left=1, right=3)",
        "window(left=3, right=-1).T": "window(left=-1, right=3)",
        "toeplitz(lags).reverse()": "toeplitz(lags).T",
    },
    "merge_shifts": {
        "dense(m).shift(0)": "dense(m)",
        "dense(m).shift(1).shift(2)": "dense(m).shift(3)",
    },
    "drop_units": {
        "full() * dense(m) * full()": "dense(m)",
        "full() * full()": "full()",
        "dense(m) * full() * decay(t)": "dense(m) * decay(t)",
    },
    "drop_zeros": {
        "-zero()": "zero()",
        "zero().T": "zero()",
        "zero().reverse()": "zero()",
        "zero().strict()": "zero()",
        "diagonal(t).strict()": "zero()",
        "zero().shift(1)": "zero()",
        "zero().scale(rows=t)": "zero()",
        "dense(m) * zero()": "zero()",
    },
    "keep_one_of_equals": {
        "causal() * causal()": "causal()",
        "documents(cu) * dense(m) * documents(cu)": "documents(cu) * dense(m)",
        "window(left=2, right=1) * window(left=2, right=1)": "window(left=2, right=1)",
    },
    "absorb_causal": {
        "causal() * decay(t)": "decay(t)",
        "causal() * retention(g) * dense(m)": "retention(g) * dense(m)",
        "dense(m).T * causal() * -decay(t).scale(rows=t).shift(2).strict()": (
            "dense(m).T * -decay(t).scale(rows=t).shift(2).strict()"
        ),
        "causal() * (decay(t) + diagonal(t))": "decay(t) + diagonal(t)",
        "causal() * channel_decay(c)": "channel_decay(c)",
        "causal() * trapezoidal(t, t, t)": "trapezoidal(t, t, t)",
    },
    "merge_decays": {
        "decay(t) * decay(t_batch)": "decay(t + t_batch)",
        "decay(t) * dense(m) * decay(t_head) * decay(t_shared)": "decay(t + t_head + t_shared) * dense(m)",
    },
    "merge_scales": {
        "dense(m).scale(rows=t).scale(rows=t_head, cols=t_batch)": "dense(m).scale(rows=t * t_head, cols=t_batch)",
        "dense(m).scale(log_cols=t).scale(log_cols=t_head)": "dense(m).scale(log_cols=t + t_head)",
    },
    "split_full": {"full()": "causal() + causal().strict().T"},
    "split_ranks": {
        "semiseparable(t, r, r_one, rank=2)": (
            "decay(t).scale(rows=select(r_one, 0), cols=select(r, 0))"
            " + decay(t).scale(rows=select(r_one, 1), cols=select(r, 1))"
        ),
    },
    "split_trapezoid": {
        "trapezoidal(t, t_head, t_batch)": (
            "decay(t).scale(cols=t_batch) + decay(advance(t)).shift(1).scale(cols=advance(t_head))"
        ),
        "trapezoidal(t, gamma=t_head, beta_over_a=t_batch)": (
            "decay(t).strict().scale(cols=t_head + advance(t_batch)) + diagonal(t_head)"
        ),
    },
    "retention_as_decay": {"retention(g)": "decay(g)"},
    "lower_registered": {
        "their_alibi(g)": "retention(g) + retention(g).strict().T",
        "their_band(t, g, width=2)": "window(left=2, right=2).scale(rows=t * 2.0 + g)",
    },
    "distribute": {
        "-(dense(m) + decay(t))": "-dense(m) + -decay(t)",
        "(dense(m) + decay(t)).T": "dense(m).T + decay(t).T",
        "(dense(m) + decay(t)).reverse()": "dense(m).reverse() + decay(t).reverse()",
        "(dense(m) + decay(t)).strict()": "dense(m).strict() + decay(t).strict()",
        "(dense(m) + decay(t)).shift(2)": "dense(m).shift(2) + decay(t).shift(2)",
        "(dense(m) + decay(t)).scale(cols=t)": "dense(m).scale(cols=t) + decay(t).scale(cols=t)",
        "(dense(m) + decay(t)) * causal() * (diagonal(t) + full())": (
            "dense(m) * causal() * diagonal(t) + dense(m) * causal() * full()"
            " + decay(t) * causal() * diagonal(t) + decay(t) * causal() * full()"
        ),
    },
    "lift_neg": {
        "(-dense(m)).T": "-dense(m).T",
        "(-dense(m)).reverse()": "-dense(m).reverse()",
        "(-dense(m)).strict()": "-dense(m).strict()",
        "(-dense(m)).shift(2)": "-dense(m).shift(2)",
        "(-dense(m)).scale(rows=t)": "-dense(m).scale(rows=t)",
        "-dense(m) * decay(t)": "-(dense(m) * decay(t))",
        "-dense(m) * decay(t) * -causal()": "dense(m) * decay(t) * causal()",
    },
    "lift_scale": {
        "dense(m).scale(rows=t, cols=t_head).T": "dense(m).T.scale(rows=t_head, cols=t)",
        "dense(m).scale(cols=t, log_cols=t_head).T": "dense(m).T.scale(rows=t * exp(t_head))",
        "dense(m).scale(rows=t, cols=t_head, log_cols=t_shared).reverse()": (
            "dense(m).reverse().scale(rows=flip(t), cols=flip(t_head), log_cols=flip(t_shared))"
        ),
        "dense(m).scale(rows=t).strict()": "dense(m).strict().scale(rows=t)",
        "dense(m).scale(rows=t, log_cols=t_batch).shift(1)": (
            "dense(m).shift(1).scale(rows=delay(t), log_cols=t_batch)"
        ),
        "dense(m).scale(rows=t, log_cols=t_head) * decay(t) * full().scale(rows=t_head, cols=t, log_cols=t_batch)": (
            "(dense(m) * decay(t) * full()).scale(rows=t * t_head, cols=t, log_cols=t_head + t_batch)"
        ),
    },
    "push_through_product": {
        "(dense(m) * decay(t)).T": "dense(m).T * decay(t).T",
        "(dense(m) * decay(t)).reverse()": "dense(m).reverse() * decay(t).reverse()",
        "(dense(m) * decay(t)).shift(2)": "dense(m).shift(2) * decay(t).shift(2)",
        "(dense(m) * decay(t)).strict()": "dense(m).strict() * decay(t)",
    },
    "push_to_leaf": {
        "dense(m).strict().T": "dense(m).T.strict()",
        "dense(m).strict().reverse()": "dense(m).reverse().strict()",
        "dense(m).T.reverse()": "dense(m).reverse().T",
        "causal().reverse()": "causal().T",
        "diagonal(t).reverse()": "diagonal(flip(t))",
        "diagonal(t).shift(1)": "window(left=1, right=-1).scale(cols=t)",
        "diagonal(t).shift(3)": "window(left=3, right=-3).scale(cols=t)",
        "documents(cu).reverse()": "documents(mirror(cu))",
        "documents(segment_ids=ids, n_segments=9).reverse()": "documents(segment_ids=mirror(ids, 9), n_segments=9)",
        "diagonal(t).scale(rows=t_head, cols=t_shared)": "diagonal(t * t_head * t_shared)",
        "diagonal(t).scale(rows=t_head, log_cols=t_shared)": "diagonal(t * t_head * exp(t_shared))",
    },
    "direct_documents": {"documents(cu)": "causal() * documents(cu) + causal().T.strict() * documents(cu)"},
}  # fmt: skip
EXAMPLES = [(rule, before, after) for rule, cases in APPLIES.items() for before, after in cases.items()]
SMALL = st.integers(0, 2**16)


# --- one rule at a time ---------------------------------------------------------------------------------------------


def test_every_rule_has_an_example():
    assert set(APPLIES) == set(RULES)


@pytest.mark.parametrize(("rule", "before", "after"), EXAMPLES, ids=[f"{r}-{b}" for r, b, _ in EXAMPLES])
def test_rule_on_an_example(rule, before, after):
    new = RULES[rule](parse(before))
    assert new == parse(after)
    for sizes in (Sizes(2, 7, 4), Sizes(1, 1, 2), Sizes(2, 0, 1)):
        assert_same_meaning(parse(before), new, sizes)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(tree=mask_trees(4), sizes=SIZES, seed=SMALL)
def test_rule_keeps_the_meaning_wherever_it_applies(rule, tree, sizes, seed):
    for node in n.walk(tree):
        new = RULES[rule](node)
        if new is not None:
            assert_same_meaning(node, new, sizes, seed)


@pytest.mark.parametrize("rule", [rule for rule in APPLIES if rule != "split_full"])
@settings(max_examples=15, deadline=None)
@given(inner=st.lists(mask_trees(3), min_size=3, max_size=3), sizes=SIZES, seed=SMALL)
def test_rule_keeps_the_meaning_of_other_masks_in_its_pattern(rule, inner, sizes, seed):
    """The examples again, with random masks in place of the leaves that any mask may be."""
    holes = {"dense(m)": inner[0], "decay(t)": inner[1], "decay(t_batch)": inner[2]}
    for before in APPLIES[rule]:
        node = _filled(parse(before), {parse(leaf): tree for leaf, tree in holes.items()})
        new = RULES[rule](node)
        if new is not None:
            assert_same_meaning(node, new, sizes, seed)


def _filled(node: n.Node, holes: dict[n.Node, n.Node]) -> n.Node:
    return holes.get(node) or n.rebuild(node, tuple(_filled(child, holes) for child in n.children(node)))


# --- passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
@settings(max_examples=100, deadline=None)
@given(tree=mask_trees(5), sizes=SIZES, seed=SMALL)
def test_pass_keeps_the_meaning(step, tree, sizes, seed):
    try:
        new = step(tree)
    except MaskError:
        assume(False)
    assert_same_meaning(tree, new, sizes, seed)


@settings(max_examples=250, deadline=None)
@given(tree=mask_trees(5), sizes=SIZES, seed=SMALL)
def test_the_terms_of_the_normal_form_sum_to_the_mask(tree, sizes, seed):
    try:
        terms = normalize(tree)
    except MaskError:
        assume(False)
    assert_same_meaning(tree, n.sum_of(*(term.node() for term in terms)), sizes, seed)


@settings(max_examples=6 * settings.default.max_examples, deadline=None)
@given(tree=mask_trees(5), sizes=MORE_TOKENS, seed=SMALL)
def test_passes_keep_the_meaning_on_many_tokens(tree, sizes, seed):
    """Each pass on what the one before gives, and the terms; up to 96 tokens."""
    new = tree
    try:
        for step in PASSES:
            new, before = step(new), new
            assert_same_meaning(before, new, sizes, seed)
        terms = normalize(tree)
    except MaskError:
        assume(False)
    assert_same_meaning(tree, n.sum_of(*(term.node() for term in terms)), sizes, seed)


@pytest.mark.parametrize("step", [SIMPLIFY, EXPAND, DISTRIBUTE], ids=lambda step: step.name)
@settings(max_examples=100, deadline=None)
@given(tree=mask_trees(5))
def test_a_pass_done_twice_is_the_pass_done_once(step, tree):
    try:
        once = step(tree)
    except MaskError:
        assume(False)
    assert step(once) == once


@settings(max_examples=60, deadline=None)
@given(mask_trees(5))
def test_the_normal_form_is_a_sum_of_terms_that_are_sum_free(tree):
    try:
        terms = normalize(tree)
    except MaskError:
        assume(False)
    for term in terms:
        assert not any(isinstance(m, n.Sum) for m in n.walk(term.node()))


# --- reading terms --------------------------------------------------------------------------------------------------

FLAGS = [
    (True, True, True), (True, False, True), (True, False, False),
    (False, False, False), (False, True, True), (False, False, True),
]  # fmt: skip
"""(causal, row_inclusive, col_inclusive): all that arise; ρ inclusive with κ exclusive never does."""


def _linear_terms() -> list[Linear]:
    out = []
    scales = [
        {},
        {"rows": "t"},
        {"cols": "t_head", "log_cols": "t_shared"},
        {"rows": "t", "cols": "t_head", "log_cols": "t"},
    ]
    documents = [None, n.Documents("cu"), n.Documents(segment_ids="ids", n_segments=9)]
    decays = [{"log_a": "t"}, {"channel": "c"}, {"log_a": ops.Add("t", "t_head"), "channel": ops.ChannelLog("t", "A")}]
    for (causal, row, col), strict, docs, scale, decay, sign in product(
        FLAGS, (False, True), documents, scales, decays, (1, -1)
    ):
        if strict or not (not row and col):  # a shifted scan is strict by what it reads
            out.append(Linear(causal, strict, row, col, documents=docs, sign=sign, **decay, **scale))
    for causal, strict, docs, scale in product((True, False), (False, True), documents, scales):
        out.append(Linear(causal, strict, documents=docs, **scale))
    return out


@pytest.mark.parametrize("terms", [_linear_terms()[at::12] for at in range(12)], ids=range(12))
def test_every_linear_term_reads_back_from_its_node(terms):
    for term in terms:
        (read,) = normalize(term.node())
        read = read if read.decays else replace(read, row_inclusive=True, col_inclusive=True)  # the flags mean nothing then
        assert read == term


def test_diagonals_read_back():
    for term in (Diagonal("t"), Diagonal("t", -1), Diagonal(None), Diagonal(None, -1)):
        assert normalize(term.node()) == (term,)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("full()", [Linear, Linear]),
        ("decay(t).strict() + decay(t_batch).strict().T + diagonal(t_head)", [Linear, Linear, Diagonal]),
        ("decay(t) * documents(cu)", [Linear]),
        ("documents(cu)", [Linear, Linear]),
        ("-documents(segment_ids=ids).scale(rows=t)", [Linear, Linear]),
        ("semiseparable(t, r, r_one, rank=2) * decay(t_head)", [Linear, Linear]),
        ("trapezoidal(t, t_head, t)", [Linear, Linear]),
        ("trapezoidal(t, gamma=t_head, beta_over_a=t) * documents(segment_ids=ids)", [Linear, Diagonal]),
        ("decay(t) * decay(t_head).T", [Diagonal]),
        ("decay(t).strict() * decay(t_head).T", []),
        ("decay(t) * decay(t_head).T * dense(m)", [Diagonal]),
        ("diagonal(t) * decay(t).shift(1) * decay(t_head)", []),
        ("diagonal(t).shift(1) * diagonal(t)", []),
        (
            "(decay(t).strict() + decay(t_batch).strict().T + diagonal(t)) * window(left=2, right=2)",
            [Quadratic, Quadratic, Diagonal],
        ),
        ("trapezoidal(t, gamma=t_head, beta_over_a=t) * window(left=5)", [Quadratic, Diagonal]),
        ("diagonal(t).shift(1)", [Quadratic]),
        ("decay(t).shift(1) * decay(t_head).shift(1)", [Linear]),
        ("causal().shift(1) * decay(t)", [Linear]),
        ("decay(t).shift(1) * decay(t_head)", [Quadratic]),
        ("decay(t).shift(2)", [Quadratic]),
        ("decay(t) * window(left=2, right=0)", [Quadratic]),
        ("decay(t) * fenwick(t, levels)", [Quadratic]),
        ("toeplitz(lags) + dense(m)", [Quadratic, Quadratic]),
        ("retention(g) * channel_decay(c)", [Linear]),
        ("zero()", []),
    ],
)
def test_what_each_mask_is_read_as(text, kinds):
    assert [type(term) for term in normalize(parse(text))] == kinds


DIAGONALS = {
    "window(left=2, right=1)": "t",
    "window(left=-1, right=3)": None,
    "window(left=2, right=-1)": None,
    "window(left=2, right=1).shift(2)": None,
    "toeplitz(lags)": "t * centre(lags)",
    "toeplitz(lags_one).T": "t * centre(lags_one)",
    "toeplitz(lags).strict()": None,
    "dense(m)": "t * main(m)",
    "dense(m_one).T": "t * main(m_one)",
    "dense(m).reverse()": "t * flip(main(m))",
    "fenwick(t_head, levels)": "t * select(levels, 0)",
    "fenwick(t_head, levels).shift(2)": None,
    "documents(cu)": "t",
    "documents(cu) * documents(segment_ids=ids)": "t",
    "decay(t_head).scale(rows=t_shared) * -toeplitz(lags)": "-(t * t_shared * centre(lags))",
    "(dense(m) * window(left=2)).scale(cols=t_head)": "t * main(m) * t_head",
}
"""Masks, and the diagonal of diagonal(t) times each; None is zero."""


@pytest.mark.parametrize("text", DIAGONALS)
def test_a_diagonal_times_a_mask_is_the_diagonal_of_the_mask(text):
    tree, wanted = parse(f"diagonal(t) * {text}"), DIAGONALS[text]
    terms = normalize(tree)
    assert [type(term) for term in terms] == ([] if wanted is None else [Diagonal])
    for sizes in (Sizes(2, 7, 4), Sizes(1, 1, 2), Sizes(2, 0, 1)):
        assert_same_meaning(tree, n.sum_of(*(term.node() for term in terms)), sizes)
        if wanted is not None:
            sign, value = (-1, wanted[2:-1]) if wanted[0] == "-" else (1, wanted)
            assert_same_meaning(terms[0].node(), parse(f"{'-' * (sign < 0)}diagonal({value})"), sizes)


def test_random_trees_reach_every_kind_of_term():
    for kind in (Linear, Diagonal, Quadratic):
        find(mask_trees(3), lambda tree: any(type(t) is kind for t in normalize(tree)))  # noqa: B023


# --- the driver -----------------------------------------------------------------------------------------------------


def test_the_callback_sees_each_pass_by_name_with_its_result():
    seen: list[tuple[str, n.Node]] = []
    tree = parse("(full() * decay(t) + diagonal(t_head)).T")
    normalize(tree, lambda name, after: seen.append((name, after)))
    assert [name for name, _ in seen] == ["simplify", "expand", "distribute"]
    for step, (_, after) in zip(PASSES, seen, strict=True):
        tree = step(tree)
        assert tree == after


BROKEN: dict[str, tuple[Callable[[n.Node], n.Node | None], str]] = {
    "nests a sum": (lambda m: n.Sum((n.Sum((m, m)), m)) if isinstance(m, n.Decay) else None, "flat"),
    "a product of one": (lambda m: n.Product((m,)) if isinstance(m, n.Diagonal) else None, "several factors"),
    "scales by nothing": (lambda m: n.Scale(m.mask) if isinstance(m, n.Neg) else None, "at least one of rows"),
    "shifts back": (lambda m: n.Shift(m.mask, -1) if isinstance(m, n.Neg) else None, "must not be negative"),
    "mixes kinds": (lambda m: n.Documents("t") if isinstance(m, n.Neg) else None, "both as integers and as floats"),
    "invents a name": (lambda m: n.Decay("not a name") if isinstance(m, n.Neg) else None, "not an identifier"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pass_is_caught_where_it_broke(name):
    rule, words = BROKEN[name]
    done: list[str] = []

    def once(m: n.Node) -> n.Node | None:
        return None if done else (new := rule(m)) and (done.append("applied") or new)

    seen: list[str] = []
    passes = (SIMPLIFY, Pass("broken", (once,)), DISTRIBUTE)
    with pytest.raises(MaskError, match=words):
        run(parse("decay(t) + diagonal(t) - causal()"), passes, lambda at, _: seen.append(at))
    assert done and seen == ["simplify"]


def test_a_malformed_mask_is_caught_before_the_first_pass():
    with pytest.raises(MaskError, match="exactly one of cu_seqlens and segment_ids"):
        normalize(n.Documents())


def test_rules_that_never_end_are_stopped():
    turn = Pass("turn", (lambda m: n.Transpose(m.mask) if isinstance(m, n.Strict) else None,
                         lambda m: n.Strict(m.mask) if isinstance(m, n.Transpose) else None))  # fmt: skip
    with pytest.raises(MaskError):
        turn(parse("causal().T"))


# --- growth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [8, 9, 12, 20, 100])
def test_a_product_of_many_sums_is_refused_in_bounded_time(factors):
    sums = [n.Sum((n.Decay(f"a{at}"), n.Transpose(n.Decay(f"b{at}")))) for at in range(factors)]
    started = time.perf_counter()
    with pytest.raises(MaskError, match=rf"more than {MAX_NODES}"):
        normalize(n.product_of(*sums))
    assert time.perf_counter() - started < 20


def test_a_product_of_a_few_sums_is_multiplied_out():
    sums = [n.Sum((n.Decay(f"a{at}"), n.Transpose(n.Decay(f"b{at}")))) for at in range(6)]
    assert len(normalize(n.product_of(*sums))) == 64


@pytest.mark.parametrize("part", ["decay(x{})", "-decay(x{}).T", "decay(x{}).scale(rows=u{})", "diagonal(x{}).strict().T"])
@pytest.mark.parametrize("join", [n.sum_of, n.product_of])
def test_wide_masks_meet_no_recursion_limit(part, join):
    wide = join(*(parse(part.format(*[at] * part.count("{}"))) for at in range(120)))
    assert verify(wide) == wide
    assert len(normalize(wide)) in (0, 1, 120)
