"""What masks cost on a GPU beside a plain decay of the same size: `PYTHONPATH=. python benchmarks/gpu_structures.py`.

Each figure is the time of a forward pass, or of both passes with gradients of q, k, v and all of the mask's operands, over
that of a plain decay on the same q, k and v just before it, in bfloat16, by the backends that "auto" takes; and of a user's
formula over the same mask built in, both by the tile kernels. Toeplitz masks are timed by FFT and by tiles, and "auto" is held
to the faster. A side that raises says so in its figure. Exits with status 1 if a target is missed. `--device cpu --tiny` tries
the script out where there is no GPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from device import Machine, Row, reason
from mamba2_work import SHAPES, draw, ssd_inputs, tiny
from measure import environment
from report import Figure, Section, print_figure, write_json
from rich.console import Console
from torch import Tensor
from workload import Inputs, Shape

from ssdops import explain, masks, operand, register_mask, ssd
from ssdops.ir.problem import fenwick_levels
from ssdops.masks import Mask

RESULTS = Path(__file__).parent / "results" / "gpu_structures.json"
DIRECTIONS = ("forward", "forward + backward")
WINDOW, NARROW, DOCUMENT = 512, 64, 512
S1, S3, S4 = (SHAPES[name] for name in ("S1", "S3", "S4"))
LONG = Shape(1, 65536, 32, 64, 1, 128)
"""The shape of log-linear attention."""
Make = Callable[[Inputs], Mask]


@register_mask("benchmarked_decay")
class Formula:
    """A decay as a user would write it, by its entries alone."""

    log_a = operand("batch seqlen nheads")
    causal = True

    def entries(self, i: Tensor, j: Tensor) -> Tensor:
        """exp of the sum of logs between j and i."""
        sums = self.log_a.cumsum()
        return (sums[i] - sums[j]).exp()


@register_mask("benchmarked_tanh")
class NoProduct:
    """A formula that is no product of factors: each entry is worked out by itself, in float64."""

    u = operand("batch seqlen nheads")
    w = operand("batch seqlen nheads")
    causal = True

    def entries(self, i: Tensor, j: Tensor) -> Tensor:
        """tanh(u_i w_j / 2)."""
        return torch.tanh(self.u[i] * self.w[j] / 2)


@dataclass(frozen=True)
class Case:
    """A mask, the one that it is measured against, and how many times as long it may take, if that is asked."""

    name: str
    shape: Shape
    make: Make
    target: float | None
    than: Make
    backend: str = "auto"


def plain(x: Inputs) -> Mask:
    """Mamba-2's mask."""
    return masks.decay(x.log_a)


def retention(x: Inputs) -> Mask:
    """A decay per head, about as strong."""
    return masks.retention(x.log_a.mean((0, 1)))


def documents(x: Inputs) -> Mask:
    """Documents of any length, packed into one row, with as many tokens as all rows together."""
    rows, seqlen, nheads = x.log_a.shape
    tokens, device = rows * seqlen, x.log_a.device
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[: tokens // DOCUMENT - 1] + 1
    boundaries = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([tokens])])
    return masks.decay(x.log_a.reshape(1, tokens, nheads)) * masks.documents(boundaries.to(device, torch.int32))


def bidirectional(x: Inputs) -> Mask:
    """A decay of its own from each side."""
    return masks.decay(x.log_a) + masks.decay(0.7 * x.log_a).strict().T


def trapezoidal(x: Inputs) -> Mask:
    """Mamba-3's, with β / a as its parameters give it."""
    share = torch.linspace(0.1, 0.9, x.log_a.shape[2], device=x.log_a.device).expand_as(x.log_a)
    return masks.trapezoidal(x.log_a, gamma=share.contiguous(), beta_over_a=(1 - share).contiguous())


def window(x: Inputs, width: int = WINDOW) -> Mask:
    """A decay that forgets at once what is further back."""
    return masks.sliding_window(width - 1, x.log_a)


def narrow(x: Inputs) -> Mask:
    """The same, of so few tokens that it runs by pairs."""
    return window(x, NARROW)


def log_linear(x: Inputs) -> Mask:
    """Log-linear attention: a weight for each level."""
    levels = fenwick_levels(x.log_a.shape[1])
    generator = torch.Generator(x.log_a.device).manual_seed(0)
    weights = torch.rand(*x.log_a.shape, levels, device=x.log_a.device, generator=generator)
    return masks.fenwick(x.log_a, weights)


def traced(x: Inputs) -> Mask:
    """The same as a narrow `window`, by the user's formula: both run by pairs."""
    return Formula(x.log_a) * masks.window(NARROW - 1)


def no_product(x: Inputs) -> Mask:
    """A narrow window of a formula that is no product."""
    return NoProduct(x.log_a, x.log_a) * masks.window(NARROW - 1)


def toeplitz(x: Inputs) -> Mask:
    """A weight for each lag, either way."""
    generator = torch.Generator(x.log_a.device).manual_seed(0)
    seqlen, nheads = x.log_a.shape[1:]
    return masks.toeplitz(torch.randn(nheads, 2 * seqlen - 1, device=x.log_a.device, generator=generator))


CASES = (
    Case("retention", S1, retention, 1.1, plain),
    Case(f"documents of {DOCUMENT} tokens", S1, documents, 1.15, plain),
    Case("bidirectional", S1, bidirectional, 2.2, plain),
    Case("trapezoidal", S1, trapezoidal, 1.25, plain),
    Case(f"decay in a window of {WINDOW}", S3, window, 1.5, plain),
    Case(f"a traced decay in a window of {NARROW}, against one built in", S4, traced, 1.3, narrow, "triton"),
    Case("a formula that is no product in that window, against the traced decay", S4, no_product, None, traced, "triton"),
    Case("log-linear attention", LONG, log_linear, 4.0, plain),
)
CONVOLUTIONS = tuple(
    Shape(1, seqlen, 8, headdim, 1, dstate)
    for seqlen, headdim, dstate in ((65536, 1, 1), (65536, 4, 4), (65536, 16, 16), (8192, 1, 1), (8192, 4, 4), (8192, 64, 64))
)
"""Shapes of Toeplitz masks."""
BY_FFT, BY_TILES = "chunked", "triton"
REGRET = 1.15


def figures(machine: Machine, wanted: Sequence[str]) -> Iterator[Figure]:
    """Each case forward, then forward and backward."""
    for case in CASES:
        if wanted and not any(word in case.name for word in wanted):
            continue
        shape = tiny(case.shape) if machine.tiny else case.shape
        inputs = ssd_inputs(draw(shape, machine))
        backend = case.backend if machine.cuda else "auto"
        for direction in DIRECTIONS:
            row, runs_by = Row(), ""
            for name, make in (("against", case.than), ("this", case.make)):
                row.measure(name, "ms", partial(_ms, machine, make, inputs, backend, direction))
                machine.free()
            try:
                runs_by = ", by " + backends(case.make, inputs, backend)
            except Exception as error:
                row.notes["plan"] = reason(error)
            title = f"{case.name} {shape} {direction}{runs_by}"
            yield Figure(title, row.ratio("this ms", "against ms"), "×", "at most", case.target, row.parts, row.notes)


def convolutions(machine: Machine, wanted: Sequence[str]) -> Iterator[Figure]:
    """Toeplitz masks by FFT, by tiles and by what "auto" takes, over the faster of the two."""
    name = "a Toeplitz mask"
    if wanted and not any(word in name for word in wanted):
        return
    for shape in map(tiny, CONVOLUTIONS) if machine.tiny else CONVOLUTIONS:
        inputs = ssd_inputs(draw(shape, machine))
        for direction in DIRECTIONS:
            row = Row()
            for by, backend in (("FFT", BY_FFT), ("tiles", BY_TILES), ("auto", "auto")):
                row.measure(by, "ms", partial(_ms, machine, toeplitz, inputs, backend, direction))
                machine.free()
            least = min((row.parts[x] for x in ("FFT ms", "tiles ms") if row.parts.get(x) is not None), default=None)
            ratio = None if least is None or row.parts.get("auto ms") is None else row.parts["auto ms"] / least
            title = f"{name} {shape} {direction}, by {backends(toeplitz, inputs, 'auto')}, over the faster way"
            yield Figure(title, ratio, "×", "at most", REGRET, row.parts, row.notes)


def backends(make: Make, inputs: Inputs, backend: str) -> str:
    """Which backends run a mask forward."""
    mask, x = _call_of(make, inputs)
    steps = explain(x.q, x.k, x.v, mask, backend=backend).plan.steps
    return " and ".join(dict.fromkeys(step.backend for step in steps))


def _call_of(make: Make, x: Inputs) -> tuple[Mask, Inputs]:
    """The mask, and the inputs as it has them: in one row, where the mask's operands are."""
    mask = make(x)
    if any(not t.is_floating_point() for t in mask.operands.values()):  # packed
        x = Inputs(*(t.flatten(0, 1)[None] for t in x))
    return mask, x


def _ms(machine: Machine, make: Make, inputs: Inputs, backend: str, direction: str) -> float:
    """Milliseconds of one call, or of one and of its gradients."""
    with torch.no_grad():
        mask, x = _call_of(make, inputs)
        q, k, v = (t.detach() for t in (x.q, x.k, x.v))
        operands = {name: t.detach() for name, t in mask.operands.items()}
    mask = Mask(mask.tree, operands)

    def forward() -> Tensor:
        y = ssd(q, k, v, mask, backend=backend)
        assert isinstance(y, Tensor)  # the pair (y, state) comes only when asked for
        return y

    if direction == "forward":
        with torch.no_grad():
            return machine.ms(forward)
    leaves = [q, k, v, *(t for t in operands.values() if t.is_floating_point())]
    for leaf in leaves:
        leaf.requires_grad_()
    dy = torch.randn(v.shape, device=v.device, dtype=v.dtype, generator=machine.generator(1))
    return machine.ms(lambda: torch.autograd.grad(forward(), leaves, dy))


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print each figure as it comes, and a short table last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="a shorter look at each figure: not for quoting")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script out; nothing is held to a target")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose names have one of these words")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where figures go; a whole run on a GPU has a place")
    parser.add_argument("--commit", help="the commit to name in FILE, where the source has no git")
    options = parser.parse_args(argv)
    machine = Machine(torch.device(options.device), options.quick, options.tiny)
    whole = machine.cuda and not (options.quick or options.tiny or options.only)
    path = options.json or (RESULTS if whole else None)
    console = Console(width=None if sys.stdout.isatty() else 150)
    facts: dict[str, object] = {**environment(options.commit), **machine.facts()}
    facts |= {"quick": options.quick, "tiny": options.tiny}
    console.print(facts)
    found: list[Figure] = []
    for figure in chain(figures(machine, options.only), convolutions(machine, options.only)):
        found.append(replace(figure, target=None) if machine.tiny else figure)
        print_figure(console, found[-1])
        if path:
            write_json(path, facts, [Section("structures", found)])
    for figure in found:
        value = "not measured" if figure.value is None else f"{figure.value:.3g} {figure.unit}"
        console.print(f"{value:>14}  {figure.name}", highlight=False)
    return 0 if all(figure.ok for figure in found) else 1


if __name__ == "__main__":
    sys.exit(main())
