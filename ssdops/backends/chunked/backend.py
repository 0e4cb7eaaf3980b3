"""The backend: what it can run, what that costs, and its two passes."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from torch import Tensor

from ...ir.problem import Problem, common_heads
from ...ir.terms import Diagonal, Linear, Quadratic, Term
from ..base import BOTH, Config, Cotangents, Gradients, Inputs, Output, Support, Work, reject_scan
from ..scan import Every, diagonal_backward, diagonal_forward, diagonal_work
from . import structured
from .backward import Backward
from .channel import CHANNEL_SIZES, ChannelScan, channel_work
from .channel_backward import ChannelBackward
from .forward import SIZES, SPAN, Kept, Scan


class Chunked:
    """The block form of the contraction."""

    name = "chunked"
    factored = True

    def supports(self, term: Term, problem: Problem) -> Support:
        """Any scan, diagonals, and what `structured.py` knows."""
        if isinstance(term, Quadratic) and structured.kind_of(term) is not None:
            return Support.yes()
        return reject_scan(term, self.name) or Support.yes()

    def has_chunks(self, term: Term) -> bool:
        """Whether a chunk size means something to a term that is no scan."""
        return structured.has_chunks(term)

    def growth(self, term: Term) -> str | None:
        """How the cost of a term that is no scan grows with seqlen."""
        return structured.growth(term)

    def configs(self, term: Term, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """Chunk sizes, of those that hold the whole sequence the least; on a GPU longer ones first, as each chunk is a round
        of launches."""
        if isinstance(term, Quadratic):
            return structured.configs(term, problem, chunk_size)
        if isinstance(term, Diagonal) or chunk_size is not None:
            return (Config(chunk_size),)
        sizes: tuple[int, ...] = SIZES if isinstance(term, Linear) and term.channel is None else CHANNEL_SIZES
        whole = min((size for size in sizes if size >= problem.seqlen), default=max(sizes))
        sizes = sizes if problem.target.device == "cpu" else tuple(sorted(sizes, reverse=True))
        return tuple(Config(size) for size in sizes if size <= whole)

    def work(self, term: Term, problem: Problem, config: Config, direction: str = "forward") -> Work:
        """Linear in seqlen; the scores of a chunk once per group, everything else once per head.

        Elements and launches are those that torch's dispatcher counts; a view is 0.4 of a launch, a product two or three.
        """
        p = problem
        if isinstance(term, Diagonal):
            return diagonal_work(p, direction)
        if isinstance(term, Quadratic):
            return structured.work(self, term, p, config, direction)
        assert isinstance(term, Linear)  # supports() refuses the rest
        if term.channel is not None:
            return channel_work(p, config.chunk_size or SIZES[0]).times(BOTH if direction == "backward" else 1.0)
        rows = max(p.n_states or p.batch, 1)
        length = ceil(p.batch * p.seqlen / rows)
        size = min(config.chunk_size or SIZES[0], max(length, 1))
        chunks = ceil(length / size)
        spans = ceil(length // size / max(SPAN // (size * rows), 1)) + (length % size > 0)  # a short chunk is a span of its own
        tokens, groups, state = float(p.batch * p.seqlen), common_heads(p), p.dstate * p.headdim
        per_head = 2 * size * p.headdim + 4 * state
        flops = tokens * (2 * size * p.dstate * groups + p.nheads * per_head) * (1 + 8 / size)  # short products are slower
        touched = 4 * tokens * (p.q_heads * p.dstate + p.k_heads * p.dstate + 2 * p.nheads * p.headdim)
        if direction == "forward":
            elements = p.nheads * (9 * size + 3 * p.headdim + 20 + state / size) + 2 * p.dstate * groups
            return Work(flops, tokens * elements, touched, 4.0 + 70 * spans + 10 * chunks)
        elements = p.nheads * (24 * size + 12 * p.headdim + 86 + 5 * state / size) + 9 * p.dstate * groups
        return Work(3 * flops, tokens * elements, 3 * touched, 6.0 + 207 * spans + 30 * chunks)

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """One span of chunks after another; saves the states at chunk starts, and what was read of them."""
        if isinstance(term, Diagonal):
            return Output(diagonal_forward(term, x))
        if isinstance(term, Quadratic):
            return Output(structured.forward(self, term, x, config))
        assert isinstance(term, Linear)  # supports() refuses the rest
        scan = self._scan(term, x, config)
        y, every = x.empty_output(), Every(x)
        state = scan.initial()
        kept: list[Kept] = []
        for span in scan.spans:
            tile = scan.tile(*span)
            if save:
                kept.append(scan.room_to_keep(tile, state))
            scan.write_output(tile, scan.across(tile, state, kept[-1] if save else None), y)
            if every.wants(tile.t1):
                every.put(tile.t1, scan.leave(state))
        saved = tuple(x for k in kept for x in (k.starts, k.across))
        return Output(y, scan.leave(state), saved, every.states)

    def final_state(self, term: Linear, x: Inputs, config: Config) -> Tensor:
        """The walk between chunks, without what is inside them."""
        scan = self._scan(term, x, config)
        state = scan.initial()
        for span in scan.spans:
            scan.across(scan.tile(*span), state)
        return scan.leave(state)

    @staticmethod
    def _scan(term: Linear, x: Inputs, config: Config) -> Scan:
        return Scan(term, x, config) if term.channel is None else ChannelScan(term, x, config)

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """Forward again for the states at chunk starts, then back over the chunks with the state's cotangent in hand."""
        if isinstance(term, Diagonal):
            return diagonal_backward(term, x, cotangents.y)
        if isinstance(term, Quadratic):
            return structured.backward(self, term, x, config, cotangents.y)
        assert isinstance(term, Linear)  # supports() refuses the rest
        if term.channel is None:
            return Backward(Scan(term, x, config), cotangents).run()
        return ChannelBackward(ChannelScan(term, x, config), cotangents).run()
