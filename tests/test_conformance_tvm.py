"""The TVM backend keeps every law on LLVM, and says what it does not run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssdops import explain, masks, ssd
from ssdops.backends import registry
from ssdops.backends.tvm import backend, build
from ssdops.backends.tvm.backend import Tvm
from ssdops.backends.tvm.tile import Tile
from ssdops.errors import UnsupportedError
from ssdops.ir.problem import Problem, Target
from ssdops.ir.terms import Diagonal, Linear
from ssdops.testing import Conformance
from ssdops.testing.structures import Make

needs_tvm = pytest.mark.skipif(
    not backend.installed().ok, reason="TVM is not installed; torch backends keep the same laws without it"
)


@needs_tvm
@pytest.mark.tvm
class TestTvm(Conformance):
    backend = "tvm"
    kind = "scalar"
    every_multiple = 16
    chunk_sizes = (32, 16, 64)


def inputs(
    batch: int = 2, seqlen: int = 70, nheads: int = 4, groups: int = 2, headdim: int = 5, dstate: int = 7
) -> list[Tensor]:
    """q, k, v and log decays."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, seqlen, groups, dstate, generator=generator) for _ in range(2))
    v = torch.randn(batch, seqlen, nheads, headdim, generator=generator)
    return [q, k, v, -torch.rand(batch, seqlen, nheads, generator=generator)]


@needs_tvm
@pytest.mark.tvm
def test_one_program_serves_every_length_and_number_of_heads() -> None:
    """Gradients of another batch, length and number of heads and groups compile nothing; another padded size does."""
    from ssdops.backends.tvm.build import MADE

    def run(**sizes: int) -> int:
        q, k, v, log_a = (x.requires_grad_() for x in inputs(**sizes))
        ssd(q, k, v, masks.decay(log_a), backend="tvm").sum().backward()
        return len(MADE)

    compiled = run()
    assert run(batch=3, seqlen=131, nheads=6, groups=1) == compiled
    assert run(headdim=3, dstate=12) == compiled  # tiles of 16 hold them, too
    assert run(dstate=17) > compiled


AGAIN = """
import sys, torch
from ssdops import masks, ssd
x, log_a = torch.ones(1, 40, 2, 3), -torch.ones(1, 40, 2)
y = ssd(x, x, x, masks.decay(log_a), backend="tvm")
assert torch.allclose(y, ssd(x, x, x, masks.decay(log_a), backend="chunked"))
print("tvm" in sys.modules)
"""


@needs_tvm
@pytest.mark.tvm
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """It does not even import TVM. A kept program that is broken is made anew; where none can be kept, each process does it."""

    def run(directory: Path) -> tuple[str, str]:
        """Whether TVM was imported, and what was warned of."""
        environment = {**os.environ, "SSDOPS_CACHE_DIR": str(directory)}
        done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, env=environment)
        assert not done.returncode, done.stderr
        return done.stdout.strip(), done.stderr

    assert (run(tmp_path), run(tmp_path)) == (("True", ""), ("False", ""))
    kept = sorted((tmp_path / "tvm").iterdir())
    assert [path.name.split("-")[0] for path in kept] == ["lines", "outputs", "scores"]
    kept[0].write_bytes(b"no library")
    imported, warned = run(tmp_path)
    assert imported == "True" and "cannot be loaded, and is made anew" in warned
    assert run(tmp_path) == ("False", "")
    (tmp_path / "tvm").chmod(0o777)  # then what is there may be anybody's
    imported, warned = run(tmp_path)
    assert imported == "True" and "others can write there" in warned
    (tmp_path / "file").write_text("in the way")
    imported, warned = run(tmp_path / "file")
    assert imported == "True" and warned.count("compiled in every process") == 1


@needs_tvm
@pytest.mark.tvm
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_heads_together_says_the_same(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are walked together, and programs side by side, by how many share an operand and how many threads there are."""
    monkeypatch.setattr("ssdops.backends.tvm.threads.count", lambda: threads)
    for q_heads, k_heads, v_heads in ((1, 1, 12), (12, 12, 12), (2, 3, 12), (1, 2, 4), (1, 1, 1), (6, 1, 4), (12, 1, 6)):
        q, k, v, log_a = (x[:1] for x in inputs(nheads=12, groups=12, seqlen=300))
        leaves = [x.clone().requires_grad_() for x in (q[:, :, :q_heads], k[:, :, :k_heads], v[:, :, :v_heads], log_a)]

        def gradients(backend: str, leaves: list[Tensor] = leaves) -> tuple[Tensor, ...]:
            return torch.autograd.grad(ssd(*leaves[:3], masks.decay(leaves[3]), backend=backend).square().sum(), leaves)

        for x, y in zip(gradients("tvm"), gradients("chunked"), strict=True):
            assert (x - y).abs().max() <= 1e-5 * y.abs().max()


@needs_tvm
@pytest.mark.tvm
def test_gradients_of_what_was_not_saved() -> None:
    """Under a transform nothing is saved between the passes: the states that enter segments are worked out again."""
    from torch.func import grad

    q, k, v, log_a = inputs(seqlen=600)

    def loss(log_a: Tensor) -> Tensor:
        return ssd(q, k, v, masks.decay(log_a), backend="tvm").square().sum()

    leaf = log_a.clone().requires_grad_()
    saved = torch.autograd.grad(loss(leaf), leaf)[0]
    assert (grad(loss)(log_a) - saved).abs().max() <= 1e-6 * saved.abs().max()


@needs_tvm
@pytest.mark.tvm
@pytest.mark.parametrize("make", [masks.decay, lambda log_a: masks.decay(log_a).shift(1), lambda log_a: masks.decay(log_a).T])
def test_pairs_without_decay_do_not_drown_the_others(make: Callable[[Tensor], masks.Mask]) -> None:
    """Strong decays leave pairs a millionth of those that do not decay: gradients of log decays are right all the same."""
    q, k, v, log_a = inputs(seqlen=64)

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        leaf = (log_a - 15).to(dtype).requires_grad_()
        y = ssd(*(x.to(dtype) for x in (q, k, v)), make(leaf), backend=backend)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return torch.autograd.grad(y, leaf, weights)[0]

    found, wanted = gradient("tvm", torch.float32), gradient("naive", torch.float64)
    assert (found - wanted).norm() <= 2e-6 * wanted.norm()


@needs_tvm
@pytest.mark.tvm
def test_threads_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where programs run on TVM's threads torch has one, and as many as before afterwards, even if a pass fails."""
    from ssdops.backends.tvm import threads
    from ssdops.backends.tvm.threads import Alone

    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "of_torch", lambda: False)
    with Alone(CPU), Alone(CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError), Alone(CPU):
        raise RuntimeError
    assert torch.get_num_threads() == before


ON_THREADS = """
import sys, torch
from pathlib import Path
from ssdops import masks, ssd
from ssdops.backends.tvm import threads
if sys.argv[1] == "tvm":
    threads.of_torch = lambda: False
torch.set_num_threads(3)
x, log_a = torch.randn(2, 100, 6, 16), -torch.rand(2, 100, 6)
leaves = [x.requires_grad_(), log_a.requires_grad_()]
y = ssd(x, x, x, masks.decay(log_a), backend="tvm")
(y.square().sum()).backward()
found = [y.detach(), *(leaf.grad.clone() for leaf in leaves)]
for leaf in leaves:
    leaf.grad = None
y = ssd(x, x, x, masks.decay(log_a), backend="chunked")
y.square().sum().backward()
for a, b in zip(found, [y.detach(), *(leaf.grad for leaf in leaves)]):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
print("libtvm_runtime" in Path("/proc/self/maps").read_text())
"""


@needs_tvm
@pytest.mark.tvm
@pytest.mark.parametrize("whose", ["torch", "tvm"])
def test_whose_threads_programs_run_on(whose: str, tmp_path: Path) -> None:
    """Torch's, without TVM's runtime, where OpenMP can be called; else TVM's. A second process loads what the first kept."""
    from ssdops.backends.tvm import threads

    if not threads.of_torch():
        pytest.skip("OpenMP's entry is not there; conformance runs on TVM's threads then")
    for _ in range(2):
        environment = {**os.environ, "SSDOPS_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", ON_THREADS, whose]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert not done.returncode, done.stderr
    assert done.stdout.strip() == str(whose == "tvm")


@needs_tvm
@pytest.mark.tvm
def test_scores_lower_to_this_program() -> None:
    """The program of scores, read against an expected text: TVM prints it the same on every machine."""
    from ssdops.backends.tvm import lower

    text = lower.scores(Tile("cpu", "float32", "float32", 16, 32)).script()
    assert text.strip() == Path(__file__).with_name("tvm_scores.txt").read_text().strip()


@needs_tvm
@pytest.mark.tvm
def test_products_are_vectors() -> None:
    """On x86 products are fused multiply-adds of whole vectors, and nothing multiplies single numbers in them."""
    import platform

    import tvm

    from ssdops.backends.tvm import outputs, rules

    if platform.machine() != "x86_64":
        pytest.skip("looks at x86 assembly; conformance covers other processors")
    scheduled = rules.schedule(outputs.outputs(tile := Tile("cpu", "float32", "float32", 32, 128, 64, whole=True)), tile)
    built = tvm.compile(scheduled, target=tvm.target.Target({"kind": "llvm", "mcpu": "haswell"}))
    assembly = built.mod.inspect_source("asm")
    products = [line.split()[0] for line in assembly.splitlines() if line.strip().startswith("vfmadd")]
    fused = [line for line in assembly.splitlines() if "vfmadd" in line and "ps" in line and "ymm" in line]
    assert len(fused) >= 3 * 8 * 4  # three products, of eight sums in registers, four steps written out
    assert sum(name.endswith("ss") for name in products) < 10  # exp(E), once per chunk


CPU = torch.device("cpu")
PLAIN, PROBLEM = Linear(log_a="log_a"), Make().case(masks.decay(Make().log())).problem
BAD: dict[str, tuple[Linear | Diagonal, Callable[[Problem], Problem], str]] = {
    "device": (PLAIN, lambda p: replace(p, target=Target("mps")), "runs on CPUs and CUDA GPUs, and the tensors are on mps"),
    "capability": (PLAIN, lambda p: replace(p, target=Target("cuda", "T4", (7, 5))), "needs compute capability 8.0"),
    "channel": (Linear(channel="a"), lambda p: p, "per channel; 'chunked', 'recurrent' and 'naive' run it"),
    "headdim": (PLAIN, lambda p: replace(p, headdim=257), "headdim from 1 to 256, got 257; 'chunked' has no such limit"),
    "dstate": (PLAIN, lambda p: replace(p, dstate=300), "dstate from 1 to 256, got 300"),
    "every": (PLAIN, lambda p: replace(p, state_every=24), "state_every=24 is between them; 'chunked' has no such limit"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_it_does_not_run(name: str) -> None:
    """The reason says what does."""
    term, change, reason = BAD[name]
    support = Tvm().supports(term, change(PROBLEM))
    assert not support.ok and reason in support.reason


@pytest.mark.parametrize("versions", [{}, {"apache-tvm": "0.27.0.post1"}, {"apache-tvm": "0.28.0", "apache-tvm-ffi": "0.1.14"}])
def test_what_to_install(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM absent, without its FFI, or of another version: never an ImportError, and `ssd` says what to install."""

    def version(package: str) -> str:
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(backend, "version", version)
    backend.installed.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match=r"pip install 'ssdops\[tvm\]'"):
            q, k, v, log_a = inputs(seqlen=90 + len(versions))  # calls like one before are not planned again
            ssd(q, k, v, masks.decay(log_a), backend="tvm")
    finally:
        monkeypatch.undo()
        backend.installed.cache_clear()


def test_chunk_sizes_that_there_are() -> None:
    q, k, v, log_a = inputs()
    with pytest.raises(UnsupportedError, match="chunks of 16, 32, 64 tokens, and chunk_size=48"):
        ssd(q, k, v, masks.decay(log_a), backend="tvm", chunk_size=48)


def test_auto_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles for seconds, so "auto" says why it is not taken; planning imports no TVM."""
    monkeypatch.setenv("SSDOPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "MADE", {})
    q, k, v, log_a = inputs()
    (step,) = explain(q, k, v, masks.decay(log_a)).plan.steps
    assert step.backend != "tvm" and any(r.backend == "tvm" and "would compile" in r.reason for r in step.rejected)
    assert "tvm" in registry.names()
    if "tvm" not in sys.modules:
        Tvm().supports(PLAIN, PROBLEM)
        assert "tvm" not in sys.modules
