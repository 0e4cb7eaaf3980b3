"""What candidates are checked on: smaller than the workload, and with its pattern."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssdops.autotune.workload import Workload
from ssdops.trial import LONGEST_CHECK, MOST_ENTRIES, reduced

WORK = Workload("decay(log_a)", "forward", "float32", "float32", 1, 64, 4, 16, 16, 1, 1, 4, 0)


@given(
    st.sampled_from(["decay(log_a)", "channel_decay(channel)", "decay(log_a) * documents(documents)"]),
    st.integers(1, 9), st.integers(1, 20000), st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 3, 8, 16, 24]),
    st.sampled_from([1, 16, 128]), st.booleans(), st.sampled_from([0, 0, 64, 300]),
)  # fmt: skip
def test_a_reduced_workload(
    term: str, batch: int, seqlen: int, groups: int, each: int, dstate: int, shared_v: bool, every: int
) -> None:
    """Heads are shared as they were, by several wherever they were; there are several rows and groups where there were."""
    heads, documents = groups * each, 5 * batch if "documents" in term else 0
    work = replace(
        WORK, term=term, batch=batch, seqlen=seqlen, nheads=heads, q_heads=groups, k_heads=groups,
        v_heads=groups if shared_v else heads, dstate=dstate, documents=documents, state_every=every,
    )  # fmt: skip
    small = reduced(work)
    assert (small.term, small.headdim, small.dstate, small.state_every) == (term, work.headdim, dstate, every)
    assert small.batch == min(batch, 2) and small.documents <= documents and small.seqlen <= max(seqlen, 2 * every)
    assert small.q_heads == small.k_heads and small.nheads % small.q_heads == 0 and small.nheads % small.v_heads == 0
    assert (small.q_heads > 1) == (groups > 1) and (small.nheads > small.q_heads) == (each > 1)
    assert (small.v_heads == small.q_heads) == (shared_v or each == 1)
    channels = dstate if "channel" in term else 1
    entries = small.batch * small.nheads * small.seqlen**2 * channels
    assert entries <= MOST_ENTRIES or small.seqlen == 2 * every


@pytest.mark.parametrize("heads", [(2, 2), (16, 1), (32, 2)], ids=str)
def test_tokens_that_the_oracle_can_afford_stay(heads: tuple[int, int]) -> None:
    nheads, groups = heads
    work = replace(WORK, seqlen=9000, nheads=nheads, q_heads=groups, k_heads=groups, v_heads=nheads)
    assert reduced(work).seqlen == LONGEST_CHECK
