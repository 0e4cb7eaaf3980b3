"""The committed support matrix: what each backend runs, compared with what it says, and really run.

`python tests/test_support_matrix.py > support_matrix.txt` writes it anew (see the table's header); nobody passes by
refusing, as a cell that changes from yes to no is a change of that file.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from ssdops import ssd, ssd_step
from ssdops.backends import registry
from ssdops.errors import UnsupportedError
from ssdops.ir import nodes as n
from ssdops.plan import terms_of
from ssdops.testing.case import Case, token
from ssdops.testing.structures import STRUCTURES, Make

TABLE = Path(__file__).with_name("support_matrix.txt")
TARGETS = {"naive": "cpu", "recurrent": "cpu", "chunked": "cpu", "triton": "cpu", "tvm": "cpu"}
"""Backend → the device type that its columns are about; Triton's kernels are interpreted there (`conftest.py`)."""
DIRECTIONS = ("forward", "backward", "step", "states", "every")
DTYPES = {"d": torch.float64, "s": torch.float32, "b": torch.bfloat16, "h": torch.float16}
HEADER = """\
# What each backend runs. Written by: python tests/test_support_matrix.py > tests/support_matrix.txt
# A cell lists dtypes of q, k, v and the operands: d float64, s float32, b bfloat16, h float16; - is none.
# forward: Y. backward: gradients of q, k, v, operands. step: ssd_step. states: initial and final ones, and gradients.
# every: the states after every 16 tokens.
"""


@lru_cache
def case_of(structure: str, dtype: str, device: str, seqlen: int = 6) -> Case:
    make = Make(seqlen=seqlen, dtype=DTYPES[dtype], device=device)
    return make.case(STRUCTURES[structure](make))


def says(structure: str, backend: str, direction: str, dtype: str) -> bool:
    """What the backend's `supports` and the mask's own structure say, without running anything."""
    step, every = direction == "step", direction == "every"
    case = case_of(structure, dtype, TARGETS[backend], 1 if step else 6)
    problem = replace(case.problem, state_every=16) if every else case.problem
    runs = all(registry.get(backend).supports(term, problem).ok for term in terms_of(case.mask.tree))
    if direction in ("forward", "backward"):
        return runs
    if isinstance(case.mask.tree, n.Trapezoidal):
        return runs and not every
    if case.carried is None:
        return False
    documents = any(isinstance(node, n.Documents) for node in n.walk(case.mask.tree))
    return runs and not ((step or every) and (documents or not all(term.causal for term in case.carried)))


def attempt(structure: str, backend: str, direction: str, dtype: str) -> None:
    """Run the smallest case of a cell, and look at what comes out."""
    case = case_of(structure, dtype, TARGETS[backend], 33 if direction == "every" else 6)
    learnt = direction not in ("forward", "every")
    leaves = {name: x.detach().clone().requires_grad_(learnt) for name, x in case.floats().items()}
    call = case.map(lambda name, x: leaves.get(name, x))
    if direction == "step":
        q, k, v = (x[:, 0] for x in (call.q, call.k, call.v))
        y, _ = ssd_step(q, k, v, token(call.mask, 0), None, backend=backend)
    elif direction == "states":
        _, first = ssd(call.q, call.k, call.v, call.mask, backend=backend, return_state=True)
        y, last = ssd(call.q, call.k, call.v, call.mask, backend=backend, initial_state=first, return_state=True)
        finals = last if isinstance(last, tuple) else (last,)
        y = y.sum() + sum(s.sum() for s in finals)
    elif direction == "every":
        y, _, every = ssd(call.q, call.k, call.v, call.mask, backend=backend, state_every=16)
        for states in every if isinstance(every, tuple) else (every,):
            assert states.shape[:2] == (1, 2) and torch.isfinite(states).all()
    else:
        y = ssd(call.q, call.k, call.v, call.mask, backend=backend)
    assert torch.isfinite(y).all()
    if direction in ("backward", "states"):
        y.sum().backward()
        for name, x in leaves.items():
            if name not in ("q", "k", "v") or direction == "backward":
                assert x.grad is not None and torch.isfinite(x.grad).all(), name


def cell(structure: str, backend: str, direction: str) -> str:
    return "".join(d for d in DTYPES if says(structure, backend, direction, d)) or "-"


def written() -> str:
    """The whole table, from what backends say."""
    rows = [("structure", "backend", "device", *DIRECTIONS)]
    for structure in STRUCTURES:
        for backend, device in TARGETS.items():
            cells = (cell(structure, backend, direction) for direction in DIRECTIONS)
            rows.append((structure.replace(" ", "_"), backend, device, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return HEADER + "\n".join(lines) + "\n"


def committed() -> dict[tuple[str, str], dict[str, str]]:
    """(structure, backend) → direction → dtypes, as committed."""
    lines = [line.split() for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    return {(row[0], row[1]): dict(zip(lines[0][3:], row[3:], strict=True)) for row in lines[1:]}


def test_table_is_what_backends_say() -> None:
    """No backend may gain or lose anything without the table saying so."""
    assert TABLE.read_text() == written(), "the table is not what backends say; its header says how to renew it"


def test_every_backend_is_in_the_table() -> None:
    assert set(registry.names()) == set(TARGETS)


@pytest.mark.parametrize("backend", TARGETS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_cells_hold(structure: str, backend: str) -> None:
    """Each yes runs; each no is an UnsupportedError that says why, and names who can if anyone can.

    Of what Triton interprets, which is slow, one dtype runs, another from structure to structure.
    """
    if TARGETS[backend] == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    table, row, turn = committed(), structure.replace(" ", "_"), list(STRUCTURES).index(structure)
    interpreted = backend == "triton" and TARGETS[backend] == "cpu"
    for direction in DIRECTIONS:
        able_in = table[row, backend][direction]
        for dtype in DTYPES:
            if dtype in able_in:
                if not interpreted or dtype == able_in[turn % len(able_in)]:
                    attempt(structure, backend, direction, dtype)
                continue
            with pytest.raises(UnsupportedError) as refusal:
                attempt(structure, backend, direction, dtype)
            able = [b for b in TARGETS if dtype in table[row, b][direction]]
            assert len(str(refusal.value)) > 20
            assert not able or any(name in str(refusal.value) for name in able), f"{refusal.value} names none of {able}"


if __name__ == "__main__":
    print(written(), end="")
