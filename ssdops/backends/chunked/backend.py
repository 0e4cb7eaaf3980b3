"""The backend: what it can run, what that costs, and its two passes."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from ...ir.problem import Problem, common_heads
from ...ir.terms import Diagonal, Linear, Term
from ..base import Config, Cotangents, Gradients, Inputs, Output, Support, Work, reject_scan
from ..scan import Every, diagonal_backward, diagonal_forward, diagonal_work
from .backward import Backward
from .channel import CHANNEL_SIZES, ChannelScan, channel_work
from .channel_backward import ChannelBackward
from .forward import SIZES, SPAN, Kept, Scan


class Chunked:
    """The block form of the contraction."""

    name = "chunked"
    factored = True

    def supports(self, term: Term, problem: Problem) -> Support:
        """Any scan, and diagonals."""
        return reject_scan(term, self.name) or Support.yes()

    def configs(self, term: Term, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """Chunk sizes; on a GPU longer chunks, as every chunk is a round of launches."""
        if isinstance(term, Diagonal) or chunk_size is not None:
            return (Config(chunk_size),)
        sizes: tuple[int, ...] = SIZES if isinstance(term, Linear) and term.channel is None else CHANNEL_SIZES
        sizes = sizes if problem.target.device == "cpu" else tuple(sorted(sizes, reverse=True))
        return tuple(Config(size) for size in sizes)

    def work(self, term: Term, problem: Problem, config: Config) -> Work:
        """Linear in seqlen; the scores of a chunk once per group, everything else once per head."""
        p, size = problem, config.chunk_size or SIZES[0]
        tokens = float(p.batch * p.seqlen)
        if isinstance(term, Diagonal):
            return diagonal_work(p)
        if isinstance(term, Linear) and term.channel is not None:
            return channel_work(p, size)
        scores = 2 * size * p.dstate * common_heads(p)
        per_head = 2 * size * p.headdim + 4 * p.dstate * p.headdim
        chunks = ceil(p.seqlen / size) if p.seqlen else 0
        return Work(
            tokens * (scores + p.nheads * per_head),
            tokens * p.nheads * (4 * size + 4 * p.headdim + 3 * p.dstate * p.headdim / size),
            4 * tokens * (p.q_heads * p.dstate + p.k_heads * p.dstate + 2 * p.nheads * p.headdim),
            10.0 + 8.0 * chunks + 60.0 * ceil(tokens / SPAN),
        )

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """One span of chunks after another; saves the states at chunk starts, and what was read of them."""
        if isinstance(term, Diagonal):
            return Output(diagonal_forward(term, x))
        assert isinstance(term, Linear)  # supports() refuses the rest
        scan = Scan(term, x, config) if term.channel is None else ChannelScan(term, x, config)
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

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """Forward again for the states at chunk starts, then back over the chunks with the state's cotangent in hand."""
        if isinstance(term, Diagonal):
            return diagonal_backward(term, x, cotangents.y)
        assert isinstance(term, Linear)  # supports() refuses the rest
        if term.channel is None:
            return Backward(Scan(term, x, config), cotangents).run()
        return ChannelBackward(ChannelScan(term, x, config), cotangents).run()
