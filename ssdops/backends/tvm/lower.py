"""Tensor programs of a linear term, in TVM's TensorIR: sums of log decays, scores, and walks.

A row is a document, or a batch row: tokens begin[row] to end of all, cut into chunks of C tokens. ρ and κ are sums
of a chunk's log decays in walking order (`ir/terms.py`), with logs that are added to them; E is the sum of the whole chunk:

    sums       ρ_i = r_i + Σ d_t, t up to i     κ_j = Σ d_t − c_j, t up to j     E = Σ d_t
    scores     G_ij = ⟨q_i, k_j⟩
    walk       y_i  = u_i [ Σ_j exp(ρ_i − κ_j) w_j G_ij v_j + exp(ρ_i) Sᵀ q_i ]
               S    ← exp(E) S + Σ_j exp(E − κ_j) w_j k_j v_jᵀ

`scan.py` makes Y and every gradient of these, and of what tokens exchange (`exchange.py`). Numbers of rows, tokens and heads
are symbolic, and so are sizes of a head, which tiles hold padded: what is compiled in is `Tile`. The slots of a row's chunks
are ⌊begin / C⌋ + row and on, which no two rows share; `chunks` has the first token of each, and the end of its row. Rows read
their last token again where a chunk is longer than they are, with a weight of 0.

`rules.py` schedules blocks by their names. No block reads what it writes, and none writes what another accumulates in: then
each can be moved. Tiles are held as tokens come, `[tokens, size]`; a rule may turn them.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .parts import barrier, bound, chunk_begin, chunk_end, exp, first_slot, fits, meets, near, number, shared, sizes, summed, within
from .tile import EVERY, KEPT, LANES, MET, Tile


def sums(tile: Tile) -> Any:
    """ρ, κ and E of every chunk and head.

    Parameters, in order: d, r, c `[tokens, nheads]`, chunks `[slots, 2]`; ρ and κ `[tokens, nheads]`, E `[slots, nheads]`,
    all but chunks float64; and the numbers causal, row_inclusive, col_inclusive.
    """
    C = T.int64(tile.chunk)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(
        d_: T.handle, r_: T.handle, c_: T.handle, chunks_: T.handle, rho_: T.handle, kappa_: T.handle, total_: T.handle,
        seqlen: T.int64, causal: T.int64, row_inclusive: T.int64, col_inclusive: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, nheads, table = sizes(4)
        d = T.match_buffer(d_, (tokens, nheads), "float64")
        r = T.match_buffer(r_, (tokens, nheads), "float64")
        c = T.match_buffer(c_, (tokens, nheads), "float64")
        chunks = T.match_buffer(chunks_, (table, 2), "int64")
        rho = T.match_buffer(rho_, (tokens, nheads), "float64")
        kappa = T.match_buffer(kappa_, (tokens, nheads), "float64")
        total = T.match_buffer(total_, (slots, nheads), "float64")
        for slot_, head_ in T.grid(slots, nheads):
            with T.sblock("program"):
                slot, h = T.axis.remap("SS", [slot_, head_])
                logs = T.sblock_alloc_buffer((C,), "float64")
                row_sums = T.sblock_alloc_buffer((C,), "float64")
                col_sums = T.sblock_alloc_buffer((C,), "float64")
                all_sum = T.sblock_alloc_buffer((1,), "float64")
                first = T.meta_var(chunk_begin(chunks, slot, seqlen, C))
                end = T.meta_var(chunk_end(chunks, slot, seqlen, C))
                for i in range(C):
                    with T.sblock("load_line"):
                        vi = T.axis.spatial(C, i)
                        logs[vi] = T.if_then_else(first + vi < end, d[first + vi, h], T.float64(0))
                barrier(tile)
                for i, t in T.grid(C, C):
                    with T.sblock("row_sums"):
                        vi, vt = T.axis.remap("SR", [i, t])
                        with T.init():
                            row_sums[vi] = T.float64(0)
                        row_sums[vi] = row_sums[vi] + T.Select(meets(vi, vt, causal, 1 - row_inclusive), logs[vt], T.float64(0))
                for i, t in T.grid(C, C):
                    with T.sblock("col_sums"):
                        vi, vt = T.axis.remap("SR", [i, t])
                        with T.init():
                            col_sums[vi] = T.float64(0)
                        col_sums[vi] = col_sums[vi] + T.Select(meets(vi, vt, causal, 1 - col_inclusive), logs[vt], T.float64(0))
                for i, t in T.grid(1, C):
                    with T.sblock("all_sum"):
                        vi, vt = T.axis.remap("SR", [i, t])
                        with T.init():
                            all_sum[vi] = T.float64(0)
                        all_sum[vi] = all_sum[vi] + logs[vt]
                barrier(tile)
                for i in range(C):
                    with T.sblock("store_lines"):
                        vi = T.axis.spatial(C, i)
                        T.where(first + i < end)
                        rho[first + vi, h] = row_sums[vi] + (r[first + vi, h] if tile.scaled else T.float64(0))
                        kappa[first + vi, h] = col_sums[vi] - (c[first + vi, h] if tile.scaled else T.float64(0))
                for i in range(1):
                    with T.sblock("store_total"):
                        vi = T.axis.spatial(1, i)
                        total[slot, h] = all_sum[vi]

    return main


def scores(tile: Tile) -> Any:
    """G of every chunk, of heads from head0 on, out of nheads; q and k have as many or fewer, shared in groups.

    Parameters, in order: q, k `[tokens, heads of their own, size]`, chunks, G `[slots, heads, C, C]`, and the numbers head0 and
    nheads.
    """
    C, D, data, acc, whole = T.int64(tile.chunk), T.int64(tile.inner), tile.data, tile.acc, tile.whole

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(q_: T.handle, k_: T.handle, chunks_: T.handle, g_: T.handle, seqlen: T.int64, head0: T.int64, nheads: T.int64) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, heads, q_heads, k_heads, filled, table = sizes(7)
        size = T.meta_var(D if whole else filled)
        q = T.match_buffer(q_, (tokens, q_heads, size), data)
        k = T.match_buffer(k_, (tokens, k_heads, size), data)
        chunks = T.match_buffer(chunks_, (table, 2), "int64")
        g = T.match_buffer(g_, (slots, heads, C, C), acc)
        for slot_, head_ in T.grid(slots, heads):
            with T.sblock("program"):
                slot, h = T.axis.remap("SS", [slot_, head_])
                qt = T.sblock_alloc_buffer((C, D), data)
                kt = T.sblock_alloc_buffer((C, D), data)
                gt = T.sblock_alloc_buffer((C, C), acc)
                first = T.meta_var(chunk_begin(chunks, slot, seqlen, C))
                end = T.meta_var(chunk_end(chunks, slot, seqlen, C))
                for i, m in T.grid(C, D):
                    with T.sblock("load_q"):
                        vi, vm = T.axis.remap("SS", [i, m])
                        qt[vi, vm] = within(
                            whole, vm < size, q[near(first + vi, end), shared(head0 + h, nheads, q_heads), vm], data
                        )
                for i, m in T.grid(C, D):
                    with T.sblock("load_k"):
                        vi, vm = T.axis.remap("SS", [i, m])
                        kt[vi, vm] = within(
                            whole, vm < size, k[near(first + vi, end), shared(head0 + h, nheads, k_heads), vm], data
                        )
                barrier(tile)
                for i, j, m in T.grid(C, C, D):
                    with T.sblock("product"):
                        vi, vj, vm = T.axis.remap("SSR", [i, j, m])
                        with T.init():
                            gt[vi, vj] = number(0, acc)
                        gt[vi, vj] = gt[vi, vj] + T.Cast(acc, qt[vi, vm]) * T.Cast(acc, kt[vj, vm])
                for i, j in T.grid(C, C):
                    with T.sblock("give"):
                        vi, vj = T.axis.remap("SS", [i, j])
                        g[slot, h, vi, vj] = gt[vi, vj]

    return main


def walk(tile: Tile) -> Any:
    """y and the state that leaves, of every row, head and part of v, from the state that enters.

    Parameters, in order: q, k, v `[tokens, heads of their own, size]`; g `[slots, heads of its own, C, C]`; ρ, κ `[tokens,
    nheads]`, E `[slots, nheads]`, float64; u, w `[tokens, nheads]`; begin `[rows + 1]`; of the `count` heads from head0 on that
    are walked, entering `[rows, count, inner, outer]`, y `[tokens, y_heads, outer]` from head y0 on, leaving; then, as the mode
    says, own `[tokens, heads of its own, outer]`, dots `[tokens, count, parts]` = ⟨own_i, exp(ρ_i) Sᵀ q_i⟩, kept `[slots,
    count, inner, outer]`, met, which another walk has kept, and through `[slots, count, parts]` = ⟨met, exp(E) S⟩; and the
    numbers head0, y0, g0 and g_share (head h has the scores of head (h − g0) / g_share), causal, strict.
    """
    C, D1, D2, data, acc = T.int64(tile.chunk), T.int64(tile.inner), T.int64(tile.outer), tile.data, tile.acc
    FLIPPED, KEEP, MEET, SCALED = tile.flipped, tile.mode in (KEPT, EVERY), tile.mode == MET, tile.scaled
    whole, exact, keeping = tile.whole, data == acc, acc if tile.mode == EVERY else data

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(
        q_: T.handle, k_: T.handle, v_: T.handle, g_: T.handle, rho_: T.handle, kappa_: T.handle, total_: T.handle,
        u_: T.handle, w_: T.handle, begin_: T.handle, entering_: T.handle, y_: T.handle, leaving_: T.handle, own_: T.handle,
        dots_: T.handle, kept_: T.handle, met_: T.handle, through_: T.handle, head0: T.int64, y0: T.int64, g0: T.int64,
        g_share: T.int64, u_scale: T.float64, w_scale: T.float64, enters: T.int64, seqlen: T.int64, causal: T.int64, strict: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, kept_slots, met_slots, rows, ends, entering_rows, nheads, count, parts = sizes(10)
        q_heads, k_heads, v_heads, g_heads, own_heads, y_heads, scale_tokens, scale_heads, dot_tokens = sizes(9)
        inner_filled, outer_filled = sizes(2)
        # as multiples of tiles where they are, so that addresses of vectors are seen to be multiples too
        inner = T.meta_var(D1 if whole else inner_filled)
        outer = T.meta_var(parts * D2 if whole else outer_filled)
        q = T.match_buffer(q_, (tokens, q_heads, inner), data)
        k = T.match_buffer(k_, (tokens, k_heads, inner), data)
        v = T.match_buffer(v_, (tokens, v_heads, outer), data)
        g = T.match_buffer(g_, (slots, g_heads, C, C), acc)
        rho = T.match_buffer(rho_, (tokens, nheads), "float64")
        kappa = T.match_buffer(kappa_, (tokens, nheads), "float64")
        total = T.match_buffer(total_, (slots, nheads), "float64")
        u = T.match_buffer(u_, (scale_tokens, scale_heads), acc)
        w = T.match_buffer(w_, (scale_tokens, scale_heads), acc)
        begin = T.match_buffer(begin_, (ends,), "int64")
        entering = T.match_buffer(entering_, (entering_rows, count, inner, outer), acc)
        y = T.match_buffer(y_, (tokens, y_heads, outer), data)
        leaving = T.match_buffer(leaving_, (rows, count, inner, outer), acc)
        own = T.match_buffer(own_, (tokens, own_heads, outer), data)
        dots = T.match_buffer(dots_, (dot_tokens, count, parts), acc)
        kept = T.match_buffer(kept_, (kept_slots, count, inner, outer), keeping)
        met = T.match_buffer(met_, (met_slots, count, inner, outer), keeping)
        through = T.match_buffer(through_, (met_slots, count, parts), acc)
        for row_, head_, part_ in T.grid(rows, count, parts):
            with T.sblock("program"):
                row, h, part = T.axis.remap("SSS", [row_, head_, part_])
                state = T.sblock_alloc_buffer((D1, D2), acc)
                after = T.sblock_alloc_buffer((D1, D2), acc)
                start = T.meta_var(bound(begin, row, seqlen))
                end = T.meta_var(bound(begin, row + 1, seqlen))
                chunk_count = T.meta_var((end - start + C - 1) // C)
                for m, p in T.grid(D1, D2):
                    with T.sblock("enter"):
                        vm, vp = T.axis.remap("SS", [m, p])
                        state[vm, vp] = T.if_then_else(
                            enters == 1,
                            within(
                                whole, vm < inner and part * D2 + vp < outer, entering[row, h, vm, part * D2 + vp], acc
                            ),
                            number(0, acc),
                        )
                for step in range(chunk_count):
                    with T.sblock("chunk"):
                        at = T.axis.spatial(1 << 40, step)
                        rho_t = T.sblock_alloc_buffer((C,), "float64")
                        kappa_t = T.sblock_alloc_buffer((C,), "float64")
                        passed = T.sblock_alloc_buffer((1,), acc)  # exp(E)
                        w_t = T.sblock_alloc_buffer((C,), acc)
                        into = T.sblock_alloc_buffer((C,), acc)
                        out_of = T.sblock_alloc_buffer((C,), acc)
                        qt = T.sblock_alloc_buffer((C, D1), data)
                        kt = T.sblock_alloc_buffer((C, D1), data)
                        vt = T.sblock_alloc_buffer((C, D2), data)
                        low = T.sblock_alloc_buffer((D1, D2), data)
                        weights = T.sblock_alloc_buffer((C, C), data)
                        read = T.sblock_alloc_buffer((C, D2), acc)
                        inside = T.sblock_alloc_buffer((C, D2), acc)
                        out = T.sblock_alloc_buffer((C, D2), acc)
                        shown = T.sblock_alloc_buffer((C, D2), acc)
                        added = T.sblock_alloc_buffer((D1, D2), acc)
                        lanes = T.sblock_alloc_buffer((C, LANES), acc)
                        passing = T.sblock_alloc_buffer((D2,), acc)
                        chunk = T.meta_var(T.Select(causal == 1, at, chunk_count - 1 - at))
                        first = T.meta_var(start + chunk * C)
                        slot = T.meta_var(first_slot(begin, row, seqlen, C) + chunk)
                        for i in range(C):
                            with T.sblock("load_lines"):
                                vi = T.axis.spatial(C, i)
                                rho_t[vi] = rho[near(first + vi, end), head0 + h]
                                kappa_t[vi] = kappa[near(first + vi, end), head0 + h]
                                w_t[vi] = T.Cast(acc, w_scale) * T.if_then_else(
                                    first + vi < end,
                                    w[near(first + vi, end), head0 + h] if SCALED else number(1, acc),
                                    number(0, acc),
                                )
                        for i in range(1):
                            with T.sblock("pass"):
                                vi = T.axis.spatial(1, i)
                                passed[vi] = exp(total[slot, head0 + h], acc)
                        barrier(tile)
                        for i in range(C):
                            with T.sblock("factors"):
                                vi = T.axis.spatial(C, i)
                                into[vi] = exp(total[slot, head0 + h] - kappa_t[vi], acc) * w_t[vi]
                                out_of[vi] = exp(rho_t[vi], acc)
                        barrier(tile)
                        for i, m in T.grid(C, D1):
                            with T.sblock("load_q"):
                                vi, vm = T.axis.remap("SS", [i, m])
                                qt[vi, vm] = T.Cast(
                                    data,
                                    out_of[vi]
                                    * within(
                                        whole,
                                        vm < inner,
                                        T.Cast(acc, q[near(first + vi, end), shared(head0 + h, nheads, q_heads), vm]),
                                        acc,
                                    ),
                                )
                        for i, m in T.grid(C, D1):
                            with T.sblock("load_k"):
                                vi, vm = T.axis.remap("SS", [i, m])
                                kt[vi, vm] = T.Cast(
                                    data,
                                    into[vi]
                                    * within(
                                        whole,
                                        vm < inner,
                                        T.Cast(acc, k[near(first + vi, end), shared(head0 + h, nheads, k_heads), vm]),
                                        acc,
                                    ),
                                )
                        for i, p in T.grid(C, D2):
                            with T.sblock("load_v"):
                                vi, vp = T.axis.remap("SS", [i, p])
                                vt[vi, vp] = within(
                                    whole,
                                    part * D2 + vp < outer,
                                    v[near(first + vi, end), shared(head0 + h, nheads, v_heads), part * D2 + vp],
                                    data,
                                )
                        for i, j in T.grid(C, C):
                            with T.sblock("weigh"):
                                vi, vj = T.axis.remap("SS", [i, j])
                                weights[vi, vj] = T.Cast(
                                    data,
                                    T.Select(
                                        meets(vi, vj, causal, strict),
                                        g[slot, T.truncdiv(head0 + h - g0, g_share), vj if FLIPPED else vi, vi if FLIPPED else vj]
                                        * exp(rho_t[vi] - kappa_t[vj], acc, exact)
                                        * w_t[vj],
                                        number(0, acc),
                                    ),
                                )
                        for m, p in T.grid(D1, D2):
                            with T.sblock("round"):
                                vm, vp = T.axis.remap("SS", [m, p])
                                low[vm, vp] = T.Cast(data, state[vm, vp])
                        if KEEP:
                            for m, p in T.grid(D1, D2):
                                with T.sblock("keep"):
                                    vm, vp = T.axis.remap("SS", [m, p])
                                    T.where(fits(whole, m, inner) and fits(whole, part * D2 + p, outer))
                                    kept[slot, h, vm, part * D2 + vp] = T.Cast(keeping, state[vm, vp])
                        if MEET:
                            for p, m in T.grid(D2, D1):
                                with T.sblock("passing"):
                                    vp, vm = T.axis.remap("SR", [p, m])
                                    with T.init():
                                        passing[vp] = number(0, acc)
                                    passing[vp] = passing[vp] + state[vm, vp] * T.Cast(
                                        acc,
                                        within(
                                            whole,
                                            vm < inner and part * D2 + vp < outer,
                                            met[slot, h, vm, part * D2 + vp],
                                            keeping,
                                        ),
                                    )
                        barrier(tile)
                        if MEET:
                            for i in range(1):
                                with T.sblock("passed"):
                                    vi = T.axis.spatial(1, i)
                                    through[slot, h, part] = passed[vi] * summed(tile.outer, lambda p: passing[p])
                        for i, p, m in T.grid(C, D2, D1):
                            with T.sblock("reads"):
                                vi, vp, vm = T.axis.remap("SSR", [i, p, m])
                                with T.init():
                                    read[vi, vp] = number(0, acc)
                                read[vi, vp] = read[vi, vp] + T.Cast(acc, qt[vi, vm]) * T.Cast(acc, low[vm, vp])
                        for i, p, j in T.grid(C, D2, C):
                            with T.sblock("values"):
                                vi, vp, vj = T.axis.remap("SSR", [i, p, j])
                                with T.init():
                                    inside[vi, vp] = number(0, acc)
                                inside[vi, vp] = inside[vi, vp] + T.Cast(acc, weights[vi, vj]) * T.Cast(acc, vt[vj, vp])
                        for m, p, j in T.grid(D1, D2, C):
                            with T.sblock("update"):
                                vm, vp, vj = T.axis.remap("SSR", [m, p, j])
                                with T.init():
                                    added[vm, vp] = number(0, acc)
                                added[vm, vp] = added[vm, vp] + T.Cast(acc, kt[vj, vm]) * T.Cast(acc, vt[vj, vp])
                        for m, p in T.grid(D1, D2):
                            with T.sblock("carry"):
                                vm, vp = T.axis.remap("SS", [m, p])
                                after[vm, vp] = state[vm, vp] * passed[0] + added[vm, vp]
                        barrier(tile)
                        for i, p in T.grid(C, D2):
                            with T.sblock("join"):
                                vi, vp = T.axis.remap("SS", [i, p])
                                out[vi, vp] = read[vi, vp] + inside[vi, vp]
                        if tile.mode in (KEPT, MET):
                            for i, p in T.grid(C, D2):
                                with T.sblock("show"):
                                    vi, vp = T.axis.remap("SS", [i, p])
                                    shown[vi, vp] = read[vi, vp]
                        barrier(tile)
                        for i, p in T.grid(C, D2):
                            with T.sblock("store"):
                                vi, vp = T.axis.remap("SS", [i, p])
                                T.where(first + i < end and fits(whole, part * D2 + p, outer))
                                y[first + vi, y0 + h, part * D2 + vp] = T.Cast(
                                    data,
                                    T.Cast(acc, u_scale) * (u[first + vi, head0 + h] if SCALED else number(1, acc)) * out[vi, vp],
                                )
                        if tile.mode in (KEPT, MET):
                            for i, lane, p in T.grid(C, LANES, D2 // LANES):
                                with T.sblock("dot_lanes"):
                                    vi, vl, vp = T.axis.remap("SSR", [i, lane, p])
                                    with T.init():
                                        lanes[vi, vl] = number(0, acc)
                                    lanes[vi, vl] = lanes[vi, vl] + shown[vi, vp * LANES + vl] * T.Cast(
                                        acc,
                                        within(
                                            whole,
                                            part * D2 + vp * LANES + vl < outer,
                                            own[
                                                near(first + vi, end),
                                                shared(head0 + h, nheads, own_heads),
                                                part * D2 + vp * LANES + vl,
                                            ],
                                            data,
                                        ),
                                    )
                            barrier(tile)
                            for i in range(C):
                                with T.sblock("dot"):
                                    vi = T.axis.spatial(C, i)
                                    T.where(first + i < end)
                                    dots[first + vi, h, part] = summed(LANES, lambda lane: lanes[vi, lane])
                    for m, p in T.grid(D1, D2):
                        with T.sblock("turn"):
                            vm, vp = T.axis.remap("SS", [m, p])
                            state[vm, vp] = after[vm, vp]
                barrier(tile)
                for m, p in T.grid(D1, D2):
                    with T.sblock("leave"):
                        vm, vp = T.axis.remap("SS", [m, p])
                        T.where(fits(whole, m, inner) and fits(whole, part * D2 + p, outer))
                        leaving[row, h, vm, part * D2 + vp] = state[vm, vp]

    return main
