"""A picture of `ssdops bench`: time against length, a line for each backend, rings around what "auto" takes.

Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UnsupportedError, ValueRangeError

if TYPE_CHECKING:
    from .cli_bench import Bench

COLORS = ("#2e86ab", "#d1495b", "#edae49", "#3d7a57", "#7d5ba6", "#666666")
MARKERS = "osD^vP"


def require(path: Path) -> None:
    """What can be known before anything is measured.

    Raises:
        UnsupportedError: matplotlib is not installed.
        ValueRangeError: the path is not a PNG's.
    """
    if path.suffix.lower() != ".png":
        raise ValueRangeError(f"--plot writes a PNG, so its name must end in .png, got {path}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UnsupportedError("drawing needs matplotlib, which is not installed: pip install 'ssdops[plot]'") from None


def draw(found: Bench, path: Path) -> None:
    """Write the picture.

    Raises:
        What `require` raises.
        ValueRangeError: the file cannot be written.
    """
    require(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, by_length) in enumerate(found.seconds.items()):
        times = [1e3 * seconds for seconds in by_length.values()]
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        axes.plot(list(by_length), times, label=name, linewidth=1.8, markersize=5, color=color, marker=marker)
    taken = [(t, found.seconds[name][t]) for t, name in found.chosen.items() if name and t in found.seconds.get(name, {})]
    if taken:
        lengths, times = [t for t, _ in taken], [1e3 * seconds for _, seconds in taken]
        axes.scatter(
            lengths, times, s=150, facecolors="none", edgecolors="black", linewidths=1.4, zorder=5, label="taken by auto"
        )
    axes.set(xscale="log", yscale="log", xlabel="seqlen", ylabel="ms")
    axes.set_title(found.title, fontsize=9)
    axes.set_xticks(found.seqlens, minor=False)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueRangeError(f"cannot write {path}: {error.strerror or error}") from None
