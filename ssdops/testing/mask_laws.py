"""The laws that a registered mask keeps, besides those of `laws.py` that it shares with every mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir import nodes as n
from ..ir.evaluate import Scope, entries, evaluate
from ..ir.text import parse
from .absolute import absolute
from .case import Case
from .oracle import span
from .tolerance import assert_close, tolerance

EXACT = torch.float64


def evaluates(case: Case) -> None:
    """The formula gives entries of a shape that fits."""
    _dense(case)


def text_is_the_mask(case: Case) -> None:
    """The text parses back to an equal tree with an equal hash."""
    tree = case.mask.tree
    again = parse(str(tree))
    assert again == tree and hash(again) == hash(tree), f"{tree} parses back to {again}"


def blocks_are_parts(case: Case) -> None:
    """Entries of some rows and columns, in any order, are those of the whole: what a formula gives depends on i and j alone."""
    p, tree = case.problem, case.mask.tree
    whole = _dense(case)
    tokens = torch.arange(p.seqlen, device=case.q.device)
    allowed = tolerance(EXACT, EXACT, 1, _most(case))
    for i, j in ((tokens[p.seqlen // 2 :], tokens), (tokens, tokens[:1]), (tokens.flip(0)[::2], tokens[1:].flip(0))):
        value, support = entries(tree, Scope(case.mask.operands, p.batch, p.seqlen, p.nheads, i, j))
        part = torch.where(support, value, 0.0)
        part = part.expand(p.batch, p.nheads, len(i), len(j), part.shape[-1])
        assert_close(part, whole[:, :, i][:, :, :, j], allowed, f"the block of rows {i.tolist()} and columns {j.tolist()}")


def lower_is_entries(case: Case) -> None:
    """`lower` is the matrix that `entries` gives (vacuous without one)."""
    p, tree = case.problem, case.mask.tree
    other = n.lowered(tree)
    if other == tree:
        return
    want, found = _dense(case), evaluate(other, case.mask.operands, p.batch, p.seqlen, p.nheads)
    found = (found if found.ndim == 5 else found[..., None]).expand_as(want)
    most = _most(case)
    allowed = tolerance(EXACT, EXACT, max(p.seqlen, 1), most, span(case) * most)
    wrong = torch.where(((want - found).abs() <= allowed).logical_not())
    if len(wrong[0]):
        place = tuple(int(at[0]) for at in wrong)
        axes = ", ".join(f"{name}={at}" for name, at in zip(("batch", "head", "i", "j", "channel"), place, strict=True))
        raise AssertionError(
            f"lower() gives {other}, which is not what entries() says at {axes}: {found[place]:.6g} and not {want[place]:.6g}, "
            f"where {allowed:.3g} is allowed; entries() gives {_shown(want, place)}, lower() {_shown(found, place)}"
        )


def claims_are_true(case: Case) -> None:
    """A mask that is said to be causal has no entry above the diagonal, whichever way it is written."""
    p = case.problem
    above = torch.ones(p.seqlen, p.seqlen, dtype=torch.bool, device=case.q.device).triu(1)
    dense = evaluate(n.lowered(case.mask.tree), case.mask.operands, p.batch, p.seqlen, p.nheads)
    dense = dense if dense.ndim == 4 else dense.abs().sum(4)
    assert not (dense * above).any(), f"{n.lowered(case.mask.tree)} has entries above the diagonal, and says that it is causal"


def _dense(case: Case) -> Tensor:
    p = case.problem
    dense = evaluate(case.mask.tree, case.mask.operands, p.batch, p.seqlen, p.nheads)
    return dense if dense.ndim == 5 else dense[..., None]


def _most(case: Case) -> float:
    """The greatest entry on absolute values."""
    p, big = case.problem, absolute(case).case.mask
    dense = evaluate(big.tree, big.operands, p.batch, p.seqlen, p.nheads)
    return float(dense.detach().abs().max()) if dense.numel() else 0.0


def _shown(dense: Tensor, place: tuple[int, ...]) -> str:
    """The matrix around a place, in full if it is small."""
    b, h, _, _, c = place
    rows = dense[b, h, :, :, c].detach()
    return str([[float(f"{x:.4g}") for x in row] for row in rows.tolist()]) if rows.numel() <= 64 else "a bigger matrix"
