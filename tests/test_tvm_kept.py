""" "auto" takes `tvm` on a CPU where a call would find its programs compiled, and tells so without compiling or loading any."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssdops import config, explain, masks, ssd
from ssdops.autotune.choose import Candidate, Choice, why_not
from ssdops.backends.base import Config
from ssdops.backends.tvm import build, kept, scan
from ssdops.backends.tvm.backend import Tvm
from ssdops.backends.tvm.tile import Tile
from ssdops.ir import nodes as n
from ssdops.ir.problem import Target
from ssdops.ir.terms import Diagonal, Linear
from ssdops.steps import Step

pytestmark = pytest.mark.tvm
IS_KEPT = kept._is_kept  # before any fixture


@pytest.fixture(autouse=True)
def needs_tvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm_ffi")
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(build, "MADE", {})


def tensors(mask: str, dtype: torch.dtype = torch.float32, learnt: bool = False) -> tuple[Tensor, Tensor, Tensor, masks.Mask]:
    q, v = torch.randn(2, 70, 1, 24).to(dtype), torch.randn(2, 70, 4, 16).to(dtype)
    x = torch.rand(2, 70, 4)
    made = {
        "decay": lambda: masks.decay(-x),
        "causal": masks.causal,
        "scaled": lambda: masks.decay(-x).scale(rows=x, log_cols=x),
        "anticausal": lambda: masks.decay(-x).T,
        "packed": lambda: masks.decay(-x) * masks.documents(segment_ids=torch.zeros(2, 70, dtype=torch.int32), n_segments=1),
    }[mask]()
    return q, q, v.requires_grad_(learnt), made


def step(**options: Any) -> Step:
    (found,) = explain(*tensors("decay"), **options).plan.steps
    return found


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", ["decay", "causal", "scaled", "anticausal", "packed"])
def test_it_knows_what_a_call_would_call(mask: str, dtype: torch.dtype, learnt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, given = tensors(mask, dtype, learnt)
    with build.collecting() as called:
        y = ssd(q, k, v, given, backend="tvm", chunk_size=16)
        if learnt:
            y.sum().backward()
    asked: set[object] = set()
    monkeypatch.setattr(kept, "_is_kept", lambda *program: asked.add(program) or True)
    found = explain(q, k, v, given)
    (one,) = found.plan.steps
    direction = "backward" if learnt else "forward"
    assert Tvm().ready(one.term, found.problem, Config(16), direction).ok
    asked.clear()
    assert isinstance(one.term, Linear)
    assert kept.are_kept(one.term, found.problem, Config(16), direction)
    assert asked == set(called)


class Asked(Exception):
    """Raised in place of compiling."""


@pytest.mark.parametrize("mask", ["decay", "packed"])
def test_what_learns_compiles_both_passes_at_once(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what does not, the same programs of a forward pass and no more."""
    asked: list[set[object]] = []

    def make(wanted: Iterable[tuple[str, Tile]]) -> None:
        asked.append(set(wanted))
        raise Asked

    monkeypatch.setattr(build, "make", make)
    monkeypatch.setattr(scan, "_known", {})
    for learnt in (False, True):
        with pytest.raises(Asked):
            ssd(*tensors(mask, learnt=learnt), backend="tvm", chunk_size=16)
    with build.collecting() as called:
        ssd(*tensors(mask, learnt=True), backend="tvm", chunk_size=16).sum().backward()
    forward, both = asked
    assert both == set(called) > forward
    assert {name for name, _ in forward} == {"lines", "scores", "outputs"}


IMPORT = """
import time, torch
from ssdops.backends.tvm import build
mine, all_of_it = time.thread_time(), time.process_time()
build._compiler()
print((time.thread_time() - mine) / (time.process_time() - all_of_it))
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="errors of TVM read symbols elsewhere in other ways, or not at all")
def test_tvm_is_imported_by_two_threads() -> None:
    """In processor time, of which a busy machine has no less: where one thread does it all, its share is 1."""
    pytest.importorskip("tvm")
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.75


def test_states_between_need_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[object] = set()
    monkeypatch.setattr(kept, "_is_kept", lambda *program: asked.add(program) or True)
    found = explain(*tensors("decay"), state_every=32)
    with build.collecting() as called:
        ssd(*tensors("decay"), state_every=32, return_state=True, backend="tvm", chunk_size=16)
    asked.clear()
    (one,) = found.plan.steps
    assert isinstance(one.term, Linear) and kept.are_kept(one.term, found.problem, Config(16), "forward")
    assert asked == set(called)


def test_auto_weighs_it_once_its_programs_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    before = step()
    assert before.backend == "chunked"
    assert {r.backend: r.reason for r in before.rejected}["tvm"].startswith("would compile for seconds at its first call")
    monkeypatch.setattr(kept, "_is_kept", lambda name, tile: tile.chunk == 16)
    assert (step().backend, step().config, step().origin) == ("tvm", Config(16), "model")


def test_a_program_is_there_if_its_file_is_and_nobody_else_can_have_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_is_kept", IS_KEPT)
    found = explain(*tensors("decay"))
    term = found.plan.steps[0].term
    assert isinstance(term, Linear)
    with build.collecting() as called:
        ssd(*tensors("decay"), backend="tvm", chunk_size=16)
    (tmp_path / "tvm").mkdir(mode=0o700)
    for name, tile in called:
        assert not kept.are_kept(term, found.problem, Config(16), "forward")
        build.place(name, tile).touch()
    assert kept.are_kept(term, found.problem, Config(16), "forward")
    assert not kept.are_kept(term, found.problem, Config(32), "forward")
    assert not kept.are_kept(term, found.problem, Config(16), "backward")
    (tmp_path / "tvm").chmod(0o777)
    assert not kept.are_kept(term, found.problem, Config(16), "forward")
    monkeypatch.setattr(build, "MADE", dict.fromkeys(called))
    assert kept.are_kept(term, found.problem, Config(16), "forward")


def test_on_a_gpu_it_is_taken_by_measurements_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_is_kept", lambda name, tile: True)
    found = explain(*tensors("decay"), target=Target("cuda", "a GPU", (9, 0)))
    (one,) = found.plan.steps
    assert "on GPUs it runs where it was measured" in Tvm().ready(one.term, found.problem, Config(64), "forward").reason
    assert Tvm().ready(Diagonal(None), found.problem, Config(), "forward").ok
    assert isinstance(one.term.node(), n.Node) and one.backend != "tvm"


def test_the_reason_is_that_of_the_configuration_that_could_be_taken() -> None:
    able, unable = Candidate("tvm", Config(64), 3.0), Candidate("tvm", Config(32), 1.0, "would compile")
    taken = Candidate("chunked", Config(32), 2.0)
    assert dict(why_not(Choice(taken, "model"), [taken, unable, able]))["tvm"].startswith("predicted slower: 3e+03 ms")
    assert dict(why_not(Choice(taken, "model"), [taken, unable]))["tvm"] == "would compile"
