"""The kernels of the selective scan forward: what one program does.

A chunk's states lie at its slot in rows of channels, (slots, states, 2 half). `half` is odd, so that a row begins at a
multiple of 8 bytes and no more: a thread then takes two channels with all their states, sums over states stay inside
it, and what a channel needs beside them, softplus and silu, is computed once.
"""

# Tuples that grow in an unrolled loop change their type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import sequence_of, silu, softplus
from star_kernels.recurrence.triton.chunks import sequence


@triton.jit
def place(slot, ends, length, chunks, count, VARLEN: tl.constexpr, SPAN: tl.constexpr):
    """Return a slot's sequence, batch row, first token and one past its last, number, and how many its sequence has.

    An empty sequence has one chunk, without tokens. A slot that is not used has none either, and no number below.
    """
    index = sequence_of(slot, ends, 1, count, SPAN) if VARLEN else slot // chunks
    batch, begin, stop, first = sequence(index, ends, length, chunks, VARLEN, SPAN)
    number = slot - first
    start = begin + number * SPAN
    spans = tl.maximum((stop - begin + SPAN - 1) // SPAN, 1)
    return index, batch, start, tl.minimum(start + SPAN, stop), number, spans


@triton.jit
def block_of(block, per_group, parts, size, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a block's group, its channels in the group and in all, its states, and which of them there are."""
    group, e = block // parts, (block % parts) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    real = e < per_group
    return group, e, group * per_group + e, n, real, real[:, None] & (n < size)


@triton.jit
def rates_of(A, at, inside, ACC: tl.constexpr):
    """Return A to the base of 2; -inf as -1e30, so that a step of 0 decays by nothing there too."""
    rates = tl.load(A + at, mask=inside, other=0.0).to(ACC) * 1.4426950408889634
    return tl.where(rates < -1e30, -1e30, rates)


@triton.jit
def vector(pointer, channel, step, real, ACC: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr):
    """Return a parameter of the channels; 0 where it is not given."""
    if GIVEN:
        return tl.load(pointer + channel * step, mask=real, other=0.0).to(ACC)
    else:
        return tl.zeros([BLOCK], ACC)


@triton.jit
def step_size(dt, bias, SOFTPLUS: tl.constexpr):
    """Return a token's step size."""
    s = dt + bias
    if SOFTPLUS:
        s = softplus(s)
    return s


@triton.jit
def over_states(x, n, size, PADDED: tl.constexpr):
    """Sum over the state's axis; what lies beyond its size may be infinite times 0."""
    if PADDED:
        x = tl.where(n < size, x, 0.0)
    return tl.sum(x, 1)


@triton.jit
def lives(at, stop, lane, lanes):
    """Return which lanes of a token exist: none behind the chunk's end."""
    return lane < tl.where(at < stop, lanes, 0)


@triton.jit
def tokens(pointer, at, stop, lane, lanes, token_step, COUNT: tl.constexpr):
    """Return some tokens' values, 0 behind the chunk's end."""
    found = ()
    for r in tl.static_range(COUNT):
        mask = lives(at + r, stop, lane, lanes)
        found += (tl.load(pointer + (at + r) * token_step, mask=mask, other=0.0),)
    return found


@triton.jit
def selective_ends(
    x, dt, A, B, bias, ends, states, sums, length, chunks, count, width, size, half, per_group, parts, blocks,
    x_batch, x_token, x_channel, dt_batch, dt_token, dt_channel, B_batch, B_token, B_group, B_column,
    bias_step, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, SPAN: tl.constexpr,
    AHEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a chunk with a block of one group's channels: its end from no state, and the sum of its steps."""
    program = tl.program_id(0).to(tl.int64)
    slot = program // blocks
    _, batch, start, stop, _, _ = place(slot, ends, length, chunks, count, VARLEN, SPAN)
    group, e, channel, column, real, inside = block_of(program % blocks, per_group, parts, size, BLOCK, BLOCK_N)
    at_row = column * (2 * half) + channel[:, None]
    rates = rates_of(A, at_row, inside, ACC)
    shift = vector(bias, channel, bias_step, real, ACC, BLOCK, BIAS)
    x += batch * x_batch + channel * x_channel
    dt += batch * dt_batch + channel * dt_channel
    B += batch * B_batch + group * B_group + column * B_column
    h = tl.zeros([BLOCK, BLOCK_N], ACC)
    total = tl.zeros([BLOCK], ACC)
    for at in range(start, stop, AHEAD):
        b_x = tokens(x, at, stop, e, per_group, x_token, AHEAD)
        b_dt = tokens(dt, at, stop, e, per_group, dt_token, AHEAD)
        b_B = tokens(B, at, stop, column, size, B_token, AHEAD)
        for r in tl.static_range(AHEAD):
            valid = lives(at + r, stop, e, per_group)
            s = tl.where(valid, step_size(b_dt[r].to(ACC), shift, SOFTPLUS), 0.0)
            h = tl.exp2(s[:, None] * rates) * h + (s * b_x[r].to(ACC))[:, None] * b_B[r].to(ACC)
            total += s
    tl.store(states + slot * size * (2 * half) + at_row, h, mask=inside)
    tl.store(sums + slot * width + channel, total, mask=real)


@triton.jit
def selective_carry(
    first, A, ends, states, sums, last, length, chunks, width, size, half, blocks, first_row, first_channel,
    first_column, FIRST: tl.constexpr, VARLEN: tl.constexpr, REVERSED: tl.constexpr, ACC: tl.constexpr,
    SPAN: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a sequence, a state of a block of channels: what each chunk begins with, and the last one's end.

    A decay is applied in two halves: exp2(sum of steps x rate) may overflow where what it makes of a state does not.
    """
    program = tl.program_id(0).to(tl.int64)
    index, n = program // (blocks * size), program // blocks % size
    _, begin, stop, slot = sequence(index, ends, length, chunks, VARLEN, SPAN)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = channel < width
    rates = 0.5 * rates_of(A, n * (2 * half) + channel, real, ACC)
    carry = tl.zeros([BLOCK], ACC)
    if FIRST:
        source = index * first_row + channel * first_channel + n * first_column
        carry = tl.load(first + source, mask=real, other=0.0).to(ACC)
    spans = tl.maximum((stop - begin + SPAN - 1) // SPAN, 1)
    way = 1
    if REVERSED:
        slot += spans - 1
        way = -1
    states += n * (2 * half) + channel
    sums += channel
    for start in range(0, spans, AHEAD):
        found = ()
        steps = ()
        for r in tl.static_range(AHEAD):
            at = slot + way * (start + r)
            there = lives(start + r, spans, channel, width)
            found += (tl.load(states + at * size * (2 * half), mask=there, other=0.0),)
            steps += (tl.load(sums + at * width, mask=there, other=0.0),)
        for r in tl.static_range(AHEAD):
            at = slot + way * (start + r)
            tl.store(states + at * size * (2 * half), carry, mask=lives(start + r, spans, channel, width))
            decay = tl.exp2(steps[r] * rates)
            carry = tl.where(carry == 0.0, found[r], decay * (decay * carry) + found[r])
    tl.store(last + (index * width + channel) * size + n, carry, mask=real)


@triton.jit
def selective_forward(
    x, dt, A, B, C, D, z, bias, state, ends, y, final, states, length, chunks, count, width, size, half, per_group,
    parts, blocks, x_batch, x_token, x_channel, dt_batch, dt_token, dt_channel, B_batch, B_token,
    B_group, B_column, C_batch, C_token, C_group, C_column, D_step, z_batch, z_token, z_channel, bias_step, state_row,
    state_channel, state_column, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, KEEP: tl.constexpr, CARRIED: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr,
    PADDED: tl.constexpr, SPAN: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a chunk with a block of one group's channels."""
    program = tl.program_id(0).to(tl.int64)
    slot = program // blocks
    index, batch, start, stop, number, spans = place(slot, ends, length, chunks, count, VARLEN, SPAN)
    group, e, channel, column, real, inside = block_of(program % blocks, per_group, parts, size, BLOCK, BLOCK_N)
    at_row = column * (2 * half) + channel[:, None]
    rates = rates_of(A, at_row, inside, ACC)
    skip = vector(D, channel, D_step, real, ACC, BLOCK, SKIP)
    shift = vector(bias, channel, bias_step, real, ACC, BLOCK, BIAS)
    x += batch * x_batch + channel * x_channel
    dt += batch * dt_batch + channel * dt_channel
    z += batch * z_batch + channel * z_channel
    B += batch * B_batch + group * B_group + column * B_column
    C += batch * C_batch + group * C_group + column * C_column
    y += batch * length * width + channel
    states += slot * size * (2 * half) + at_row
    used = inside & lives(number, spans, column, size)
    if CARRIED:
        h = tl.load(states, mask=used, other=0.0)
    else:
        h = tl.zeros([BLOCK, BLOCK_N], ACC)
        if STATE:
            source = index * state_row + channel[:, None] * state_channel + column * state_column
            h = tl.load(state + source, mask=used, other=0.0).to(ACC)
        if KEEP:
            tl.store(states, h, mask=inside)
    for at in range(start, stop, AHEAD):
        b_x = tokens(x, at, stop, e, per_group, x_token, AHEAD)
        b_dt = tokens(dt, at, stop, e, per_group, dt_token, AHEAD)
        b_B = tokens(B, at, stop, column, size, B_token, AHEAD)
        b_C = tokens(C, at, stop, column, size, C_token, AHEAD)
        b_z = b_x
        if GATED:
            b_z = tokens(z, at, stop, e, per_group, z_token, AHEAD)
        for r in tl.static_range(AHEAD):
            valid = lives(at + r, stop, e, per_group)
            v = b_x[r].to(ACC)
            s = tl.where(valid, step_size(b_dt[r].to(ACC), shift, SOFTPLUS), 0.0)
            h = tl.exp2(s[:, None] * rates) * h + (s * v)[:, None] * b_B[r].to(ACC)
            out = over_states(h * b_C[r].to(ACC), column, size, PADDED) + skip * v
            if GATED:
                out *= silu(b_z[r].to(ACC))
            tl.store(y + (at + r) * width, out, mask=valid)
    if not CARRIED:
        there = inside & lives(number, spans, column, size)
        tl.store(final + (index * width + channel[:, None]) * size + column, h, mask=there)


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
    rates = rates_of(A, row * A_row + column * A_column, inside, ACC)
    v = tl.load(x + index * x_row + channel * x_channel, mask=real, other=0.0).to(ACC)
    s = tl.load(dt + index * dt_row + channel * dt_channel, mask=real, other=0.0).to(ACC)
    s = step_size(s, vector(bias, channel, bias_step, real, ACC, BLOCK, BIAS), SOFTPLUS)
    b_B = tl.load(B + index * B_row + group * B_group + column * B_column, mask=held, other=0.0).to(ACC)
    b_C = tl.load(C + index * C_row + group * C_group + column * C_column, mask=held, other=0.0).to(ACC)
    at = index * state_row + row * state_channel + column * state_column
    h = tl.load(state + at, mask=inside, other=0.0).to(ACC)
    h = tl.exp2(s[:, None] * rates) * h + (s * v)[:, None] * b_B
    out = over_states(h * b_C, column, size, PADDED) + vector(D, channel, D_step, real, ACC, BLOCK, SKIP) * v
    if GATED:
        out *= silu(tl.load(z + index * z_row + channel * z_channel, mask=real, other=0.0).to(ACC))
    tl.store(y + index * width + channel, out, mask=real)
    tl.store(new + index * width * size + row * size + column, h, mask=inside)
