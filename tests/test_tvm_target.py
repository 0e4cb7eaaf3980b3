"""A target of the user's for CPUs: what it may look like, and what is refused."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ssdops.backends.tvm import backend
from ssdops.errors import ConfigError

pytestmark = [
    pytest.mark.tvm,
    pytest.mark.skipif(not backend.installed().ok, reason="TVM is not installed, and it knows targets"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86"),
]


@pytest.mark.parametrize(
    "text", ["llvm -mcpu=x86-64", "llvm -mcpu=x86-64 -mattr=-sse3", '{"kind": "llvm", "mcpu": "x86-64"}', "llvm"]
)
def test_targets(text: str) -> None:
    from ssdops.backends.tvm import targets

    target = targets.of_user(text)
    assert target.kind.name == "llvm" and ("x86-64" in text) == (target.attrs["mcpu"] == "x86-64")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("llvm -mcpu=pdp11", "knows no processor 'pdp11'"),
        ("nonsense", 'kind "nonsense" is not defined'),
        ("cuda", "it is for cuda"),
        ("llvm -colour=red", "option 'colour'"),
        ("llvm mcpu=x86-64", "'mcpu=x86-64' is no -option=value"),
        ("llvm -fast", "'-fast' is no -option=value"),
        ('{"kind": "llvm"', "no JSON"),
    ],
)
def test_what_tvm_does_not_know(text: str, reason: str) -> None:
    """The message has what was given, why not, and one that is right."""
    from ssdops.backends.tvm import targets

    with pytest.raises(ConfigError, match="llvm -mcpu=x86-64-v3") as refusal:
        targets.of_user(text)
    assert f"SSDOPS_TVM_TARGET={text}" in str(refusal.value) and reason in str(refusal.value)


def test_what_this_processor_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than an illegal instruction."""
    from ssdops.backends.tvm import targets

    monkeypatch.setattr(targets, "processor_flags", lambda: frozenset({"fma"}))
    with pytest.raises(ConfigError, match=r"this processor has no .*avx2"):
        targets.of_user("llvm -mcpu=x86-64-v3")


RUN = """
import torch
from ssdops import masks, ssd
x = torch.ones(1, 40, 1, 4)
assert torch.allclose(ssd(x, x, x, masks.window(3), backend="tvm"), ssd(x, x, x, masks.window(3), backend="naive"))
"""


def test_a_target_is_compiled_for(tmp_path: Path) -> None:
    """Programs of a target are kept apart; a wrong one ends the call with its reason."""

    def run(target: str) -> str:
        environment = {**os.environ, "SSDOPS_CACHE_DIR": str(tmp_path), "SSDOPS_TVM_TARGET": target}
        done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=environment)
        return done.stderr if done.returncode else ""

    assert not run("llvm -mcpu=x86-64") and len(list((tmp_path / "tvm").iterdir())) == 1
    assert "ConfigError: SSDOPS_TVM_TARGET=llvm -mcpu=pdp11" in run("llvm -mcpu=pdp11")
    assert not run("") and len(list((tmp_path / "tvm").iterdir())) == 2
