"""Write docs/gallery.md and its pictures: `python docs/gallery.py`. What it says of a mask is read from the mask.

Formulas and sources are those of the constructors' docstrings, terms and costs those of the planner's normal form on `chunked`.
Pictures need matplotlib (`pip install ssdops[plot]`); the text alone does not.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ssdops import masks, named
from ssdops.backends import registry
from ssdops.ir.problem import fenwick_levels
from ssdops.masks import Mask
from ssdops.plan import growth_of, terms_of
from ssdops.plot import figure_of, save
from ssdops.plot_example import Example

HERE = Path(__file__).parent
PAGE, PICTURES = HERE / "gallery.md", HERE / "gallery"
T = 64
"""Tokens of every picture; one row, one head, and `log_a` and the like with values that make a readable one."""

HEAD = f"""\
# Gallery

Every mask of the table, and of the papers by name, at {T} tokens, one head. Left the matrix, on a logarithmic scale, grey
where it is 0. Right the terms of its normal form, each block with its rank: red runs inside a chunk by masked attention,
blue between chunks through states, orange in a band, purple by convolution, yellow by entries, green on the diagonal. Costs
are in the number of tokens T, on `chunked` where it runs the term, else on `naive`. Written by `python docs/gallery.py`.
"""


@dataclass(frozen=True)
class Entry:
    """A mask of the gallery: its name, the code that makes it, and whose docstring has the formula."""

    title: str
    code: str
    of: Callable[..., Mask]
    heads: int = 1


ENTRIES = (
    Entry("Causal", "masks.causal()", masks.causal),
    Entry("Full", "masks.full()", masks.full),
    Entry("Decay: Mamba-2", "masks.decay(log_a)", masks.decay),
    Entry("Retention", "masks.retention(log_gamma)", masks.retention),
    Entry("Packed documents", "masks.decay(log_a) * masks.documents(cu_seqlens)", masks.documents),
    Entry("Window", "masks.window(12, 4)", masks.window),
    Entry("Toeplitz", "masks.toeplitz(coeffs)", masks.toeplitz),
    Entry("Dense", "masks.dense(L)", masks.dense),
    Entry("Diagonal", "masks.diagonal(d)", masks.diagonal),
    Entry("Semiseparable of rank 2", "masks.semiseparable(log_a, b, c)", masks.semiseparable),
    Entry("Fenwick: log-linear attention", "masks.fenwick(log_a, levels)", masks.fenwick),
    Entry("Trapezoidal: Mamba-3", "masks.trapezoidal(log_a, beta, gamma)", masks.trapezoidal),
    Entry("Decay per channel: GLA, RWKV-6, Mamba-1", "masks.channel_decay(channels)", masks.channel_decay),
    Entry("Linear attention", "masks.linear_attention()", named.linear_attention),
    Entry("RetNet", "masks.retnet(1)", named.retnet),
    Entry("Lightning attention", "masks.lightning(8, layer=2, n_layers=12)", named.lightning, heads=8),
    Entry("Mamba-2 with dt", "masks.mamba2(dt, A)", named.mamba2),
    Entry("ALiBi without softmax's normaliser", "masks.alibi(8)", named.alibi, heads=8),
    Entry("mLSTM", "masks.mlstm(log_f, log_i)", named.mlstm),
    Entry("Quasiseparable: Hydra", "masks.quasiseparable(log_a, log_b, d)", named.quasiseparable),
    Entry("Sliding window with decay", "masks.sliding_window(12, log_a)", named.sliding_window),
)


def operands() -> dict[str, torch.Tensor]:
    """What the codes name."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    lag = torch.arange(2 * T - 1) - (T - 1)
    return {
        "log_a": -0.2 * uniform(1, T, 1), "log_b": -0.2 * uniform(1, T, 1), "log_gamma": torch.tensor([-0.08]),
        "cu_seqlens": torch.tensor([0, 23, 40, T]), "coeffs": ((lag / 3).cos() * (-lag.abs() / 12).exp())[None],
        "L": torch.randn(1, 1, T, T, generator=generator), "d": 0.5 + uniform(1, T, 1),
        "b": uniform(1, T, 1, 2), "c": uniform(1, T, 1, 2),
        "levels": uniform(1, T, 1, fenwick_levels(T)) * 0.75 ** torch.arange(fenwick_levels(T)), "beta": uniform(1, T, 1),
        "gamma": uniform(1, T, 1), "channels": -0.2 * uniform(1, T, 1, 1), "dt": 0.1 + 0.2 * uniform(1, T, 1),
        "A": torch.tensor([-0.5]),
        "log_f": -0.2 * uniform(1, T, 1), "log_i": uniform(1, T, 1) - 0.5,
    }  # fmt: skip


def made(entry: Entry, given: dict[str, torch.Tensor]) -> Mask:
    """The mask of an entry's code: calls of `masks` on names and numbers, joined by `*`."""
    found: Mask | None = None
    for name, text in re.findall(r"masks\.(\w+)\(([^()]*)\)", entry.code):
        parts = [part.split("=") for part in text.split(", ") if part]
        values = [given[part[-1]] if part[-1] in given else int(part[-1]) for part in parts]
        plain = [value for part, value in zip(parts, values, strict=True) if len(part) == 1]
        by_name = {part[0]: value for part, value in zip(parts, values, strict=True) if len(part) == 2}
        one = getattr(masks, name)(*plain, **by_name)
        found = one if found is None else found * one
    assert found is not None, entry.code
    return found


def section(entry: Entry, mask: Mask) -> str:
    """An entry's part of the page."""
    doc = inspect.getdoc(entry.of) or ""
    formula, source = doc.split("\n\n")[0], re.search(r"^Source: (.*?)(?:\n\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    lines = [f"## {entry.title}", "", f"```python\n{entry.code}\n```", "", " ".join(formula.split()), ""]
    lines += [f"{' '.join(source[1].split())}", ""] if source else []
    lines += ["| term | cost |", "| --- | --- |"]
    chunked, naive = registry.get("chunked"), registry.get("naive")
    for term in terms_of(mask.tree):
        backend = chunked if chunked.supports(term, None).ok else naive  # type: ignore[arg-type]  # of the term alone
        lines.append(f"| `{term.node()}` | O({growth_of(term, backend)}) |")
    head = f", head {entry.heads // 2} of {entry.heads}" if entry.heads > 1 else ""
    return "\n".join([*lines, "", f"![{entry.title}{head}](gallery/{slug(entry)}.png)", ""])


def slug(entry: Entry) -> str:
    """The name of an entry's picture."""
    return re.sub(r"[^a-z0-9]+", "_", entry.title.lower()).strip("_")


def page() -> str:
    """The whole page."""
    given = operands()
    return "\n".join([HEAD, *(section(entry, made(entry, given)) for entry in ENTRIES)])


def main() -> None:
    """Write the page and its pictures."""
    PAGE.write_text(page())
    PICTURES.mkdir(exist_ok=True)
    for entry in ENTRIES:
        mask = made(entry, operands())
        example = Example(mask.operands, T, nheads=entry.heads, head=entry.heads // 2)
        save(figure_of(mask.tree, example, small=True), PICTURES / f"{slug(entry)}.png")


if __name__ == "__main__":
    main()
