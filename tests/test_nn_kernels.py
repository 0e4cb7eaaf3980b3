"""The kernels beside the scan, compiled for GPUs that are not here: wide loads and stores, and registers that suffice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import ssdops

TOKENS, WIDTH = 16, 4
ROWS = {"conv": (TOKENS + WIDTH - 1, TOKENS), "conv_gradients": (2 * TOKENS + 3 * (WIDTH - 1), TOKENS)}
"""Of a block of tokens: those that are read and written, each by one instruction."""


@pytest.mark.slow
def test_compiled_for_sm_80_and_sm_90_they_are_lean() -> None:
    script = Path(__file__).with_name("nn_ptx.py")
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(ssdops.__file__).parents[1])}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert {fact["kernel"] for fact in facts} == {
        "conv", "conv_gradients", "window_gradients", "windows_after", "conv_step", "gated_norm", "gated_norm_gradients",
        "places", "discretize", "discretize_gradients", "gated_skip", "gated_skip_gradients",
    }  # fmt: skip
    for fact in facts:
        # what may spill is rare: learning that reaches back into a window, wide taps, and the widest rows of models
        rare = fact["kernel"] == "conv_gradients" and (fact["window"] or fact["width"] > WIDTH)
        rare |= fact["kernel"] == "gated_norm_gradients" and fact["channels"] > 4096
        assert fact["spilt"] <= (320 if rare else 0), fact
        if fact["kernel"] in ROWS and fact["width"] == WIDTH:
            loads, stores = ROWS[fact["kernel"]]
            assert fact["wide loads"] >= loads and fact["wide stores"] >= stores, fact
        if "norm" in fact["kernel"]:
            vectors = -(-fact["channels"] // 4096)  # of eight numbers each, for a thread
            back = fact["kernel"] == "gated_norm_gradients"
            assert fact["wide loads"] >= (4 if back else 3) * vectors, fact
            assert fact["wide stores"] >= (3 if back else 1) * vectors, fact
        if "skip" in fact["kernel"]:
            back = fact["kernel"] == "gated_skip_gradients"
            assert fact["wide loads"] >= (8 if back else 6) and fact["wide stores"] >= (6 if back else 2), fact
