"""Which functions of transformers are exchanged, when, and that they come back; what is refused."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ssdops.compat.transformers import disable, enable, enabled, switch
from ssdops.compat.transformers.functions import REPLACEMENTS, called_by_mixers, convolution
from ssdops.errors import UnsupportedError

pytest.importorskip("transformers")


def functions(model: str) -> dict[str, object]:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return {name: getattr(module, name) for name in REPLACEMENTS}


@pytest.fixture
def own():
    """Every function of every model as transformers has it, which is also what a test must leave."""
    before = {model: functions(model) for model in switch.MODELS}
    yield before
    disable()
    assert {model: functions(model) for model in switch.MODELS} == before


def exchanged(own) -> set[str]:
    """The models all of whose functions are ours; none has some."""
    changed = {model: [functions(model)[name] is not own[model][name] for name in REPLACEMENTS] for model in own}
    assert all(all(flags) or not any(flags) for flags in changed.values())
    return {model for model, flags in changed.items() if all(flags)}


def test_enable_and_disable(own):
    assert exchanged(own) == set()
    enable()
    enable("bamba")  # it stays as it is
    assert exchanged(own) == set(switch.MODELS)
    disable("bamba")
    assert exchanged(own) == set(switch.MODELS) - {"bamba"}
    disable()
    disable()
    assert exchanged(own) == set()


def test_enabled_ends_as_it_began(own):
    enable("mamba2")
    with enabled("bamba"):
        assert exchanged(own) == {"mamba2", "bamba"}
        with enabled():
            assert exchanged(own) == set(switch.MODELS)
    assert exchanged(own) == {"mamba2"}
    with pytest.raises(ZeroDivisionError), enabled("zamba2"):
        _ = 1 / 0
    assert exchanged(own) == {"mamba2"}


@pytest.mark.parametrize("release", ["4.57.6", "5.15.1", "5.25.0", "6.0.0", "5.25.0.dev0", "five"])
def test_an_unknown_release_is_refused(own, monkeypatch, release):
    monkeypatch.setattr(metadata, "version", lambda name: release)
    with pytest.raises(UnsupportedError, match=f"transformers {release} is not .* >= 5.20, < 5.25"):
        enable()
    assert exchanged(own) == set()


def test_the_range_is_that_of_the_extra():
    first, after_last = (".".join(map(str, release)) for release in (switch.FIRST, switch.AFTER_LAST))
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'transformers = ["transformers>={first},<{after_last}"]' in project.splitlines()


def test_without_transformers(own, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UnsupportedError, match=r"not installed; install 'ssdops\[transformers\]'"):
        enable()


def test_a_model_that_is_none_of_these(own):
    with pytest.raises(UnsupportedError, match=r"'jamba': enable\(\) takes 'mamba2', 'bamba'"):
        enable("mamba2", "jamba")
    assert exchanged(own) == set()


def test_a_file_that_lacks_a_function(own, monkeypatch):
    module = importlib.import_module("transformers.models.zamba2.modeling_zamba2")
    with monkeypatch.context() as patch:
        patch.delattr(module, "mamba2_chunk_scan")
        with pytest.raises(UnsupportedError, match="zamba2 has no mamba2_chunk_scan"):
            enable()
    assert exchanged(own) == set()


def test_what_another_hand_put_there_is_not_overwritten(own, monkeypatch):
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    enable()
    with monkeypatch.context() as patch:
        patch.setattr(module, "mamba2_chunk_scan", len)
        with pytest.raises(UnsupportedError, match="mamba2_chunk_scan of transformers' mamba2 is no longer"):
            disable()
    assert exchanged(own) == set(switch.MODELS)


def test_packed_sequences_need_ids():
    with pytest.raises(UnsupportedError, match="told apart by seq_idx"):
        called_by_mixers(torch.nn.functional.silu)(torch.ones(3), cu_seqlens=torch.tensor([0, 3]))


def test_other_activations_after_packed_convolutions():
    x, weight, ids = torch.randn(1, 3, 5), torch.randn(3, 4), torch.zeros(1, 5, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="'silu', 'swish' or None after it, got 'gelu'"):
        convolution(len)(x, weight, activation="gelu", seq_idx=ids)
