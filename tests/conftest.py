"""Hypothesis profiles, `default` (fast, always the same) and `thorough`; Triton's interpreter where there is no GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

os.environ.setdefault("SSDOPS_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "ssdops"))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported, as its decorator looks at it

settings.register_profile(
    "default",
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
settings.register_profile("thorough", max_examples=600, derandomize=False, deadline=None, print_blob=True)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """What other tests have compiled does not change what "auto" takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssdops.backends.tvm.kept._is_kept", lambda name, tile: False)
        yield


@pytest.fixture
def nothing_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, nothing tuned, and no warning given yet."""
    from ssdops import config
    from ssdops.autotune import store, tuner
    from ssdops.backends import registry

    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(config, "triton_interpreted", lambda: False)
    for module in (store, tuner):
        monkeypatch.setattr(module, "_told", set())
    monkeypatch.setattr(tuner, "_done", set())
    store.forget()
    yield
    store.forget()
    registry.get.cache_clear()
