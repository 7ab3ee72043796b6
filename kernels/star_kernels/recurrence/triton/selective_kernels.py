"""The kernels of the selective scan: what one program does."""

# Tuples that grow in an unrolled loop change their type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import sigmoid, silu, silu_slope, softplus
from star_kernels.recurrence.triton.chunks import sequence


@triton.jit
def _rates(A, channel, n, inside, A_row, A_column, ACC: tl.constexpr):
    """Return A to the base of 2; -inf as -1e30, so that a step of 0 decays by nothing there too."""
    rates = tl.load(A + channel * A_row + n * A_column, mask=inside, other=0.0).to(ACC) * 1.4426950408889634
    return tl.where(rates < -1e30, -1e30, rates)


@triton.jit
def _vector(pointer, channel, step, inside, ACC: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr):
    if GIVEN:
        return tl.load(pointer + channel * step, mask=inside, other=0.0).to(ACC)
    else:
        return tl.zeros([BLOCK], ACC)


@triton.jit
def _step_size(dt, bias, SOFTPLUS: tl.constexpr):
    s = dt + bias
    if SOFTPLUS:
        s = softplus(s)
    return s


@triton.jit
def _over_states(x, n, size, PADDED: tl.constexpr):
    """Sum over the state's axis; what lies beyond its size may be infinite times 0."""
    if PADDED:
        x = tl.where(n < size, x, 0.0)
    return tl.sum(x, 1)


@triton.jit
def _lives(at, stop, lane, lanes):
    """Return which lanes of a token exist: none behind the sequence's end."""
    return lane < tl.where(at < stop, lanes, 0)


@triton.jit
def _tokens(pointer, at, stop, lane, lanes, token_step, COUNT: tl.constexpr):
    found = ()
    for r in tl.static_range(COUNT):
        mask = _lives(at + r, stop, lane, lanes)
        found += (tl.load(pointer + (at + r) * token_step, mask=mask, other=0.0),)
    return found


@triton.jit
def selective_forward(
    x, dt, A, B, C, D, z, bias, state, ends, y, final, kept, length, chunks, width, size, per_group, parts, blocks,
    x_batch, x_token, x_channel, dt_batch, dt_token, dt_channel, A_row, A_column, B_batch, B_token, B_group, B_column,
    C_batch, C_token, C_group, C_column, D_step, z_batch, z_token, z_channel, bias_step, state_row, state_channel,
    state_column, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, KEEP: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PADDED: tl.constexpr,
    SPAN: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a sequence with a block of one group's channels."""
    program = tl.program_id(0).to(tl.int64)
    index, block = program // blocks, program % blocks
    batch, begin, stop, slot = sequence(index, ends, length, chunks, VARLEN, SPAN)
    group, e = block // parts, (block % parts) * BLOCK + tl.arange(0, BLOCK)
    real = e < per_group
    channel, n = group * per_group + e, tl.arange(0, BLOCK_N).to(tl.int64)
    row, column = channel[:, None], n[None, :]
    inside = real[:, None] & (column < size)
    rates = _rates(A, row, column, inside, A_row, A_column, ACC)
    skip = _vector(D, channel, D_step, real, ACC, BLOCK, SKIP)
    shift = _vector(bias, channel, bias_step, real, ACC, BLOCK, BIAS)
    x += batch * x_batch + channel * x_channel
    dt += batch * dt_batch + channel * dt_channel
    z += batch * z_batch + channel * z_channel
    B += batch * B_batch + group * B_group + column * B_column
    C += batch * C_batch + group * C_group + column * C_column
    y += batch * length * width + channel
    where = row * size + column
    h = tl.zeros([BLOCK, BLOCK_N], ACC)
    if STATE:
        at = index * state_row + row * state_channel + column * state_column
        h = tl.load(state + at, mask=inside, other=0.0).to(ACC)
    for start in range(begin, stop, AHEAD):
        if KEEP and (start - begin) % SPAN == 0:
            tl.store(kept + (slot + (start - begin) // SPAN) * width * size + where, h, mask=inside)
        b_x = _tokens(x, start, stop, e, per_group, x_token, AHEAD)
        b_dt = _tokens(dt, start, stop, e, per_group, dt_token, AHEAD)
        b_B = _tokens(B, start, stop, column, size, B_token, AHEAD)
        b_C = _tokens(C, start, stop, column, size, C_token, AHEAD)
        b_z = b_x
        if GATED:
            b_z = _tokens(z, start, stop, e, per_group, z_token, AHEAD)
        for r in tl.static_range(AHEAD):
            valid = _lives(start + r, stop, e, per_group)
            v = b_x[r].to(ACC)
            s = tl.where(valid, _step_size(b_dt[r].to(ACC), shift, SOFTPLUS), 0.0)
            h = tl.exp2(s[:, None] * rates) * h + (s * v)[:, None] * b_B[r].to(ACC)
            out = _over_states(h * b_C[r].to(ACC), column, size, PADDED) + skip * v
            if GATED:
                out *= silu(b_z[r].to(ACC))
            tl.store(y + (start + r) * width, out, mask=valid)
    tl.store(final + index * width * size + where, h, mask=inside)


@triton.jit
def _advance(h, x, dt, B, start, stop, shift, rates, e, per_group, column, size, x_token, dt_token, B_token,
             SOFTPLUS: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Run through a group of tokens; return the state after it."""
    b_x = _tokens(x, start, stop, e, per_group, x_token, GROUP)
    b_dt = _tokens(dt, start, stop, e, per_group, dt_token, GROUP)
    b_B = _tokens(B, start, stop, column, size, B_token, GROUP)
    for r in tl.static_range(GROUP):
        s = tl.where(_lives(start + r, stop, e, per_group), _step_size(b_dt[r].to(ACC), shift, SOFTPLUS), 0.0)
        h = tl.exp2(s[:, None] * rates) * h + (s * b_x[r].to(ACC))[:, None] * b_B[r].to(ACC)
    return h


@triton.jit
def selective_backward(
    dy, dfinal, x, dt, A, B, C, D, z, bias, ends, kept, buffer, dx, ddt, dA, dB, dC, dD, dz, dbias, dstate,
    length, chunks, width, size, per_group, parts, blocks, tokens, dy_batch, dy_token, dy_channel, dfinal_row,
    dfinal_channel, dfinal_column, x_batch, x_token, x_channel, dt_batch, dt_token, dt_channel, A_row, A_column,
    B_batch, B_token, B_group, B_column, C_batch, C_token, C_group, C_column, D_step, z_batch, z_token, z_channel,
    bias_step, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    OUTPUT: tl.constexpr, FINAL: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, PADDED: tl.constexpr,
    SPAN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a sequence with a block of one group's channels, and its parts of the gradients of A, B, C, D."""
    program = tl.program_id(0).to(tl.int64)
    index, block = program // blocks, program % blocks
    batch, begin, stop, slot = sequence(index, ends, length, chunks, VARLEN, SPAN)
    group, e = block // parts, (block % parts) * BLOCK + tl.arange(0, BLOCK)
    real = e < per_group
    channel, n = group * per_group + e, tl.arange(0, BLOCK_N).to(tl.int64)
    row, column = channel[:, None], n[None, :]
    inside = real[:, None] & (column < size)
    rates = _rates(A, row, column, inside, A_row, A_column, ACC)
    skip = _vector(D, channel, D_step, real, ACC, BLOCK, SKIP)
    shift = _vector(bias, channel, bias_step, real, ACC, BLOCK, BIAS)
    x += batch * x_batch + channel * x_channel
    dt += batch * dt_batch + channel * dt_channel
    z += batch * z_batch + channel * z_channel
    dy += batch * dy_batch + channel * dy_channel
    B += batch * B_batch + group * B_group + column * B_column
    C += batch * C_batch + group * C_group + column * C_column
    target = batch * length * width + channel
    # Parts of the gradients of B and C: (parts of a group, tokens of all rows, groups, size).
    shared = (((block % parts) * tokens + batch * length) * (blocks // parts) + group) * size + n
    shared_token = (blocks // parts) * size
    where = row * size + column
    buffer += program * (SPAN // GROUP * BLOCK * BLOCK_N)
    buffer += tl.arange(0, BLOCK)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    pull = tl.zeros([BLOCK, BLOCK_N], ACC)
    if FINAL:
        at = index * dfinal_row + row * dfinal_channel + column * dfinal_column
        pull = tl.load(dfinal + at, mask=inside, other=0.0).to(ACC)
    total_A = tl.zeros([BLOCK, BLOCK_N], ACC)
    total_D = tl.zeros([BLOCK], ACC)
    total_bias = tl.zeros([BLOCK], ACC)
    spans = (stop - begin + SPAN - 1) // SPAN
    for number in range(spans):
        first = begin + (spans - 1 - number) * SPAN
        groups = (tl.minimum(first + SPAN, stop) - first + GROUP - 1) // GROUP
        at = (slot + spans - 1 - number) * width * size + where
        h = tl.load(kept + at, mask=inside, other=0.0)
        for i in range(groups):
            tl.store(buffer + i * (BLOCK * BLOCK_N), h)
            h = _advance(
                h, x, dt, B, first + i * GROUP, stop, shift, rates, e, per_group, column, size, x_token, dt_token,
                B_token, SOFTPLUS, ACC, GROUP,
            )  # fmt: skip
        tl.debug_barrier()
        for back in range(groups):
            start = first + (groups - 1 - back) * GROUP
            h = tl.load(buffer + (groups - 1 - back) * (BLOCK * BLOCK_N))
            b_x = _tokens(x, start, stop, e, per_group, x_token, GROUP)
            b_dt = _tokens(dt, start, stop, e, per_group, dt_token, GROUP)
            b_B = _tokens(B, start, stop, column, size, B_token, GROUP)
            b_C = _tokens(C, start, stop, column, size, C_token, GROUP)
            b_dy = b_x
            if OUTPUT:
                b_dy = _tokens(dy, start, stop, e, per_group, dy_token, GROUP)
            b_z = b_x
            if GATED:
                b_z = _tokens(z, start, stop, e, per_group, z_token, GROUP)
            states = (h,)
            decays = ()
            sizes = ()
            for r in tl.static_range(GROUP):
                s = tl.where(_lives(start + r, stop, e, per_group), _step_size(b_dt[r].to(ACC), shift, SOFTPLUS), 0.0)
                decay = tl.exp2(s[:, None] * rates)
                h = decay * h + (s * b_x[r].to(ACC))[:, None] * b_B[r].to(ACC)
                states += (h,)
                decays += (decay,)
                sizes += (s,)
            for r in tl.static_range(GROUP - 1, -1, -1):
                valid = _lives(start + r, stop, e, per_group)
                v, s = b_x[r].to(ACC), sizes[r]
                place = target + (start + r) * width
                part = shared + (start + r) * shared_token
                lives = _lives(start + r, stop, n, size)
                g = tl.zeros([BLOCK], ACC)
                if OUTPUT:
                    g = b_dy[r].to(ACC)
                if GATED:
                    w = b_z[r].to(ACC)
                    out = _over_states(states[r + 1] * b_C[r].to(ACC), column, size, PADDED) + skip * v
                    tl.store(dz + place, g * out * silu_slope(w), mask=valid)
                    g *= silu(w)
                tl.store(dC + part, tl.sum(g[:, None] * states[r + 1], 0), mask=lives)
                pull += g[:, None] * b_C[r].to(ACC)
                tl.store(dB + part, tl.sum(pull * (s * v)[:, None], 0), mask=lives)
                through = _over_states(pull * b_B[r].to(ACC), column, size, PADDED)
                pull *= decays[r]
                slope = pull * states[r]
                ds = _over_states(slope * rates, column, size, PADDED) * 0.6931471805599453 + through * v
                if SOFTPLUS:
                    ds *= sigmoid(b_dt[r].to(ACC) + shift)
                tl.store(dx + place, through * s + skip * g, mask=valid)
                tl.store(ddt + place, ds, mask=valid)
                total_A += tl.where(valid[:, None], slope * s[:, None], 0.0)
                total_D += tl.where(valid, g * v, 0.0)
                total_bias += tl.where(valid, ds, 0.0)
        tl.debug_barrier()
    tl.store(dstate + index * width * size + where, pull, mask=inside)
    tl.store(dA + index * width * size + where, total_A, mask=inside)
    if SKIP:
        tl.store(dD + index * width + channel, total_D, mask=real)
    if BIAS:
        tl.store(dbias + index * width + channel, total_bias, mask=real)


@triton.jit
def selective_step(
    state, x, dt, A, B, C, D, z, bias, y, new, width, size, per_group, parts, blocks, state_row, state_channel,
    state_column, x_row, x_channel, dt_row, dt_channel, A_row, A_column, B_row, B_group, B_column, C_row, C_group,
    C_column, D_step, z_row, z_channel, bias_step, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, ACC: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a block of one row's channels, of one group."""
    program = tl.program_id(0).to(tl.int64)
    index, block = program // blocks, program % blocks
    group, e = block // parts, (block % parts) * BLOCK + tl.arange(0, BLOCK)
    real = e < per_group
    channel, n = group * per_group + e, tl.arange(0, BLOCK_N).to(tl.int64)
    row, column = channel[:, None], n[None, :]
    held, inside = column < size, real[:, None] & (column < size)
    rates = _rates(A, row, column, inside, A_row, A_column, ACC)
    v = tl.load(x + index * x_row + channel * x_channel, mask=real, other=0.0).to(ACC)
    s = tl.load(dt + index * dt_row + channel * dt_channel, mask=real, other=0.0).to(ACC)
    s = _step_size(s, _vector(bias, channel, bias_step, real, ACC, BLOCK, BIAS), SOFTPLUS)
    b_B = tl.load(B + index * B_row + group * B_group + column * B_column, mask=held, other=0.0).to(ACC)
    b_C = tl.load(C + index * C_row + group * C_group + column * C_column, mask=held, other=0.0).to(ACC)
    at = index * state_row + row * state_channel + column * state_column
    h = tl.load(state + at, mask=inside, other=0.0).to(ACC)
    h = tl.exp2(s[:, None] * rates) * h + (s * v)[:, None] * b_B
    out = _over_states(h * b_C, column, size, PADDED) + _vector(D, channel, D_step, real, ACC, BLOCK, SKIP) * v
    if GATED:
        out *= silu(tl.load(z + index * z_row + channel * z_channel, mask=real, other=0.0).to(ACC))
    tl.store(y + index * width + channel, out, mask=real)
    tl.store(new + index * width * size + row * size + column, h, mask=inside)
