"""`gradients` for Hopper in bfloat16, in Gluon: products that run while the program goes on.

Triton waits for each product before it goes on. Here products are started, and waited for where their results are wanted, so
that decays and sums of one are worked out while the tensor cores have the next. The formulas are those of `gradients.py`, with
all rows of a block in a program, which has one of two parts and walks over heads:

    states   dQ = Σ_h (a_i dY) S,  dK = Σ_h (b_j V) dS,  and a_i ⟨dY_i, S q_i⟩,  ⟨dS, exp(E) S⟩
    pairs    dV = b_j K dSᵀ + (G ∘ W)ᵀ dY,  dG = Σ_h (dY Vᵀ) ∘ W,  and the other sums of tokens

Pairs are rows j by columns i, so that (G ∘ W)ᵀ goes from registers to the tensor cores as it is. G is 0 where pairs do not
meet, and for pairs (j, j), which have no decay and would drown the sums of the others: their part is added for itself.

Order matters. A program's threads meet once per head, after its tiles have come; what the last head left in shared memory is
read then, and the next tiles are sent for, as nobody reads those that they replace any more. A product must not be under way
where a loop turns: the assembler then runs all of the kernel's products one after the other. `unmoved` is 0, as no compiler
knows: addresses that are worked out with it are not kept in registers from head to head.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .gradients import ALL_PAIRS, IN_PAIRS, IN_STATES
from .hopper_states import through_states
from .hopper_tiles import (
    FLAT,
    TOKEN,
    fetch,
    fetch_head,
    lines,
    operand_of,
    rows_of,
    sums_by_warp,
    tiles,
    whole_sectors,
)
from .rows import slot_bounds

LARGE = gl.constexpr(126.0)
"""The exponent that decays of pairs which do not meet are held below: 0 · 2^126 is 0, and 0 · ∞ is not."""


@gluon.jit
def hopper_gradients(
    q, k, v, dy, u, w, cu, rho, kappa, total, states, dstates, dq, dk, dv, dg, sums, through, onto, d, dd, met,
    n_rows, seqlen, tokens, nheads, groups, q_share, k_share, v_share, scale, per_split,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, d_scale,
    BLOCK: gl.constexpr, P: gl.constexpr, BP: gl.constexpr, N: gl.constexpr, BN: gl.constexpr,
    CAUSAL: gl.constexpr, STRICT: gl.constexpr, DECAY: gl.constexpr, APART: gl.constexpr, ROWS: gl.constexpr,
    COLS: gl.constexpr, PACKED: gl.constexpr, SUMS: gl.constexpr, ALL_SUMS: gl.constexpr, ONTO: gl.constexpr,
    DIAGONAL: gl.constexpr, VALUES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: (blocks · parts, groups, splits of a group's heads), with 3 parts if BN > 128, else 2.

    Arguments are those of `gradients.gradients`, but for

        u, w: `[blocks, nheads, BLOCK]`, as `prepare` puts them, for ROWS and for COLS.
        d, dd: of a DIAGONAL beside the scan its values, likewise, and their gradients, `[tokens, nheads]`, if it has VALUES,
            else 1; d_scale is its factor. dV has in it what is its own (`diagonal.py`). There are 2 parts then.
        met: its m, `[splits, blocks, groups, BLOCK]`.
        sums: of rows, those for scales are left out without ROWS, which alone ask for them; of columns what ⟨dV, V⟩ is before
            w comes to it, as one sum, ALL_PAIRS.
        STAGES: heads that have their tiles in shared memory at once.
    """
    parts: gl.constexpr = 3 if BN > 128 else 2  # dQ and dK have registers in one program, or not
    blocks = gl.num_programs(0) // parts
    slot, part, split = gl.program_id(0) // parts, gl.program_id(0) % parts, gl.program_id(2)
    _, _, stop, first = slot_bounds(cu, slot, n_rows, seqlen, tokens, gl.arange(0, 256, TOKEN), BLOCK, PACKED)
    if first < stop:
        batch, t, share, g = first // seqlen, first % seqlen, nheads // groups, gl.program_id(1)
        q += batch * q_b + t * q_t + (g * share // q_share) * q_h
        k += batch * k_b + t * k_t + (g * share // k_share) * k_h
        v += batch * v_b + t * v_t
        dy += batch * y_b + t * y_t
        place = ((split * tokens + first) * groups + g) * N
        base, length, area = slot.to(gl.int64) * nheads, (stop - first).to(gl.int32), blocks.to(gl.int64) * nheads * BLOCK
        lo, hi = g * share + split * per_split, g * share + gl.minimum((split + 1) * per_split, share)
        if part == 0:
            _pairs(
                q, k, v, dy, u, w, d, rho, kappa, total, dstates, dv + first * nheads * P, onto + first * nheads * P,
                dg + ((split * blocks + slot).to(gl.int64) * groups + g) * BLOCK * BLOCK, sums, base, area, length, lo, hi,
                nheads, v_share, scale, d_scale, q_t, k_t, v_t, v_h, y_t, y_h,
                BLOCK, P, BP, N, BN, CAUSAL, STRICT, DECAY, APART, ROWS, COLS, SUMS, ALL_SUMS, ONTO, DIAGONAL, VALUES, STAGES,
            )  # fmt: skip
        elif part == 1:
            through_states(
                q, k, v, dy, u, w, d, rho, kappa, total, states, dstates, dq + place, dk + place, sums, through,
                dd + first * nheads, met + ((split * blocks + slot).to(gl.int64) * groups + g) * BLOCK, base, area, length,
                lo, hi, nheads, groups, v_share, scale, d_scale, q_t, k_t, v_t, v_h, y_t, y_h,
                BLOCK, P, BP, N, BN, True, parts == 2, DECAY, APART and parts == 2, ROWS, COLS and parts == 2, SUMS,
                ALL_SUMS, DIAGONAL, VALUES, STAGES,
            )  # fmt: skip
        else:
            through_states(
                q, k, v, dy, u, w, d, rho, kappa, total, states, dstates, dq + place, dk + place, sums, through, dd, met, base,
                area, length, lo, hi, nheads, groups, v_share, scale, d_scale, q_t, k_t, v_t, v_h, y_t, y_h,
                BLOCK, P, BP, N, BN, False, True, DECAY, APART, False, COLS, False, False, False, False, STAGES,
            )  # fmt: skip


@gluon.jit
def _pairs(
    q, k, v, dy, u, w, d, rho, kappa, total, dstates, dv, onto, dg, sums, base, area, length, lo, hi, nheads, v_share,
    scale, d_scale, q_t, k_t, v_t, v_h, y_t, y_h,
    BLOCK: gl.constexpr, P: gl.constexpr, BP: gl.constexpr, N: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr,
    STRICT: gl.constexpr, DECAY: gl.constexpr, APART: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr,
    SUMS: gl.constexpr, ALL_SUMS: gl.constexpr, ONTO: gl.constexpr, DIAGONAL: gl.constexpr, VALUES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dV, with what is a DIAGONAL's own, dG, and the sums of pairs and through dS."""
    HALF: gl.constexpr = BLOCK // 2
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, HALF, 16])  # [j, i], half of the i
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BP, 16])  # [j, p]
    row: gl.constexpr = gl.SliceLayout(1, narrow)
    wide_row: gl.constexpr = gl.SliceLayout(1, wide)
    wide_col: gl.constexpr = gl.SliceLayout(0, wide)
    whole: gl.constexpr = whole_sectors(BLOCK, BP)
    AHEAD: gl.constexpr = STAGES - 1
    SINGLE: gl.constexpr = BN > 128  # shared memory has room for one dS
    v_room, y_room = tiles(STAGES, BLOCK, BP), tiles(STAGES, BLOCK, BP)
    ds_room = tiles(1 if SINGLE else STAGES, BP, BN)
    r_room, c_room = lines(STAGES, BLOCK) if DECAY else None, lines(STAGES, BLOCK) if APART else None
    u_room, w_room = lines(STAGES, BLOCK) if ROWS else None, lines(STAGES, BLOCK) if COLS else None
    d_room, same_room = lines(STAGES, BLOCK) if VALUES else None, lines(2, BLOCK)
    rooms, line_rooms = (None, v_room, y_room, None if SINGLE else ds_room), (r_room, c_room, u_room, w_room, d_room)
    tensors, line_tensors = (None, v, dy, dstates), (rho, kappa, u, w, d)
    early_sums = gl.allocate_shared_memory(gl.float32, [2, gl.num_warps(), HALF], FLAT)
    late_sums = gl.allocate_shared_memory(gl.float32, [2, gl.num_warps(), HALF], FLAT)
    own, scores = tiles(1, BLOCK, BN).index(0), tiles(2, BLOCK, HALF)
    if ds_room.shape[0] * BP >= HALF:
        q_room = ds_room._reinterpret(gl.bfloat16, [HALF, BN], own.layout)  # before it is wanted for dS
    else:
        q_room = tiles(1, HALF, BN).index(0)
    fetch(own, k, length, k_t, N)
    j, i = gl.arange(0, BLOCK, wide_row), gl.arange(0, HALF, wide_col)
    nothing, same = gl.zeros([BLOCK, HALF], gl.float32, wide), gl.zeros([BLOCK], gl.float32, row)
    for half in gl.static_range(2):
        fetch(q_room, q + half * HALF * q_t, length - half * HALF, q_t, N)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        full = warpgroup_mma(own, q_room.permute((1, 0)), nothing, use_acc=False)
        apart = half * HALF + i[None, :] - j[:, None]
        same += gl.convert_layout(gl.sum(gl.where(apart == 0, full, 0.0), 1), row)
        scores.index(half).store(gl.where((apart > 0) if CAUSAL else (apart < 0), full * scale, 0.0).to(gl.bfloat16))
    beside, same = same * d_scale, same * scale
    for ahead in gl.static_range(AHEAD):
        fetch_head(
            rooms, tensors, line_rooms, line_tensors, base, length, lo + ahead, hi, v_share, v_t, v_h, y_t, y_h, ahead,
            BLOCK, P, N,
        )  # fmt: skip
    if SINGLE:
        fetch(ds_room.index(0), dstates + (base + lo) * P * N, P, N, N)
        async_copy.commit_group()
    jn, jv = gl.arange(0, BLOCK, row), gl.arange(0, BLOCK, gl.SliceLayout(1, whole))
    pv = gl.arange(0, BP, gl.SliceLayout(0, whole))
    inside = (jv < length)[:, None] & (pv < P)[None, :]
    # additions in place that a mask says to leave out are branches, and with more sums to hold they make everything spill:
    # then zeros are added, to where the last token is
    ALL: gl.constexpr = ONTO == 2 and ALL_SUMS and P == BP
    place = (gl.minimum(jv, length - 1) if ALL else jv)[:, None] * (nheads * P) + pv[None, :]
    early_out, late_out = nothing, nothing
    log = gl.load(total + base + lo) if DECAY else 0.0
    for h in range(lo, hi):
        stage, turn, unmoved = (h - lo) % STAGES, (h - lo) % 2, h >> 30
        own_log, at = log, (base + h) * BLOCK
        if DECAY:
            log = gl.load(total + base + gl.minimum(h + 1, hi - 1))
        async_copy.wait_group(AHEAD - 1)
        if SUMS:
            if h > lo:
                _add_up(
                    early_sums, late_sums, u_room, same_room, sums, base, area, h - 1, 1 - turn, (h - 1 - lo) % STAGES,
                    BLOCK, ROWS, ALL_SUMS,
                )  # fmt: skip
        fetch_head(
            rooms, tensors, line_rooms, line_tensors, base, length + unmoved, h + AHEAD, hi, v_share, v_t + 16 * unmoved, v_h,
            y_t + 16 * unmoved, y_h, (h - lo + AHEAD) % STAGES, BLOCK, P, N,
        )  # fmt: skip
        fence_async_shared()
        vs, ys, ds = v_room.index(stage), y_room.index(stage), ds_room.index(0 if SINGLE else stage)
        r_tile = r_room.index(stage) if DECAY else None
        c_tile = c_room.index(stage) if APART else r_tile
        us, ws = u_room.index(stage) if ROWS else None, w_room.index(stage) if COLS else None
        early, late = ys.slice(0, HALF), ys.slice(HALF, HALF)
        pairs = warpgroup_mma(vs, early.permute((1, 0)), nothing, use_acc=False, is_async=True)
        y = warpgroup_mma(own, ds.permute((1, 0)), gl.zeros([BLOCK, BP], gl.float32, narrow), use_acc=False, is_async=True)
        pairs = warpgroup_mma_wait(1, deps=[pairs])
        early_out, given, exchanged = _weigh(
            pairs, early_out, scores.index(0), r_tile, c_tile, us, ws, early_sums.index(turn), 0, DECAY, ROWS, COLS, SUMS,
        )  # fmt: skip
        y = warpgroup_mma_wait(0, deps=[y])
        if SINGLE:
            if h + 1 < hi:
                fetch(ds, dstates + (base + h + 1) * P * N, P, N, N)
            async_copy.commit_group()
        pairs = warpgroup_mma(vs, late.permute((1, 0)), nothing, use_acc=False, is_async=True)
        b, own_scale, here = gl.full([BLOCK], 1.0, gl.float32, row), 1.0, same
        if DECAY:
            c = c_tile.load(row)
            b = gl.exp2(own_log - c)
            if APART:
                here *= gl.exp2(r_tile.load(row) - c)
        if COLS:
            own_scale = ws.load(row)
        if SUMS:
            vt = rows_of(vs, narrow)
            crossed = gl.sum(y * vt, 1) * b
            gl.store(sums + (2 * IN_STATES + 1) * area + at + jn, crossed * own_scale)
        y *= b[:, None]
        if not STRICT:
            yt = rows_of(ys, narrow)
            if ROWS and ALL_SUMS:
                met = here * gl.sum(vt * yt, 1)
            if ROWS:
                here *= us.load(row)
            y += here[:, None] * yt
        y = warpgroup_mma(operand_of(given, narrow), early, y, is_async=True)
        pairs = warpgroup_mma_wait(1, deps=[pairs])
        late_out, given, exchanged_late = _weigh(
            pairs, late_out, scores.index(1), r_tile, c_tile, us, ws, late_sums.index(turn), 1, DECAY, ROWS, COLS, SUMS,
        )  # fmt: skip
        if SUMS:
            exchanged = gl.convert_layout(exchanged + exchanged_late, row)
            gl.store(sums + (2 * IN_PAIRS + 1) * area + at + jn, exchanged)
            if ALL_SUMS and ROWS:
                if STRICT:
                    met = gl.zeros([BLOCK], gl.float32, row)
                same_room.index(turn).store(met * own_scale)
        if ONTO == 1:
            p = gl.arange(0, BP, gl.SliceLayout(0, narrow))
            of_head = onto + h * P + jn[:, None] * (nheads * P) + p[None, :] + unmoved
            before = gl.load(of_head, mask=(jn < length + unmoved)[:, None] & (p < P)[None, :], other=0.0)
        y = warpgroup_mma_wait(0, deps=[y])
        y = warpgroup_mma(operand_of(given, narrow), late, y)
        if ALL_SUMS:
            gl.store(sums + (2 * ALL_PAIRS + 1) * area + at + jn, gl.sum(y * rows_of(vs, narrow), 1))
        if COLS:
            y *= own_scale[:, None]
        if DIAGONAL:
            own_values = beside * d_room.index(stage).load(row) if VALUES else beside
            y += own_values[:, None] * rows_of(ys, narrow)
        if ONTO == 1:
            y += before
        if ALL:
            y = gl.where((jn < length)[:, None], y, 0.0)
        found = gl.convert_layout(y.to(dv.dtype.element_ty), whole)
        if ALL:  # dV itself: nobody waits for what is there
            gl.atomic_add(dv + h * P + place, found, sem="relaxed")
        elif ONTO == 2:
            gl.atomic_add(dv + h * P + place, found, mask=inside, sem="relaxed")
        else:
            gl.store(dv + h * P + place, found, mask=inside)
    async_copy.wait_group(0)
    if SUMS:
        _add_up(
            early_sums, late_sums, u_room, same_room, sums, base, area, hi - 1, (hi - 1 - lo) % 2, (hi - 1 - lo) % STAGES,
            BLOCK, ROWS, ALL_SUMS,
        )  # fmt: skip
    for half in gl.static_range(2):
        after = half * HALF + i[None, :] - j[:, None] if CAUSAL else j[:, None] - half * HALF - i[None, :]
        out = gl.where(after >= STRICT, (late_out if half else early_out) * scale, 0.0)
        gl.store(dg + (half * HALF + i[None, :]) * BLOCK + j[:, None], out.to(dg.dtype.element_ty))


@gluon.jit
def _weigh(
    pairs, out, scores, r, c, u, w, sums, half: gl.constexpr, DECAY: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr,
    SUMS: gl.constexpr,
):  # fmt: skip
    """Of half of the columns i: dG with a head's pairs, (G ∘ W)ᵀ without w, and the sums of R over i.

    Those over j, without u, go to `sums`.
    """
    HALF: gl.constexpr = pairs.shape[1]
    layout: gl.constexpr = pairs.type.layout
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    cols: gl.constexpr = gl.SliceLayout(0, layout)
    given = rows_of(scores, layout)
    if COLS:
        pairs *= w.load(rows)[:, None]
    met = pairs
    if DECAY:
        r = r.slice(half * HALF, HALF).load(cols)
        decays = gl.exp2(gl.minimum(r[None, :] - c.load(rows)[:, None], LARGE))
        met, given = pairs * decays, given * decays
    exchanged = pairs * given
    by_i = exchanged
    if ROWS:
        own = u.slice(half * HALF, HALF).load(cols)[None, :]
        given, met, by_i = given * own, met * own, by_i * own
    if SUMS:
        sums.store(sums_by_warp(exchanged))
    return out + met, given, gl.sum(by_i, 1)


@gluon.jit
def _add_up(
    early, late, u, same, sums, base, area, h, turn, stage, BLOCK: gl.constexpr, ROWS: gl.constexpr, ALL_SUMS: gl.constexpr
):  # fmt: skip
    """The sums of R by rows i, from those of each warp."""
    HALF: gl.constexpr = BLOCK // 2
    layout: gl.constexpr = gl.BlockedLayout([gl.num_warps(), 1], [1, 32], [1, gl.num_warps()], [1, 0])
    line: gl.constexpr = gl.SliceLayout(0, layout)
    for half in gl.static_range(2):
        at = (base + h) * BLOCK + half * HALF + gl.arange(0, HALF, line)
        total = gl.sum((late if half else early).index(turn).load(layout), 0)
        own = total
        if ROWS:
            own *= u.index(stage).slice(half * HALF, HALF).load(line)
        gl.store(sums + 2 * IN_PAIRS * area + at, own)
        if ALL_SUMS and ROWS:
            met = same.index(turn).slice(half * HALF, HALF).load(line)
            gl.store(sums + 2 * ALL_PAIRS * area + at, total + met)
