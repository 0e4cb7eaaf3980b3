"""The gallery says what masks are, and `Mask.plot` draws the mask that it is asked for."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from ssdops import masks
from ssdops.errors import ShapeError, UnsupportedError, ValueRangeError
from ssdops.plan import terms_of
from ssdops.plot import blocks
from ssdops.plot_example import Example, own_operands

DOCS = Path(__file__).parents[1] / "docs"
GALLERY = runpy.run_path(str(DOCS / "gallery.py"))


def test_the_page_is_up_to_date() -> None:
    assert GALLERY["page"]() == (DOCS / "gallery.md").read_text(), "write it anew with: python docs/gallery.py"


def test_every_mask_is_in_it_with_a_picture() -> None:
    shown = {name for entry in GALLERY["ENTRIES"] for name in [entry.of.__name__]}
    assert shown == (set(masks.__all__) - {"Mask"}) | set(masks.NAMED)
    pictures = {path.stem: path for path in (DOCS / "gallery").iterdir()}
    assert pictures.keys() == {GALLERY["slug"](entry) for entry in GALLERY["ENTRIES"]}
    assert sum(path.stat().st_size for path in pictures.values()) < 500_000


def test_plot_draws_the_row_and_head_that_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log_a = -torch.rand(2, 24, 3)
    mask = masks.decay(log_a) * masks.window(5)
    figure = mask.plot(tmp_path / "mask.png", row=1, head=2)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    shown = figure.subfigs[0].axes[0].images[0].get_array().filled(0.0)
    sums = log_a[1, :, 2].double().cumsum(0)
    expected = (sums[:, None] - sums).exp().tril().triu(-5)
    torch.testing.assert_close(torch.from_numpy(shown), expected)


@pytest.mark.parametrize(
    "mask",
    [
        masks.channel_decay(-torch.rand(2, 9, 3, 4)),
        masks.channel_decay(dt=torch.rand(1, 9, 2), A=-torch.rand(2, 5)),
        masks.toeplitz(torch.rand(2, 17)),
        masks.dense(torch.rand(9, 9)),
        masks.decay(-torch.rand(3)) * masks.documents(torch.tensor([0, 4, 9])),
    ],
    ids=str,
)
def test_sizes_are_those_of_the_operands(mask: masks.Mask) -> None:
    found = own_operands(mask, None, 0, 0)
    assert found.seqlen == 9 and found.matrix(mask.tree).shape == (9, 9)


def test_blocks_of_a_fenwick_mask_have_rank_one_off_the_diagonal() -> None:
    mask = masks.fenwick(-torch.rand(1, 64, 1), 0.5 + torch.rand(1, 64, 1, 7))
    (term,) = terms_of(mask.tree)
    found = list(blocks(Example(mask.operands, 64), term))
    assert {block.kind for block in found} == {"quadratic", "levels"} and len(found) == 36
    assert all(block.rank == 1 for block in found if block.kind == "levels")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.plot(seqlen=9), ShapeError, "have 24 tokens"),
        (lambda m: m.plot(head=3), ShapeError, "head 3"),
        (lambda m: m.plot("mask.pdf"), ValueRangeError, "must end in .png"),
        (lambda m: masks.causal().plot(seqlen=5000), ValueRangeError, "at most 2048"),
    ],
)
def test_mistakes_are_named(call, error, words) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(error, match=words):
        call(masks.decay(torch.zeros(1, 24, 3)))


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"pip install ssdops\[plot\]"):
        masks.causal().plot(seqlen=8)
