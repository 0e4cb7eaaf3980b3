"""The command line, as a user meets it: what it prints, what it draws, and how it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import registered  # noqa: F401  # whose masks are written by name below
import torch
from typer.testing import CliRunner, Result

from ssdops.backends import registry
from ssdops.backends.base import Output
from ssdops.backends.chunked import Chunked
from ssdops.cli import app
from ssdops.errors import UnsupportedError
from ssdops.ir.text import parse
from ssdops.plan import terms_of
from ssdops.plot import blocks, draw, example_of

SHAPE = ["--shape", "1,256,4,16,1,8"]
TEXT = "It is manifest that Light consists of Parts, both Successive and Contemporary."


def ssdops(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "140"})


def one_line_error(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_demo_runs_every_backend(text: Path) -> None:
    result = ssdops("demo", text, "--seqlen", 48)
    assert result.exit_code == 0, result.output
    assert "48 bytes of text.txt" in result.output
    assert "decay(log_a) [" in result.output and "WRONG" not in result.output
    for name in registry.names():
        assert f"\n {name} " in result.output
    assert "chosen by auto" in result.output


def test_demo_reads_the_text_that_ships() -> None:
    result = ssdops("demo", "--seqlen", 8, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "8 bytes of Newton's Opticks" in result.output


def test_demo_says_which_backend_is_wrong(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Chunked.forward

    def wrong(self, term, x, config, save=False):
        out = right(self, term, x, config, save)
        return replace(out, y=out.y + 1.0)

    monkeypatch.setattr(Chunked, "forward", wrong)
    result = ssdops("demo", text)
    assert result.exit_code == 1, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.split()}
    assert "WRONG" in lines["chunked"] and " ok " in lines["naive"]


def test_demo_does_not_pass_nan(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chunked, "forward", lambda self, term, x, config, save=False: Output(x.v.float() * torch.nan))
    assert ssdops("demo", text).exit_code == 1


def test_demo_gives_the_reason_of_a_backend_that_cannot(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssdops.backends.base import Support

    monkeypatch.setattr(Chunked, "supports", lambda self, term, problem: Support.no("it is Sunday"))
    result = ssdops("demo", text)
    assert result.exit_code == 0, result.output
    assert "it is Sunday" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["demo", "no/such/file"], "cannot read no/such/file: No such file"),
        (["demo", "."], "cannot read ."),
        (["demo", "--seqlen", "0"], "--seqlen must be at least 1"),
        (["demo", "--dtype", "int8"], "--dtype 'int8' is not one of float32"),
        (["demo", "--device", "abacus"], "--device 'abacus' is not a device"),
        (["demo", "--device", "meta"], "--device 'meta' cannot be used here"),
        (["explain", *SHAPE, "--mask", "decay(log_a"], "is not an expression"),
        (["explain", *SHAPE, "--mask=" + "-" * 990 + "causal()"], "nests"),
        (["explain", *SHAPE, "--mask", "__import__('os')"], "expected a mask"),
        (["explain", *SHAPE, "--mask", "window(1, -5)"], "is empty"),
        (["explain", *SHAPE, "--mask", "decay(x) + toeplitz(x)"], "give it two names"),
        (["explain", *SHAPE, "--mask", "causal().scale(rows=select(x, 0))"], "give rows a name"),
        (["explain", *SHAPE, "--mask", "causal()", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["explain", *SHAPE, "--mask", "dense(L)", "--backend", "chunked"], "cannot run dense(L)"),
        (["explain", *SHAPE, "--mask", "causal()", "--chunk-size", "0"], "chunk_size must be at least 1"),
        (["explain", *SHAPE, "--mask", "causal()", "--plot", "mask.pdf"], "must end in .png"),
        (["explain", *SHAPE, "--mask", "causal()", "--plot", "no/such/folder/mask.png"], "cannot write"),
        (["explain", "--shape", "1,256,4", "--mask", "causal()"], "six positive integers"),
        (["explain", "--shape", "1,0,4,16,1,8", "--mask", "causal()"], "six positive integers"),
        (["explain", "--shape", "1,256,4,16,3,8", "--mask", "causal()"], "must divide nheads=4"),
        (["explain", "--shape", "2,256,4,16,1,8", "--mask", "documents(cu) * causal()"], "batch must be 1"),
    ],
)
def test_errors_are_one_line_and_exit_2(args: list[str], message: str) -> None:
    assert message in one_line_error(ssdops(*args))


def test_demo_refuses_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert "is empty" in one_line_error(ssdops("demo", tmp_path / "empty"))


def test_explain_shows_passes_plan_and_rejections() -> None:
    result = ssdops("explain", "--shape", "1,4096,8,64,1,128", "--mask", "full() * decay(log_a) + dense(L)")
    assert result.exit_code == 0, result.output
    assert "nheads 8 (q 1, k 1, v 8)" in result.output
    for name in ("as written", "simplify", "expand", "distribute", "unchanged"):
        assert name in result.output
    assert "decay(log_a) + dense(L)" in result.output
    assert "taken" in result.output and "predicted slower" in result.output and "dense is not one here" in result.output


def test_explain_plans_for_a_device_that_is_not_here() -> None:
    result = ssdops("explain", "--shape", "8,65536,80,64,1,128", "--mask", "decay(log_a)", "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert "on cuda" in result.output


def test_explain_knows_the_shape_of_every_operand() -> None:
    masks = (
        "causal() + full() + decay(a) + retention(g) + window(3, 2) + toeplitz(c) + dense(L) + diagonal(d)",
        "semiseparable(a, b, c, rank=3) * documents(cu) + fenwick(a, l) + trapezoidal(a, beta, gamma)",
        "channel_decay(x) + channel_decay(dt=dt, A=A) + decay(a).scale(rows=u, cols=w, log_cols=z)",
        "decay(a) * documents(segment_ids=ids, n_segments=3) + zero()",
    )
    for mask in masks:
        result = ssdops("explain", *SHAPE, "--mask", mask)
        assert result.exit_code == 0, result.output


def test_explain_knows_registered_masks(tmp_path: Path) -> None:
    text = "their_ranks(g, b, c, rank=3) * their_documents(ids) + their_band(u, w, width=4)"
    result = ssdops("explain", *SHAPE, "--mask", text, "--plot", tmp_path / "mask.png")
    assert result.exit_code == 0, result.output
    assert "decay(g).scale(rows=select(c, 2)" in result.output.replace("\n", "") or "select(c, 2)" in result.output
    assert (tmp_path / "mask.png").stat().st_size > 1000


def test_explain_draws_the_mask(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    result = ssdops("explain", *SHAPE, "--mask", "decay(f) - decay(g).strict().T + diagonal(d)", "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    from matplotlib.image import imread

    pixels = torch.from_numpy(imread(path))[..., :3]
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    assert len(pixels.flatten(0, 1).unique(dim=0)) > 100


def test_blocks_off_the_diagonal_of_a_scan_have_rank_1() -> None:
    tree = parse("decay(f) + decay(g).strict().T * documents(cu) + diagonal(d)")
    example = example_of(tree, 64)
    causal, packed, diagonal = (list(blocks(example, term)) for term in terms_of(tree))
    assert len(causal) == 8 * 9 // 2
    for block in causal + packed:
        assert block.kind == ("quadratic" if block.rows == block.cols else "low rank")
        assert block.kind == "quadratic" or block.rank == 1
    assert 0 < len(packed) < len(causal)  # documents cut the blocks that would cross them
    assert {block.kind for block in diagonal} == {"diagonal"}


def test_a_rank_3_mask_has_blocks_of_rank_3() -> None:
    tree = parse("semiseparable(a, b, c, rank=3)")
    dense = example_of(tree, 64).matrix(tree)
    assert torch.linalg.matrix_rank(dense[32:, :32], rtol=1e-9) == 3


def test_drawing_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"pip install ssdops\[plot\]"):
        draw(parse("causal()"), 8, tmp_path / "mask.png")


def test_doctor_knows_versions_devices_and_backends() -> None:
    result = ssdops("doctor")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output and "cpu" in result.output
    for name in registry.names():
        assert f"\n {name} " in result.output


def test_version() -> None:
    import ssdops as package

    assert ssdops("--version").output == f"ssdops {package.__version__}\n"
