"""Random mask trees up to depth 5, sizes up to 96, on every backend: Y and every gradient.

The default profile draws a few, `--hypothesis-profile=thorough` hundreds. Of a tree that backends of kernels do not run whole
they run what terms they can, and `naive` the rest. Triton's interpreter and TVM's compiler are slow, so theirs are fewer.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from preferring import preferring

from ssdops.backends import registry
from ssdops.backends.tvm.backend import installed
from ssdops.errors import MaskError
from ssdops.ir.terms import Diagonal, Term
from ssdops.plan import terms_of
from ssdops.testing import laws, strategies
from ssdops.testing.case import Case
from ssdops.testing.source import Sizes, problems

BACKENDS = ("naive", "recurrent", "chunked")
EXAMPLES = max(settings.default.max_examples // 4, 1)
EXACT = (torch.float64, torch.float32)


def trees(sizes: st.SearchStrategy[Sizes], kind: str = "any", dtypes: Sequence[torch.dtype] = EXACT) -> st.SearchStrategy[Case]:
    make = (lambda s: strategies.any_mask(s, 5)) if kind == "any" else (lambda s: strategies.build(s, kind, 5))
    return strategies.cases(kind, make=make, sizes=sizes, dtypes=dtypes)


def up_to(max_seqlen: int) -> st.SearchStrategy[Sizes]:
    """Empty ones among them."""
    return problems(max_seqlen=max_seqlen, max_dim=5, max_batch=2)


SLOW = problems(max_seqlen=96, max_dim=5, min_batch=1, max_batch=1).filter(lambda sizes: sizes.seqlen > 1)
"""Sizes for what is slow: none that are empty, for which a backend has nothing to do."""
MAX_TERMS = 6
"""Trees of more terms than that are not drawn for what is slow."""


def terms_in(case: Case) -> tuple[Term, ...]:
    """Its terms; none where products of sums multiply out to more of them than are taken."""
    try:
        return terms_of(case.mask.tree)
    except MaskError:
        return ()


def holds_everywhere(case: Case) -> None:
    """Each backend that runs every term gives what the oracle does; one, at least, always does."""
    if not (terms := terms_in(case)):
        return
    able = [name for name in BACKENDS if all(registry.get(name).supports(term, case.problem).ok for term in terms)]
    assert "naive" in able
    for name in ["auto", *able]:
        run = laws.Runner(name, 8 if name == "chunked" else None)
        laws.equals_oracle(run, case)
        laws.gradients_equal_oracle(run, case)


def holds_term_by_term(backend: str, case: Case) -> None:
    """The backend and `naive` together, where the backend has kernels for a term."""
    kernels, terms = registry.get(backend), terms_in(case)
    assume(len(terms) <= MAX_TERMS)
    assume(any(not isinstance(term, Diagonal) and kernels.supports(term, case.problem).ok for term in terms))
    with preferring(backend) as name:
        laws.equals_oracle(laws.Runner(name), case)
        laws.gradients_equal_oracle(laws.Runner(name), case)


@settings(max_examples=EXAMPLES, deadline=None)
@given(trees(up_to(24)))
def test_any_tree(case: Case) -> None:
    holds_everywhere(case)


@settings(max_examples=max(EXAMPLES // 2, 1), deadline=None)
@given(trees(up_to(96)))
def test_any_tree_of_many_tokens(case: Case) -> None:
    holds_everywhere(case)


@settings(max_examples=max(EXAMPLES // 2, 1), deadline=None)
@given(trees(up_to(96), "linear"))
def test_sums_of_scans_of_many_tokens(case: Case) -> None:
    holds_everywhere(case)


@pytest.mark.skipif(
    find_spec("triton") is None, reason="no Triton, whose kernels these are; torch backends have the same trees"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here, and kernels then take no CPU tensors")
@settings(max_examples=max(2 * EXAMPLES // 3, 1), deadline=None)
@given(trees(SLOW, dtypes=(torch.float32, torch.bfloat16)))
def test_any_tree_in_tritons_interpreter(case: Case) -> None:
    holds_term_by_term("triton", replace(case, operands=case.problem.dtype))


@pytest.mark.tvm
@pytest.mark.skipif(not installed().ok, reason="no TVM, whose programs these are; torch backends have the same trees")
@settings(max_examples=max(EXAMPLES // 3, 1), deadline=None)
@given(trees(SLOW))
def test_any_tree_in_programs_of_tvm(case: Case) -> None:
    holds_term_by_term("tvm", case)
