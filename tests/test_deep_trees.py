"""Random mask trees up to depth 5, sizes up to 96, on every torch backend that runs them: Y and every gradient.

The default profile draws a few, `--hypothesis-profile=thorough` hundreds. Backends of kernels have suites of their own.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssdops.backends import registry
from ssdops.errors import MaskError
from ssdops.plan import terms_of
from ssdops.testing import laws, strategies
from ssdops.testing.case import Case
from ssdops.testing.source import problems

BACKENDS = ("naive", "recurrent", "chunked")
EXAMPLES = max(settings.default.max_examples // 4, 1)


def deep(kind: str, max_seqlen: int) -> st.SearchStrategy[Case]:
    return strategies.cases(
        kind,
        make=lambda s: strategies.any_mask(s, 5) if kind == "any" else strategies.build(s, kind, 5),
        sizes=problems(max_seqlen=max_seqlen, max_dim=5, max_batch=2),
        dtypes=(torch.float64, torch.float32),
    )


def holds_everywhere(case: Case) -> None:
    """Each backend that runs every term gives what the oracle does; one, at least, always does."""
    try:
        terms = terms_of(case.mask.tree)
    except MaskError:  # products of sums that multiply out to more terms than are taken
        return
    able = [name for name in BACKENDS if all(registry.get(name).supports(term, case.problem).ok for term in terms)]
    assert "naive" in able
    for name in ["auto", *able]:
        run = laws.Runner(name, 8 if name == "chunked" else None)
        laws.equals_oracle(run, case)
        laws.gradients_equal_oracle(run, case)


@settings(max_examples=EXAMPLES, deadline=None)
@given(deep("any", 24))
def test_any_tree(case: Case) -> None:
    holds_everywhere(case)


@settings(max_examples=max(EXAMPLES // 2, 1), deadline=None)
@given(deep("any", 96))
def test_any_tree_of_many_tokens(case: Case) -> None:
    holds_everywhere(case)


@settings(max_examples=max(EXAMPLES // 2, 1), deadline=None)
@given(deep("linear", 96))
def test_sums_of_scans_of_many_tokens(case: Case) -> None:
    holds_everywhere(case)
