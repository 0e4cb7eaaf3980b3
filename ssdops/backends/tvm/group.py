"""The tensor program of a backward pass on a GPU by chunks: each walks over heads that share q and k."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .blocks import Rows, arrive, fetch, fill, near_sums, product
from .parts import (
    barrier,
    chunk_begin,
    chunk_end,
    decay,
    exp,
    meets,
    near,
    number,
    one_if,
    shared,
    sizes,
    summed,
    under,
    within,
)
from .tile import EXCHANGE, INTO, LANES, LINES, OUT_OF, PAIR_LANES, SUMS, Tile, U, W


def group(tile: Tile) -> Any:
    """Gradients of q and k in every chunk, and what its tokens exchange, from the states S before it and the cotangents D of
    those after it. With R = exp(ρ − κ) ∘ ⟨dY, v⟩,

        dq_i = Σ_h u_i [ Σ_j w_j R_ij k_j + exp(ρ_i) S dY_i ]        dk_j = Σ_h w_j [ Σ_i u_i R_ij q_i + exp(E − κ_j) D v_j ]

    summed over heads in registers. And for `exchange.settle`, with G = ⟨q, k⟩, of pairs with or without decay between
    their tokens: Σ_j w_j G_ij R_ij and Σ_i u_i G_ij R_ij; exp(ρ_i) ⟨q_i, S dY_i⟩ and exp(E − κ_j) ⟨k_j, D v_j⟩; exp(E) ⟨S, D⟩.

    Tiles have `outer` of dstate, a part, and all of headdim, `inner`. Parameters, in order: q, k `[tokens, heads of their own,
    dstate]`; v, dY `[tokens, heads of their own, headdim]`; g `[slots, heads of its own, C, C]`; lines and E of `lines`;
    chunks; of the `count` heads from head0 on, S, D `[slots, count, dstate, headdim]`; dq, dk `[slots, runs, C, padded
    dstate]`; sums `[slots, count, 4, C]`, by `SUMS`; met `[slots, count, parts, 2, C]`; through `[slots, count, parts, 16]`,
    to be summed; and the numbers seqlen, head0, walked (heads of a run), causal, strict, distance.

    Between two barriers no tile is written first after another was read last: they may lie in one place. What cannot be
    kept so is cleared at first, and keeps its place. There is none between what a head's sums are given from and the next
    head's first part, which writes what no head reads there.
    """
    C, P, N, data, acc, line = tile.chunk, tile.inner, tile.outer, tile.data, tile.acc, tile.line
    whole, EXCHANGED, WIDTH = tile.whole, tile.mode == EXCHANGE, 4 if tile.exact else LANES
    HELD, CROSSING = 1 + tile.ahead, (LANES, LANES)

    @T.prim_func(s_tir=True)
    def main(
        q_: T.handle, k_: T.handle, v_: T.handle, dy_: T.handle, g_: T.handle, lines_: T.handle, total_: T.handle,
        chunks_: T.handle, before_: T.handle, after_: T.handle, dq_: T.handle, dk_: T.handle, sums_: T.handle,
        met_: T.handle, through_: T.handle, seqlen: T.int64, head0: T.int64, walked: T.int64, causal: T.int64,
        strict: T.int64, distance: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, table, nheads, count, runs, parts, sum_slots = sizes(8)
        q_heads, k_heads, v_heads, dy_heads, g_heads, dstate_filled, headdim_filled = sizes(7)
        dstate = T.meta_var(parts * N if whole else dstate_filled)
        headdim = T.meta_var(P if whole else headdim_filled)
        q = T.match_buffer(q_, (tokens, q_heads, dstate), data)
        k = T.match_buffer(k_, (tokens, k_heads, dstate), data)
        v = T.match_buffer(v_, (tokens, v_heads, headdim), data)
        dy = T.match_buffer(dy_, (tokens, dy_heads, headdim), data)
        g = T.match_buffer(g_, (slots, g_heads, C, C), data)
        lines = T.match_buffer(lines_, (slots, nheads, LINES, C), line)
        total = T.match_buffer(total_, (slots, nheads), "float64")
        chunks = T.match_buffer(chunks_, (table, 2), "int64")
        before = T.match_buffer(before_, (slots, count, dstate, headdim), data)
        after = T.match_buffer(after_, (slots, count, dstate, headdim), data)
        dq = T.match_buffer(dq_, (slots, runs, C, parts * N), acc)
        dk = T.match_buffer(dk_, (slots, runs, C, parts * N), acc)
        sums = T.match_buffer(sums_, (sum_slots, count, SUMS, C), acc)
        met = T.match_buffer(met_, (sum_slots, count, parts, 2, C), acc)
        through = T.match_buffer(through_, (sum_slots, count, parts, LANES), acc)
        for slot_, run_, part_ in T.grid(slots, runs, parts):
            with T.sblock("program"):
                slot, run, part = T.axis.remap("SSS", [slot_, run_, part_])
                place = T.sblock_alloc_buffer((2,), "int64")
                owner = T.sblock_alloc_buffer((3,), "int64")
                qt = T.sblock_alloc_buffer((C, N), data)
                kt = T.sblock_alloc_buffer((C, N), data)
                gt = T.sblock_alloc_buffer((C, C), data)
                other = T.sblock_alloc_buffer((C, C), data)
                tokens_t = T.sblock_alloc_buffer((HELD * LINES, C), line)
                dyt = T.sblock_alloc_buffer((HELD * C, P), data)
                vt = T.sblock_alloc_buffer((HELD * C, P), data)
                st = T.sblock_alloc_buffer((HELD * N, P), data)
                dst = T.sblock_alloc_buffer((HELD * N, P), data)
                parts_q = T.sblock_alloc_buffer((N // WIDTH, C), acc)
                parts_k = T.sblock_alloc_buffer((N // WIDTH, C), acc)
                sum_q = T.sblock_alloc_buffer((C, N), acc)
                sum_k = T.sblock_alloc_buffer((C, N), acc)
                next_q = T.sblock_alloc_buffer((C, N), acc)
                next_k = T.sblock_alloc_buffer((C, N), acc)
                first = T.meta_var(place[0])
                end = T.meta_var(place[1])
                for i in range(1):
                    with T.sblock("place"):
                        vi = T.axis.spatial(1, i)
                        place[vi] = chunk_begin(chunks, slot, seqlen, C)
                        place[vi + 1] = chunk_end(chunks, slot, seqlen, C)
                        owner[vi] = shared(head0 + run * walked, nheads, q_heads)
                        owner[vi + 1] = shared(head0 + run * walked, nheads, k_heads)
                        owner[vi + 2] = shared(head0 + run * walked, nheads, g_heads)
                as_sum = T.meta_var(lambda value: T.Cast(acc, value))
                of_state = T.meta_var(lambda n: part * N + n)
                row = T.meta_var(lambda i: near(first + i, end))
                fill("load_q", C, N)(
                    qt, lambda i, n: within(whole, under(of_state(n), dstate), q[row(i), owner[0], of_state(n)], data)
                )
                fill("load_k", C, N)(
                    kt, lambda i, n: within(whole, under(of_state(n), dstate), k[row(i), owner[1], of_state(n)], data)
                )
                fill("clear_other", C, C)(other, lambda i, j: T.Cast(data, 0))
                if EXCHANGED:
                    fill("load_g", C, C)(gt, lambda i, j: g[slot, owner[2], i, j])
                    fill("clear_parts_q", N // WIDTH, C)(parts_q, lambda t, i: number(0, acc))
                    fill("clear_parts_k", N // WIDTH, C)(parts_k, lambda t, i: number(0, acc))
                fill("clear_q", C, N)(sum_q, lambda i, n: number(0, acc))
                fill("clear_k", C, N)(sum_k, lambda i, n: number(0, acc))
                get_lines = T.meta_var(fetch("get_lines", tile, LINES, C, line, True))
                get_lines_again = T.meta_var(fetch("get_lines_again", tile, LINES, C, line, True, True))
                get_dy = T.meta_var(fetch("get_dy", tile, C, P, data, whole))
                get_v = T.meta_var(fetch("get_v", tile, C, P, data, whole))
                get_before = T.meta_var(fetch("get_before", tile, N, P, data, whole))
                get_after = T.meta_var(fetch("get_after", tile, N, P, data, whole))
                head_lines = T.meta_var(lambda h: lambda which, i: lines[slot, head0 + h, which, i])
                head_tokens = T.meta_var(
                    lambda x, heads, h: (
                        lambda i, p: within(whole, under(p, headdim), x[row(i), shared(head0 + h, nheads, heads), p], data)
                    )
                )
                head_states = T.meta_var(
                    lambda x, h: (
                        lambda n, p: within(
                            whole, T.And(under(of_state(n), dstate), under(p, headdim)), x[slot, h, of_state(n), p], data
                        )
                    )
                )
                if tile.ahead:
                    get_lines(tokens_t, 0, head_lines(run * walked))
                    get_dy(dyt, 0, head_tokens(dy, dy_heads, run * walked))
                    get_v(vt, 0, head_tokens(v, v_heads, run * walked))
                    get_before(st, 0, head_states(before, run * walked))
                    get_after(dst, 0, head_states(after, run * walked))
                    arrive(tile)
                barrier(tile)
                coming = T.meta_var(lambda step: run * walked + (T.min(step + 1, walked - 1) if tile.ahead else step))
                place_of = T.meta_var(lambda step: T.Cast("int32", (step + 1) % 2) if tile.ahead else 0)
                for step in range(walked):
                    with T.sblock("coming"):  # this head's tiles, or the next one's, while this one's are multiplied
                        now = T.axis.spatial(1 << 40, step)
                        then = T.meta_var(coming(now))
                        to = T.meta_var(place_of(now))
                        if not tile.ahead:
                            get_lines(tokens_t, 0, head_lines(then))
                        get_dy(dyt, to * C, head_tokens(dy, dy_heads, then))
                        get_v(vt, to * C, head_tokens(v, v_heads, then))
                        get_before(st, to * N, head_states(before, then))
                        get_after(dst, to * N, head_states(after, then))
                        if not tile.ahead:
                            barrier(tile)
                    with T.sblock("chunk"):
                        at = T.axis.spatial(1 << 40, step)
                        passed = T.sblock_alloc_buffer((1,), acc)
                        scored = T.sblock_alloc_buffer((C, C), acc)
                        weight = T.sblock_alloc_buffer((C, C), data)
                        weights = T.sblock_alloc_buffer((C, C), data)
                        pairs = T.sblock_alloc_buffer((C, C), acc)
                        row_lanes = T.sblock_alloc_buffer((PAIR_LANES, C), acc)
                        col_lanes = T.sblock_alloc_buffer((PAIR_LANES, C), acc)
                        near_rows = T.sblock_alloc_buffer((C,), acc)
                        near_cols = T.sblock_alloc_buffer((C,), acc)
                        crossing = T.sblock_alloc_buffer(CROSSING, acc)
                        read_q = T.sblock_alloc_buffer((C, N), acc)
                        read_k = T.sblock_alloc_buffer((C, N), acc)
                        inside_q = T.sblock_alloc_buffer((C, N), acc)
                        inside_k = T.sblock_alloc_buffer((C, N), acc)
                        h = T.meta_var(run * walked + at)
                        lot = T.meta_var(T.Cast("int32", at % HELD))
                        here = T.meta_var(Rows(tokens_t, lot * LINES))
                        of_token = T.meta_var(lambda which, i: T.Cast(acc, here[which, i]))
                        u = T.meta_var(lambda i: of_token(U, i))
                        w = T.meta_var(lambda i: of_token(W, i))
                        for i in range(1):
                            with T.sblock("pass"):
                                vi = T.axis.spatial(1, i)
                                passed[vi] = exp(total[slot, head0 + h], acc, tile.exact)
                        product("scored", C, C, P, acc)(
                            scored, lambda i, p: as_sum(dyt[lot * C + i, p]), lambda p, j: as_sum(vt[lot * C + j, p])
                        )
                        fill("give_scored", C, C)(
                            other, lambda i, j: scored[i, j] if data == acc else T.Cast(data, scored[i, j])
                        )
                        if EXCHANGED:
                            for lane, one, n, p in T.grid(LANES, LANES, N // LANES, P // LANES):
                                with T.sblock("crossing"):
                                    vl, vo, vn, vp = T.axis.remap("SSRR", [lane, one, n, p])
                                    with T.init():
                                        crossing[vl, vo] = number(0, acc)
                                    crossing[vl, vo] = crossing[vl, vo] + as_sum(
                                        st[lot * N + vn * LANES + vl, vp * LANES + vo]
                                    ) * as_sum(dst[lot * N + vn * LANES + vl, vp * LANES + vo])
                        barrier(tile)
                        if tile.ahead:  # not before this barrier: in this place are the lines of the head before
                            get_lines_again(tokens_t, place_of(at) * LINES, head_lines(coming(at)))
                        decayed = T.meta_var(
                            lambda i, j: as_sum(other[i, j]) * decay(tile, here, i, j, meets(i, j, causal, strict))
                        )
                        if EXCHANGED:
                            for i, j in T.grid(C, C):
                                with T.sblock("weigh"):  # both at once, of one decay
                                    vi, vj = T.axis.remap("SS", [i, j])
                                    weight[vi, vj] = T.Cast(data, u(vi) * w(vj) * decayed(vi, vj))
                                    pairs[vi, vj] = as_sum(gt[vi, vj]) * decayed(vi, vj)
                        else:
                            fill("weigh", C, C)(weight, lambda i, j: T.Cast(data, u(i) * w(j) * decayed(i, j)))
                        fill("put", C, C)(weights, lambda i, j: weight[i, j])
                        barrier(tile)
                        if EXCHANGED:  # noqa: SIM102  # one is Python's, the other the program's
                            if part == 0:
                                for lane, i, j in T.grid(PAIR_LANES, C, C // PAIR_LANES):
                                    with T.sblock("row_lanes"):
                                        vl, vi, vj = T.axis.remap("SSR", [lane, i, j])
                                        with T.init():
                                            row_lanes[vl, vi] = number(0, acc)
                                        row_lanes[vl, vi] = row_lanes[vl, vi] + pairs[vi, vj * PAIR_LANES + vl] * w(
                                            vj * PAIR_LANES + vl
                                        ) * one_if(meets(vi, vj * PAIR_LANES + vl, causal, distance), acc)
                                for lane, j, i in T.grid(PAIR_LANES, C, C // PAIR_LANES):
                                    with T.sblock("col_lanes"):
                                        vl, vj, vi = T.axis.remap("SSR", [lane, j, i])
                                        with T.init():
                                            col_lanes[vl, vj] = number(0, acc)
                                        col_lanes[vl, vj] = col_lanes[vl, vj] + pairs[vi * PAIR_LANES + vl, vj] * u(
                                            vi * PAIR_LANES + vl
                                        ) * one_if(meets(vi * PAIR_LANES + vl, vj, causal, distance), acc)
                                near_sums(C, acc)(pairs, near_rows, near_cols, u, w, causal, distance)
                        product("reads_q", C, N, P, acc)(
                            read_q, lambda i, p: as_sum(dyt[lot * C + i, p]), lambda p, n: as_sum(st[lot * N + n, p])
                        )
                        product("values_q", C, N, C, acc)(
                            inside_q, lambda i, j: as_sum(weights[i, j]), lambda j, n: as_sum(kt[j, n])
                        )
                        if EXCHANGED:
                            fill("dots_q", N // WIDTH, C)(
                                parts_q,
                                lambda t, i: summed(WIDTH, lambda n: read_q[i, t * WIDTH + n] * as_sum(qt[i, t * WIDTH + n])),
                            )
                        fill("gather_q", C, N)(
                            next_q,
                            lambda i, n: sum_q[i, n] + (of_token(OUT_OF, i) * of_token(U, i) * read_q[i, n] + inside_q[i, n]),
                        )
                        product("reads_k", C, N, P, acc)(
                            read_k, lambda i, p: as_sum(vt[lot * C + i, p]), lambda p, n: as_sum(dst[lot * N + n, p])
                        )
                        product("values_k", C, N, C, acc)(
                            inside_k, lambda i, j: as_sum(weights[j, i]), lambda j, n: as_sum(qt[j, n])
                        )
                        if EXCHANGED:
                            fill("dots_k", N // WIDTH, C)(
                                parts_k,
                                lambda t, i: summed(WIDTH, lambda n: read_k[i, t * WIDTH + n] * as_sum(kt[i, t * WIDTH + n])),
                            )
                        fill("gather_k", C, N)(
                            next_k,
                            lambda i, n: sum_k[i, n] + (of_token(INTO, i) * of_token(W, i) * read_k[i, n] + inside_k[i, n]),
                        )
                        if EXCHANGED:
                            for one in range(LANES):
                                with T.sblock("give_through"):
                                    vo = T.axis.spatial(LANES, one)
                                    through[slot, h, part, vo] = passed[0] * summed(LANES, lambda lane: crossing[lane, vo])
                        arrive(tile)
                        barrier(tile)
                        if EXCHANGED:
                            for i in range(C):
                                with T.sblock("give_sums"):
                                    vi = T.axis.spatial(C, i)
                                    T.where(part == 0)
                                    sums[slot, h, 0, vi] = summed(PAIR_LANES, lambda lane: row_lanes[lane, vi])
                                    sums[slot, h, 1, vi] = near_rows[vi]
                                    sums[slot, h, 2, vi] = summed(PAIR_LANES, lambda lane: col_lanes[lane, vi])
                                    sums[slot, h, 3, vi] = near_cols[vi]
                            for i in range(C):
                                with T.sblock("give_met"):
                                    vi = T.axis.spatial(C, i)
                                    met[slot, h, part, 0, vi] = of_token(OUT_OF, vi) * summed(
                                        N // WIDTH, lambda t: parts_q[t, vi]
                                    )
                                    met[slot, h, part, 1, vi] = of_token(INTO, vi) * summed(
                                        N // WIDTH, lambda t: parts_k[t, vi]
                                    )
                        if not tile.ahead:
                            barrier(tile)
                    fill("turn_q", C, N)(sum_q, lambda i, n: next_q[i, n])
                    fill("turn_k", C, N)(sum_k, lambda i, n: next_k[i, n])
                for i, n in T.grid(C, N):
                    with T.sblock("leave_q"):
                        vi, vn = T.axis.remap("SS", [i, n])
                        dq[slot, run, vi, part * N + vn] = sum_q[vi, vn]
                for i, n in T.grid(C, N):
                    with T.sblock("leave_k"):
                        vi, vn = T.axis.remap("SS", [i, n])
                        dk[slot, run, vi, part * N + vn] = sum_k[vi, vn]

    return main
