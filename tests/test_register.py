"""Masks from outside: they mean what their formula says, and are like built-in ones in everything else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registered import KINDS, TheirAlibi, TheirDecay, TheirDocuments, TheirMatrix, TheirPowers, TheirRanks
from trees import SIZES, Sizes, assert_same_meaning, dense, leaf_of, tensors

import ssdops
import ssdops.register
from ssdops import Mask, masks, operand, register_mask, ssd
from ssdops.errors import MaskError, ParseError, RegistrationError, ShapeError, UnsupportedError
from ssdops.ir import nodes as n
from ssdops.ir.evaluate import Scope, entries
from ssdops.ir.text import parse
from ssdops.register import registered

LOWERED = [kind for kind in KINDS if kind.definition.lower is not None]
ids = [kind.name for kind in KINDS]


ONE_ROW = Sizes(batch=1)


def example(kind, sizes: Sizes = ONE_ROW) -> Mask:
    node, given = leaf_of(kind.node), tensors(sizes)
    return Mask(node, {name: given[name] for name in n.operand_names(node)})


# --- meaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOWERED, ids=lambda kind: kind.name)
@settings(max_examples=8)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_lower_is_what_entries_say(kind, sizes, seed):
    node = leaf_of(kind.node)
    single = Sizes(1, sizes.seqlen, sizes.nheads) if any(axes == n.BOUNDARIES for _, axes in n.operands_of(node)) else sizes
    assert_same_meaning(node, kind.definition.lowered(node), single, seed)


def test_entries_of_a_decay_are_those_of_the_built_in_one():
    sizes = Sizes()
    t, mine = tensors(sizes), dense(TheirDecay.node("t"), tensors(sizes), sizes)
    assert torch.allclose(mine, dense(n.Decay("t"), t, sizes), rtol=1e-13, atol=0)


def test_entries_without_a_lower_are_the_formula():
    w = torch.randn(2, 5, 3, dtype=torch.float64)
    i, j = torch.arange(5)[:, None], torch.arange(5)
    expected = torch.where(i >= j, w.transpose(1, 2)[:, :, None, :] / (1 + (i - j).abs()) ** 2, 0.0)
    found = dense(TheirPowers(w, 2).tree, {"w": w}, Sizes(2, 5, 3))[..., 0]
    assert torch.allclose(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "formula",
    [
        lambda i, j: 0.1 + (i - j),
        lambda i, j: (i - j) / 3,
        lambda i, j: (i + 2 * j + 1).log(),
        lambda i, j: torch.where(i >= j, 0.1, 0.3),
        lambda i, j: torch.exp(-0.1 * (i - j).abs()) * torch.maximum(i, j),
        lambda i, j: 1 / (1 + i + j),
    ],
)
def test_index_arithmetic_is_in_float64(formula):
    """torch itself would leave the integers for float32."""
    kind = register_mask("formula")(type("Formula", (), {"entries": lambda self, i, j: formula(i, j)}))
    found = dense(kind().tree, {}, Sizes(1, 6, 1))[0, 0, ..., 0]
    torch.set_default_dtype(torch.float64)
    try:
        expected = formula(torch.arange(6)[:, None], torch.arange(6))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_blocks_are_parts_of_the_whole(kind):
    """Rows and columns in any order, as the backends and combinators ask for them."""
    mask = example(kind)
    whole = dense(mask.tree, mask.operands, ONE_ROW)
    i, j = torch.tensor([4, 1, 5]), torch.tensor([0, 5, 4, 2])
    value, support = entries(mask.tree, Scope(mask.operands, 1, 6, 4, i, j))
    part = torch.where(support, value, 0.0).expand(1, 4, 3, 4, whole.shape[-1])
    assert torch.equal(part, whole[:, :, i][:, :, :, j])


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_gradients_of_everything(kind):
    """Of q, k, v and the mask's own operands, to second order where it is made of scans."""
    mask = example(kind, Sizes(batch=1, seqlen=4, nheads=2))
    q, k, v = torch.randn(3, 1, 4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    floats = {name: x.requires_grad_() for name, x in mask.operands.items() if x.is_floating_point()}

    def call(q, k, v, *operands):
        return ssd(q, k, v, Mask(mask.tree, {**mask.operands, **dict(zip(floats, operands, strict=True))}), backend="naive")

    inputs = [x.clone().requires_grad_() for x in (q, k, v)] + list(floats.values())
    assert torch.autograd.gradcheck(call, inputs)
    assert all(x.grad is not None or x.requires_grad for x in inputs)


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_every_backend_runs_what_is_lowered_and_naive_everything(kind):
    mask = example(kind, Sizes(batch=1, seqlen=7))
    q, k, v = torch.randn(3, 1, 7, 4, 3, dtype=torch.float64)
    expected = ssd(q, k, v, mask, backend="naive")
    linear = kind.name in ("their_decay", "their_alibi", "their_ranks", "their_documents", "their_boundaries")
    structured = kind.name in ("their_band", "their_lags")  # which chunked knows as well
    for backend in ("chunked", "recurrent"):
        if linear or (structured and backend == "chunked"):
            assert torch.allclose(ssd(q, k, v, mask, backend=backend), expected, rtol=1e-10, atol=1e-12)
        else:
            with pytest.raises(UnsupportedError, match="naive"):
                ssd(q, k, v, mask, backend=backend)


def test_a_lowered_mask_carries_states():
    log_a = -torch.rand(1, 6, 2)
    q, k, v = torch.randn(3, 1, 6, 2, 3)
    y, state = ssd(q, k, v, TheirDecay(log_a), return_state=True)
    want, left = ssd(q, k, v, masks.decay(log_a), return_state=True)
    assert torch.equal(y, want) and torch.equal(state, left)


def test_states_that_it_cannot_carry_are_refused():
    q, g = torch.randn(1, 6, 1, 3), torch.zeros(1)
    rule = register_mask("their_trapezoid")(
        bad_class(
            entries=lambda s, i, j: s.g,
            g=operand("batch seqlen nheads"),
            lower=lambda s: masks.trapezoidal(s.g, gamma=s.g, beta_over_a=s.g),
        )
    )
    with pytest.raises(UnsupportedError, match=r"made of trapezoidal\(\).*write trapezoidal\(\) itself"):
        ssd(q, q, q, rule(g), return_state=True)
    ids = torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(ShapeError, match="need n_segments"):
        ssd(q, q, q, TheirDecay(g) * TheirDocuments(ids), return_state=True)
    with pytest.raises(UnsupportedError, match=r"a step has no documents, and their_decay.* is made of them"):
        ssdops.ssd_step(q[:, 0], q[:, 0], q[:, 0], TheirDecay(g) * TheirDocuments(ids[:, 0]), None)


def test_refusals_say_what_is_missing():
    q = torch.randn(1, 4, 1, 2)
    with pytest.raises(UnsupportedError, match=r"of their_powers only the entries are known; give its class a lower\(\)"):
        ssd(q, q, q, TheirPowers(torch.ones(1, 4, 1), 1), backend="chunked")


# --- like a built-in ------------------------------------------------------------------------------------------------


def test_it_composes_prints_and_parses():
    w, log_a = torch.ones(1, 4, 2), torch.zeros(1, 4, 2)
    mask = -(TheirPowers(w, 2) * masks.decay(log_a)).T.reverse() + TheirPowers(w, power=3).strict().shift(2).scale(cols=log_a)
    text = (
        "-(their_powers(w, power=2) * decay(log_a)).T.reverse() + their_powers(w, power=3).strict().shift(2).scale(cols=log_a)"
    )
    assert str(mask) == text
    assert parse(text) == mask.tree and hash(parse(text)) == hash(mask.tree)
    assert mask.operands["w"] is w and mask.operands["log_a"] is log_a
    assert TheirPowers(w, 2).tree == TheirPowers(torch.zeros(3), 2).tree != TheirPowers(w, 3).tree


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_it_can_be_copied_and_sent(through):
    mask = TheirPowers(torch.randn(1, 4, 2), 2) + masks.causal()
    again = through(mask)
    assert again.tree == mask.tree and torch.equal(again.operands["w"], mask.operands["w"])
    assert through(TheirPowers) is TheirPowers


def test_a_causal_claim_is_used():
    from ssdops.plan import terms_of

    assert [str(t.node()) for t in terms_of(parse("causal() * their_powers(w, power=1)"))] == ["their_powers(w, power=1)"]


def test_explain_shows_what_it_is_made_of():
    x = torch.empty(1, 64, 2, 4, device="meta")
    found = ssdops.explain(x, x, x, TheirAlibi(torch.empty(2, device="meta")))
    assert found.mask == "their_alibi(log_gamma)"
    assert dict(found.passes)["expand"] == "decay(log_gamma) + decay(log_gamma).strict().T"


def test_it_compiles_and_maps():
    q, w = torch.randn(2, 5, 2, 3), torch.rand(2, 5, 2)
    expected = ssd(q, q, q, TheirPowers(w, 2))
    compiled = torch.compile(lambda q, w: ssd(q, q, q, TheirPowers(w, 2)), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q, w), expected)
    log_a = -torch.rand(2, 5, 2)
    stateful = torch.compile(lambda q, a: ssd(q, q, q, TheirDecay(a), return_state=True), fullgraph=True, backend="aot_eager")
    for found, want in zip(stateful(q, log_a), ssd(q, q, q, masks.decay(log_a), return_state=True), strict=True):
        assert torch.allclose(found, want)
    mapped = torch.func.vmap(lambda q, w: ssd(q[None], q[None], q[None], TheirPowers(w[None], 2))[0])(q, w)
    assert torch.allclose(mapped, expected, atol=1e-6)


# --- mistakes -------------------------------------------------------------------------------------------------------


def call(mask: Mask) -> torch.Tensor:
    q = torch.randn(1, 4, 2, 3)
    return ssd(q, q, q, mask, backend="naive")


def test_a_name_is_given_once():
    for name, owner in (("their_decay", "registered.TheirDecay"), ("decay", "ssdops.ir.nodes.Decay")):
        with pytest.raises(RegistrationError, match=rf"{name}' is {owner} already, and .*Another cannot take its name"):

            @register_mask(name)
            class Another:
                def entries(self, i, j):
                    return 1.0

    assert registered("their_decay") is TheirDecay


def bad_class(**body):
    return type("Bad", (), {"entries": lambda self, i, j: 1.0, **body})


@pytest.mark.parametrize(
    ("register", "words"),
    [
        (lambda: register_mask("not a name")(bad_class()), "needs an identifier"),
        (lambda: register_mask("exp")(bad_class()), "a meaning of its own"),
        (lambda: register_mask("zero")(bad_class()), "a meaning of its own"),
        (lambda: register_mask("nothing")(type("Bad", (), {})), r"Bad has no entries\(self, i, j\)"),
        (lambda: register_mask("nothing")(bad_class(causal=1)), "causal must be True or False, got 1"),
        (lambda: register_mask("nothing")(lambda: None), "decorates a class, got function"),
        (lambda: operand("tokens"), '"batch seqlen nheads"'),
    ],
)
def test_bad_registrations_are_named(register, words):
    with pytest.raises(RegistrationError, match=words):
        register()
    assert n.leaf_named("nothing") is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TheirAlibi(torch.ones(3, 4)), r"log_gamma must be \(nheads\), got 2 dimensions.*their_alibi declares it so"),
        (
            lambda: TheirPowers(torch.ones(1, 5, 2), 1),
            r"w has shape \(1, 5, 2\), where seqlen must be 4.*their_powers",
        ),
        (lambda: TheirMatrix(torch.ones(1, 2, 4, 3)), "seqlen must be 4.*their_matrix declares it so: reshape it"),
        (lambda: TheirRanks(torch.ones(2), torch.ones(1, 4, 2, 3), torch.ones(1, 4, 2, 3), 2), "rank 3, expected 2"),
    ],
)
def test_shapes_that_were_not_declared_are_shape_errors(make, words):
    with pytest.raises(ShapeError, match=words):
        call(make())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: TheirAlibi(), TypeError, r"their_alibi\(log_gamma\) takes each of these once"),
        (lambda: TheirAlibi(torch.ones(2), log_gamma=torch.ones(2)), TypeError, "once"),
        (lambda: TheirAlibi(gamma=torch.ones(2)), TypeError, "once"),
        (lambda: TheirAlibi(0.5), MaskError, "log_gamma must be a torch.Tensor, got float"),
        (lambda: TheirPowers(torch.ones(2), 1.5), MaskError, r"their_powers\(power\) must be an int, got float"),
        (lambda: TheirPowers(torch.ones(2), None), MaskError, r"their_powers\(power\) must be an int, got NoneType"),
        (lambda: parse("their_powers(w)"), ParseError, r"their_powers\(w, power\) with nothing missing"),
        (lambda: parse("decay(w * 1e999)"), ParseError, "expected an operand"),
        (lambda: parse(f"decay(w * {10**400})"), ParseError, "expected an operand"),
        (lambda: parse("theirs(w)"), ParseError, "one of causal, .*their_powers"),
    ],
)
def test_misuse_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def broken(name: str, **body) -> Mask:
    """A mask of one operand per token whose class has this body; registered for this test alone."""
    kind = register_mask(name)(bad_class(w=operand("batch seqlen nheads"), g=operand("nheads"), **body))
    return kind(torch.ones(1, 4, 2), torch.ones(2))


@pytest.fixture(autouse=True)
def registrations_end_here(monkeypatch):
    monkeypatch.setattr(n, "REGISTERED", dict(n.REGISTERED))
    monkeypatch.setattr("ssdops.register._KNOWN", dict(ssdops.register._KNOWN))


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (
            {"entries": lambda s, i, j: s.w * i},
            MaskError,
            r"w cannot be used before it is read: write self.w\[i\] or",
        ),
        ({"entries": lambda s, i, j: torch.exp(s.w)}, MaskError, "before it is read"),
        ({"entries": lambda s, i, j: s.w[i / 2]}, MaskError, "read at torch.float64 indices"),
        (
            {"entries": lambda s, i, j: torch.ones(3, 4)},
            ShapeError,
            r"entries\(\) of .* gave shape \(3, 4\).*2, 4, 4",
        ),
        ({"support": lambda s, i, j: i - j}, MaskError, r"support\(\) of .* gave torch.int64, expected torch.bool"),
        ({"lower": lambda s: None}, MaskError, "gave NoneType, expected a Mask"),
        ({"lower": lambda s: masks.decay(torch.ones(2))}, MaskError, "brings a tensor of its own"),
        ({"lower": lambda s: masks.decay(s.w.cumsum(1))}, MaskError, r"lower\(\) may use .*, and not cumsum"),
        ({"lower": lambda s: masks.decay(s.w + 1.0)}, MaskError, "and not add"),
        ({"lower": lambda s: masks.retention(s.w)}, MaskError, r"axes \(batch, seqlen, nheads\) where \(nheads\) is read"),
    ],
)
def test_mistakes_in_a_class_are_named(body, error, words):
    name = f"broken_{abs(hash(words))}"
    with pytest.raises(error, match=words):
        call(broken(name, **body))


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (lambda s: s.w - s.g, "decay(w + g * -1.0)"),
        (lambda s: -s.w * s.g, "decay(w * -1.0 * g)"),
        (lambda s: 2 * s.w + s.w.exp(), "decay(w * 2.0 + exp(w))"),
        (lambda s: torch.exp(s.g) * torch.neg(s.w), "decay(exp(g) * (w * -1.0))"),
    ],
)
def test_lower_reckons_with_operands(expression, text):
    lowered = broken("reckoned", lower=lambda s: masks.decay(expression(s))).tree
    assert str(lowered.definition.lowered(lowered)) == text
    assert parse(text) == lowered.definition.lowered(lowered)
