"""`check_mask`: a registered mask held to the laws that built-in ones keep, in one line.

    from ssdops.testing import check_mask

    def test_my_mask():
        check_mask(MyMask)

Operands are drawn by their axes; those whose names begin with `log` as log decays. A call that breaks a law is shrunk, and
printed as a program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ..backends import registry
from ..errors import RegistrationError, UnsupportedError
from ..ir import nodes as n
from ..masks import Mask
from ..plan import terms_of
from ..register import RegisteredMask
from . import laws, mask_laws, strategies
from .case import Case
from .drawn import combined, drawn
from .laws import Runner
from .oracle import magnitudes
from .snippet import program, rounded
from .source import Sizes, Source, problems

Step: TypeAlias = "tuple[str, Callable[[], object]]"
"""One check, as a line of a program and as what it does."""
Law: TypeAlias = Callable[["MaskCheck", Case], Iterator[Step]]
TORCH = ("naive", "chunked", "recurrent")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class MaskCheck:
    """What is checked, and how much of it.

    Attributes:
        kind: the registered mask.
        make: makes it with its operands from a `Source`; None draws them by their axes.
        backends: those to run on, where they can; None is every one of torch.
        examples: calls drawn for each law.
        ran: the backends that some call has run on.
    """

    kind: RegisteredMask
    make: Callable[[Source], Mask] | None = None
    backends: Sequence[str] | None = None
    examples: int = 20
    ran: set[str] = field(default_factory=set)

    def draw(self, s: Source) -> Mask:
        """The mask with drawn operands."""
        return drawn(self.kind, s) if self.make is None else self.make(s)

    def runners(self, case: Case) -> list[Runner]:
        """The backends that run a call."""
        terms = terms_of(case.mask.tree)
        names = TORCH if self.backends is None else self.backends
        able = [name for name in names if all(registry.get(name).supports(t, case.problem).ok for t in terms)]
        self.ran.update(able)
        return [Runner(name) for name in able]


def check_mask(
    kind: RegisteredMask,
    *,
    make: Callable[[Source], Mask] | None = None,
    backends: Sequence[str] | None = None,
    examples: int = 20,
) -> None:
    """Hold a registered mask to every law.

    Its text parses back; a block of its entries is a part of the whole; `lower` gives what `entries` says; every backend gives
    what the float64 oracle gives, forward and in every gradient, alone and under combinators, inside the one tolerance
    (`ssdops.testing.tolerance`); where the mask claims to be causal, later tokens change nothing.

    Args:
        kind: what `register_mask` made of a class.
        make: makes the mask from a `Source`, where operands drawn by their axes alone would have no meaning.
        backends: the names of those to run on; one that cannot run the mask at all is an error. None is every one of torch.
        examples: calls drawn for each law.

    Raises:
        AssertionError: a law is broken; the message holds the smallest call that was found, as a program.
        UnsupportedError: a backend that was named cannot run the mask.
    """
    if not isinstance(kind, RegisteredMask):
        raise RegistrationError(f"check_mask takes what register_mask made of a class, got {kind!r}")
    check = MaskCheck(kind, make, backends, examples)
    for name in LAWS:
        hold(check, name)
    if missing := set(backends or ()) - check.ran:
        raise UnsupportedError(f"{', '.join(sorted(missing))} cannot run {kind.name}; `explain` says why, or leave it out")


def hold(check: MaskCheck, name: str) -> None:
    """Hold a mask to one of `LAWS`."""
    law = LAWS[name]
    failing: list[tuple[Case, str, Exception]] = []

    @settings(
        max_examples=check.examples, deadline=None, database=None, derandomize=True, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        make = combined(check.draw) if law.combines else check.draw
        case = data.draw(strategies.cases(sizes=law.sizes(check), dtypes=law.dtypes, make=make))
        found = _failure([_evaluates(case)])
        if found is None:
            assume(all(size < 1e30 for size in magnitudes(case, False).values()))  # no dtype here holds what is much bigger
            found = _failure(law.steps(check, case))
        if found is not None:
            failing.append((case, *found))
            raise found[1]

    try:
        run()
    except Exception as error:
        if not failing:
            raise
        raise AssertionError(_told(law, check, name, *failing[-1])) from error


def _evaluates(case: Case) -> Step:
    """That the formula can be evaluated at all."""
    return "mask_laws.evaluates(case)", partial(mask_laws.evaluates, case)


def _failure(steps: Iterable[Step]) -> tuple[str, Exception] | None:
    """The first check that fails, and how."""
    for line, step in steps:
        try:
            step()
        except Exception as error:  # a formula may raise anything
            return line, error
    return None


def _told(law: Checked, check: MaskCheck, name: str, case: Case, line: str, error: Exception) -> str:
    """The message: what is broken, and a program that shows it, with round values if those show it too."""
    simpler = rounded(case)
    if (found := _failure([_evaluates(simpler), *law.steps(check, simpler)])) is not None:
        case, (line, error) = simpler, found
    lines = program(case, line).replace("\n", "\n    ")
    what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    return f"{check.kind.name}: {name!r} does not hold for {case.mask.tree}: {what}\n\nTo see it again:\n\n    {lines}\n"


# --- the laws -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A law and what it is checked on.

    Attributes:
        steps: the checks of a call.
        combines: whether the mask stands under combinators.
        max_seqlen, dtypes: of the calls; small ones, as a formula is wrong in a small call or in none.
    """

    steps: Law
    combines: bool = False
    max_seqlen: int = 16
    dtypes: Sequence[torch.dtype] = DTYPES

    def sizes(self, check: MaskCheck) -> st.SearchStrategy[Sizes]:
        """Sizes of calls; boundaries pack one batch row."""
        packed = n.BOUNDARIES in check.kind.definition.operands.values()
        return problems(max_seqlen=self.max_seqlen, max_dim=4, min_batch=int(packed), max_batch=1 if packed else 2)


def _of_mask(law: Callable[[Case], None]) -> Law:
    def steps(check: MaskCheck, case: Case) -> Iterator[Step]:
        yield f"mask_laws.{law.__name__}(case)", partial(law, case)

    return steps


def _on_backends(law: Callable[[Runner, Case], None]) -> Law:
    def steps(check: MaskCheck, case: Case) -> Iterator[Step]:
        for runner in check.runners(case):
            yield f'laws.{law.__name__}(laws.Runner("{runner.backend}"), case)', partial(law, runner, case)

    return steps


def _causality(check: MaskCheck, case: Case) -> Iterator[Step]:
    if check.kind.definition.causal:
        yield from _of_mask(mask_laws.claims_are_true)(check, case)
        yield from _on_backends(laws.causal)(check, case)


LAWS: dict[str, Checked] = {
    "text": Checked(_of_mask(mask_laws.text_is_the_mask), combines=True),
    "blocks": Checked(_of_mask(mask_laws.blocks_are_parts)),
    "lowering": Checked(_of_mask(mask_laws.lower_is_entries), dtypes=(torch.float64,)),
    "forward": Checked(_on_backends(laws.equals_oracle)),
    "gradients": Checked(_on_backends(laws.gradients_equal_oracle), max_seqlen=8),
    "combinators": Checked(_on_backends(laws.equals_oracle), combines=True),
    "causality": Checked(_causality),
}
"""By name, the cheap ones first."""
