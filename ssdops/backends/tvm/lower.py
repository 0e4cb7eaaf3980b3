"""Tensor programs of a linear term, in TVM's TensorIR: what there is per token, scores, and walks.

A row is a document, or a batch row: tokens begin[row] to begin[row + 1] of all, cut into chunks of C tokens. ρ and κ are sums
of a chunk's log decays in walking order (`ir/terms.py`), with logs that are added to them; E is the sum of the whole chunk:

    lines      ρ_i = r_i + Σ d_t, t up to i     κ_j = Σ d_t − c_j, t up to j     E = Σ d_t     u, w
    scores     G_ij = ⟨q_i, k_j⟩
    walk       y_i  = u_i [ Σ_j exp(ρ_i − κ_j) w_j G_ij v_j + exp(ρ_i) Sᵀ q_i ]
               S    ← exp(E) S + Σ_j exp(E − κ_j) w_j k_j v_jᵀ

`cpu.py` and `cuda.py` make Y and every gradient of these, and of what tokens exchange. Numbers of rows,
tokens and heads are symbolic, and so are sizes of a head, which tiles hold padded: what is compiled in is `Tile`. A slot is a
chunk's place in what there is per chunk: no two rows share one. Rows read their last token again where a chunk is longer than
they are, with a weight of 0.

`rules.py` schedules blocks by their names. No block reads what it writes, and none writes what another accumulates in: then
each can be moved. Tiles are held as tokens come, `[tokens, size]`; a rule may turn them. Where threads have barriers, what is
written between two of them is not read before the second, nor is what is read written.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .parts import (
    barrier,
    chunk_begin,
    chunk_end,
    exp,
    meets,
    near,
    number,
    one_if,
    shared,
    sizes,
    under,
    within,
)
from .tile import (
    ABREAST,
    INTO,
    KAPPA,
    KAPPA_LOW,
    LINES,
    OUT_OF,
    RHO,
    RHO_LOW,
    STRETCH,
    Tile,
    U,
    W,
)  # fmt: skip


def lines(tile: Tile) -> Any:
    """What there is per token, of every chunk and head.

    Parameters, in order: d, r, c `[tokens, nheads]`, u, w `[tokens, nheads]`, of which r, c, u and w are read only where the
    tile is scaled; chunks `[slots, 2]`; lines `[slots, nheads, 8, C]`, E `[slots, nheads]` float64; and the numbers
    by which u and w are multiplied, seqlen, causal, row_inclusive, col_inclusive.
    """
    C, acc, exact, SCALED, line = tile.chunk, tile.acc, tile.exact, tile.scaled, tile.line

    @T.prim_func(s_tir=True)
    def main(
        d_: T.handle, r_: T.handle, c_: T.handle, u_: T.handle, w_: T.handle, chunks_: T.handle, lines_: T.handle,
        total_: T.handle, u_scale: T.float64, w_scale: T.float64, seqlen: T.int64, causal: T.int64, row_inclusive: T.int64,
        col_inclusive: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, nheads, table, scale_tokens, scale_heads = sizes(6)
        d = T.match_buffer(d_, (tokens, nheads), tile.logs)
        r = T.match_buffer(r_, (tokens, nheads), tile.logs)
        c = T.match_buffer(c_, (tokens, nheads), tile.logs)
        u = T.match_buffer(u_, (scale_tokens, scale_heads), acc)
        w = T.match_buffer(w_, (scale_tokens, scale_heads), acc)
        chunks = T.match_buffer(chunks_, (table, 2), "int64")
        out = T.match_buffer(lines_, (slots, nheads, LINES, C), line)
        total = T.match_buffer(total_, (slots, nheads), "float64")
        for slot_, some_ in T.grid(slots, (nheads + ABREAST - 1) // ABREAST):
            with T.sblock("program"):
                slot, some = T.axis.remap("SS", [slot_, some_])
                logs = T.sblock_alloc_buffer((C, ABREAST), "float64")
                rho = T.sblock_alloc_buffer((ABREAST, C), "float64")
                kappa = T.sblock_alloc_buffer((ABREAST, C), "float64")
                before = T.sblock_alloc_buffer((ABREAST, C), "float64")
                stretches = T.sblock_alloc_buffer((ABREAST, C // STRETCH), "float64")
                all_sum = T.sblock_alloc_buffer((ABREAST, C), "float64")
                place = T.sblock_alloc_buffer((2,), "int64")
                first = T.meta_var(place[0])
                end = T.meta_var(place[1])
                for i in range(1):
                    with T.sblock("place"):
                        vi = T.axis.spatial(1, i)
                        place[vi] = chunk_begin(chunks, slot, seqlen, C)
                        place[vi + 1] = chunk_end(chunks, slot, seqlen, C)
                head = T.meta_var(lambda h: T.min(some * ABREAST + h, nheads - 1))
                of_log = T.meta_var(lambda x, i, h: T.Cast("float64", x[near(first + i, end), head(h)]))
                for i, h in T.grid(C, ABREAST):
                    with T.sblock("load_logs"):
                        vi, vh = T.axis.remap("SS", [i, h])
                        logs[vi, vh] = T.if_then_else(first + vi < end, of_log(d, vi, vh), T.float64(0))
                barrier(tile)
                for h, i, t in T.grid(ABREAST, C // STRETCH, STRETCH):
                    with T.sblock("stretches"):
                        vh, vi, vt = T.axis.remap("SSR", [h, i, t])
                        with T.init():
                            stretches[vh, vi] = T.float64(0)
                        stretches[vh, vi] = stretches[vh, vi] + logs[vi * STRETCH + vt, vh]
                barrier(tile)
                for h, i, t in T.grid(ABREAST, C, STRETCH):
                    with T.sblock("row_sums"):
                        vh, vi, vt = T.axis.remap("SSR", [h, i, t])
                        with T.init():
                            rho[vh, vi] = T.float64(0)
                        rho[vh, vi] = rho[vh, vi] + logs[vi // STRETCH * STRETCH + vt, vh] * one_if(
                            meets(vi % STRETCH, vt, causal, 1 - row_inclusive), "float64"
                        )
                for h, i, t in T.grid(ABREAST, C, STRETCH):
                    with T.sblock("col_sums"):
                        vh, vi, vt = T.axis.remap("SSR", [h, i, t])
                        with T.init():
                            kappa[vh, vi] = T.float64(0)
                        kappa[vh, vi] = kappa[vh, vi] + logs[vi // STRETCH * STRETCH + vt, vh] * one_if(
                            meets(vi % STRETCH, vt, causal, 1 - col_inclusive), "float64"
                        )
                for h, i, t in T.grid(ABREAST, C, C // STRETCH):
                    with T.sblock("before"):  # of stretches before the token's
                        vh, vi, vt = T.axis.remap("SSR", [h, i, t])
                        with T.init():
                            before[vh, vi] = T.float64(0)
                        before[vh, vi] = before[vh, vi] + stretches[vh, vt] * one_if(
                            meets(vi // STRETCH, vt, causal, 1), "float64"
                        )
                for h, i, t in T.grid(ABREAST, C, C // STRETCH):
                    with T.sblock("all_sum"):  # E, by all that want it
                        vh, vi, vt = T.axis.remap("SSR", [h, i, t])
                        with T.init():
                            all_sum[vh, vi] = T.float64(0)
                        all_sum[vh, vi] = all_sum[vh, vi] + stretches[vh, vt]
                barrier(tile)
                for h, i in T.grid(ABREAST, C):
                    with T.sblock("store_lines"):
                        vh, vi = T.axis.remap("SS", [h, i])
                        T.where(some * ABREAST + h < nheads)
                        rows = T.meta_var(before[vh, vi] + rho[vh, vi] + (of_log(r, vi, vh) if SCALED else T.float64(0)))
                        cols = T.meta_var(before[vh, vi] + kappa[vh, vi] - (of_log(c, vi, vh) if SCALED else T.float64(0)))
                        put = T.meta_var(lambda value: T.Cast(line, value))
                        out[slot, head(vh), RHO, vi] = put(rows)
                        out[slot, head(vh), KAPPA, vi] = put(cols)
                        if not exact:
                            out[slot, head(vh), RHO_LOW, vi] = put(rows - T.Cast("float64", put(rows)))
                            out[slot, head(vh), KAPPA_LOW, vi] = put(cols - T.Cast("float64", put(cols)))
                        out[slot, head(vh), OUT_OF, vi] = put(exp(rows, acc, exact))
                        out[slot, head(vh), INTO, vi] = put(exp(all_sum[vh, vi] - cols, acc, exact))
                        out[slot, head(vh), U, vi] = T.if_then_else(
                            first + vi < end,
                            put(u_scale * T.Cast("float64", u[near(first + vi, end), head(vh)] if SCALED else number(1, acc))),
                            number(0, line),
                        )
                        out[slot, head(vh), W, vi] = T.if_then_else(
                            first + vi < end,
                            put(w_scale * T.Cast("float64", w[near(first + vi, end), head(vh)] if SCALED else number(1, acc))),
                            number(0, line),
                        )
                for h in range(ABREAST):
                    with T.sblock("store_total"):
                        vh = T.axis.spatial(ABREAST, h)
                        T.where(some * ABREAST + h < nheads)
                        total[slot, head(vh)] = all_sum[vh, 0]

    return main


def scores(tile: Tile) -> Any:
    """G of every chunk, of heads from head0 on, out of nheads; q and k have as many or fewer, shared in groups.

    Parameters, in order: q, k `[tokens, heads of their own, size]`, chunks, G `[slots, heads, C, C]`, and the numbers head0 and
    nheads.
    """
    C, D, data, acc, whole = tile.chunk, tile.inner, tile.data, tile.acc, tile.whole

    @T.prim_func(s_tir=True)
    def main(
        q_: T.handle, k_: T.handle, chunks_: T.handle, g_: T.handle, seqlen: T.int64, head0: T.int64, nheads: T.int64
    ) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, heads, q_heads, k_heads, filled, table = sizes(7)
        size = T.meta_var(D if whole else filled)
        q = T.match_buffer(q_, (tokens, q_heads, size), data)
        k = T.match_buffer(k_, (tokens, k_heads, size), data)
        chunks = T.match_buffer(chunks_, (table, 2), "int64")
        g = T.match_buffer(g_, (slots, heads, C, C), data)
        for slot_, head_ in T.grid(slots, heads):
            with T.sblock("program"):
                slot, h = T.axis.remap("SS", [slot_, head_])
                qt = T.sblock_alloc_buffer((C, D), data)
                kt = T.sblock_alloc_buffer((C, D), data)
                summed_t = T.sblock_alloc_buffer((C, C), acc)
                place = T.sblock_alloc_buffer((2,), "int64")
                first = T.meta_var(place[0])
                end = T.meta_var(place[1])
                for i in range(1):
                    with T.sblock("place"):
                        vi = T.axis.spatial(1, i)
                        place[vi] = chunk_begin(chunks, slot, seqlen, C)
                        place[vi + 1] = chunk_end(chunks, slot, seqlen, C)
                for i, m in T.grid(C, D):
                    with T.sblock("load_q"):
                        vi, vm = T.axis.remap("SS", [i, m])
                        qt[vi, vm] = within(
                            whole, under(vm, size), q[near(first + vi, end), shared(head0 + h, nheads, q_heads), vm], data
                        )
                for i, m in T.grid(C, D):
                    with T.sblock("load_k"):
                        vi, vm = T.axis.remap("SS", [i, m])
                        kt[vi, vm] = within(
                            whole, under(vm, size), k[near(first + vi, end), shared(head0 + h, nheads, k_heads), vm], data
                        )
                barrier(tile)
                for i, j, m in T.grid(C, C, D):
                    with T.sblock("product"):
                        vi, vj, vm = T.axis.remap("SSR", [i, j, m])
                        with T.init():
                            summed_t[vi, vj] = number(0, acc)
                        summed_t[vi, vj] = summed_t[vi, vj] + T.Cast(acc, qt[vi, vm]) * T.Cast(acc, kt[vj, vm])
                for i, j in T.grid(C, C):
                    with T.sblock("give"):
                        vi, vj = T.axis.remap("SS", [i, j])
                        g[slot, h, vi, vj] = summed_t[vi, vj] if data == acc else T.Cast(data, summed_t[vi, vj])

    return main
