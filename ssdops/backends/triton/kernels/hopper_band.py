"""A window times a decay, for Hopper in bfloat16, in Gluon: all of a row tile's scores are kept, and every head reads them.

Row tile r of BLOCK tokens sees its own tokens and those of the OFF tiles before it (after it, if the scan goes from the right).
With ρ and κ the sums of logs from the beginning of a token's own tile, m what those of row tile r are all near to, and β_j what
decays between the beginning of column j's tile and that of tile r,

    y_i = scale · exp(ρ_i − m) Σ_j S_ij exp(m + β_j − κ_j) v_j

where S is Q Kᵀ where a row sees a column, and 0 elsewhere. It is the same for all heads of a group, stays in shared memory,
and is what the tensor cores read: of a head only V is to be scaled, once for every row tile that sees it. Products are Yᵀ, of
MANY columns of V at once, which are those of one head or several: so V goes through registers, where it is scaled, to the
tensor cores. No state is made. Where the row tile's own tokens are too far apart for one m, or logs are positive and grow, m is
0, and their pairs are weighted one by one after the others.

V comes in steps of half a tile. A program's threads meet once per step, after its tokens have come: then nobody reads any more
what the step before has left, and the next are sent for there. Factors are worked out a step ahead, from what was loaded four
steps before, and Y goes to memory while the next heads are under way. `unmoved` is what `hopper.py` says.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .hopper import LARGE
from .hopper_tiles import coalesced, fetch, operand_of, rows_of, tiles

meet = getattr(gl, "barrier", None) or gl.thread_barrier  # as Triton 3.6 calls it
MANY = gl.constexpr(128)
"""Columns of V that are multiplied at once."""
APART = gl.constexpr(1e29)
"""What a center is above where there is none."""


@gluon.jit
def hopper_band(
    q, k, v, y, rho, kappa, total, center, seqlen, row_tiles, nheads, groups, q_share, k_share, v_share, width, scale,
    per_split, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    BLOCK: gl.constexpr, P: gl.constexpr, BP: gl.constexpr, N: gl.constexpr, BN: gl.constexpr, OFF: gl.constexpr,
    CAUSAL: gl.constexpr, STRICT: gl.constexpr, DECAY: gl.constexpr,
):  # fmt: skip
    """Grid: (batch · row tiles, groups, splits of a group's heads).

    Args:
        y: `[batch, seqlen, nheads, P]`.
        rho, kappa: `[row tiles, nheads, BLOCK]`, in units of log 2, and total and center `[row tiles, nheads]`, as `prepare`
            has them of blocks.
        width: how many tokens a row sees, itself among them; it is seen unless STRICT.
        BN: columns of q and k that are multiplied at once.
    """
    EACH: gl.constexpr = MANY // BP  # heads at once
    STEPS: gl.constexpr = 2 * OFF + 2
    TOWARDS: gl.constexpr = -1 if CAUSAL else 1
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK, 16])  # [column of V, i]
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    slot, g, split = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    batch, r, share = slot // row_tiles, slot % row_tiles, nheads // groups
    t0 = r * BLOCK
    length = gl.minimum(seqlen - t0, BLOCK)
    q += batch.to(gl.int64) * q_b + t0.to(gl.int64) * q_t + (g * share // q_share) * q_h
    k += batch.to(gl.int64) * k_b + t0.to(gl.int64) * k_t + (g * share // k_share) * k_h
    v += batch.to(gl.int64) * v_b + t0.to(gl.int64) * v_t
    y += (batch.to(gl.int64) * seqlen + t0) * nheads * P
    lo, hi = g * share + split * per_split, g * share + gl.minimum((split + 1) * per_split, share)
    scores = tiles(STEPS, BLOCK, BLOCK // 2)
    _scores(q, k, q_t, k_t, scores, r, row_tiles, seqlen, length, width, BLOCK, N, BN, OFF, TOWARDS, STRICT)
    rooms, made = (tiles(1, BLOCK // 2, MANY).index(0), tiles(1, BLOCK // 2, MANY).index(0)), tiles(1, BLOCK, MANY).index(0)
    _send(rooms[0], v, r, seqlen, row_tiles, lo, hi, v_share, v_t, v_h, 0, TOWARDS, BLOCK, P, BP)
    lines = ((_line(EACH, BLOCK), _line(EACH, BLOCK)), (_line(EACH, BLOCK), _line(EACH, BLOCK)))
    reads = gl.allocate_shared_memory(gl.float32, [EACH, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    if DECAY:
        rho, kappa = rho + slot.to(gl.int64) * nheads * BLOCK, kappa + slot.to(gl.int64) * nheads * BLOCK
        total, center = total + slot.to(gl.int64) * nheads, center + slot.to(gl.int64) * nheads
        middle = _of_heads(center, 0, r, row_tiles, lo, hi, EACH)
        first = _kappa(kappa, r, row_tiles, nheads, lo, hi, 0, TOWARDS, BLOCK, EACH)
        one, two, three, four = (
            _kappa(kappa, r, row_tiles, nheads, lo, hi, 1, TOWARDS, BLOCK, EACH),
            _kappa(kappa, r, row_tiles, nheads, lo, hi, 2, TOWARDS, BLOCK, EACH),
            _kappa(kappa, r, row_tiles, nheads, lo, hi, 3, TOWARDS, BLOCK, EACH),
            _kappa(kappa, r, row_tiles, nheads, lo + 4 // STEPS * EACH, hi, 4 % STEPS, TOWARDS, BLOCK, EACH),
        )
        passed = _of_heads(total + TOWARDS * nheads, TOWARDS, r, row_tiles, lo, hi, EACH)
        _split(lines[0], gl.exp2(gl.where(middle > APART, float("-inf"), middle)[:, None] - first))
    nothing = gl.zeros([MANY, BLOCK], gl.float32, wide)
    for h in range(lo, hi, EACH):
        out, unmoved = nothing, h >> 30
        for step in gl.static_range(STEPS):
            async_copy.wait_group(0)
            _send(
                rooms[(step + 1) % 2], v, r, seqlen, row_tiles, h + (step + 1) // STEPS * EACH, hi, v_share,
                v_t + 16 * unmoved, v_h, (step + 1) % STEPS, TOWARDS, BLOCK, P, BP,
            )  # fmt: skip
            if DECAY:  # factors of the next step, which may be of the next heads
                if step == 0:
                    far = gl.where(middle > APART, 0.0, middle)
                    between = gl.where(middle > APART, float("-inf"), middle)
                    late = _rho(rho, h, hi, EACH, BLOCK)
                    after = _of_heads(center, 0, r, row_tiles, h + EACH, hi, EACH)
                if step == STEPS - 1:
                    middle = after
                    between = gl.where(middle > APART, float("-inf"), middle)
                    reads.store(gl.exp2(late - far[:, None]) * scale)
                elif step % 2 == 1:
                    between = (far if step == 1 else between) + passed
                    passed = _of_heads(
                        total + TOWARDS * (step // 2 + 2 - (step + 3) // STEPS * OFF) * nheads,
                        TOWARDS * (step // 2 + 2 - (step + 3) // STEPS * OFF), r, row_tiles, h + (step + 3) // STEPS * EACH, hi,
                        EACH,
                    )  # fmt: skip
                _split(lines[(step + 1) % 2], gl.exp2(between[:, None] - one))
                one, two, three = two, three, four
                four = _kappa(
                    kappa, r, row_tiles, nheads, h + (step + 5) // STEPS * EACH, hi, (step + 5) % STEPS, TOWARDS, BLOCK, EACH
                )  # fmt: skip
            tile = rooms[step % 2].permute((1, 0)).load(left)
            if DECAY:
                tile = _scaled(tile, lines[step % 2], EACH, BP)
            out = warpgroup_mma(tile, scores.index(step).permute((1, 0)), out, use_acc=step > 0, is_async=True)
            if step > 0:
                out = warpgroup_mma_wait(1, deps=[out])
            if step == 1:
                _put(y, made, h - EACH, lo, hi, length + unmoved, nheads, P, BP)
        out = warpgroup_mma_wait(0, deps=[out])
        if DECAY:
            by: gl.constexpr = by_head(EACH, BP, BLOCK)
            out = gl.convert_layout(gl.reshape(out, [EACH, BP, BLOCK]), by)
            out *= gl.expand_dims(reads.load(gl.SliceLayout(1, by)), 1)
            out = gl.convert_layout(gl.reshape(out, [MANY, BLOCK]), wide)
        else:
            out *= scale
        made.permute((1, 0)).store(out.to(gl.bfloat16))
    _put(y, made, lo + (hi - lo - 1) // EACH * EACH, lo, hi, length, nheads, P, BP)
    if DECAY:
        for h in range(lo, hi):
            if gl.load(center + h) > APART:
                _add_own(
                    y + h * P, v, rho + h * BLOCK, kappa + h * BLOCK, scores, rooms, r, row_tiles, seqlen, length, nheads, h,
                    v_share, v_t, v_h, scale, TOWARDS, BLOCK, P, BP,
                )  # fmt: skip


@gluon.jit
def _add_own(
    y, v, rho, kappa, scores, rooms, r, row_tiles, seqlen, length, nheads, h, v_share, v_t, v_h, scale,
    TOWARDS: gl.constexpr, BLOCK: gl.constexpr, P: gl.constexpr, BP: gl.constexpr,
):  # fmt: skip
    """Add what the row tile's own tokens make, of a head where they are too far apart for factors."""
    HALF: gl.constexpr = BLOCK // 2
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, MANY, 16])  # [i, column of V]
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, HALF, 16])  # [i, j]
    async_copy.wait_group(0)
    meet()
    for part in gl.static_range(2):
        _send(rooms[part], v, r, seqlen, row_tiles, h, h + 1, v_share, v_t, v_h, part, TOWARDS, BLOCK, P, BP)
    async_copy.wait_group(0)
    fence_async_shared()
    out = gl.zeros([BLOCK, MANY], gl.float32, wide)
    late = gl.load(rho + gl.arange(0, BLOCK, gl.SliceLayout(1, half)))
    for part in gl.static_range(2):
        early = gl.load(kappa + part * HALF + gl.arange(0, HALF, gl.SliceLayout(0, half)))
        weights = rows_of(scores.index(part), half) * gl.exp2(gl.minimum(late[:, None] - early[None, :], LARGE))
        out = warpgroup_mma(operand_of(weights, wide), rooms[part], out)
    i, p = gl.arange(0, BLOCK, gl.SliceLayout(1, wide)), gl.arange(0, MANY, gl.SliceLayout(0, wide))
    place, inside = y + i[:, None] * (nheads * P) + p[None, :], (i < length)[:, None] & (p < P)[None, :]
    before = gl.load(place, mask=inside, other=0.0).to(gl.float32)
    gl.store(place, (before + out * scale).to(y.dtype.element_ty), mask=inside)


@gluon.jit
def _put(y, made, h, lo, hi, length, nheads, P: gl.constexpr, BP: gl.constexpr):
    """Store what heads have from h on, if that is one of these."""
    layout: gl.constexpr = coalesced(made.shape[0], MANY)
    i, m = gl.arange(0, made.shape[0], gl.SliceLayout(1, layout)), gl.arange(0, MANY, gl.SliceLayout(0, layout))
    real = (h >= lo) & (h + m // BP < hi) & (m % BP < P)
    place = y + i[:, None] * (nheads * P) + (h * P + m // BP * P + m % BP)[None, :]
    gl.store(place, made.load(layout).to(y.dtype.element_ty), mask=(i < length)[:, None] & real[None, :])


@gluon.jit
def _send(
    room, v, r, seqlen, row_tiles, h, hi, v_share, v_t, v_h, step: gl.constexpr, TOWARDS: gl.constexpr, BLOCK: gl.constexpr,
    P: gl.constexpr, BP: gl.constexpr,
):  # fmt: skip
    """Send for half a tile of V, of as many heads as there is room for: zeros come where there is none."""
    HALF: gl.constexpr = BLOCK // 2
    layout: gl.constexpr = coalesced(HALF, MANY)
    j, m = gl.arange(0, HALF, gl.SliceLayout(1, layout)), gl.arange(0, MANY, gl.SliceLayout(0, layout))
    there = r + TOWARDS * (step // 2)
    length = gl.where((there >= 0) & (there < row_tiles), seqlen - there * BLOCK - step % 2 * HALF, 0)
    at = v + (TOWARDS * (step // 2) * BLOCK + step % 2 * HALF) * v_t
    head = h + m // BP
    place = at + (head // v_share * v_h + m % BP)[None, :] + j[:, None] * v_t
    async_copy.async_copy_global_to_shared(room, place, mask=(j < length)[:, None] & ((head < hi) & (m % BP < P))[None, :])
    async_copy.commit_group()


@gluon.jit
def _of_heads(x, offset: gl.constexpr, r, row_tiles, h, hi, EACH: gl.constexpr):
    """A number of each of the heads from h on, 0 where the row tile at the offset is none."""
    head = h + gl.arange(0, EACH, gl.SliceLayout(1, each_token(EACH)))
    return gl.load(x + head, mask=(head < hi) & (r + offset >= 0) & (r + offset < row_tiles), other=0.0)


@gluon.jit
def _kappa(
    kappa, r, row_tiles, nheads, h, hi, step: gl.constexpr, TOWARDS: gl.constexpr, BLOCK: gl.constexpr, EACH: gl.constexpr
):  # fmt: skip
    """κ of half a tile's tokens, `[head, j]`."""
    HALF: gl.constexpr = BLOCK // 2
    layout: gl.constexpr = each_token(EACH)
    head, j = h + gl.arange(0, EACH, gl.SliceLayout(1, layout)), gl.arange(0, HALF, gl.SliceLayout(0, layout))
    there = (r + TOWARDS * (step // 2) >= 0) & (r + TOWARDS * (step // 2) < row_tiles)
    place = kappa + (TOWARDS * (step // 2) * nheads + head)[:, None] * BLOCK + step % 2 * HALF + j[None, :]
    return gl.load(place, mask=((head < hi) & there)[:, None], other=0.0)


@gluon.jit
def _rho(rho, h, hi, EACH: gl.constexpr, BLOCK: gl.constexpr):
    """ρ of the row tile's tokens, `[head, i]`."""
    layout: gl.constexpr = each_token(EACH)
    head, i = h + gl.arange(0, EACH, gl.SliceLayout(1, layout)), gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    return gl.load(rho + head[:, None] * BLOCK + i[None, :], mask=(head < hi)[:, None], other=0.0)


@gluon.jit
def _line(EACH: gl.constexpr, BLOCK: gl.constexpr):
    """Room for a number of each head and token of half a tile."""
    return gl.allocate_shared_memory(gl.bfloat16, [EACH, BLOCK // 2], as_read(EACH, BLOCK // 2))


@gluon.jit
def _split(lines, x):
    """x as the sum of two numbers of bfloat16."""
    high = x.to(gl.bfloat16)
    lines[0].store(high)
    lines[1].store((x - high.to(gl.float32)).to(gl.bfloat16))


@gluon.jit
def _scaled(tile, lines, EACH: gl.constexpr, BP: gl.constexpr):
    """A tile `[column of V, j]` with its tokens scaled and rounded once, two of its numbers at a time."""
    T: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = by_head(EACH, BP, T)
    line: gl.constexpr = gl.SliceLayout(1, layout)
    x = gl.convert_layout(gl.reshape(tile, [EACH, BP, T]), layout)
    high, low = gl.expand_dims(lines[0].load(line), 1), gl.expand_dims(lines[1].load(line), 1)
    x = gl.inline_asm_elementwise(
        "{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }", "=r,r,r,r", [x, high, low],
        dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip
    return gl.convert_layout(gl.reshape(x, tile.shape), tile.type.layout)


@gluon.jit
def _scores(
    q, k, q_t, k_t, scores, r, row_tiles, seqlen, length, width, BLOCK: gl.constexpr, N: gl.constexpr,
    BN: gl.constexpr, OFF: gl.constexpr, TOWARDS: gl.constexpr, STRICT: gl.constexpr,
):  # fmt: skip
    """S of a row tile."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK, 16])  # [i, j]
    i, j = gl.arange(0, BLOCK, gl.SliceLayout(1, wide)), gl.arange(0, BLOCK, gl.SliceLayout(0, wide))
    q_room, k_room = tiles(1, BLOCK, BN).index(0), tiles(1, BLOCK, BN).index(0)
    for off in gl.static_range(OFF + 1):
        there = r + TOWARDS * off
        columns = gl.where((there >= 0) & (there < row_tiles), seqlen - there * BLOCK, 0)
        full = gl.zeros([BLOCK, BLOCK], gl.float32, wide)
        for n0 in gl.static_range(0, N, BN):
            meet()
            if off == 0 or N > BN:
                fetch(q_room, q + n0, length, q_t, N - n0)
            fetch(k_room, k + TOWARDS * off * BLOCK * k_t + n0, columns, k_t, N - n0)
            async_copy.commit_group()
            async_copy.wait_group(0)
            fence_async_shared()
            full = warpgroup_mma(q_room, k_room.permute((1, 0)), full)
        lag = off * BLOCK - TOWARDS * (i[:, None] - j[None, :])
        seen = gl.where((lag >= STRICT) & (lag < width), full, 0.0).to(gl.bfloat16)
        early, late = gl.split(gl.permute(gl.reshape(seen, [BLOCK, 2, BLOCK // 2]), [0, 2, 1]))
        scores.index(2 * off).store(early)
        scores.index(2 * off + 1).store(late)


# --- layouts ----------------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def by_head(EACH, BP, T):
    """As tensor cores have tiles `[column of V, token]`, the columns as heads and their own: `[head, p, token]`."""
    column = [[0, 1 << bit, 0] if 1 << bit < BP else [(1 << bit) // BP, 0, 0] for bit in range(7)]
    far = [[0, 0, 1 << bit] for bit in range(3, T.bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4], *column[:3]]
    return gl.DistributedLinearLayout([[0, 0, 1], column[3], *far], lanes, column[4:], [], [EACH, BP, T])


@gluon.constexpr_function
def each_token(EACH):
    """Of `[head, token]`, each token by a thread, or by more than one."""
    return gl.BlockedLayout([1, 1], [1, 32], [EACH, 8 // EACH], [1, 0])


@gluon.constexpr_function
def as_read(EACH, T):
    """What a thread reads of a line for its part of a left operand, in one place."""
    token = [[0, 1 << bit] for bit in range(T.bit_length() - 1)]
    heads = [[1 << bit, 0] for bit in range(EACH.bit_length() - 1)]
    return gl.SharedLinearLayout([token[0], *token[3:], *token[1:3], *heads])
