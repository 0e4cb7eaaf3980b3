"""The part of `hopper.py` that goes through the states: dQ and dK, and what is summed on the way."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .gradients import ALL_STATES, IN_STATES
from .hopper_tiles import coalesced, fetch, fetch_head, lines, operand_of, rows_of, tiles


@gluon.jit
def through_states(
    q, k, v, dy, u, w, d, rho, kappa, total, states, dstates, dq, dk, sums, through, dd, met, base, area, length, lo, hi,
    nheads, groups, v_share, scale, d_scale, q_t, k_t, v_t, v_h, y_t, y_h,
    BLOCK: gl.constexpr, P: gl.constexpr, BP: gl.constexpr, N: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr,
    DK: gl.constexpr, DECAY: gl.constexpr, APART: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, SUMS: gl.constexpr,
    ALL_SUMS: gl.constexpr, DIAGONAL: gl.constexpr, VALUES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ and dK through the states, or one of them; with dQ, the sums of rows and what passes the block.

    With both and a DIAGONAL, m and the gradients of d, as ⟨dY, V⟩ is at hand here, and registers are.
    """
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BP, 16])
    row: gl.constexpr = gl.SliceLayout(1, narrow)
    whole: gl.constexpr = coalesced(BP, BN)
    AHEAD: gl.constexpr = STAGES - 1
    i = gl.arange(0, BLOCK, row)
    if DIAGONAL:  # before there are the rooms, which leave no room for sums
        beside, of_diagonal = _beside(q, k, length, q_t, k_t, row, BLOCK, N, BN) * d_scale, gl.zeros([BLOCK], gl.float32, row)
    v_room, y_room = tiles(STAGES, BLOCK, BP) if DK else None, tiles(STAGES, BLOCK, BP) if DQ else None
    s_room, ds_room = tiles(STAGES, BP, BN) if DQ else None, tiles(STAGES, BP, BN) if DK or SUMS else None
    r_room, c_room = lines(STAGES, BLOCK) if DECAY else None, lines(STAGES, BLOCK) if APART else None
    u_room, w_room = lines(STAGES, BLOCK) if DQ and ROWS else None, lines(STAGES, BLOCK) if DK and COLS else None
    d_room, passed_room = lines(STAGES, BLOCK) if VALUES else None, lines(2, BP)
    rooms, line_rooms = (s_room, v_room, y_room, ds_room), (r_room, c_room, u_room, w_room, d_room)
    tensors, line_tensors = (states, v, dy, dstates), (rho, kappa, u, w, d)
    own = tiles(1, BLOCK, BN).index(0)
    if SUMS:
        fetch(own, q, length, q_t, N)
    for ahead in gl.static_range(AHEAD):
        fetch_head(
            rooms, tensors, line_rooms, line_tensors, base, length, lo + ahead, hi, v_share, v_t, v_h, y_t, y_h, ahead,
            BLOCK, P, N,
        )  # fmt: skip
    dq_out, dk_out = gl.zeros([BLOCK, BN], gl.float32, wide), gl.zeros([BLOCK, BN], gl.float32, wide)
    log, decay = gl.load(total + base + lo) if DECAY else 0.0, 1.0
    for h in range(lo, hi):
        stage, turn, unmoved = (h - lo) % STAGES, (h - lo) % 2, h >> 30
        before, own_log = decay, log
        if DECAY:
            decay = gl.exp2(own_log)
            log = gl.load(total + base + gl.minimum(h + 1, hi - 1))
        async_copy.wait_group(AHEAD - 1)
        if SUMS:
            if h > lo:
                _pass_on(passed_room.index(1 - turn), through + base + h - 1, before)
        fetch_head(
            rooms, tensors, line_rooms, line_tensors, base, length + unmoved, h + AHEAD, hi, v_share, v_t + 16 * unmoved, v_h,
            y_t + 16 * unmoved, y_h, (h - lo + AHEAD) % STAGES, BLOCK, P, N,
        )  # fmt: skip
        fence_async_shared()
        r = gl.zeros([BLOCK], gl.float32, row)
        if DECAY:
            r = r_room.index(stage).load(row)
        if DQ:
            s = s_room.index(stage)
            if SUMS:
                y = gl.zeros([BLOCK, BP], gl.float32, narrow)
                y = warpgroup_mma(own, s.permute((1, 0)), y, use_acc=False, is_async=True)
            a = gl.exp2(r) * scale
            scaled = a
            if ROWS:
                scaled = a * u_room.index(stage).load(row)
            yt = rows_of(y_room.index(stage), narrow)
            dq_out = warpgroup_mma(operand_of(yt * scaled[:, None], wide), s, dq_out, is_async=True)
            if SUMS:
                y = warpgroup_mma_wait(1, deps=[y])
                crossed = gl.sum(y * yt, 1)
                at = (base + h) * BLOCK + i
                gl.store(sums + 2 * IN_STATES * area + at, crossed * scaled)
                if ALL_SUMS and ROWS:
                    gl.store(sums + 2 * ALL_STATES * area + at, crossed * a)
        if DK:
            c = r
            if APART:
                c = c_room.index(stage).load(row)
            b = gl.exp2(own_log - c)
            if COLS:
                b *= w_room.index(stage).load(row)
            vt = rows_of(v_room.index(stage), narrow)
            dk_out = warpgroup_mma(operand_of(vt * b[:, None], wide), ds_room.index(stage), dk_out, is_async=True)
            if DIAGONAL:
                along = gl.sum(vt * yt, 1)
                if VALUES:
                    gl.store(dd + h + i * nheads, beside * along, mask=i < length)
                    along *= d_room.index(stage).load(row)
                of_diagonal += along
        if SUMS:
            passed = s.load(whole).to(gl.float32) * ds_room.index(stage).load(whole).to(gl.float32)
            passed_room.index(turn).store(gl.sum(passed, 1))
        if DQ and DK:
            dq_out, dk_out = warpgroup_mma_wait(0, deps=[dq_out, dk_out])
        elif DQ:
            dq_out = warpgroup_mma_wait(0, deps=[dq_out])
        else:
            dk_out = warpgroup_mma_wait(0, deps=[dk_out])
    async_copy.wait_group(0)
    if SUMS:
        _pass_on(passed_room.index((hi - lo + 1) % 2), through + base + hi - 1, decay)
    if DIAGONAL:
        gl.store(met + i, of_diagonal * d_scale)
    i, n = gl.arange(0, BLOCK, gl.SliceLayout(1, wide)), gl.arange(0, BN, gl.SliceLayout(0, wide))
    place, inside = i.to(gl.int64)[:, None] * groups * N + n[None, :], (i < length)[:, None] & (n < N)[None, :]
    if DQ:
        gl.store(dq + place, dq_out.to(dq.dtype.element_ty), mask=inside)
    if DK:
        gl.store(dk + place, dk_out.to(dk.dtype.element_ty), mask=inside)


@gluon.jit
def _beside(q, k, length, q_t, k_t, row: gl.constexpr, BLOCK: gl.constexpr, N: gl.constexpr, BN: gl.constexpr):
    """⟨q_i, k_i⟩."""
    layout: gl.constexpr = coalesced(BLOCK, BN)
    i, n = gl.arange(0, BLOCK, gl.SliceLayout(1, layout)), gl.arange(0, BN, gl.SliceLayout(0, layout))
    inside = (i < length)[:, None] & (n < N)[None, :]
    qt = gl.load(q + i[:, None] * q_t + n[None, :], mask=inside, other=0.0).to(gl.float32)
    kt = gl.load(k + i[:, None] * k_t + n[None, :], mask=inside, other=0.0).to(gl.float32)
    return gl.convert_layout(gl.sum(qt * kt, 1), row)


@gluon.jit
def _pass_on(rows, out, decay):
    """exp(E) ⟨dS, S⟩, from its sums by rows."""
    EACH: gl.constexpr = max(rows.shape[0] // 32, 1)  # so that every warp has them all
    layout: gl.constexpr = gl.BlockedLayout([EACH], [32], [gl.num_warps()], [0])
    gl.store(out, gl.sum(rows.load(layout), 0) * decay)
