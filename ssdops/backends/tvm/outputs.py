"""The tensor program of a forward pass on a CPU: Y in one walk along rows, of heads that share q and k together."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .blocks import fill, locate, store
from .parts import bound, decay, exp, fits, meets, near, number, shared, sizes, under, within
from .products import onto, product
from .tile import EVERY, INTO, LINES, MOST, OUT_OF, SEGMENT, STATES, Tile, U, W


def outputs(tile: Tile) -> Any:
    """Y and the states that leave, as `lower.py` has them, with S as `[dstate, headdim]`.

    Parameters, in order: q, k `[tokens, heads of their own, N]`; v `[tokens, heads of its own, P]`; g `[slots, heads of its
    own, C, C]`; lines and E of `lines`; begin `[rows + 1]`; entering and leaving `[rows, nheads, P, N]`; y `[tokens, nheads,
    P]`; kept `[slots or segments, nheads, N, P]`; and the numbers enters (whether states do), seqlen, causal, strict, how many
    heads are walked together, and keeps (whether states that enter segments are kept: so passes that are learnt from need no
    program of their own). The mode says what else is kept, and whether Y is wanted.
    """
    C, N, P, data, whole = tile.chunk, tile.inner, tile.outer, tile.data, tile.whole
    WANTED = tile.mode != STATES

    @T.prim_func(s_tir=True)
    def main(
        q_: T.handle, k_: T.handle, v_: T.handle, g_: T.handle, lines_: T.handle, total_: T.handle, begin_: T.handle,
        entering_: T.handle, leaving_: T.handle, y_: T.handle, kept_: T.handle, enters: T.int64, seqlen: T.int64,
        causal: T.int64, strict: T.int64, together: T.int64, keeps: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, rows, ends, entering_rows, nheads, kept_slots = sizes(7)
        q_heads, k_heads, v_heads, g_heads, n_filled, p_filled = sizes(6)
        n = T.meta_var(N if whole else n_filled)
        p = T.meta_var(P if whole else p_filled)
        q = T.match_buffer(q_, (tokens, q_heads, n), data)
        k = T.match_buffer(k_, (tokens, k_heads, n), data)
        v = T.match_buffer(v_, (tokens, v_heads, p), data)
        g = T.match_buffer(g_, (slots, g_heads, C, C), data)
        lines = T.match_buffer(lines_, (slots, nheads, LINES, C), "float64")
        total = T.match_buffer(total_, (slots, nheads), "float64")
        begin = T.match_buffer(begin_, (ends,), "int64")
        entering = T.match_buffer(entering_, (entering_rows, nheads, p, n), data)
        leaving = T.match_buffer(leaving_, (rows, nheads, p, n), data)
        y = T.match_buffer(y_, (tokens, nheads, p), data)
        kept = T.match_buffer(kept_, (kept_slots, nheads, n, p), data)
        for row_, some_ in T.grid(rows, T.truncdiv(nheads, together)):
            with T.sblock("program"):
                row, some = T.axis.remap("SS", [row_, some_])
                place = T.sblock_alloc_buffer((4,), "int64")
                at = T.sblock_alloc_buffer((2,), "int64")
                state = T.sblock_alloc_buffer((MOST, N, P), data)
                start = T.meta_var(place[0])
                end = T.meta_var(place[1])
                first = T.meta_var(at[0])
                slot = T.meta_var(at[1])
                head = T.meta_var(lambda h: some * together + h)
                chunk_count = T.meta_var((bound(begin, row + 1, seqlen) - bound(begin, row, seqlen) + C - 1) // C)
                from_first = T.meta_var(lambda step: T.Select(causal == 1, step, (end - start + C - 1) // C - 1 - step))
                locate(place, begin, row, seqlen, C)
                fill("enter", together, N, P)(
                    state,
                    lambda h, m, o: T.if_then_else(
                        enters == 1,
                        within(whole, T.And(under(o, p), under(m, n)), entering[row, head(h), o, m], data),
                        number(0, data),
                    ),
                )
                for step in range(chunk_count):
                    with T.sblock("chunk"):
                        vs = T.axis.spatial(1 << 40, step)
                        qt = T.sblock_alloc_buffer((C, N), data)
                        kt = T.sblock_alloc_buffer((C, N), data)
                        gt = T.sblock_alloc_buffer((C, C), data)
                        passed = T.sblock_alloc_buffer((1,), data)
                        for i in range(1):
                            with T.sblock("here"):
                                vi = T.axis.spatial(1, i)
                                at[vi] = start + from_first(vs) * C
                                at[vi + 1] = place[2] + from_first(vs)
                        q_head = T.meta_var(shared(head(0), nheads, q_heads))
                        k_head = T.meta_var(shared(head(0), nheads, k_heads))
                        if WANTED:
                            fill("load_q", C, N)(
                                qt, lambda i, m: within(whole, under(m, n), q[near(first + i, end), q_head, m], data)
                            )
                            fill("load_g", C, C)(gt, lambda i, j: g[slot, shared(head(0), nheads, g_heads), i, j])
                        fill("load_k", C, N)(
                            kt, lambda j, m: within(whole, under(m, n), k[near(first + j, end), k_head, m], data)
                        )
                        for h in range(together):
                            with T.sblock("head"):
                                vh = T.axis.spatial(together, h)
                                ts = T.sblock_alloc_buffer((LINES, C), "float64")
                                into = T.sblock_alloc_buffer((C,), data)
                                vt = T.sblock_alloc_buffer((C, P), data)
                                scaled = T.sblock_alloc_buffer((C, P), data)
                                weights = T.sblock_alloc_buffer((C, C), data)
                                read = T.sblock_alloc_buffer((C, P), data)
                                inside = T.sblock_alloc_buffer((C, P), data)
                                v_head = T.meta_var(shared(head(vh), nheads, v_heads))
                                fill("pass", 1)(passed, lambda _: exp(total[slot, head(vh)], data))
                                fill("load_lines", LINES, C)(ts, lambda which, i: lines[slot, head(vh), which, i])
                                fill("weigh_cols", C)(into, lambda j: T.Cast(data, ts[INTO, j] * ts[W, j]))
                                fill("load_v", C, P)(
                                    vt, lambda j, o: within(whole, under(o, p), v[near(first + j, end), v_head, o], data)
                                )
                                fill("scale_v", C, P)(scaled, lambda j, o: into[j] * vt[j, o])
                                if tile.mode == EVERY:
                                    for m, o in T.grid(N, P):
                                        with T.sblock("keep"):
                                            vm, vo = T.axis.remap("SS", [m, o])
                                            T.where(fits(whole, m, n) and fits(whole, o, p))
                                            kept[slot, head(vh), vm, vo] = state[vh, vm, vo]
                                else:
                                    for m, o in T.grid(N, P):
                                        with T.sblock("keep"):
                                            vm, vo = T.axis.remap("SS", [m, o])
                                            T.where(
                                                keeps == 1 and vs % SEGMENT == 0 and fits(whole, m, n) and fits(whole, o, p)
                                            )
                                            kept[place[3] + vs // SEGMENT, head(vh), vm, vo] = state[vh, vm, vo]
                                if WANTED:
                                    fill("pairs", C, C)(
                                        weights,
                                        lambda i, j: (
                                            T.Cast(data, ts[W, j])
                                            * gt[i, j]
                                            * decay(tile, ts, i, j, meets(i, j, causal, strict))
                                        ),
                                    )
                                    product("reads", C, P, N, data)(read, lambda i, m: qt[i, m], lambda m, o: state[vh, m, o])
                                    product("values", C, P, C, data, causal)(
                                        inside, lambda i, j: weights[i, j], lambda j, o: vt[j, o]
                                    )
                                if WANTED:
                                    store("store", C, P, whole)(
                                        y, head(vh), first, end, p,
                                        lambda i, o: T.Cast(data, ts[U, i])
                                        * (T.Cast(data, ts[OUT_OF, i]) * read[i, o] + inside[i, o]),
                                    )  # fmt: skip
                                onto("update", N, P, C, data)(
                                    state, vh, lambda m, o: state[vh, m, o] * passed[0], lambda m, j: kt[j, m],
                                    lambda j, o: scaled[j, o],
                                )  # fmt: skip
                for h, m, o in T.grid(together, N, P):
                    with T.sblock("leave"):
                        vh, vm, vo = T.axis.remap("SSS", [h, m, o])
                        T.where(fits(whole, m, n) and fits(whole, o, p))
                        leaving[row, head(vh), vo, vm] = state[vh, vm, vo]

    return main
