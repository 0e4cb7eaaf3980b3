"""The tensor program of a backward pass on a CPU: dQ, dK and dV in one walk along rows, against the term's direction."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .blocks import fill, locate, store
from .parts import bound, decay, exp, fits, meets, near, number, shared, sizes, summed, under, within
from .products import add, adding, given, onto, product
from .tile import INTO, LANES, LINES, MOST, OUT_OF, SEGMENT, Tile, U, W

PASSING = 4
"""Rows of partial sums of what passes a chunk."""


def gradients(tile: Tile) -> Any:
    """Gradients of q, k, v and the entering state, and what tokens exchange through states, of heads from head0 on.

    Backwards from the cotangent D of the state that leaves, with S the state that enters a chunk, both `[headdim, dstate]`:

        X_ij = u_i exp(ρ_i − κ_j) w_j ⟨dy_i, v_j⟩             M_ij = u_i exp(ρ_i − κ_j) w_j ⟨q_i, k_j⟩
        dq_i = Σ_j X_ij k_j + u_i exp(ρ_i) Sᵀ dy_i            dv_j = Σ_i M_ij dy_i + w_j exp(E − κ_j) D k_j
        dk_j = Σ_i X_ij q_i + w_j exp(E − κ_j) Dᵀ v_j         D    ← exp(E) D + Σ_i u_i exp(ρ_i) dy_i q_iᵀ

    `together` heads that share q and k are walked chunk by chunk, so that Σ_j X_ij k_j and Σ_i X_ij q_i are products of the sum
    of their X. States come where segments of `SEGMENT` chunks begin, and are worked out again inside one.

    Parameters, in order: q, k `[tokens, heads of their own, N]`; v, dy `[tokens, heads of their own, P]`; qk `[slots, heads of
    its own, C, C]`, yv `[slots, count, C, C]`; lines and E of `lines`; begin `[rows + 1]`; starts `[segments, nheads, N, P]`;
    entering and leaving `[rows, nheads, P, N]`, D at either end; dq, dk, dv `[tokens, lanes, size]`, and the same once more, as
    what is there already is added to; entered = ⟨q_i, exp(ρ_i) Sᵀ dy_i⟩ and left = ⟨k_j, exp(E − κ_j) Dᵀ v_j⟩, `[tokens, count,
    1]`; through = ⟨S, exp(E) D⟩ `[slots, count, 1]`; and the numbers head0, enters (whether a cotangent does), seqlen, causal,
    strict, and of q, k and v into how many lanes each of their heads is spread: programs that run at once write to lanes of
    their own, and the first that comes to a lane does not add; and together.
    """
    C, N, P, Z, data, whole = tile.chunk, tile.inner, tile.outer, SEGMENT, tile.data, tile.whole

    @T.prim_func(s_tir=True)
    def main(
        q_: T.handle, k_: T.handle, v_: T.handle, dy_: T.handle, qk_: T.handle, yv_: T.handle, lines_: T.handle,
        total_: T.handle, begin_: T.handle, starts_: T.handle, entering_: T.handle, leaving_: T.handle, dq_: T.handle,
        dk_: T.handle, dv_: T.handle, dq_there_: T.handle, dk_there_: T.handle, dv_there_: T.handle, entered_: T.handle,
        left_: T.handle, through_: T.handle, head0: T.int64, enters: T.int64, seqlen: T.int64, causal: T.int64,
        strict: T.int64, q_spread: T.int64, k_spread: T.int64, v_spread: T.int64, together: T.int64,
    ) -> None:  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens, slots, segments, rows, ends, entering_rows, nheads, count, dot_tokens, dot_slots = sizes(10)
        q_heads, k_heads, v_heads, qk_heads, q_lanes, k_lanes, v_lanes, n_filled, p_filled = sizes(9)
        n = T.meta_var(N if whole else n_filled)
        p = T.meta_var(P if whole else p_filled)
        q = T.match_buffer(q_, (tokens, q_heads, n), data)
        k = T.match_buffer(k_, (tokens, k_heads, n), data)
        v = T.match_buffer(v_, (tokens, v_heads, p), data)
        dy = T.match_buffer(dy_, (tokens, nheads, p), data)
        qk = T.match_buffer(qk_, (slots, qk_heads, C, C), data)
        yv = T.match_buffer(yv_, (slots, count, C, C), data)
        lines = T.match_buffer(lines_, (slots, nheads, LINES, C), "float64")
        total = T.match_buffer(total_, (slots, nheads), "float64")
        begin = T.match_buffer(begin_, (ends,), "int64")
        starts = T.match_buffer(starts_, (segments, nheads, n, p), data)
        entering = T.match_buffer(entering_, (entering_rows, nheads, p, n), data)
        leaving = T.match_buffer(leaving_, (rows, nheads, p, n), data)
        dq = T.match_buffer(dq_, (tokens, q_lanes, n), data)
        dk = T.match_buffer(dk_, (tokens, k_lanes, n), data)
        dv = T.match_buffer(dv_, (tokens, v_lanes, p), data)
        dq_there = T.match_buffer(dq_there_, (tokens, q_lanes, n), data)
        dk_there = T.match_buffer(dk_there_, (tokens, k_lanes, n), data)
        dv_there = T.match_buffer(dv_there_, (tokens, v_lanes, p), data)
        entered = T.match_buffer(entered_, (dot_tokens, count, 1), data)
        left = T.match_buffer(left_, (dot_tokens, count, 1), data)
        through = T.match_buffer(through_, (dot_slots, count, 1), data)
        for row_, some_ in T.grid(rows, T.truncdiv(count, together)):
            with T.sblock("program"):
                row, some = T.axis.remap("SS", [row_, some_])
                place = T.sblock_alloc_buffer((4,), "int64")
                at = T.sblock_alloc_buffer((3,), "int64")
                lane = T.sblock_alloc_buffer((6,), "int64")  # of q, k and v, and whether another was there before
                cotangent = T.sblock_alloc_buffer((MOST, P, N), data)  # D
                states = T.sblock_alloc_buffer((Z * MOST, P, N), data)
                start = T.meta_var(place[0])
                end = T.meta_var(place[1])
                first = T.meta_var(at[0])
                slot = T.meta_var(at[1])
                index = T.meta_var(at[2])  # of a chunk in its segment
                held = T.meta_var(lambda chunk, h: chunk * MOST + h)  # where a state is
                head = T.meta_var(lambda h: head0 + some * together + h)
                q_head = T.meta_var(shared(head(0), nheads, q_heads))
                k_head = T.meta_var(shared(head(0), nheads, k_heads))
                chunk_count = T.meta_var((bound(begin, row + 1, seqlen) - bound(begin, row, seqlen) + C - 1) // C)
                chunks_here = T.meta_var((end - start + C - 1) // C)
                from_first = T.meta_var(lambda step: T.Select(causal == 1, step, chunks_here - 1 - step))
                filled = T.meta_var(lambda o, m: T.And(under(o, p), under(m, n)))
                # which block of the heads that share an operand's these are
                block = T.meta_var(lambda h, heads: T.truncdiv(T.truncmod(head(h), T.truncdiv(nheads, heads)), together))
                locate(place, begin, row, seqlen, C)
                for i in range(1):
                    with T.sblock("lanes"):
                        vi = T.axis.spatial(1, i)
                        lane[vi] = q_head * q_spread + T.truncmod(block(0, q_heads), q_spread)
                        lane[vi + 1] = T.Cast("int64", block(0, q_heads) >= q_spread)
                        lane[vi + 2] = k_head * k_spread + T.truncmod(block(0, k_heads), k_spread)
                        lane[vi + 3] = T.Cast("int64", block(0, k_heads) >= k_spread)
                fill("enter", together, P, N)(
                    cotangent,
                    lambda h, o, m: T.if_then_else(
                        enters == 1, within(whole, filled(o, m), entering[row, head(h), o, m], data), number(0, data)
                    ),
                )
                for turn in range((chunk_count + Z - 1) // Z):
                    with T.sblock("segment"):
                        vt = T.axis.spatial(1 << 40, turn)
                        segment = T.meta_var((chunks_here + Z - 1) // Z - 1 - vt)
                        inside = T.meta_var(T.min(Z, chunks_here - segment * Z))  # chunks of it
                        for h, o, m in T.grid(together, P, N):
                            with T.sblock("start"):
                                vh, vo, vm = T.axis.remap("SSS", [h, o, m])
                                states[held(0, vh), vo, vm] = within(
                                    whole, filled(vo, vm), starts[place[3] + segment, head(vh), vm, vo], data
                                )
                        for step in range(inside - 1):
                            with T.sblock("ahead"):
                                vs = T.axis.spatial(Z, step)
                                kt = T.sblock_alloc_buffer((C, N), data)
                                for i in range(1):
                                    with T.sblock("here_ahead"):
                                        vi = T.axis.spatial(1, i)
                                        at[vi] = start + from_first(segment * Z + vs) * C
                                        at[vi + 1] = place[2] + from_first(segment * Z + vs)
                                fill("load_k_ahead", C, N)(
                                    kt, lambda j, m: within(whole, under(m, n), k[near(first + j, end), k_head, m], data)
                                )
                                for h in range(together):
                                    with T.sblock("head_ahead"):
                                        vh = T.axis.spatial(together, h)
                                        into = T.sblock_alloc_buffer((C,), data)
                                        passed = T.sblock_alloc_buffer((1,), data)
                                        scaled = T.sblock_alloc_buffer((C, P), data)
                                        v_head = T.meta_var(shared(head(vh), nheads, v_heads))
                                        fill("pass_ahead", 1)(passed, lambda _: exp(total[slot, head(vh)], data))
                                        fill("weigh_cols_ahead", C)(
                                            into,
                                            lambda j: T.Cast(
                                                data, lines[slot, head(vh), INTO, j] * lines[slot, head(vh), W, j]
                                            ),
                                        )
                                        fill("scale_v_ahead", C, P)(
                                            scaled,
                                            lambda j, o: (
                                                into[j] * within(whole, under(o, p), v[near(first + j, end), v_head, o], data)
                                            ),
                                        )
                                        onto("update_ahead", P, N, C, data)(
                                            states, held(vs + 1, vh), lambda o, m: states[held(vs, vh), o, m] * passed[0],
                                            lambda o, j: scaled[j, o], lambda j, m: kt[j, m],
                                        )  # fmt: skip
                        for step in range(inside):
                            with T.sblock("chunk"):
                                vs = T.axis.spatial(Z, step)
                                qt = T.sblock_alloc_buffer((C, N), data)
                                kt = T.sblock_alloc_buffer((C, N), data)
                                k_turned = T.sblock_alloc_buffer((N, C), data)
                                qk_t = T.sblock_alloc_buffer((C, C), data)
                                passed = T.sblock_alloc_buffer((1,), data)
                                out_of = T.sblock_alloc_buffer((C,), data)
                                into = T.sblock_alloc_buffer((C,), data)
                                x_sum = T.sblock_alloc_buffer((C, C), data)
                                q_sum = T.sblock_alloc_buffer((C, N), data)
                                k_sum = T.sblock_alloc_buffer((C, N), data)
                                for i in range(1):
                                    with T.sblock("here"):
                                        vi = T.axis.spatial(1, i)
                                        at[vi] = start + from_first(segment * Z + inside - 1 - vs) * C
                                        at[vi + 1] = place[2] + from_first(segment * Z + inside - 1 - vs)
                                        at[vi + 2] = inside - 1 - vs
                                fill("load_q", C, N)(
                                    qt, lambda i, m: within(whole, under(m, n), q[near(first + i, end), q_head, m], data)
                                )
                                fill("load_k", C, N)(
                                    kt, lambda j, m: within(whole, under(m, n), k[near(first + j, end), k_head, m], data)
                                )
                                fill("turn_k", N, C)(k_turned, lambda m, j: kt[j, m])
                                fill("no_x", C, C)(x_sum, lambda i, j: number(0, data))
                                fill("no_q", C, N)(q_sum, lambda i, m: number(0, data))
                                fill("no_k", C, N)(k_sum, lambda j, m: number(0, data))
                                fill("load_g", C, C)(qk_t, lambda i, j: qk[slot, shared(head(0), nheads, qk_heads), i, j])
                                for h in range(together):
                                    with T.sblock("head"):
                                        vh = T.axis.spatial(together, h)
                                        ts = T.sblock_alloc_buffer((LINES, C), "float64")
                                        weight = T.sblock_alloc_buffer((C, C), data)
                                        weights = T.sblock_alloc_buffer((C, C), data)  # M
                                        yv_t = T.sblock_alloc_buffer((C, C), data)
                                        vt = T.sblock_alloc_buffer((C, P), data)
                                        v_turned = T.sblock_alloc_buffer((P, C), data)
                                        dyt = T.sblock_alloc_buffer((C, P), data)
                                        dy_scaled = T.sblock_alloc_buffer((C, P), data)
                                        values = T.sblock_alloc_buffer((C, P), data)
                                        from_d = T.sblock_alloc_buffer((P, C), data)
                                        from_d_turned = T.sblock_alloc_buffer((C, P), data)
                                        row_lanes = T.sblock_alloc_buffer((C, LANES), data)
                                        col_lanes = T.sblock_alloc_buffer((C, LANES), data)
                                        passing = T.sblock_alloc_buffer((PASSING, LANES), data)
                                        v_head = T.meta_var(shared(head(vh), nheads, v_heads))
                                        within_v = T.meta_var(T.truncmod(head(vh), T.truncdiv(nheads, v_heads)))
                                        for i in range(1):
                                            with T.sblock("pass"):
                                                vi = T.axis.spatial(1, i)
                                                passed[vi] = exp(total[slot, head(vh)], data)
                                                lane[vi + 4] = v_head * v_spread + T.truncmod(block(vh, v_heads), v_spread)
                                                lane[vi + 5] = T.Cast(
                                                    "int64",
                                                    block(vh, v_heads) >= v_spread or T.truncmod(within_v, together) > 0,
                                                )
                                        fill("load_lines", LINES, C)(ts, lambda which, i: lines[slot, head(vh), which, i])
                                        fill("weigh_rows", C)(out_of, lambda i: T.Cast(data, ts[OUT_OF, i] * ts[U, i]))
                                        fill("weigh_cols", C)(into, lambda j: T.Cast(data, ts[INTO, j] * ts[W, j]))
                                        fill("load_v", C, P)(
                                            vt,
                                            lambda j, o: within(whole, under(o, p), v[near(first + j, end), v_head, o], data),
                                        )
                                        fill("load_dy", C, P)(
                                            dyt,
                                            lambda i, o: within(
                                                whole, under(o, p), dy[near(first + i, end), head(vh), o], data
                                            ),
                                        )
                                        fill("turn_v", P, C)(v_turned, lambda o, j: vt[j, o])
                                        fill("scale_dy", C, P)(dy_scaled, lambda i, o: out_of[i] * dyt[i, o])
                                        product("scores", C, C, P, data)(
                                            yv_t, lambda i, o: dyt[i, o], lambda o, j: v_turned[o, j]
                                        )
                                        fill("weigh_pairs", C, C)(
                                            weight,
                                            lambda i, j: (
                                                T.Cast(data, ts[U, i] * ts[W, j])
                                                * decay(tile, ts, i, j, meets(i, j, causal, strict))
                                            ),
                                        )
                                        fill("weights", C, C)(weights, lambda i, j: weight[i, j] * qk_t[i, j])
                                        fill("sum_x", C, C)(x_sum, lambda i, j: x_sum[i, j] + weight[i, j] * yv_t[i, j])
                                        for i, j in T.grid(C, C):
                                            with T.sblock("give"):
                                                vi, vj = T.axis.remap("SS", [i, j])
                                                yv[slot, some * together + vh, vi, vj] = yv_t[vi, vj]
                                        fill("no_row_lanes", C, LANES)(row_lanes, lambda i, r: number(0, data))
                                        fill("no_col_lanes", C, LANES)(col_lanes, lambda j, r: number(0, data))
                                        fill("no_passing", PASSING, LANES)(passing, lambda r, lane: number(0, data))
                                        given("reads", C, N, P, data)(  # Sᵀ dy
                                            lambda i, m, x: (
                                                add(q_sum, out_of[i] * x, i, m), add(row_lanes, qt[i, m] * x, i, m % LANES)
                                            ),
                                            lambda i, o: dyt[i, o], lambda o, m: states[held(index, vh), o, m],
                                        )  # fmt: skip
                                        given("gives", C, N, P, data)(  # Dᵀ v
                                            lambda j, m, x: (
                                                add(k_sum, into[j] * x, j, m), add(col_lanes, kt[j, m] * x, j, m % LANES)
                                            ),
                                            lambda j, o: vt[j, o], lambda o, m: cotangent[vh, o, m],
                                        )  # fmt: skip
                                        product("reads_d", P, C, N, data)(
                                            from_d, lambda o, m: cotangent[vh, o, m], lambda m, j: k_turned[m, j]
                                        )
                                        product("values", C, P, C, data, 1 - causal)(
                                            values, lambda j, i: weights[i, j], lambda i, o: dyt[i, o]
                                        )
                                        fill("turn_d", C, P)(from_d_turned, lambda j, o: from_d[o, j])
                                        for i in range(C):
                                            with T.sblock("dots"):
                                                vi = T.axis.spatial(C, i)
                                                T.where(first + i < end)
                                                entered[first + vi, some * together + vh, 0] = T.Cast(
                                                    data, ts[OUT_OF, vi]
                                                ) * summed(LANES, lambda r: row_lanes[vi, r])
                                                left[first + vi, some * together + vh, 0] = T.Cast(data, ts[INTO, vi]) * summed(
                                                    LANES, lambda r: col_lanes[vi, r]
                                                )
                                        store("store_v", C, P, whole)(
                                            dv, lane[4], first, end, p,
                                            lambda j, o: values[j, o]
                                            + into[j] * from_d_turned[j, o]
                                            + T.if_then_else(lane[5] == 1, dv_there[first + j, lane[4], o], number(0, data)),
                                        )  # fmt: skip
                                        onto("update", P, N, C, data)(
                                            cotangent, vh,
                                            lambda o, m: adding(
                                                passing, cotangent[vh, o, m] * states[held(index, vh), o, m],
                                                (o % PASSING, m % LANES), cotangent[vh, o, m] * passed[0],
                                            ),
                                            lambda o, i: dy_scaled[i, o], lambda i, m: qt[i, m],
                                        )  # fmt: skip
                                        for i in range(1):
                                            with T.sblock("passed"):
                                                vi = T.axis.spatial(1, i)
                                                through[slot, some * together + vh, vi] = passed[0] * summed(
                                                    PASSING * LANES, lambda r: passing[r // LANES, r % LANES]
                                                )
                                for i in range(1):
                                    with T.sblock("shared_by_heads"):
                                        T.axis.spatial(1, i)
                                        q_pairs = T.sblock_alloc_buffer((C, N), data)
                                        k_pairs = T.sblock_alloc_buffer((C, N), data)
                                        product("q_pairs", C, N, C, data)(
                                            q_pairs, lambda i, j: x_sum[i, j], lambda j, m: kt[j, m]
                                        )
                                        product("k_pairs", C, N, C, data)(
                                            k_pairs, lambda j, i: x_sum[i, j], lambda i, m: qt[i, m]
                                        )
                                        store("store_q", C, N, whole)(
                                            dq, lane[0], first, end, n,
                                            lambda i, m: q_sum[i, m]
                                            + q_pairs[i, m]
                                            + T.if_then_else(lane[1] == 1, dq_there[first + i, lane[0], m], number(0, data)),
                                        )  # fmt: skip
                                        store("store_k", C, N, whole)(
                                            dk, lane[2], first, end, n,
                                            lambda j, m: k_sum[j, m]
                                            + k_pairs[j, m]
                                            + T.if_then_else(lane[3] == 1, dk_there[first + j, lane[2], m], number(0, data)),
                                        )  # fmt: skip
                for h, o, m in T.grid(together, P, N):
                    with T.sblock("leave"):
                        vh, vo, vm = T.axis.remap("SSS", [h, o, m])
                        T.where(fits(whole, o, p) and fits(whole, m, n))
                        leaving[row, head(vh), vo, vm] = cotangent[vh, vo, vm]

    return main
