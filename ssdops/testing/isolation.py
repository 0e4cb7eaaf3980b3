"""The laws of what must never meet: documents, and with them batch rows and heads, NaN and inf included."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..ir import nodes as n
from ..ir.resolve import document_spans
from ..masks import Mask
from . import oracle
from .case import Case
from .laws import Runner, part, rows_of, state_rows, twice
from .tolerance import assert_close


def documents_equal_separate_runs(run: Runner, case: Case, documents: Mask) -> None:
    """A packed batch gives what each of its documents gives alone."""
    case = replace(case, initial=())
    packed = replace(case, mask=case.mask * documents)
    out, allowed = run(packed, states=False)["y"], twice(oracle.output_bounds(packed, False))["y"]
    for row, tokens in _documents(case, documents):
        alone = rows_of(part(case, tokens.start, tokens.stop), [row])
        assert_close(run(alone, states=False)["y"][0], out[row, tokens], allowed, f"y of row {row}, {tokens}")


def _documents(case: Case, documents: Mask) -> list[tuple[int, slice]]:
    assert isinstance(documents.tree, n.Documents)
    spans = document_spans(documents.tree, documents.operands, *case.q.shape[:2])
    return [(s.row, slice(s.start, s.stop)) for s in spans]


def poison_stays_in_its_document(run: Runner, case: Case, documents: Mask, value: float) -> None:
    """q, k and v of every second document that are NaN or inf change no document between."""
    case = replace(case, mask=case.mask * documents, initial=())
    out, allowed = run(case, states=False)["y"], twice(oracle.output_bounds(case, False))["y"]
    spans = [(row, tokens) for row, tokens in _documents(case, documents) if tokens.stop > tokens.start]
    for poisoned in (spans[::2], spans[1::2]) if len(spans) > 1 else ():
        q, k, v = (x.clone() for x in (case.q, case.k, case.v))
        for x in (q, k, v):
            for row, tokens in poisoned:
                x[row, tokens] = value
        got, expected = run(replace(case, q=q, k=k, v=v), states=False)["y"].clone(), out.clone()
        for row, tokens in poisoned:
            got[row, tokens] = expected[row, tokens] = 0
        assert_close(got, expected, allowed, f"y outside {poisoned}")


def poison_stays_in_its_row(run: Runner, case: Case, value: float) -> None:
    """A batch row that is NaN or inf, operands and states included, changes no other row."""
    batch = case.q.shape[0]
    if batch < 2:
        return
    out, allowed = run(case), twice(oracle.output_bounds(case, bool(case.carried)))

    def poison(name: str, x: Tensor) -> Tensor:
        per_token = x.ndim >= 3 and x.is_floating_point() and x.shape[:2] == case.q.shape[:2]
        own = per_token or (name.startswith("initial") and x.shape[0] == batch)
        return x if not own else torch.cat([torch.full_like(x[:1], value), x[1:]])

    got = run(case.map(poison))
    rows = list(range(1, batch))
    for name, x in got.items():
        assert_close(state_rows(x, rows, batch), state_rows(out[name], rows, batch), allowed[name], f"{name} of the other rows")


def poison_stays_in_its_head(run: Runner, case: Case, value: float) -> None:
    """A head of v, or of a log decay with a head for each, that is NaN or inf changes no other head."""
    p = case.problem
    out, allowed = run(case), twice(oracle.output_bounds(case, bool(case.carried)))
    targets = {"v": 2}
    for name, x in case.mask.operands.items():
        if name.startswith("log_a") and x.ndim == 3:
            targets[name] = 2
    for target, axis in targets.items():

        def poison(name: str, x: Tensor, target: str = target, axis: int = axis) -> Tensor:
            if name != target:
                return x
            x = x.clone()
            x.select(axis, 0).fill_(value)
            return x

        hit = dict(case.tensors())[target].shape[axis]
        others = slice(p.nheads // hit, None)
        for name, x in run(case.map(poison)).items():
            heads = (slice(None), slice(None), others) if name == "y" else (slice(None), others)
            assert_close(x[heads], out[name][heads], allowed[name], f"{name} of heads untouched by {target}")
