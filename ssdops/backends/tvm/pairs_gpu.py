"""The tensor program of tiles of pairs on a GPU: `pairs.py` has the same for a CPU, called with the same.

Products multiply `tile.data` and sum up in registers; what scores weigh is worked out in `tile.acc`, from shared memory.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from ..quadratic.formula import counts
from .blocks import arrive, fetch, fill, store
from .pairs import Factors, Operands, bounded, has, nearest, of_batch, own, weighed
from .parts import barrier, near, number, summed
from .tile import ENTRIES, LAGS, LOGS, PAIR_LANES, ROWS, SCALES, Tile

ADD = """
#ifndef SSDOPS_ADD
#define SSDOPS_ADD
__forceinline__ __device__ void ssdops_add(float* to, float value) { *to += value; }
#endif
"""
"""To what is there: as two buffers TVM would have CUDA believe that nobody writes what is read."""


@T.macro
def add(to, value):
    """One thread at a time adds to a number."""
    T.evaluate(T.cuda.func_call("ssdops_add", to, value, source_code=ADD))


def pairs_gpu(tile: Tile) -> Any:
    """As `pairs.pairs`, whose parameters these are; x, y, z and w are of the dtype that products multiply.

    A step of a row of tiles: what there is of its columns, and the next step's y and w on their way where the tile loads
    ahead; products; scores to shared memory; weights; and what is made of them. Of `lags`, each program has sums of its own.
    """
    C, D, E, data, acc, whole, mode = tile.chunk, tile.inner, tile.outer, tile.data, tile.acc, tile.whole, tile.mode
    CONTRACT = mode == ""
    LOCAL = mode in ("", ROWS)
    GENERAL, held = tile.formula is not None, counts(tile.formula)
    OF_ROW, OF_COL, OF_LAG = held["row"], held["col"], held["lag"]
    HELD, SUMMED, AHEAD = 1 + tile.ahead, PAIR_LANES, tile.ahead
    WEIGHT = data if CONTRACT else acc

    @T.prim_func(s_tir=True)
    def main(
        x_: T.handle, y_: T.handle, z_: T.handle, w_: T.handle, u_rows_: T.handle, u_cols_: T.handle, rows_: T.handle,
        cols_: T.handle, lags_: T.handle, entries_: T.handle, leaf_rows_: T.handle, leaf_cols_: T.handle,
        leaf_lags_: T.handle, table_: T.handle, out_: T.handle, there_: T.handle, bounds_: T.handle, scale: T.float64,
        seqlen: T.int64, nheads: T.int64, of_rows: T.int64, of_heads: T.int64, of_tiles: T.int64, in_rows: T.int64,
        in_heads: T.int64, in_tiles: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": LOCAL})
        given = T.meta_var(
            Operands(
                tile, data, x_, y_, z_, w_, u_rows_, u_cols_, rows_, cols_, lags_, entries_, leaf_rows_, leaf_cols_, leaf_lags_,
                table_, out_, there_, bounds_,
            )
        )  # fmt: skip
        values = T.meta_var(given.z if CONTRACT else given.w)
        for of_tile, of_head, of_row in T.grid(of_tiles, of_heads, of_rows):  # of which only the first may be very many
            with T.sblock("program"):
                ot, oh, ob = T.axis.remap("SSS", [of_tile, of_head, of_row])
                place = T.sblock_alloc_buffer((4,), "int64")
                owner = T.sblock_alloc_buffer((5,), "int64")
                here = T.sblock_alloc_buffer((1,), "int64")
                there_at = T.sblock_alloc_buffer((1,), "int64")
                edge = T.sblock_alloc_buffer((8,), "int32")
                one = T.sblock_alloc_buffer((1,), acc)
                full = T.sblock_alloc_buffer((C, C), acc)
                other = T.sblock_alloc_buffer((C, C), acc)
                weights = T.sblock_alloc_buffer((C, C), WEIGHT)
                state = T.sblock_alloc_buffer((C, E), acc)
                after = T.sblock_alloc_buffer((C, E), acc)
                left = T.sblock_alloc_buffer((C, E), acc)
                lanes = T.sblock_alloc_buffer((2, C, SUMMED), acc)
                more = T.sblock_alloc_buffer((2, C, SUMMED), acc)
                # what is written here keeps its place in shared memory
                fill("clear_low", C, C)(full, lambda i, j: number(0, acc))
                fill("clear_out", C, C)(weights, lambda i, j: T.Cast(WEIGHT, 0))
                if CONTRACT:
                    for i in range(1):
                        with T.sblock("one"):
                            vi = T.axis.spatial(1, i)
                            one[vi] = number(1, acc)
                    fill("clear_q", C, E)(state, lambda i, o: number(0, acc))
                else:
                    fill("clear_other", C, C)(other, lambda i, j: number(0, acc))
                if mode == ROWS:
                    fill("clear_lanes", 2, C, SUMMED)(lanes, lambda which, i, lane: number(0, acc))
                for in_row, in_head, in_tile in T.grid(in_rows, in_heads, in_tiles):
                    with T.sblock("part"):
                        vb = T.axis.spatial(1 << 40, in_row)
                        vh = T.axis.spatial(1 << 40, in_head)
                        vn = T.axis.spatial(1 << 40, in_tile)
                        b = T.meta_var(ob * in_rows + vb)
                        h = T.meta_var(oh * in_heads + vh)
                        t = T.meta_var(ot * in_tiles + vn)
                        qt = T.sblock_alloc_buffer((C, D), data)
                        dyt = T.sblock_alloc_buffer((C, E), data)
                        kt = T.sblock_alloc_buffer((HELD * C, D), data)
                        vt = T.sblock_alloc_buffer((HELD * C, E), data)
                        ut = T.sblock_alloc_buffer((2, C), "float64")
                        rt = T.sblock_alloc_buffer((C,), acc)
                        at_rows = T.sblock_alloc_buffer((OF_ROW, C), "float64")
                        i0 = T.meta_var(place[0])
                        i1 = T.meta_var(place[1])
                        end = T.meta_var(place[3])
                        first, stop = T.meta_var(given.columns(b, t))
                        count = T.meta_var((T.max(stop - first, 0) + C - 1) // C)
                        for i in range(1):
                            with T.sblock("place"):
                                vi = T.axis.spatial(1, i)
                                place[vi] = of_batch(given.table, b, t, 0)
                                place[vi + 1] = of_batch(given.table, b, t, 1)
                                place[vi + 2] = first
                                place[vi + 3] = stop
                                owner[vi] = own(given.x, h, nheads)
                                owner[vi + 1] = own(given.y, h, nheads)
                                owner[vi + 2] = own(given.z, h, nheads)
                                owner[vi + 3] = own(values, h, nheads)
                                owner[vi + 4] = own(given.entries, h, nheads) if ENTRIES in tile.factors else h
                        row = T.meta_var(lambda i: near(i0 + i, i1))
                        fill("load_q", C, D)(qt, lambda i, m: given.read(given.x, b * seqlen + row(i), owner[0], m))
                        if not CONTRACT:
                            fill("load_dy", C, E)(dyt, lambda i, o: given.read(given.z, b * seqlen + row(i), owner[2], o))
                        if LOGS in tile.factors:
                            fill("load_u", 2, C)(ut, lambda which, i: of_batch(given.u_rows, b, h, which, row(i)))
                        if SCALES in tile.factors:
                            fill("load_rows", C)(rt, lambda i: of_batch(given.rows, b, h, row(i)))
                        if GENERAL:
                            fill("leaf_rows", OF_ROW, C)(
                                at_rows, lambda leaf, i: nearest(given.leaf_rows, b, h, T.Cast("int64", leaf), row(i))
                            )
                        get_k = T.meta_var(fetch("get_k", tile, C, D, data, whole))
                        get_v = T.meta_var(fetch("get_v", tile, C, E, data, whole))
                        token = T.meta_var(lambda j: b * seqlen + near(there_at[0] + j, end))
                        of_y = T.meta_var(lambda j, m: given.read(given.y, token(j), owner[1], m))
                        of_w = T.meta_var(lambda j, o: given.read(values, token(j), owner[3], o))
                        if AHEAD:
                            for i in range(1):
                                with T.sblock("there_first"):
                                    vi = T.axis.spatial(1, i)
                                    there_at[vi] = place[2]
                            get_k(kt, 0, of_y)
                            get_v(vt, 0, of_w)
                            arrive(tile)
                            barrier(tile)
                        for step in range(count):
                            with T.sblock("coming"):
                                now = T.axis.spatial(1 << 40, step)
                                then = T.meta_var(T.min(now + 1, count - 1) if AHEAD else now)
                                to = T.meta_var(T.Cast("int32", (now + 1) % 2) if AHEAD else 0)
                                for i in range(1):
                                    with T.sblock("there"):
                                        vi = T.axis.spatial(1, i)
                                        there_at[vi] = place[2] + then * C
                                get_k(kt, to * C, of_y)
                                get_v(vt, to * C, of_w)
                            with T.sblock("chunk"):
                                vs = T.axis.spatial(1 << 40, step)
                                ct = T.sblock_alloc_buffer((2, C), "float64")
                                st = T.sblock_alloc_buffer((C,), acc)
                                line = T.sblock_alloc_buffer((2 * C,), acc)
                                at_cols = T.sblock_alloc_buffer((OF_COL, C), "float64")
                                at_lags = T.sblock_alloc_buffer((OF_LAG, 2 * C), "float64")
                                summed_t = T.sblock_alloc_buffer((C, C), acc)
                                scored = T.sblock_alloc_buffer((C, C), acc)
                                weight = T.sblock_alloc_buffer((C, C), WEIGHT)
                                inside = T.sblock_alloc_buffer((C, E), acc)
                                row_lanes = T.sblock_alloc_buffer((2, C, SUMMED), acc)
                                col_lanes = T.sblock_alloc_buffer((SUMMED, 2 * C), acc)
                                lot = T.meta_var(T.Cast("int32", vs % HELD))
                                factors = T.meta_var(Factors(ut, ct, rt, st, line, at_rows, at_cols, at_lags))
                                j0 = T.meta_var(here[0])
                                for i in range(1):
                                    with T.sblock("here"):
                                        vi = T.axis.spatial(1, i)
                                        here[vi] = place[2] + vs * C
                                for i in range(1):
                                    with T.sblock("edge"):
                                        vi = T.axis.spatial(1, i)
                                        bounded(edge, vi, given.bounds, i0, i1, j0, end)
                                col = T.meta_var(lambda j: near(j0 + j, end))
                                lag_at = T.meta_var(lambda lag: near(j0 - i0 + lag - C + seqlen, 2 * seqlen - 1))
                                if LOGS in tile.factors:
                                    fill("load_w", 2, C)(ct, lambda which, j: of_batch(given.u_cols, b, h, which, col(j)))
                                if SCALES in tile.factors:
                                    fill("load_cols", C)(st, lambda j: of_batch(given.cols, b, h, col(j)))
                                if LAGS in tile.factors:  # at j − i of the tile, from 1 − C on
                                    fill("load_lags", 2 * C)(line, lambda lag: given.lags[h, lag_at(lag)])
                                if GENERAL:
                                    fill("leaf_cols", OF_COL, C)(
                                        at_cols, lambda leaf, j: nearest(given.leaf_cols, b, h, T.Cast("int64", leaf), col(j))
                                    )
                                    fill("leaf_lags", OF_LAG, 2 * C)(
                                        at_lags,
                                        lambda leaf, lag: nearest(given.leaf_lags, h, T.Cast("int64", leaf), lag_at(lag)),
                                    )
                                if not AHEAD:
                                    barrier(tile)
                                for i, j, m in T.grid(C, C, D):
                                    with T.sblock("product"):
                                        vi, vj, vm = T.axis.remap("SSR", [i, j, m])
                                        with T.init():
                                            summed_t[vi, vj] = number(0, acc)
                                        summed_t[vi, vj] = summed_t[vi, vj] + T.Cast(acc, qt[vi, vm]) * T.Cast(
                                            acc, kt[lot * C + vj, vm]
                                        )
                                if not CONTRACT:
                                    for i, j, o in T.grid(C, C, E):
                                        with T.sblock("scored"):
                                            vi, vj, vo = T.axis.remap("SSR", [i, j, o])
                                            with T.init():
                                                scored[vi, vj] = number(0, acc)
                                            scored[vi, vj] = scored[vi, vj] + T.Cast(acc, dyt[vi, vo]) * T.Cast(
                                                acc, vt[lot * C + vj, vo]
                                            )
                                fill("show_state", C, C)(full, lambda i, j: summed_t[i, j])
                                if not CONTRACT:
                                    fill("show_other", C, C)(other, lambda i, j: scored[i, j])
                                barrier(tile)
                                fill("weigh", C, C)(
                                    weight,
                                    lambda i, j: T.Cast(
                                        WEIGHT,
                                        T.Select(
                                            has(edge, i, j),
                                            weighed(
                                                tile,
                                                T.Cast(acc, scale) * (full[i, j] if CONTRACT else full[i, j] * other[i, j]),
                                                i,
                                                j,
                                                factors,
                                                lambda: of_batch(given.entries, b, owner[4], row(i), col(j)),
                                            ),
                                            number(0, acc),
                                        ),
                                    ),
                                )
                                fill("put", C, C)(weights, lambda i, j: weight[i, j])
                                barrier(tile)
                                if CONTRACT:
                                    for i, o, j in T.grid(C, E, C):
                                        with T.sblock("values"):
                                            vi, vo, vj = T.axis.remap("SSR", [i, o, j])
                                            with T.init():
                                                inside[vi, vo] = number(0, acc)
                                            inside[vi, vo] = inside[vi, vo] + T.Cast(acc, weights[vi, vj]) * T.Cast(
                                                acc, vt[lot * C + vj, vo]
                                            )
                                    fill("carry", C, E)(after, lambda i, o: state[i, o] * one[0] + inside[i, o])
                                elif mode == ROWS:
                                    for which, i, lane, part in T.grid(2, C, SUMMED, C // SUMMED):
                                        with T.sblock("row_lanes"):
                                            vw, vi, vl, vp = T.axis.remap("SSSR", [which, i, lane, part])
                                            with T.init():
                                                row_lanes[vw, vi, vl] = number(0, acc)
                                            row_lanes[vw, vi, vl] = row_lanes[vw, vi, vl] + T.Select(
                                                T.Cast("int32", vi - (vp * SUMMED + vl) == edge[3]) == vw,
                                                weights[vi, vp * SUMMED + vl], number(0, acc),
                                            )  # fmt: skip
                                    barrier(tile)
                                    fill("add_lanes", 2, C, SUMMED)(
                                        more, lambda which, i, lane: lanes[which, i, lane] + row_lanes[which, i, lane]
                                    )
                                elif mode == LAGS:
                                    for lane, lag, part in T.grid(SUMMED, 2 * C, C // SUMMED):
                                        with T.sblock("lag_lanes"):
                                            vl, vg, vp = T.axis.remap("SSR", [lane, lag, part])
                                            across = T.meta_var(vg - (C - 1) + vp * SUMMED + vl)
                                            with T.init():
                                                col_lanes[vl, vg] = number(0, acc)
                                            col_lanes[vl, vg] = col_lanes[vl, vg] + T.Select(
                                                T.And(across >= 0, across < C),
                                                weights[vp * SUMMED + vl, T.max(T.min(across, C - 1), 0)], number(0, acc),
                                            )  # fmt: skip
                                    barrier(tile)
                                    for lane, lag in T.grid(SUMMED, 2 * C):  # so many that each is one thread's
                                        with T.sblock("give_lags"):
                                            vl, vg = T.axis.remap("SS", [lane, lag])
                                            where = T.meta_var(lambda lag: j0 - i0 + lag - C + seqlen)
                                            T.where(lane == 0 and where(lag) >= 0 and where(lag) < 2 * seqlen - 1)
                                            sum_of = T.meta_var(lambda lag: summed(SUMMED, lambda lane: col_lanes[lane, lag]))
                                            if tile.target == "cpu":
                                                given.out[ob, oh, ot, where(vg)] = given.there[ob, oh, ot, where(vg)] + sum_of(
                                                    vg
                                                )
                                            else:
                                                T.reads()
                                                T.writes(given.out[ob, oh, ot, where(vg)])
                                                add(T.address_of(given.out[ob, oh, ot, where(vg)]), sum_of(vg))
                                else:
                                    for i, j in T.grid(C, C):
                                        with T.sblock("give_entries"):
                                            vi, vj = T.axis.remap("SS", [i, j])
                                            T.where(i0 + i < i1 and j0 + j < end)
                                            if tile.target == "cpu":
                                                given.out[ob, oh, i0 + vi, j0 + vj] = (
                                                    given.there[ob, oh, i0 + vi, j0 + vj] + weights[vi, vj]
                                                )
                                            else:
                                                T.reads()
                                                T.writes(given.out[ob, oh, i0 + vi, j0 + vj])
                                                add(T.address_of(given.out[ob, oh, i0 + vi, j0 + vj]), weights[vi, vj])
                            if CONTRACT:
                                fill("turn", C, E)(state, lambda i, o: after[i, o])
                            if mode == ROWS:
                                fill("turn_lanes", 2, C, SUMMED)(lanes, lambda which, i, lane: more[which, i, lane])
                            arrive(tile)
                            barrier(tile)
                if LOCAL:
                    start = T.meta_var(of_batch(given.table, ob, ot, 0))
                    over = T.meta_var(of_batch(given.table, ob, ot, 1))
                    barrier(tile)
                    if CONTRACT:
                        fill("give_state", C, E)(left, lambda i, o: state[i, o])
                        barrier(tile)
                        store("store", C, E, whole)(
                            given.out, oh, ob * seqlen + start, ob * seqlen + over, given.e, lambda i, o: left[i, o]
                        )
                    else:
                        for which, i in T.grid(2, C):
                            with T.sblock("store_rows"):
                                vw, vi = T.axis.remap("SS", [which, i])
                                T.where(start + i < over)
                                given.out[ob, oh, vw, start + vi] = summed(SUMMED, lambda lane: lanes[vw, vi, lane])

    return main
