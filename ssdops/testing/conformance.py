"""The conformance suite: subclass it with a backend's name, and every law becomes a test.

    from ssdops.testing import Conformance

    class TestChunked(Conformance):
        backend = "chunked"
        kind = "scalar"

A mask of one's own is held to the same laws by giving `make_mask`, a function that makes it with its operands from a
`Source` (`ssdops.testing.source`); outside pytest, `check_backend(name)` runs everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import lcm
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from .. import masks
from ..ir import nodes as n
from ..ir.problem import FLOATS
from ..masks import Mask
from . import isolation, laws, strategies
from .case import Case, Unsliceable
from .laws import Runner
from .oracle import magnitudes
from .source import Draw, Sizes, Source, problems

Test = TypeVar("Test", bound=Callable[..., Any])
EXACT = (torch.float64, torch.float32)
_CHECKS = (
    HealthCheck.differing_executors,
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
)


def law(test: Test, share: float = 1.0) -> Any:
    """A test of drawn data that subclasses may inherit, of a share of the loaded hypothesis profile's examples."""
    examples = max(int(settings().max_examples * share), 1)
    drawn: Any = settings(deadline=None, suppress_health_check=_CHECKS, max_examples=examples)(given(data=st.data())(test))
    drawn.of = test
    return drawn


class Conformance:
    """The laws of `ssdops.testing.laws` on drawn calls.

    Attributes:
        backend: the backend's name, or "auto".
        kind: which masks it runs: "any", "linear" (sums of scans), or "scalar" (those without decay per channel).
        make_mask: a mask to test instead of that kind.
        has_states: whether make_mask's mask carries states.
        chunk_sizes: sizes that must all give the same; empty for a backend without chunks.
        every_multiple: what `state_every` is to be a multiple of; more than 1, of the chunk size too.
        row_bits: whether a row's bits are claimed not to depend on the rest of the batch.
        dtypes: of the inputs.
        rounds_operands: whether products are of operands in the inputs' dtype, weighted with decays and rounded (tensor cores).
        device: where calls run.
        share: of the profile's examples, how many to draw: less than 1 for what runs slowly.
    """

    backend: str = "auto"
    kind: str = "any"
    make_mask: Callable[[Source], Mask] | None = None
    has_states: bool = True
    chunk_sizes: Sequence[int] = ()
    every_multiple: int = 1
    row_bits: bool = True
    dtypes: Sequence[torch.dtype] = FLOATS
    rounds_operands: bool = False
    device: str = "cpu"
    share: float = 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "share" in cls.__dict__:
            for name in dir(cls):
                if (test := getattr(getattr(cls, name), "of", None)) is not None:
                    setattr(cls, name, law(test, cls.share))

    def runner(self, data: st.DataObject) -> Runner:
        """The backend, with a drawn chunk size if it has any."""
        return Runner(self.backend, data.draw(st.sampled_from(list(self.chunk_sizes))) if self.chunk_sizes else None)

    def draw(
        self,
        data: st.DataObject,
        *,
        make: Callable[[Source], Mask] | None = None,
        states: bool = False,
        sizes: st.SearchStrategy[Sizes] | None = None,
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> Case:
        """A call, on this suite's device; discarded where the output's dtype is too small for it."""
        make = type(self).make_mask or make
        allowed = [d for d in dtypes or self.dtypes if d in self.dtypes]
        case: Case = data.draw(strategies.cases(self.kind, make=make, states=states, sizes=sizes, dtypes=allowed))
        if states and not case.carried:
            assume(False)
        if case.problem.dtype == torch.float16:
            assume(all(size < 1e4 for size in magnitudes(case, bool(case.carried)).values()))
        case = replace(case, operands=case.problem.dtype) if self.rounds_operands else case
        return case.map(lambda _, x: x.to(self.device))

    # --- against the oracle -------------------------------------------------------------------------------------------

    @law
    def test_equals_oracle(self, data: st.DataObject) -> None:
        """Y and the states, in every dtype."""
        laws.equals_oracle(self.runner(data), self.draw(data))

    @law
    def test_gradients_equal_oracle(self, data: st.DataObject) -> None:
        """Gradients of everything, in every dtype."""
        case = self.draw(data, sizes=problems(max_seqlen=24, max_dim=6))
        laws.gradients_equal_oracle(self.runner(data), case)

    @law
    def test_scans_equal_oracle(self, data: st.DataObject) -> None:
        """One scan at a time, exactly: every direction, strictness and scale."""
        case = self.draw(data, make=_scan(self.kind), states=self.has_states, dtypes=EXACT)
        laws.equals_oracle(self.runner(data), case)
        laws.gradients_equal_oracle(self.runner(data), case)

    # --- with itself --------------------------------------------------------------------------------------------------

    @law
    def test_chunk_size_does_not_matter(self, data: st.DataObject) -> None:
        """Any two chunk sizes agree."""
        if self.chunk_sizes:
            size = data.draw(st.sampled_from(list(self.chunk_sizes)))
            case = self.draw(data, sizes=problems(max_dim=4, max_batch=1))
            laws.chunk_size_does_not_matter(self.runner(data), case, [size])

    @law
    def test_batch_order_does_not_matter(self, data: st.DataObject) -> None:
        """Rows are computed alike wherever they stand."""
        case = self.draw(data, sizes=problems(min_batch=1))
        laws.batch_order_does_not_matter(self.runner(data), case, self.row_bits)

    @law
    def test_deterministic(self, data: st.DataObject) -> None:
        """The same bits twice, and inputs untouched."""
        laws.deterministic(self.runner(data), self.draw(data, sizes=problems(max_seqlen=24, max_dim=5, max_batch=2)))

    @law
    def test_strides_do_not_matter(self, data: st.DataObject) -> None:
        """Any strides."""
        case = self.draw(data, dtypes=EXACT, sizes=problems(max_seqlen=24, max_dim=5, max_batch=2))
        laws.strides_do_not_matter(self.runner(data), case)

    @law
    def test_linear_in_v(self, data: st.DataObject) -> None:
        """Linear in v, exactly enough."""
        widest = (torch.float64,) if torch.float64 in self.dtypes else (torch.float32,)
        laws.linear_in_v(self.runner(data), self.draw(data, dtypes=widest))

    @law
    def test_causal(self, data: st.DataObject) -> None:
        """Later tokens change nothing before them."""
        laws.causal(self.runner(data), self.draw(data, make=_causal(self.kind, quadratic=self.kind == "any")))

    # --- states -------------------------------------------------------------------------------------------------------

    @law
    def test_split_and_carry(self, data: st.DataObject) -> None:
        """Parts with carried states are the whole, from the left and from the right."""
        if not self.has_states:
            return
        case = self.draw(data, states=True, dtypes=EXACT)
        cut = data.draw(st.integers(0, case.q.shape[1]))
        try:
            laws.split_and_carry(self.runner(data), case, cut)
        except Unsliceable:
            assume(False)

    @law
    def test_states_every_equal_prefixes(self, data: st.DataObject) -> None:
        """States between are those that prefixes leave."""
        if not self.has_states:
            return
        run, step = self.runner(data), self.every_multiple
        step = step if step == 1 else lcm(step, run.chunk_size or 1)
        sizes = problems(max_seqlen=24, max_dim=5, max_batch=2).map(lambda z: replace(z, seqlen=z.seqlen + step))
        case = self.draw(data, make=_causal(self.kind), states=True, sizes=sizes)
        packed = any(isinstance(node, n.Documents | n.Trapezoidal) for node in n.walk(n.lowered(case.mask.tree)))
        assume(not packed and all(term.causal for term in case.carried or ()))
        seqlen = case.q.shape[1]
        every = step * data.draw(st.integers(1, seqlen // step + 1))
        try:
            case = laws.part(case, 0, seqlen // every * every) if data.draw(st.booleans()) else case
            laws.states_every_equal_prefixes(run, case, every)
        except Unsliceable:
            assume(False)

    @law
    def test_state_equals_prefix(self, data: st.DataObject) -> None:
        """A state is the tokens that made it."""
        if not self.has_states:
            return
        case = self.draw(data, make=_scan(self.kind), states=True, dtypes=EXACT, sizes=problems(min_batch=1))
        assume(case.carried is not None and len({term.causal for term in case.carried}) == 1)
        try:
            laws.state_equals_prefix(self.runner(data), case)
        except Unsliceable:
            assume(False)

    @law
    def test_steps_equal_scan(self, data: st.DataObject) -> None:
        """Decoding equals the scan."""
        if not self.has_states:
            return
        case = self.draw(
            data,
            make=_causal(self.kind),
            states=True,
            dtypes=EXACT,
            sizes=problems(max_seqlen=12, max_dim=5, min_batch=1),
        )
        assume(case.q.shape[1] > 0 and all(term.causal for term in case.carried or ()))
        laws.steps_equal_scan(self.runner(data), case)

    # --- what must never meet -----------------------------------------------------------------------------------------

    @law
    def test_documents_equal_separate_runs(self, data: st.DataObject) -> None:
        """Packing changes nothing."""
        case, documents = self._packed(data)
        try:
            isolation.documents_equal_separate_runs(self.runner(data), case, documents)
        except Unsliceable:
            assume(False)

    @law
    def test_poison_stays_in_its_document(self, data: st.DataObject) -> None:
        """NaN and inf never cross documents."""
        case, documents = self._packed(data)
        isolation.poison_stays_in_its_document(self.runner(data), case, documents, data.draw(_POISON))

    @law
    def test_poison_stays_in_its_row(self, data: st.DataObject) -> None:
        """NaN and inf never cross batch rows."""
        case = self.draw(data, sizes=problems(max_seqlen=24, min_batch=2, max_batch=2, max_dim=5), dtypes=EXACT)
        isolation.poison_stays_in_its_row(self.runner(data), case, data.draw(_POISON))

    @law
    def test_poison_stays_in_its_head(self, data: st.DataObject) -> None:
        """NaN and inf never cross heads."""
        case = self.draw(data, sizes=problems(max_seqlen=24, min_batch=1, max_dim=5), dtypes=EXACT)
        isolation.poison_stays_in_its_head(self.runner(data), case, data.draw(_POISON))

    def _packed(self, data: st.DataObject) -> tuple[Case, Mask]:
        """A call without documents, and documents to pack it into."""
        kept: list[Mask] = []

        def make(s: Source) -> Mask:
            kept.append(s.documents(s.pick([True, False])))
            return _unpacked(self.kind)(s)

        case = self.draw(data, make=make, dtypes=EXACT, sizes=problems(max_seqlen=24, max_dim=5, min_batch=1, max_batch=2))
        documents = kept[-1] if kept else data.draw(_documents_for(case))
        return case, Mask(documents.tree, {name: x.to(self.device) for name, x in documents.operands.items()})


_POISON = st.sampled_from([float("nan"), float("inf"), float("-inf")])


def _scan(kind: str) -> Callable[[Source], Mask]:
    return lambda s: strategies.scan_mask(s, channel=kind != "scalar")


def _causal(kind: str, quadratic: bool = False) -> Callable[[Source], Mask]:
    def make(s: Source) -> Mask:
        if quadratic and s.chance(2):
            other = strategies.QUADRATIC[s.pick(["fenwick", "dense", "toeplitz"])](s)
            return other * (masks.window(3) if s.chance(2) else masks.decay(s.token_log()))
        return strategies.linear_mask(s, channel=kind != "scalar", backwards=False)

    return make


def _unpacked(kind: str) -> Callable[[Source], Mask]:
    """A mask without documents in it, of either direction."""

    def make(s: Source) -> Mask:
        if kind == "any" and s.chance(2):
            mask = strategies.QUADRATIC[s.pick(["window", "toeplitz", "dense"])](s)
            return mask * masks.decay(s.token_log()) if s.chance(2) else mask
        mask = strategies.linear_mask(s, kind != "scalar", backwards=False, states=False)
        return mask + strategies.scan_mask(s, kind != "scalar") if s.chance(2) else mask

    return make


@st.composite
def _documents_for(draw: Draw, case: Case) -> Mask:
    p = case.problem
    sizes = Sizes(p.batch, p.seqlen, p.nheads, p.headdim, p.dstate, p.q_heads, p.k_heads, p.v_heads)
    return Source(draw, sizes, torch.float32).documents()


def check_backend(name: str, kind: str = "any", **attributes: Any) -> None:
    """Hold a backend to every law, outside pytest.

    Args:
        name: the backend.
        kind: which masks it runs (`Conformance.kind`).
        attributes: further attributes of `Conformance`.

    Raises:
        AssertionError: a law is broken; hypothesis prints the smallest call it found.
    """
    suite = type("Suite", (Conformance,), {"backend": name, "kind": kind, **attributes})()
    for test in [t for t in dir(suite) if t.startswith("test_")]:
        getattr(suite, test)()
