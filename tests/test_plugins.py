"""What other packages add: backends by a call, masks and backends by entry points; and what is said of those that fail."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from typer.testing import CliRunner

import ssdops
import ssdops.register
from ssdops import explain, masks, plugins, register_backend, ssd
from ssdops.backends import registry
from ssdops.backends.naive import Naive
from ssdops.cli import app
from ssdops.errors import ParseError, RegistrationError, UnknownBackendError, UnsupportedError
from ssdops.ir import nodes as n
from ssdops.ir.text import parse

Q = torch.randn(1, 5, 2, 3, generator=torch.Generator().manual_seed(0))

MASKS = """
import torch
from ssdops import masks, operand, register_mask

@register_mask("plugged")
class Plugged:
    log_gamma = operand("nheads")
    causal = True

    def entries(self, i, j):
        return torch.where(i >= j, self.log_gamma * (i - j), 0.0).exp()

    def lower(self):
        return masks.retention(self.log_gamma)
"""
BACKEND = """
from ssdops.backends.naive import Naive

class Doubler(Naive):
    name = "doubler"

    def forward(self, term, x, config, save=False):
        out = super().forward(term, x, config, save)
        out.y = 2 * out.y
        return out
"""
POINTS = """
[ssdops.masks]
plugged = their_ssdops_masks:Plugged
broken_mask = their_ssdops_broken:Missing
empty_mask = their_ssdops_backend:Doubler

[ssdops.backends]
doubler = their_ssdops_backend:Doubler
broken_backend = their_ssdops_broken:Missing
no_backend = their_ssdops_masks:torch
"""


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    monkeypatch.setattr(registry, "_added", {})
    monkeypatch.setattr(n, "REGISTERED", dict(n.REGISTERED))
    monkeypatch.setattr("ssdops.register._KNOWN", dict(ssdops.register._KNOWN))
    registry.get.cache_clear()
    plugins.forget()
    parse.cache_clear()
    yield
    registry.get.cache_clear()
    plugins.forget()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A distribution with entry points, some of which cannot be imported."""
    (tmp_path / "their_ssdops_masks.py").write_text(MASKS)
    (tmp_path / "their_ssdops_backend.py").write_text(BACKEND)
    (tmp_path / "their_ssdops_broken.py").write_text("raise RuntimeError('out of order')\n")
    info = tmp_path / "their_ssdops-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-ssdops\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    plugins.forget()
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("their_ssdops")]:
        del sys.modules[name]


# --- by entry points ------------------------------------------------------------------------------------------------


def test_a_mask_is_imported_when_its_name_is_read(package):
    assert "their_ssdops_masks" not in sys.modules
    mask = parse("plugged(log_gamma) * window(left=2, right=0)")
    assert str(mask) == "plugged(log_gamma) * window(left=2, right=0)"
    log_gamma = torch.tensor([-0.3, -0.1])
    found = ssd(Q, Q, Q, ssdops.Mask(parse("plugged(g)"), {"g": log_gamma}))
    assert torch.equal(found, ssd(Q, Q, Q, masks.retention(log_gamma)))


def test_explain_on_the_command_line_knows_it(package):
    result = CliRunner().invoke(app, ["explain", "--shape", "1,64,2,4,1,4", "--mask", "plugged(g)"])
    assert result.exit_code == 0, result.output
    assert "plugged(g)" in result.output and "decay(g)" in result.output


def test_a_backend_is_imported_when_it_is_named(package):
    assert {"doubler", "broken_backend", "no_backend"} <= set(registry.names())
    expected = ssd(Q, Q, Q, masks.full() * masks.window(3))
    assert "their_ssdops_backend" not in sys.modules  # "auto" imports nothing
    assert torch.allclose(ssd(Q, Q, Q, masks.window(3), backend="doubler"), 2 * expected)


def test_auto_says_where_a_backend_comes_from(package):
    (step,) = explain(Q, Q, Q, masks.causal()).plan.steps
    reasons = {r.backend: r.reason for r in step.rejected}
    assert "the entry point their_ssdops_backend:Doubler" in reasons["doubler"]
    assert "only where it is named" in reasons["broken_backend"]


def test_what_fails_is_named_and_skipped(package):
    with pytest.raises(ParseError, match=r"mask 'broken_mask' is an entry point .*: RuntimeError: out of order"):
        parse("broken_mask(x)")
    with pytest.raises(ParseError, match=r"'empty_mask' is an entry point .* it registers no mask of that name"):
        parse("empty_mask(x)")
    with pytest.raises(UnsupportedError, match=r"their_ssdops_broken:Missing\) cannot be used: .*out of order.*able: .*naive"):
        ssd(Q, Q, Q, masks.causal(), backend="broken_backend")
    with pytest.raises(UnsupportedError, match="is module, no class"):
        ssd(Q, Q, Q, masks.causal(), backend="no_backend")
    assert ssd(Q, Q, Q, masks.causal()).shape == Q.shape


def test_doctor_lists_them(package):
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    lines = {tuple(line.split()[:2]): line for line in result.output.splitlines() if line.strip()}
    assert "yes: their_ssdops_masks:Plugged" in lines["plugged", "ssdops.masks"]
    assert "no: their_ssdops_broken:Missing: RuntimeError: out of order" in lines["broken_mask", "ssdops.masks"]
    assert "registers no mask of that name" in lines["empty_mask", "ssdops.masks"]
    assert "yes" in lines["doubler", "ssdops.backends"]
    assert "out of order" in lines["broken_backend", "ssdops.backends"]
    assert "cannot be used" in lines["broken_backend", "cpu"] and "yes" in lines["doubler", "cpu"]


def test_importing_ssdops_imports_no_plugin(package):
    code = textwrap.dedent("""
        import sys, torch
        from ssdops import masks, ssd
        x = torch.ones(1, 3, 1, 1)
        ssd(x, x, x, masks.causal())
        assert not [name for name in sys.modules if name.startswith("their_ssdops")]
    """)
    path = ":".join([str(package), *filter(None, sys.path)])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path, "PATH": ""})


# --- by a call ------------------------------------------------------------------------------------------------------


class Plain(Naive):
    name = "plain"


def test_a_registered_backend_runs_where_it_is_named():
    register_backend("plain", Plain)
    x = Q.clone().requires_grad_()
    y = ssd(x, Q, Q, masks.causal(), backend="plain")
    y.sum().backward()
    assert torch.equal(y, ssd(Q, Q, Q, masks.causal(), backend="naive")) and x.grad.abs().sum() > 0
    (step,) = explain(Q, Q, Q, masks.causal()).plan.steps
    assert "register_backend(…, auto=True)" in {r.backend: r.reason for r in step.rejected}["plain"]


def test_auto_weighs_it_if_it_is_told_to():
    class Free(Naive):
        name = "free"

        def work(self, term, problem, config, direction="forward"):
            return type(super().work(term, problem, config))(0.0, 0.0, 0.0, 0.0)

    register_backend("free", Free, auto=True)
    assert [step.backend for step in explain(Q, Q, Q, masks.causal()).plan.steps] == ["free"]


def test_bad_backends_are_refused():
    register_backend("plain", "tests_have_no_such_module:Plain")
    with pytest.raises(RegistrationError, match=r"'plain' is tests_have_no_such_module:Plain already, and .*Plain cannot take"):
        register_backend("plain", Plain)
    with pytest.raises(UnsupportedError, match="ModuleNotFoundError"):
        ssd(Q, Q, Q, masks.causal(), backend="plain")
    for name, target, words in (
        ("auto", Plain, "other than 'auto'"),
        ("a b", Plain, "identifier"),
        ("short", "module", 'expected a class or "module:Class"'),
        ("empty", dict, "lacks supports, configs, work, forward, backward"),
    ):
        with pytest.raises(RegistrationError, match=words):
            register_backend(name, target)
    with pytest.raises(UnknownBackendError, match="plain, or 'auto'"):
        ssd(Q, Q, Q, masks.causal(), backend="abacus")
