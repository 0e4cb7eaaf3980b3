"""Masks and contractions as text: what is printed parses back to an equal value, and nothing is evaluated."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import REGISTERED, mask_trees

from ssdops.errors import ParseError, SsdopsError
from ssdops.ir import nodes as n
from ssdops.ir import operands as ops
from ssdops.ir.contraction import Contraction, parse_contraction
from ssdops.ir.text import parse, show, show_operand
from ssdops.ir.verify import MAX_DEPTH

A, B, C = n.Decay("a"), n.Decay("b"), n.Decay("c")
CONTRACTIONS = st.builds(
    Contraction,
    mask_trees(3),
    st.booleans(),
    st.sampled_from([None, "float32", "bfloat16"]),
    st.sampled_from(["auto", "chunked", "naive"]),
    st.sampled_from([None, 1, 64, -3]),
    st.sampled_from([None, 1, 256]),
)


@settings(max_examples=300, deadline=None)
@given(mask_trees())
def test_what_is_shown_parses_back(tree):
    assert parse(show(tree)) == tree


def test_random_trees_hold_every_node():
    """The round trip is only as good as its trees."""
    drawn: set[type] = set()

    @settings(max_examples=600, derandomize=True, database=None, deadline=None)
    @given(mask_trees(3))
    def draw(tree):
        drawn.update(type(m) for m in n.walk(tree))
        drawn.update(type(x) for operand, _ in n.operands_of(tree) for x in _inside(operand))

    draw()
    built_in = {kind for kind in n.FIELDS if not issubclass(kind, n.Registered)}
    assert drawn >= {*built_in, *REGISTERED, *ops.EXPRESSIONS, str}


def _inside(x: ops.Operand) -> Iterator[ops.Operand]:
    yield x
    for part in ops.parts(x):
        yield from _inside(part)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (n.Sum((A, n.Neg(B))), "decay(a) - decay(b)"),
        (n.Sum((n.Neg(A), B)), "-decay(a) + decay(b)"),
        (n.Sum((A, n.Neg(n.Sum((B, C))))), "decay(a) - (decay(b) + decay(c))"),
        (n.Sum((A, n.Neg(n.Product((B, C))))), "decay(a) - (decay(b) * decay(c))"),
        (n.Sum((A, n.Neg(n.Neg(B)))), "decay(a) - -decay(b)"),
        (n.Sum((A, n.Product((B, C)))), "decay(a) + decay(b) * decay(c)"),
        (n.Product((n.Sum((A, B)), C)), "(decay(a) + decay(b)) * decay(c)"),
        (n.Product((C, n.Sum((A, B)))), "decay(c) * (decay(a) + decay(b))"),
        (n.Product((n.Neg(A), n.Neg(B))), "-decay(a) * -decay(b)"),
        (n.Neg(n.Product((A, B))), "-(decay(a) * decay(b))"),
        (n.Neg(n.Neg(A)), "--decay(a)"),
        (n.Transpose(n.Neg(A)), "(-decay(a)).T"),
        (n.Neg(n.Transpose(A)), "-decay(a).T"),
        (n.Transpose(n.Product((A, B))), "(decay(a) * decay(b)).T"),
        (n.Strict(n.Shift(n.Reverse(A), 2)), "decay(a).reverse().shift(2).strict()"),
        (n.Scale(n.Sum((A, B)), rows="u", log_cols="z"), "(decay(a) + decay(b)).scale(rows=u, log_cols=z)"),
        (n.ZERO, "zero()"),
        (n.Neg(n.ZERO), "-zero()"),
        (n.Window(-1, 3), "window(left=-1, right=3)"),
        (n.Documents(segment_ids="ids", n_segments=4), "documents(segment_ids=ids, n_segments=4)"),
        (n.Documents("cu"), "documents(cu)"),
        (n.Trapezoidal("a", "b", "c"), "trapezoidal(a, b, c)"),
        (n.Trapezoidal("a", gamma="c", beta_over_a="r"), "trapezoidal(a, gamma=c, beta_over_a=r)"),
        (n.ChannelDecay(dt="dt", A="A"), "channel_decay(dt=dt, A=A)"),
        (n.Semiseparable("a", "b", "c", 2), "semiseparable(a, b, c, rank=2)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_precedence(tree, text):
    assert show(tree) == text
    assert parse(text) == tree
    assert str(tree) == text


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (ops.Add(ops.Add("a", "b"), "c"), "a + b + c"),
        (ops.Add("a", ops.Add("b", "c")), "a + (b + c)"),
        (ops.Mul("a", ops.Mul("b", "c")), "a * (b * c)"),
        (ops.Mul(ops.Add("a", "b"), "c"), "(a + b) * c"),
        (ops.Add(ops.Mul("a", "b"), ops.Exp(ops.Add("c", "d"))), "a * b + exp(c + d)"),
        (ops.Select(ops.Flip("r"), 1), "select(flip(r), 1)"),
        (ops.Advance(ops.Delay("a")), "advance(delay(a))"),
        (ops.Mul("a", ops.Centre("lags")), "a * centre(lags)"),
        (ops.Flip(ops.Main("m")), "flip(main(m))"),
        (ops.ChannelLog("dt", "A"), "channel_log(dt, A)"),
        (ops.Mirror("cu"), "mirror(cu)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_operand_precedence(x, text):
    assert show_operand(x) == text
    assert parse(f"decay({text})") == n.Decay(x)


def test_different_trees_have_different_texts():
    """The text is the cache key of programs: Add(a, Add(b, c)) rounds differently from Add(Add(a, b), c)."""
    trees = [
        n.Decay(ops.Add("a", ops.Add("b", "c"))),
        n.Decay(ops.Add(ops.Add("a", "b"), "c")),
        A,
        B,
        n.Neg(A),
        n.Strict(A),
    ]
    assert len({show(t) for t in trees}) == len(trees)


def test_spaces_and_line_breaks_around_the_text_do_not_matter():
    assert parse("  decay( a )\n") == A


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "not an expression"),
        ("decay(a", "never closed"),
        ("decay(a)) + decay(b)", "unmatched"),
        ("decay(a); decay(b)", "invalid syntax"),
        ("x = decay(a)", "not an expression"),
        ("decay(a) + 1", "got '1'"),
        ("decay(a) / decay(b)", "got 'decay(a) / decay(b)'"),
        ("decay(a) @ decay(b)", "got 'decay(a) @ decay(b)'"),
        ("+decay(a)", "got '+decay(a)'"),
        ("decoy(a)", "got 'decoy(a)'"),
        ("causal() + decay(a, b)", "expected decay(log_a), got 'decay(a, b)'"),
        ("decay()", "decay(log_a) with nothing missing, got 'decay()'"),
        ("decay(log_b=a)", "expected decay(log_a), got 'decay(log_b=a)'"),
        ("decay(a, log_a=b)", "got 'decay(a, log_a=b)'"),
        ("decay(log_a=a, log_a=b)", "got 'decay(log_a=a, log_a=b)'"),
        ("decay(*a)", "got '*a'"),
        ("decay(**a)", "got 'decay(**a)'"),
        ("decay(a).scale(**b)", "got 'decay(a).scale(**b)'"),
        ("decay(a).scale()", "got 'decay(a).scale()'"),
        ("decay(a).scale(u)", "got 'decay(a).scale(u)'"),
        ("decay(a).scale(rows=u, rows=w)", "got 'decay(a).scale(rows=u, rows=w)'"),
        ("decay(a).scale(rws=u)", "got 'decay(a).scale(rws=u)'"),
        ("decay(a).strict(1)", "got 'decay(a).strict(1)'"),
        ("decay(a).shift(x)", "expected an integer, got 'x'"),
        ("decay(a).shift(True)", "expected an integer, got 'True'"),
        ("decay(a).shift(1.5)", "expected an integer, got '1.5'"),
        ("decay(a).transpose()", "got 'decay(a).transpose()'"),
        ("decay(a).T()", "got 'decay(a).T()'"),
        ("decay(a).U", "got 'decay(a).U'"),
        ("window(left=a, right=0)", "expected an integer, got 'a'"),
        ("window(left=True, right=0)", "expected an integer, got 'True'"),
        ("window()", "window(left, right) with nothing missing"),
        ("semiseparable(a, b, c, rank=b)", "expected an integer, got 'b'"),
        ("decay(1)", "expected an operand name or expression, got '1'"),
        ("decay(a - b)", "got 'a - b'"),
        ("decay(select(a, b))", "expected an integer, got 'b'"),
        ("decay(log(a))", "got 'log(a)'"),
        ("decay(a.b)", "got 'a.b'"),
        ("zero(1)", "got 'zero(1)'"),
        ("documents", "got 'documents'"),
    ],
)  # fmt: skip
def test_what_is_not_a_mask_is_a_parse_error_that_names_the_place(text, place):
    for _ in range(2):  # an error is not remembered as a result
        with pytest.raises(ParseError) as error:
            parse(text)
        assert place in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "__import__('os').system('true')",
        "decay(__import__('os'))",
        "decay(a).scale(rows=__import__('os'))",
        "decay(a).__class__",
        "decay(a).__class__()",
        "(lambda: decay(a))()",
        "[decay(a) for a in b][0]",
        "decay(a) if b else decay(c)",
        "(x := decay(a))",
        "f'{decay(a)}'",
        "window(left=2 ** 9999999, right=0)",
        "window(left=int('1'), right=0)",
        "decay(a)\x00",
    ],
)
def test_nothing_is_evaluated(text, monkeypatch):
    for read, spelt in ((parse, text), (parse_contraction, f"contract({text})")):
        with monkeypatch.context() as patch:
            for name in ("eval", "exec", "__import__"):
                patch.setattr(f"builtins.{name}", _forbidden)
            try:
                outcome = read(spelt)
            except Exception as error:
                outcome = error
        assert isinstance(outcome, ParseError), outcome


def _forbidden(*args: object, **kwargs: object) -> None:
    raise AssertionError("evaluated")


@pytest.mark.parametrize("depth", [100, 2000, 200_000])
@pytest.mark.parametrize("text", ["causal(){}", "{}causal()", "decay({})"])
def test_depth_never_meets_the_recursion_limit(depth, text):
    """Deeper than a mask may be is an error of ours (or parses), never a RecursionError or a crash."""
    nest = {"causal(){}": ".T" * depth, "{}causal()": "-" * depth, "decay({})": "exp(" * depth + "a" + ")" * depth}
    try:
        tree = parse(text.format(nest[text]))
    except ParseError as error:
        assert len(str(error)) < 2000  # the message stays readable
    else:
        assert depth == 100
        assert show(tree)


def test_the_deepest_mask_that_may_be_made_is_read_back():
    tree: n.Node = n.Causal()
    for at in range(MAX_DEPTH - 1):
        tree = (n.Transpose, n.Strict, n.Neg, n.Reverse)[at % 4](tree)
    assert parse(show(tree)) == tree


# --- contractions ---------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(CONTRACTIONS)
def test_contractions_read_back(contraction):
    assert parse_contraction(str(contraction)) == contraction


def test_defaults_are_left_out_of_the_text():
    assert str(Contraction(A)) == "contract(decay(a))"
    assert str(Contraction(A, return_state=True, chunk_size=64)) == "contract(decay(a), return_state=True, chunk_size=64)"


def _options() -> Iterator[Contraction]:
    plain = Contraction(n.Product((A, n.Documents("cu"))))
    yield plain
    yield replace(plain, return_state=True)
    yield replace(plain, state_dtype="bfloat16")
    yield replace(plain, backend="naive", chunk_size=32)
    yield replace(plain, return_state=True, state_every=256)


def test_a_contraction_means_the_same_in_another_process():
    ours = list(_options())
    program = (
        "import sys\nfrom ssdops.ir.contraction import parse_contraction\n"
        "for c in map(parse_contraction, sys.stdin): print(c, repr(c), sep='\\t')"
    )
    sent = "\n".join(str(c) for c in ours)
    done = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True, text=True, check=True)
    assert [line.split("\t") for line in done.stdout.splitlines()] == [[str(c), repr(c)] for c in ours]


@pytest.mark.parametrize(
    "text",
    [
        "decay(a)",
        "contract()",
        "contract(decay(a), decay(b))",
        "contract(decay(a), backnd='naive')",
        "contract(decay(a), backend=naive)",
        "contract(decay(a), chunk_size=open('x'))",
        "contract(decay(a), backend='a', backend='b')",
        "contract(decay(a), **options)",
        "contract(decoy(a))",
        "contract",
    ],
)
def test_what_is_not_a_contraction_is_a_parse_error(text):
    with pytest.raises(ParseError) as error:
        parse_contraction(text)
    assert "contract" in str(error.value) or "decoy" in str(error.value)
    assert isinstance(error.value, SsdopsError)
