"""The tensor program of a walk on a GPU along rows, chunk by chunk: see `lower.py` for what it is made of."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .blocks import Rows, arrive, arrive_but_last, depart, fetch, fill, product
from .parts import (
    barrier,
    bound,
    decay,
    exp,
    first_slot,
    fits,
    meets,
    near,
    number,
    shared,
    sizes,
    under,
    within,
)
from .tile import EVERY, INTO, KEPT, LINES, OUT_OF, STARTS, STATES, Tile, U, W


def walk(tile: Tile) -> Any:
    """y and the state that leaves, of every row, head and part of v, from the state that enters.

    Parameters, in order: q, k, v `[tokens, heads of their own, size]`; g `[slots, heads of its own, C, C]`; lines and E of
    `lines`; begin `[rows + 1]`; of the `count` heads from head0 on that are walked, entering `[rows, count, inner, outer]`, or
    another one if none does; y `[tokens, y_heads, outer]` from head y0 on; leaving; where the mode says so, kept `[slots,
    count, inner, outer]`; and the numbers rows, parts (of outer), head0, y0, g0
    and g_share (head h has the scores of head (h − g0) / g_share), enters (whether a state does), segments and last (of so
    many rows that follow one another, that one's state leaves), seqlen, causal, strict.

    A chunk has these parts, with barriers between: loads, if not ahead; weights and what is rounded; products and what they
    summed up, to shared memory; and from there, beside the next one's first part. Tiles of different parts may share memory,
    but for those that are cleared at first.
    """
    C, D1, D2, data, acc = tile.chunk, tile.inner, tile.outer, tile.data, tile.acc
    FLIPPED, whole, exact = tile.flipped, tile.whole, tile.exact
    keeping, line = acc if tile.mode == EVERY else data, tile.line
    GIVES, KEEPS = tile.mode not in (STATES, STARTS), tile.mode in (KEPT, STARTS)
    HELD, LATE, SHARED = 1 + tile.ahead, tile.late, tile.shared
    OURS = 1 if LATE else HELD
    EARLY = LATE and KEEPS  # states on their way to memory keep q and k back: these are fetched as soon as they can be
    STRAIGHT = whole  # states from memory to where they are summed, and back

    @T.prim_func(s_tir=True)
    def main(
        q_: T.handle, k_: T.handle, v_: T.handle, g_: T.handle, lines_: T.handle, total_: T.handle, begin_: T.handle,
        entering_: T.handle, y_: T.handle, leaving_: T.handle, kept_: T.handle, rows: T.int64, parts: T.int64,
        head0: T.int64, y0: T.int64, g0: T.int64, g_share: T.int64, enters: T.int64, segments: T.int64, last: T.int64,
        seqlen: T.int64, causal: T.int64, strict: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, kept_slots, ends, entering_rows, entering_count, leaving_rows, nheads, count = sizes(9)
        q_heads, k_heads, v_heads, g_heads, y_heads = sizes(5)
        inner_filled, outer_filled = sizes(2)
        # as multiples of tiles where they are, so that addresses of vectors are seen to be multiples too
        inner = T.meta_var(SHARED * D1 if whole else inner_filled)
        outer = T.meta_var(parts * D2 if whole else outer_filled)
        q = T.match_buffer(q_, (tokens, q_heads, inner), data)
        k = T.match_buffer(k_, (tokens, k_heads, inner), data)
        v = T.match_buffer(v_, (tokens, v_heads, outer), data)
        g = T.match_buffer(g_, (slots, g_heads, C, C), data)
        lines = T.match_buffer(lines_, (slots, nheads, LINES, C), line)
        total = T.match_buffer(total_, (slots, nheads), "float64")
        begin = T.match_buffer(begin_, (ends,), "int64")
        entering = T.match_buffer(entering_, (entering_rows, entering_count, inner, outer), acc)
        y = T.match_buffer(y_, (tokens, y_heads, outer), data)
        leaving = T.match_buffer(leaving_, (leaving_rows, count, inner, outer), acc)
        kept = T.match_buffer(kept_, (kept_slots, count, inner, outer), keeping)
        for row_, head_, part_ in T.grid(rows, count, parts * SHARED):
            with T.sblock("program"):
                row, h, some = T.axis.remap("SSS", [row_, head_, part_])
                part = T.meta_var(T.truncdiv(some, SHARED) if SHARED > 1 else some)
                from_inner = T.meta_var(T.truncmod(some, SHARED) * D1 if SHARED > 1 else 0)
                of_inner = T.meta_var(lambda m: from_inner + m)
                place = T.sblock_alloc_buffer((3,), "int64")
                owner = T.sblock_alloc_buffer((4,), "int64")
                here = T.sblock_alloc_buffer((2,), "int64")
                there = T.sblock_alloc_buffer((2,), "int64")
                tokens_t = T.sblock_alloc_buffer((HELD * LINES, C), line)
                gt = T.sblock_alloc_buffer((HELD * C, C), data)
                qt = T.sblock_alloc_buffer((OURS * C, D1), data)
                kt = T.sblock_alloc_buffer((OURS * C, D1), data)
                vt = T.sblock_alloc_buffer((HELD * C, D2), data)
                low = T.sblock_alloc_buffer((D1, D2), data)
                out = T.sblock_alloc_buffer((C, D2), data)
                passage = T.sblock_alloc_buffer((D1, D2), acc)
                state = T.sblock_alloc_buffer((D1, D2), acc)
                after = T.sblock_alloc_buffer((D1, D2), acc)
                left = T.sblock_alloc_buffer((D1, D2), acc)
                start = T.meta_var(place[0])
                as_sum = T.meta_var(lambda value: T.Cast(acc, value) if exact else value)
                end = T.meta_var(place[1])
                leaves = T.meta_var(T.truncmod(row, segments) == last)
                leaves_to = T.meta_var(T.truncdiv(row, segments))
                chunk_count = T.meta_var((bound(begin, row + 1, seqlen) - bound(begin, row, seqlen) + C - 1) // C)
                for i in range(1):
                    with T.sblock("place"):
                        vi = T.axis.spatial(1, i)
                        place[vi] = bound(begin, row, seqlen)
                        place[vi + 1] = bound(begin, row + 1, seqlen)
                        place[vi + 2] = first_slot(begin, row, seqlen, C)
                        owner[vi] = shared(head0 + h, nheads, q_heads)
                        owner[vi + 1] = shared(head0 + h, nheads, k_heads)
                        owner[vi + 2] = shared(head0 + h, nheads, v_heads)
                        owner[vi + 3] = T.truncdiv(head0 + h - g0, g_share)
                if GIVES and not tile.ahead:  # what is written before the first chunk keeps its place in shared memory
                    fill("clear", LINES, C)(tokens_t, lambda which, i: number(0, line))
                    fill("clear_g", C, C)(gt, lambda i, j: T.Cast(data, 0))
                if GIVES or KEEPS:
                    fill("clear_low", D1, D2)(low, lambda m, p: T.Cast(data, 0))
                if GIVES:
                    fill("clear_out", C, D2)(out, lambda i, p: T.Cast(data, 0))
                of_entering = T.meta_var(lambda m, p: entering[row, h, of_inner(m), part * D2 + p])
                if STRAIGHT:
                    if enters == 1:
                        fill("take_straight", D1, D2)(state, of_entering)
                    else:
                        fill("clear_state", D1, D2)(state, lambda m, p: number(0, acc))
                else:
                    filled = T.meta_var(lambda m, p: T.And(under(of_inner(m), inner), under(part * D2 + p, outer)))
                    fill("enter", D1, D2)(
                        passage,
                        lambda m, p: T.if_then_else(
                            enters == 1, within(whole, filled(m, p), of_entering(m, p), acc), number(0, acc)
                        ),
                    )
                    barrier(tile)
                    fill("take", D1, D2)(state, lambda m, p: passage[m, p])
                barrier(tile)
                get_lines = T.meta_var(fetch("get_lines", tile, LINES, C, line, True))
                get_q = T.meta_var(fetch("get_q", tile, C, D1, data, whole))
                get_k = T.meta_var(fetch("get_k", tile, C, D1, data, whole))
                get_v = T.meta_var(fetch("get_v", tile, C, D2, data, whole))
                get_g = T.meta_var(fetch("get_g", tile, C, C, data, True))
                get_q_again = T.meta_var(fetch("get_q_again", tile, C, D1, data, whole, True))
                get_k_again = T.meta_var(fetch("get_k_again", tile, C, D1, data, whole, True))
                token = T.meta_var(lambda i: near(there[0] + i, end))
                of_lines = T.meta_var(lambda which, i: lines[there[1], head0 + h, which, i])
                of_q = T.meta_var(lambda i, m: within(whole, under(m, inner), q[token(i), owner[0], m], data))
                of_k = T.meta_var(
                    lambda i, m: within(whole, under(of_inner(m), inner), k[token(i), owner[1], of_inner(m)], data)
                )
                of_v = T.meta_var(
                    lambda i, p: within(whole, under(part * D2 + p, outer), v[token(i), owner[2], part * D2 + p], data)
                )
                of_g = T.meta_var(lambda i, j: g[there[1], owner[3], i, j])
                in_order = T.meta_var(lambda step: T.max(T.Select(causal == 1, step, chunk_count - 1 - step), 0))
                if tile.ahead:
                    for i in range(1):
                        with T.sblock("there_first"):
                            vi = T.axis.spatial(1, i)
                            there[vi] = start + in_order(T.int64(0)) * C
                            there[vi + 1] = place[2] + in_order(T.int64(0))
                    get_lines(tokens_t, 0, of_lines)
                    get_v(vt, 0, of_v)
                    if GIVES:
                        get_g(gt, 0, of_g)
                    depart(tile)
                    get_k(kt, 0, of_k)
                    if GIVES:
                        get_q(qt, 0, of_q)
                    depart(tile)
                    arrive(tile)
                    barrier(tile)
                for step in range(chunk_count):
                    with T.sblock("coming"):  # this chunk's tiles, or the next one's, while this one's are multiplied
                        now = T.axis.spatial(1 << 40, step)
                        then = T.meta_var(T.min(now + 1, chunk_count - 1) if tile.ahead else now)
                        to = T.meta_var(T.Cast("int32", (now + 1) % 2) if tile.ahead else 0)
                        for i in range(1):
                            with T.sblock("there"):
                                vi = T.axis.spatial(1, i)
                                there[vi] = start + in_order(then) * C
                                there[vi + 1] = place[2] + in_order(then)
                        get_lines(tokens_t, to * LINES, of_lines)
                        get_v(vt, to * C, of_v)
                        if GIVES:
                            get_g(gt, to * C, of_g)
                        if not LATE:
                            get_k(kt, to * C, of_k)
                            if GIVES:
                                get_q(qt, to * C, of_q)
                        depart(tile)
                        if not tile.ahead:
                            barrier(tile)
                    with T.sblock("chunk"):
                        at = T.axis.spatial(1 << 40, step)
                        passed = T.sblock_alloc_buffer((1,), acc)  # exp(E)
                        vs = T.sblock_alloc_buffer((C, D2), data)
                        weight = T.sblock_alloc_buffer((C, C), data)
                        weights = T.sblock_alloc_buffer((C, C), data)
                        read = T.sblock_alloc_buffer((C, D2), acc)
                        inside = T.sblock_alloc_buffer((C, D2), acc)
                        full = T.sblock_alloc_buffer((D1, D2), acc)
                        added = T.sblock_alloc_buffer((D1, D2), acc)
                        lot = T.meta_var(T.Cast("int32", at % HELD))
                        ours = T.meta_var(0 if LATE else lot)
                        mine = T.meta_var(Rows(tokens_t, lot * LINES))
                        first = T.meta_var(here[0])
                        slot = T.meta_var(here[1])
                        for i in range(1):
                            with T.sblock("here"):
                                vi = T.axis.spatial(1, i)
                                here[vi] = start + in_order(at) * C
                                here[vi + 1] = place[2] + in_order(at)
                        for i in range(1):
                            with T.sblock("pass"):
                                vi = T.axis.spatial(1, i)
                                passed[vi] = exp(total[slot, head0 + h], acc, exact)
                        of_g_now = T.meta_var(lambda i, j: gt[lot * C + (j if FLIPPED else i), i if FLIPPED else j])
                        if GIVES:
                            fill("weigh", C, C)(
                                weight,
                                lambda i, j: T.Cast(
                                    data,
                                    T.Cast(acc, mine[W, j])
                                    * T.Cast(acc, of_g_now(i, j))
                                    * decay(tile, mine, i, j, meets(i, j, causal, strict)),
                                ),
                            )
                        fill("scale_v", C, D2)(
                            vs,
                            lambda i, p: T.Cast(
                                data, T.Cast(acc, mine[INTO, i] * mine[W, i]) * T.Cast(acc, vt[lot * C + i, p])
                            ),
                        )
                        if GIVES:
                            fill("put", C, C)(weights, lambda i, j: weight[i, j])
                        if GIVES or KEEPS:
                            fill("round", D1, D2)(low, lambda m, p: state[m, p] if data == acc else T.Cast(data, state[m, p]))
                        arrive_but_last(tile)
                        barrier(tile)
                        if KEEPS:
                            for m, p in T.grid(D1, D2):
                                with T.sblock("keep"):
                                    vm, vp = T.axis.remap("SS", [m, p])
                                    T.where(fits(whole, of_inner(m), inner) and fits(whole, part * D2 + p, outer))
                                    kept[slot, h, of_inner(vm), part * D2 + vp] = low[vm, vp]
                        factor = T.meta_var(lambda value: T.Cast(acc, value))
                        if GIVES:
                            product("reads", C, D2, D1, acc)(
                                read, lambda i, m: factor(qt[ours * C + i, m]), lambda m, p: factor(low[m, p])
                            )
                            product("values", C, D2, C, acc)(
                                inside, lambda i, j: factor(weights[i, j]), lambda j, p: factor(vt[lot * C + j, p])
                            )
                        product("update", D1, D2, C, acc)(
                            added, lambda m, j: factor(kt[ours * C + j, m]), lambda j, p: factor(vs[j, p])
                        )
                        fill("carry", D1, D2)(after, lambda m, p: state[m, p] * passed[0] + added[m, p])
                        if tile.mode == EVERY or EARLY:
                            barrier(tile)
                        if EARLY:
                            get_k_again(kt, 0, of_k)
                            get_q_again(qt, 0, of_q)
                            depart(tile)
                        if GIVES:
                            fill("join", C, D2)(
                                out,
                                lambda i, p: T.Cast(
                                    data, as_sum(mine[U, i]) * (as_sum(mine[OUT_OF, i]) * read[i, p] + inside[i, p])
                                ),
                            )
                        if tile.mode == EVERY:
                            fill("show_state", D1, D2)(full, lambda m, p: state[m, p])
                        if GIVES:
                            if EARLY:
                                arrive_but_last(tile)
                            else:
                                arrive(tile)
                            barrier(tile)
                            if LATE and not EARLY:
                                get_k_again(kt, 0, of_k)
                                get_q_again(qt, 0, of_q)
                                depart(tile)
                            for i, p in T.grid(C, D2):
                                with T.sblock("store"):
                                    vi, vp = T.axis.remap("SS", [i, p])
                                    T.where(first + i < end and fits(whole, part * D2 + p, outer))
                                    y[first + vi, y0 + h, part * D2 + vp] = out[vi, vp]
                        if tile.mode == EVERY:
                            for m, p in T.grid(D1, D2):
                                with T.sblock("keep"):
                                    vm, vp = T.axis.remap("SS", [m, p])
                                    T.where(fits(whole, m, inner) and fits(whole, part * D2 + p, outer))
                                    kept[slot, h, of_inner(vm), part * D2 + vp] = full[vm, vp]
                    if tile.mode == EVERY or not GIVES:
                        arrive(tile)
                        barrier(tile)
                    fill("turn", D1, D2)(state, lambda m, p: after[m, p])
                if STRAIGHT:
                    if leaves:
                        for m, p in T.grid(D1, D2):
                            with T.sblock("leave_straight"):
                                vm, vp = T.axis.remap("SS", [m, p])
                                leaving[leaves_to, h, of_inner(vm), part * D2 + vp] = state[vm, vp]
                else:
                    barrier(tile)
                    fill("give_state", D1, D2)(left, lambda m, p: state[m, p])
                    barrier(tile)
                    for m, p in T.grid(D1, D2):
                        with T.sblock("leave"):
                            vm, vp = T.axis.remap("SS", [m, p])
                            T.where(leaves and fits(whole, of_inner(m), inner) and fits(whole, part * D2 + p, outer))
                            leaving[leaves_to, h, of_inner(vm), part * D2 + vp] = left[vm, vp]

    return main
