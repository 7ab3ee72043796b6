"""The kernels of the short convolutions: what one program does."""

# Tuples that grow in an unrolled loop change their type.
# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import sequence_of, silu, silu_slope


@triton.jit
def _place(ends, ends_step, length, chunks, sequences, blocks, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """Return this program's slot, sequence, batch row, the sequence's bounds, its first token and block of channels."""
    program = tl.program_id(0).to(tl.int64)
    slot = program // blocks
    if PACKED:
        sequence = sequence_of(slot, ends, ends_step, sequences, CHUNK)
        batch = slot * 0
        begin = tl.load(ends + sequence * ends_step).to(tl.int64)
        stop = tl.load(ends + (sequence + 1) * ends_step).to(tl.int64)
        first = begin + (slot - begin // CHUNK - sequence) * CHUNK
    else:
        sequence = slot // chunks
        batch = sequence
        begin = slot * 0
        stop = begin + length
        first = (slot % chunks) * CHUNK
    return slot, sequence, batch, begin, stop, first, program % blocks


@triton.jit
def _inputs(
    x, gate, state, token, begin, stop, channel, inside, early, x_token, gate_token, state_column,
    COUNT: tl.constexpr, EARLY: tl.constexpr, PAST: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return what the filter sees at COUNT tokens from `token` on, and x and the gate there.

    The first EARLY may come from the state.
    """
    found = ()
    values = ()
    gates = ()
    for r in tl.static_range(COUNT):
        at = token + r
        valid = inside & (at >= begin) & (at < stop)
        value = tl.load(x + at * x_token, mask=valid, other=0.0)
        u = value.to(ACC)
        if GATED:
            factor = tl.load(gate + at * gate_token, mask=valid, other=0.0)
            u *= factor.to(ACC)
            values += (value,)
            gates += (factor,)
        if r < EARLY and early:
            before = inside & (at < begin) & (at >= begin - PAST)
            kept = tl.load(state + (at - begin + PAST) * state_column, mask=before, other=0.0).to(ACC)
            u = tl.where(before, kept, u)
        found += (u,)
    return found, values, gates


@triton.jit
def _taps(weight, channel, inside, weight_row, weight_column, WIDTH: tl.constexpr, ACC: tl.constexpr):
    found = ()
    for w in tl.static_range(WIDTH):
        tap = tl.load(weight + channel * weight_row + w * weight_column, mask=inside, other=0.0)
        found += (tap.to(ACC),)
    return found


@triton.jit
def _sum(taps, u, start, first: tl.constexpr, WIDTH: tl.constexpr):
    """start + sum_w taps[w] u[first + w]."""
    for w in tl.static_range(WIDTH):
        start += taps[w] * u[first + w]
    return start


@triton.jit
def _output_gradients(
    dy, gate_out, u, taps, bias, token, begin, stop, inside, dy_token, gate_token,
    COUNT: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the gradient at the filtered sum of COUNT tokens from `token` on, and dy there.

    u begins W - 1 tokens before.
    """
    found = ()
    given = ()
    for r in tl.static_range(COUNT):
        at = token + r
        valid = inside & (at >= begin) & (at < stop)
        d = tl.load(dy + at * dy_token, mask=valid, other=0.0)
        g = d.to(ACC)
        if GATED:
            given += (d,)
            g *= tl.load(gate_out + at * gate_token, mask=valid, other=0.0).to(ACC)
        if SILU:
            g = tl.where(valid, g * silu_slope(_sum(taps, u, bias, r, WIDTH)), 0.0)
        found += (g,)
    return found, given


@triton.jit
def conv_forward(
    x, gate_in, gate_out, weight, bias, state, ends, y, final, length, chunks, sequences, width, blocks,
    x_batch, x_token, x_channel, in_batch, in_token, in_channel, out_batch, out_token, out_channel,
    weight_row, weight_column, bias_step, state_row, state_channel, state_column, ends_step,
    GATED: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
    WIDTH: tl.constexpr, ACC: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: SEGMENTS times TOKENS tokens; that of a sequence's first chunk also writes its final state."""
    PAST: tl.constexpr = WIDTH - 1
    _, sequence, batch, begin, stop, first, block = _place(
        ends, ends_step, length, chunks, sequences, blocks, PACKED, SEGMENTS * TOKENS
    )
    channel = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = channel < width
    x += batch * x_batch + channel * x_channel
    gate_in += batch * in_batch + channel * in_channel
    gate_out += batch * out_batch + channel * out_channel
    state += sequence * state_row + channel * state_channel
    token = first + tl.arange(0, SEGMENTS)[:, None] * TOKENS
    u = _inputs(
        x, gate_in, state, token - PAST, begin, stop, channel, inside, first == begin, x_token, in_token, state_column,
        TOKENS + PAST, PAST if STATE else 0, PAST, GATED, ACC,
    )[0]  # fmt: skip
    taps = _taps(weight, channel, inside, weight_row, weight_column, WIDTH, ACC)
    start = tl.zeros([1, BLOCK], ACC)
    if BIAS:
        start = tl.load(bias + channel * bias_step, mask=inside, other=0.0).to(ACC)
    gates = ()
    for r in tl.static_range(TOKENS):
        at = token + r
        gates += (tl.load(gate_out + at * out_token, mask=inside & (at < stop), other=0.0) if GATED else start,)
    for r in tl.static_range(TOKENS):
        at = token + r
        z = _sum(taps, u, start, r, WIDTH)
        if SILU:
            z = silu(z)
        if GATED:
            z *= gates[r].to(ACC)
        tl.store(y + (batch * length + at) * width + channel, z, mask=inside & (at < stop))
    if WIDTH > 1 and first == begin:
        last = _inputs(
            x, gate_in, state, stop - PAST + tl.zeros([1, 1], tl.int64), begin, stop, channel, inside, stop > -1,
            x_token, in_token, state_column, PAST, PAST if STATE else 0, PAST, GATED, ACC,
        )[0]  # fmt: skip
        for r in tl.static_range(PAST):
            tl.store(final + (sequence * width + channel) * PAST + r, last[r], mask=inside)


@triton.jit
def conv_backward(
    dy, dfinal, x, gate_in, gate_out, weight, bias, state, ends, dx, dgate_in, dgate_out, dstate, sums,
    length, chunks, sequences, width, blocks, dy_batch, dy_token, dy_channel, dfinal_row, dfinal_channel, dfinal_column,
    x_batch, x_token, x_channel, in_batch, in_token, in_channel, out_batch, out_token, out_channel,
    weight_row, weight_column, bias_step, state_row, state_channel, state_column, ends_step,
    GATED: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, FINAL: tl.constexpr,
    PACKED: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of its tokens, and its part of the sums for the filter and the bias."""
    PAST: tl.constexpr = WIDTH - 1
    slot, sequence, batch, begin, stop, first, block = _place(
        ends, ends_step, length, chunks, sequences, blocks, PACKED, SEGMENTS * TOKENS
    )
    channel = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = channel < width
    dy += batch * dy_batch + channel * dy_channel
    dfinal += sequence * dfinal_row + channel * dfinal_channel
    x += batch * x_batch + channel * x_channel
    gate_in += batch * in_batch + channel * in_channel
    gate_out += batch * out_batch + channel * out_channel
    state += sequence * state_row + channel * state_channel
    token = first + tl.arange(0, SEGMENTS)[:, None] * TOKENS
    # The slope of silu needs the sum of the tokens behind, too.
    BEHIND: tl.constexpr = PAST if SILU else 0
    u, values, gates = _inputs(
        x, gate_in, state, token - PAST, begin, stop, channel, inside, first == begin, x_token, in_token, state_column,
        PAST + TOKENS + BEHIND, PAST if STATE else 0, PAST, GATED, ACC,
    )  # fmt: skip
    taps = _taps(weight, channel, inside, weight_row, weight_column, WIDTH, ACC)
    start = tl.zeros([1, BLOCK], ACC)
    if BIAS:
        start = tl.load(bias + channel * bias_step, mask=inside, other=0.0).to(ACC)
    g, given = _output_gradients(
        dy, gate_out, u, taps, start, token, begin, stop, inside, dy_token, out_token,
        TOKENS + PAST, GATED, SILU, WIDTH, ACC,
    )  # fmt: skip
    ending = first + SEGMENTS * TOKENS > stop - PAST
    for r in tl.static_range(TOKENS):
        at = token + r
        valid = inside & (at < stop)
        du = tl.zeros([SEGMENTS, BLOCK], ACC)
        for w in tl.static_range(WIDTH):
            du += taps[w] * g[r + PAST - w]
        if FINAL and ending:
            held = valid & (at >= stop - PAST)
            du += tl.load(dfinal + (at - stop + PAST) * dfinal_column, mask=held, other=0.0).to(ACC)
        target = (batch * length + at) * width + channel
        if GATED:
            tl.store(dgate_in + target, du * values[r + PAST].to(ACC), mask=valid)
            tl.store(dgate_out + target, given[r].to(ACC) * _sum(taps, u, start, r, WIDTH), mask=valid)
            du *= gates[r + PAST].to(ACC)
        tl.store(dx + target, du, mask=valid)
    column = tl.reshape(channel, [BLOCK])
    part = sums + slot * WIDTH * width + slot * width + column
    for w in tl.static_range(WIDTH):
        dtap = tl.zeros([SEGMENTS, BLOCK], ACC)
        for r in tl.static_range(TOKENS):
            dtap += g[r] * u[r + w]
        tl.store(part + w * width, tl.sum(dtap, 0), mask=column < width)
    dbias = tl.zeros([SEGMENTS, BLOCK], ACC)
    for r in tl.static_range(TOKENS):
        dbias += g[r]
    tl.store(part + WIDTH * width, tl.sum(dbias, 0), mask=column < width)
    if STATE and first == begin:
        head = begin + tl.zeros([1, 1], tl.int64)
        u_head = _inputs(
            x, gate_in, state, head - PAST, begin, stop, channel, inside, stop > -1, x_token, in_token, state_column,
            PAST + PAST, PAST, PAST, GATED, ACC,
        )[0]  # fmt: skip
        g_head = _output_gradients(
            dy, gate_out, u_head, taps, start, head, begin, stop, inside, dy_token, out_token,
            PAST, GATED, SILU, WIDTH, ACC,
        )[0]  # fmt: skip
        for r in tl.static_range(PAST):
            dkept = tl.zeros([1, BLOCK], ACC)
            for w in tl.static_range(r + 1):
                dkept += taps[w] * g_head[r - w]
            if FINAL:
                # A sequence of fewer than W - 1 tokens shifts its state.
                held = inside & (head + r >= stop)
                dkept += tl.load(dfinal + (r - (stop - begin)) * dfinal_column, mask=held, other=0.0).to(ACC)
            tl.store(dstate + (sequence * width + channel) * PAST + r, dkept, mask=inside)


@triton.jit
def conv_step(
    state, x, gate_in, gate_out, weight, bias, y, new, width, blocks, state_row, state_channel, state_column,
    x_row, x_channel, in_row, in_channel, out_row, out_channel, weight_row, weight_column, bias_step,
    GATED: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a block of one row's channels."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    u = tl.load(x + row * x_row + channel * x_channel, mask=inside, other=0.0).to(ACC)
    if GATED:
        u *= tl.load(gate_in + row * in_row + channel * in_channel, mask=inside, other=0.0).to(ACC)
    z = tl.zeros([BLOCK], ACC)
    if BIAS:
        z = tl.load(bias + channel * bias_step, mask=inside, other=0.0).to(ACC)
    state += row * state_row + channel * state_channel
    new += (row * width + channel) * (WIDTH - 1)
    for w in tl.static_range(WIDTH):
        kept = tl.load(state + w * state_column, mask=inside, other=0.0).to(ACC) if w < WIDTH - 1 else u
        z += tl.load(weight + channel * weight_row + w * weight_column, mask=inside, other=0.0).to(ACC) * kept
        if w > 0:
            tl.store(new + (w - 1), kept, mask=inside)
    if SILU:
        z = silu(z)
    if GATED:
        z *= tl.load(gate_out + row * out_row + channel * out_channel, mask=inside, other=0.0).to(ACC)
    tl.store(y + row * width + channel, z, mask=inside)
