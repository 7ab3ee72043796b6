"""The kernels of the selective scan backward: what one program does."""

# Tuples that grow in an unrolled loop change their type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import sigmoid, silu, silu_slope
from star_kernels.recurrence.triton.selective_kernels import (
    block_of,
    lives,
    over_states,
    place,
    rates_of,
    step_size,
    tokens,
    vector,
)


@triton.jit
def selective_pulls(
    dy, dt, A, C, z, bias, ends, pulls, sums, length, chunks, count, width, size, half, per_group, parts, blocks,
    dy_batch, dy_token, dy_channel, dt_batch, dt_token, dt_channel, C_batch, C_token, C_group,
    C_column, z_batch, z_token, z_channel, bias_step, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    OUTPUT: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, SPAN: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a chunk with a block of one group's channels: its own pull at its start, the sum of its steps."""
    program = tl.program_id(0).to(tl.int64)
    slot = program // blocks
    _, batch, start, stop, _, _ = place(slot, ends, length, chunks, count, VARLEN, SPAN)
    group, e, channel, column, real, inside = block_of(program % blocks, per_group, parts, size, BLOCK, BLOCK_N)
    at_row = column * (2 * half) + channel[:, None]
    rates = rates_of(A, at_row, inside, ACC)
    shift = vector(bias, channel, bias_step, real, ACC, BLOCK, BIAS)
    dt += batch * dt_batch + channel * dt_channel
    z += batch * z_batch + channel * z_channel
    dy += batch * dy_batch + channel * dy_channel
    C += batch * C_batch + group * C_group + column * C_column
    pull = tl.zeros([BLOCK, BLOCK_N], ACC)
    total = tl.zeros([BLOCK], ACC)
    groups = (stop - start + AHEAD - 1) // AHEAD
    for back in range(groups):
        at = start + (groups - 1 - back) * AHEAD
        b_dt = tokens(dt, at, stop, e, per_group, dt_token, AHEAD)
        if OUTPUT:
            b_C = tokens(C, at, stop, column, size, C_token, AHEAD)
            b_dy = tokens(dy, at, stop, e, per_group, dy_token, AHEAD)
            b_z = b_dy
            if GATED:
                b_z = tokens(z, at, stop, e, per_group, z_token, AHEAD)
        for r in tl.static_range(AHEAD - 1, -1, -1):
            valid = lives(at + r, stop, e, per_group)
            s = tl.where(valid, step_size(b_dt[r].to(ACC), shift, SOFTPLUS), 0.0)
            if OUTPUT:
                g = b_dy[r].to(ACC)
                if GATED:
                    g *= silu(b_z[r].to(ACC))
                pull += g[:, None] * b_C[r].to(ACC)
            pull *= tl.exp2(s[:, None] * rates)
            total += s
    tl.store(pulls + slot * size * (2 * half) + at_row, pull, mask=inside)
    tl.store(sums + slot * width + channel, total, mask=real)


@triton.jit
def _advance(h, x, dt, B, start, stop, shift, rates, e, per_group, column, size, x_token, dt_token, B_token,
             SOFTPLUS: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Run through a group of tokens; return the state after it."""
    b_x = tokens(x, start, stop, e, per_group, x_token, GROUP)
    b_dt = tokens(dt, start, stop, e, per_group, dt_token, GROUP)
    b_B = tokens(B, start, stop, column, size, B_token, GROUP)
    for r in tl.static_range(GROUP):
        s = tl.where(lives(start + r, stop, e, per_group), step_size(b_dt[r].to(ACC), shift, SOFTPLUS), 0.0)
        h = tl.exp2(s[:, None] * rates) * h + (s * b_x[r].to(ACC))[:, None] * b_B[r].to(ACC)
    return h


@triton.jit
def selective_backward(
    dy, dfinal, x, dt, A, B, C, D, z, bias, ends, states, pulls, buffer, dx, ddt, dA, dB, dC, dD, dz, dbias, dstate,
    length, chunks, count, width, size, half, per_group, parts, blocks, items, all_tokens, dy_batch, dy_token,
    dy_channel, dfinal_row, dfinal_channel, dfinal_column, x_batch, x_token, x_channel, dt_batch, dt_token, dt_channel,
    B_batch, B_token, B_group, B_column, C_batch, C_token, C_group, C_column, D_step, z_batch, z_token,
    z_channel, bias_step, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    OUTPUT: tl.constexpr, FINAL: tl.constexpr, CARRIED: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
    PADDED: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: some items, each a chunk with a block of one group's channels, and its parts of the parameters'."""
    # Rows two longer than the block: so threads take the same states of it as of a chunk's.
    TILE: tl.constexpr = (BLOCK + 2) * BLOCK_N
    kept = buffer + tl.program_id(0).to(tl.int64) * (SPAN // GROUP * TILE)
    kept += tl.arange(0, BLOCK_N)[None, :] * (BLOCK + 2) + tl.arange(0, BLOCK)[:, None]
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0)):
        slot, block = item // blocks, item % blocks
        index, batch, start, stop, number, spans = place(slot, ends, length, chunks, count, VARLEN, SPAN)
        group, e, channel, column, real, inside = block_of(block, per_group, parts, size, BLOCK, BLOCK_N)
        at_row = column * (2 * half) + channel[:, None]
        used = inside & lives(number, spans, column, size)
        rates = rates_of(A, at_row, inside, ACC)
        skip = vector(D, channel, D_step, real, ACC, BLOCK, SKIP)
        shift = vector(bias, channel, bias_step, real, ACC, BLOCK, BIAS)
        p_x = x + batch * x_batch + channel * x_channel
        p_dt = dt + batch * dt_batch + channel * dt_channel
        p_z = z + batch * z_batch + channel * z_channel
        p_dy = dy + batch * dy_batch + channel * dy_channel
        p_B = B + batch * B_batch + group * B_group + column * B_column
        p_C = C + batch * C_batch + group * C_group + column * C_column
        target = batch * length * width + channel
        # Parts of the gradients of B and C: (parts of a group, tokens of all rows, groups, size).
        n = tl.arange(0, BLOCK_N).to(tl.int64)
        shared = (((block % parts) * all_tokens + batch * length) * (blocks // parts) + group) * size + n
        shared_token = (blocks // parts) * size
        place_of = slot * size * (2 * half) + at_row
        pull = tl.zeros([BLOCK, BLOCK_N], ACC)
        if CARRIED:
            pull = tl.load(pulls + place_of, mask=used, other=0.0)
        elif FINAL:
            source = index * dfinal_row + channel[:, None] * dfinal_channel + column * dfinal_column
            pull = tl.load(dfinal + source, mask=used, other=0.0).to(ACC)
        total_A = tl.zeros([BLOCK, BLOCK_N], ACC)
        total_D = tl.zeros([BLOCK], ACC)
        total_bias = tl.zeros([BLOCK], ACC)
        groups = (stop - start + GROUP - 1) // GROUP
        h = tl.load(states + place_of, mask=used, other=0.0)
        for i in range(groups):
            tl.store(kept + i * TILE, h)
            h = _advance(
                h, p_x, p_dt, p_B, start + i * GROUP, stop, shift, rates, e, per_group, column, size, x_token, dt_token,
                B_token, SOFTPLUS, ACC, GROUP,
            )  # fmt: skip
        tl.debug_barrier()
        for back in range(groups):
            first = start + (groups - 1 - back) * GROUP
            h = tl.load(kept + (groups - 1 - back) * TILE)
            b_x = tokens(p_x, first, stop, e, per_group, x_token, GROUP)
            b_dt = tokens(p_dt, first, stop, e, per_group, dt_token, GROUP)
            b_B = tokens(p_B, first, stop, column, size, B_token, GROUP)
            b_C = tokens(p_C, first, stop, column, size, C_token, GROUP)
            b_dy = b_x
            if OUTPUT:
                b_dy = tokens(p_dy, first, stop, e, per_group, dy_token, GROUP)
            b_z = b_x
            if GATED:
                b_z = tokens(p_z, first, stop, e, per_group, z_token, GROUP)
            past = (h,)
            decays = ()
            sizes = ()
            for r in tl.static_range(GROUP):
                s = tl.where(lives(first + r, stop, e, per_group), step_size(b_dt[r].to(ACC), shift, SOFTPLUS), 0.0)
                decay = tl.exp2(s[:, None] * rates)
                h = decay * h + (s * b_x[r].to(ACC))[:, None] * b_B[r].to(ACC)
                past += (h,)
                decays += (decay,)
                sizes += (s,)
            for r in tl.static_range(GROUP - 1, -1, -1):
                valid = lives(first + r, stop, e, per_group)
                v, s = b_x[r].to(ACC), sizes[r]
                at = target + (first + r) * width
                part = shared + (first + r) * shared_token
                there = lives(first + r, stop, n, size)
                g = tl.zeros([BLOCK], ACC)
                if OUTPUT:
                    g = b_dy[r].to(ACC)
                if GATED:
                    w = b_z[r].to(ACC)
                    out = over_states(past[r + 1] * b_C[r].to(ACC), column, size, PADDED) + skip * v
                    tl.store(dz + at, g * out * silu_slope(w), mask=valid)
                    g *= silu(w)
                tl.store(dC + part, tl.sum(g[:, None] * past[r + 1], 0), mask=there)
                pull += g[:, None] * b_C[r].to(ACC)
                tl.store(dB + part, tl.sum(pull * (s * v)[:, None], 0), mask=there)
                through = over_states(pull * b_B[r].to(ACC), column, size, PADDED)
                pull *= decays[r]
                slope = pull * past[r]
                ds = over_states(slope * rates, column, size, PADDED) * 0.6931471805599453 + through * v
                if SOFTPLUS:
                    ds *= sigmoid(b_dt[r].to(ACC) + shift)
                tl.store(dx + at, through * s + skip * g, mask=valid)
                tl.store(ddt + at, ds, mask=valid)
                total_A += tl.where(valid[:, None], slope * s[:, None], 0.0)
                total_D += tl.where(valid, g * v, 0.0)
                total_bias += tl.where(valid, ds, 0.0)
        tl.debug_barrier()
        if not CARRIED:
            tl.store(dstate + (index * width + channel[:, None]) * size + column, pull, mask=used)
        tl.store(dA + place_of, total_A, mask=inside)
        if SKIP:
            tl.store(dD + slot * width + channel, total_D, mask=real)
        if BIAS:
            tl.store(dbias + slot * width + channel, total_bias, mask=real)
