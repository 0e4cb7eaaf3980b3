"""`check_mask` passes what is right, and shows what is wrong by a small program that fails likewise."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from registered import KINDS, TheirDecay, TheirPowers

import ssdops.register
from ssdops import masks, operand, register_mask
from ssdops.errors import RegistrationError, UnsupportedError
from ssdops.ir import nodes as n
from ssdops.testing import check_mask
from ssdops.testing.drawn import drawn
from ssdops.testing.mask import LAWS, MaskCheck, hold

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), str(HERE.parent)])


@pytest.fixture(autouse=True)
def registrations_end_here(monkeypatch):
    monkeypatch.setattr(n, "REGISTERED", dict(n.REGISTERED))
    monkeypatch.setattr("ssdops.register._KNOWN", dict(ssdops.register._KNOWN))


@pytest.mark.filterwarnings("ignore:torch.searchsorted")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_masks_that_are_right_pass(kind):
    check_mask(kind, examples=5)


# --- what is wrong --------------------------------------------------------------------------------------------------


def decay_entries(self, i, j):
    sums = self.log_a.cumsum()
    return torch.where(i >= j, sums[i] - sums[j], 0.0).exp()


BROKEN = {
    "lower is shifted": (
        {"lower": lambda s: masks.decay(s.log_a).strict()},
        "lowering",
        r"decay\(log_a\)\.strict\(\), which is not what entries\(\) says at .*i=0, j=0",
    ),
    "lower is anticausal": ({"lower": lambda s: masks.decay(s.log_a).T}, "lowering", "which is not what entries"),
    "lower forgets a factor": ({"causal": True, "lower": lambda s: masks.decay(2.0 * s.log_a)}, "lowering", "i=1, j=0"),
    "entries depend on the block": (
        {"entries": lambda s, i, j: s.log_a[i] * (i == i[:1])},
        "blocks",
        "the block of rows",
    ),
    "entries are counted from the block": (
        {"entries": lambda s, i, j: s.log_a[i] * torch.arange(i.shape[0])[:, None]},
        "blocks",
        "the block of rows",
    ),
    "exp overflows where nothing is": (
        {"entries": lambda s, i, j: (999.0 * (j - i) + s.log_a[i]).exp(), "causal": True},
        "gradients",
        "log_a is off by inf",
    ),
    "no operation": ({"entries": lambda s, i, j: s.log_a * 2}, "blocks", "MaskError: log_a cannot be used before it is read"),
    "rounding": (
        {"entries": lambda s, i, j: decay_entries(s, i, j).float(), "lower": lambda s: masks.decay(s.log_a)},
        "lowering",
        "is allowed",
    ),
    "causal is only claimed": (
        {"causal": True, "lower": lambda s: masks.decay(s.log_a) + masks.decay(s.log_a).strict().T},
        "causality",
        "has entries above the diagonal",
    ),
}


COUNT = itertools.count()  # programs are remembered by their text, so a name is used once


def broken(body) -> ssdops.register.RegisteredMask:
    whole = {"log_a": operand("batch seqlen nheads"), "entries": decay_entries, "__module__": "__main__", **body}
    return register_mask(f"broken_{next(COUNT)}")(type("Broken", (), whole))


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_found(name):
    body, law, words = BROKEN[name]
    with pytest.raises(AssertionError, match=words) as told:
        hold(MaskCheck(broken(body)), law)
    assert "To see it again:" in str(told.value) and "# first the class" in str(told.value)


def test_every_law_but_text_can_fail():
    """A law that nothing breaks proves nothing; text and combinators follow from how nodes are made."""
    assert {law for _, law, _ in BROKEN.values()} >= set(LAWS) - {"text", "forward", "combinators"}


def test_a_wrong_backend_is_found(monkeypatch):
    from ssdops.backends.chunked import Chunked

    right = Chunked.forward

    def wrong(self, term, x, config, save=False):
        out = right(self, term, x, config, save)
        out.y = out.y * 1.001
        return out

    monkeypatch.setattr(Chunked, "forward", wrong)
    for law in ("forward", "combinators"):
        with pytest.raises(AssertionError, match=r'y is off by(.|\n)*laws.Runner\("chunked"\)'):
            hold(MaskCheck(TheirDecay, examples=60), law)


def test_the_smallest_example_is_shown():
    with pytest.raises(AssertionError) as told:
        hold(MaskCheck(broken(BROKEN["lower forgets a factor"][0])), "lowering")
    message = str(told.value)
    assert "entries() gives [[1.0, 0.0], [" in message  # two tokens are the fewest that show it
    assert "torch.tensor([[[" in message and message.count("\n") < 30


WRONG_MODULE = """
from ssdops import masks, operand, register_mask

@register_mask("wrong_window")
class WrongWindow:
    width = operand(int)

    def entries(self, i, j):
        return (i - j).abs() <= self.width

    def lower(self):
        return masks.window(self.width, self.width + 1)
"""


def run(*command: str, path: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)


def test_the_program_fails_as_the_message_says(tmp_path, monkeypatch):
    (tmp_path / "wrong_window.py").write_text(WRONG_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import wrong_window

    with pytest.raises(AssertionError) as told:
        check_mask(wrong_window.WrongWindow)
    head, program = str(told.value).split("To see it again:")
    lines = "\n".join(line.strip() for line in program.splitlines())
    again = run("-c", lines, path=f"{tmp_path}{os.pathsep}{PATH}")
    assert again.returncode == 1
    last = again.stderr.strip().splitlines()[-1]
    assert last.startswith("AssertionError: lower() gives window(") and last.removeprefix("AssertionError: ") in head
    del sys.modules["wrong_window"]


def test_the_plugin_makes_a_test_of_every_law(tmp_path):
    (tmp_path / "wrong_window.py").write_text(WRONG_MODULE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nssdops_masks = wrong_window:WrongWindow\n")
    options = ("-m", "pytest", "-p", "ssdops.pytest_plugin", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c")
    found = run(*options, str(tmp_path / "pytest.ini"), "--ssdops-mask", "registered:TheirLags", str(tmp_path), "-v",
                "-k", "text or lowering",
                path=f"{tmp_path}{os.pathsep}{PATH}")  # fmt: skip
    assert found.returncode == 1, found.stdout + found.stderr
    for law in ("text", "lowering"):
        assert f"registered:TheirLags::{law} PASSED" in found.stdout
    assert "wrong_window:WrongWindow::lowering FAILED" in found.stdout
    assert f"1 failed, 3 passed, {2 * len(LAWS) - 4} deselected" in found.stdout
    assert "mask_laws.lower_is_entries(case)" in found.stdout
    missing = run(
        *options, str(tmp_path / "pytest.ini"), "--ssdops-mask", "registered:Missing", path=f"{tmp_path}{os.pathsep}{PATH}"
    )
    assert missing.returncode == 4 and "'registered:Missing' is no registered mask" in missing.stdout + missing.stderr


def test_a_backend_that_is_named_must_run_it():
    with pytest.raises(UnsupportedError, match="chunked cannot run their_powers"):
        check_mask(TheirPowers, backends=("chunked",), examples=3)
    with pytest.raises(RegistrationError, match="what register_mask made of a class"):
        check_mask(masks.decay)


def test_operands_may_be_made_by_hand():
    seen = []

    def make(s):
        seen.append(drawn(TheirPowers, s))
        return seen[-1]

    check_mask(TheirPowers, make=make, examples=2)
    assert len(seen) >= len(LAWS)
