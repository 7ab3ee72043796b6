"""The kernels of the long convolutions: what one program does.

Matrix products ask nothing of single numbers: zeros that stand for other tokens and taps spread what is not finite. The
sums tell whether there was any, and are then made again token by token, or lag by lag: slowly, with NaN put where it is
seen and nowhere else.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import clean, product


@triton.jit
def _tile(program, blocks_t, blocks_d, TILE: tl.constexpr):
    """Return the batch row, tokens and channels of a program, shaped (tokens, channels)."""
    d = program % blocks_d * TILE + tl.arange(0, TILE)
    t = program // blocks_d % blocks_t * TILE + tl.arange(0, TILE)
    return program // blocks_d // blocks_t, t[:, None], d[None, :]


@triton.jit(do_not_specialize=["tokens", "blocks_t"])
def turn(
    x, gate, out, dy, gate_out, dout, tokens, pitch, channels, blocks_t, blocks_d, x_batch, x_token, x_channel,
    gate_batch, gate_token, gate_channel, dy_batch, dy_token, dy_channel, gate_out_batch, gate_out_token,
    gate_out_channel, ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store gate x and, in backward, gate_out dy as (B, D, pitch), with zeros after the last token."""
    batch, t, d = _tile(tl.program_id(0).to(tl.int64), blocks_t, blocks_d, TILE)
    inside = (t < tokens) & (d < channels)
    u = tl.load(x + batch * x_batch + t * x_token + d * x_channel, mask=inside, other=0.0)
    if gate is not None:
        where = batch * gate_batch + t * gate_token + d * gate_channel
        u = u.to(ACC) * tl.load(gate + where, mask=inside, other=0.0).to(ACC)
    target = (batch * channels + d) * pitch + t
    tl.store(out + target, u, mask=d < channels)
    if dy is not None:
        v = tl.load(dy + batch * dy_batch + t * dy_token + d * dy_channel, mask=inside, other=0.0)
        if gate_out is not None:
            where = batch * gate_out_batch + t * gate_out_token + d * gate_out_channel
            v = v.to(ACC) * tl.load(gate_out + where, mask=inside, other=0.0).to(ACC)
        tl.store(dout + target, v, mask=d < channels)


@triton.jit
def _columns(column, ends, pitch, batch, columns, count, steps, VARLEN: tl.constexpr, BLOCK: tl.constexpr):
    """Return, for each block of tokens, its batch row, first token, and place in a sequence; and sequences' lengths.

    Blocks of many rows go by their place in time, so that neighbours see as many earlier blocks. A row is as long as
    its pitch, with zeros behind its last token: as a known multiple of 16, it lets 128 bits be read at once.
    """
    if VARLEN:
        # The last sequence whose first block is at most this one.
        low = column * 0
        high = low + count
        for _ in range(steps):
            middle = (low + high) // 2
            first = tl.load(ends + middle).to(tl.int64) // BLOCK + middle
            low = tl.where((first <= column) & (high - low > 1), middle, low)
            high = tl.where(first > column, middle, high)
        start = tl.load(ends + low).to(tl.int64)
        at = (column - start // BLOCK - low) * BLOCK
        length = tl.where(column < columns, tl.load(ends + low + 1).to(tl.int64) - start, 0)
        return low * 0, start + at, at.to(tl.int32), length.to(tl.int32)
    else:
        begin = column // batch * BLOCK
        return column % batch, begin, begin.to(tl.int32), pitch


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _sum_taps(
    u, taps, out, at, length, blocks, reach, taps_step, TURNED: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Add up so many blocks of tokens, STEP at a time; `u` points at the columns' first, `at` in their sequences."""
    i = tl.arange(0, BLOCK)[:, None]
    for m in range(blocks * (BLOCK // STEP)):
        ahead = (m * STEP if TURNED else BLOCK - (m + 1) * STEP) + tl.arange(0, STEP)
        lag = ahead[None, :] - i if TURNED else i - ahead[None, :]
        token = at + ahead[:, None]
        held = (token >= 0) & (token < length)
        b_u = tl.load(u + ahead[:, None], mask=held, other=0.0)
        seen = (lag >= 0) & (lag < reach)
        tile = tl.load(taps + lag.to(tl.int64) * taps_step, mask=seen, other=0.0)
        out = product(tile, b_u, out)
    return out


@triton.jit
def _sum_taps_slowly(
    u, taps, out, at, length, blocks, reach, taps_step, TURNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the same token by token, with NaN where something that is not finite is seen."""
    i = tl.arange(0, BLOCK)[:, None]
    for step in range(blocks * BLOCK):
        ahead = step if TURNED else BLOCK - 1 - step
        lag = ahead - i if TURNED else i - ahead
        held = (at + ahead >= 0) & (at + ahead < length)
        seen = (lag >= 0) & (lag < reach)
        b_u = tl.load(u + ahead, mask=held, other=0.0).to(out.dtype)
        tap = tl.load(taps + lag.to(tl.int64) * taps_step, mask=seen, other=0.0).to(out.dtype)
        wrong = held & seen & ~(_finite(b_u) & _finite(tap))
        out += tl.where(wrong, float("nan"), clean(tap) * clean(b_u))
    return out


@triton.jit
def _convolve(
    u, taps, y, row, begin, at, length, tokens, reach, taps_step,
    TURNED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Convolve some blocks of tokens of one channel; turned, backwards in time."""
    i = tl.arange(0, BLOCK)[:, None]
    inside = at + i < length
    behind = (length - 1 - at) // BLOCK if TURNED else at // BLOCK
    most = tl.max(tl.max(tl.where(at < length, behind, -1), 1), 0)
    blocks = tl.minimum(most, (reach + BLOCK - 2) // BLOCK) + 1
    first = u + row + begin
    nothing = tl.zeros([BLOCK, COLUMNS], ACC)
    out = _sum_taps(first, taps, nothing, at, length, blocks, reach, taps_step, TURNED, BLOCK, STEP)
    good = tl.min(_finite(out).to(tl.int32), 0)
    if tl.min(good, 0) == 0:
        length = tl.minimum(length, tokens)
        slow = _sum_taps_slowly(first, taps, nothing, at, length, blocks, reach, taps_step, TURNED, BLOCK)
        out = tl.where(good[None, :] > 0, out, slow)
    tl.store(y + row + begin + i, out, mask=inside)


@triton.jit(do_not_specialize=["tokens", "columns", "blocks", "reach", "count", "steps"])
def convolutions(
    u, taps, y, dv, du, ends, tokens, pitch, channels, batch, columns, blocks, reach, count, steps, taps_channel,
    taps_step,
    CONVOLVE: tl.constexpr, TURN: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program: some blocks of tokens of a channel; u convolved, and in the grid's last row dv backwards in time."""
    program = tl.program_id(0).to(tl.int64)
    # Blocks far from the start first: they take longest.
    column = ((blocks - 1 - program // channels) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    channel = program % channels
    index, begin, at, length = _columns(column, ends, pitch, batch, columns, count, steps, VARLEN, BLOCK)
    row = (index * channels + channel) * pitch
    taps += channel * taps_channel
    if CONVOLVE and TURN:
        if tl.program_id(1) == 1:
            _convolve(dv, taps, du, row, begin, at, length, tokens, reach, taps_step, True, ACC, BLOCK, COLUMNS, STEP)
        else:
            _convolve(u, taps, y, row, begin, at, length, tokens, reach, taps_step, False, ACC, BLOCK, COLUMNS, STEP)
    elif TURN:
        _convolve(dv, taps, du, row, begin, at, length, tokens, reach, taps_step, True, ACC, BLOCK, COLUMNS, STEP)
    else:
        _convolve(u, taps, y, row, begin, at, length, tokens, reach, taps_step, False, ACC, BLOCK, COLUMNS, STEP)


@triton.jit(do_not_specialize=["tokens", "columns", "reach", "length", "count", "steps"])
def tap_gradients(
    u, dv, skip_sums, dtaps, ends, tokens, pitch, channels, batch, columns, reach, length, count, steps,
    VARLEN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: 64 taps of a channel, sum_t dv_t u_{t - lag} over all rows. That of lag 0 is the skip's as well."""
    program = tl.program_id(0).to(tl.int64)
    channel, m = program % channels, (program // channels).to(tl.int32)
    i = tl.arange(0, BLOCK)
    same, earlier = tl.zeros([BLOCK, BLOCK], ACC), tl.zeros([BLOCK, BLOCK], ACC)
    for first in range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        index, begin, at, size = _columns(column, ends, pitch, batch, columns, count, steps, VARLEN, BLOCK)
        where = (index * channels + channel) * pitch + begin
        b_dv = tl.load(dv + where + i[:, None], mask=at + i[:, None] < size, other=0.0)
        ahead = (i - m * BLOCK)[:, None]
        known = (at + ahead >= 0) & (at + ahead < size)
        same = product(b_dv, tl.trans(tl.load(u + where + ahead, mask=known, other=0.0)), same)
        ahead = (i - m * BLOCK - BLOCK)[:, None]
        known = (at + ahead >= 0) & (at + ahead < size)
        earlier = product(b_dv, tl.trans(tl.load(u + where + ahead, mask=known, other=0.0)), earlier)
    diagonals = tl.where(i[:, None] >= i[None, :], same, earlier)
    sums = tl.sum(tl.gather(diagonals, (i[:, None] + i[None, :]) % BLOCK, 0), 1)
    # Something that is not finite is in a whole row or column of the products, and in every sum that it enters.
    if tl.min(_finite(sums).to(tl.int32), 0) == 0:
        slow = tl.zeros([BLOCK], ACC)
        for step in range(BLOCK):
            total = tl.zeros([], ACC)
            ahead = (i - m * BLOCK - step)[:, None]
            for first in range(0, columns, COLUMNS):
                column = (first + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
                index, begin, at, size = _columns(column, ends, pitch, batch, columns, count, steps, VARLEN, BLOCK)
                where = (index * channels + channel) * pitch + begin
                known = (at + ahead >= 0) & (at + i[:, None] < tl.minimum(size, tokens))
                b_dv = tl.load(dv + where + i[:, None], mask=known, other=0.0).to(ACC)
                b_u = tl.load(u + where + ahead, mask=known, other=0.0).to(ACC)
                both = tl.where(_finite(b_dv) & _finite(b_u), b_dv * b_u, float("nan"))
                total += tl.sum(tl.sum(both, 1), 0)
            slow = tl.where(i == step, total, slow)
        sums = tl.where(_finite(sums), sums, slow)
    lag = m * BLOCK + i
    tl.store(dtaps + channel * length + lag, sums, mask=lag < reach)
    tl.store(skip_sums + channel + lag, sums, mask=lag == 0)


@triton.jit(do_not_specialize=["tokens", "blocks_t"])
def finish(
    conv, u, gate, skip, y, tokens, pitch, channels, blocks_t, blocks_d, gate_batch, gate_token, gate_channel,
    skip_step, ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y = gate (conv + skip u), turned back to (B, T, D)."""
    batch, t, d = _tile(tl.program_id(0).to(tl.int64), blocks_t, blocks_d, TILE)
    inside = (t < tokens) & (d < channels)
    turned = (batch * channels + d) * pitch + t
    out = tl.load(conv + turned, mask=d < channels, other=0.0)
    if skip is not None:
        w = tl.load(skip + d * skip_step, mask=d < channels, other=0.0).to(ACC)
        out += w * tl.load(u + turned, mask=d < channels, other=0.0).to(ACC)
    if gate is not None:
        where = batch * gate_batch + t * gate_token + d * gate_channel
        out *= tl.load(gate + where, mask=inside, other=0.0).to(ACC)
    tl.store(y + (batch * tokens + t) * channels + d, out, mask=inside)


@triton.jit(do_not_specialize=["tokens", "blocks_t"])
def finish_gradients(
    conv, u, dv, du, dy, x, gate_in, skip, dx, dgate_in, dgate_out, tokens, pitch, channels, blocks_t, blocks_d,
    dy_batch, dy_token, dy_channel, x_batch, x_token, x_channel, gate_in_batch, gate_in_token, gate_in_channel,
    skip_step, ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx = gate_in (du + skip dv), dgate_in = x (du + skip dv), dgate_out = dy (conv + skip u)."""
    batch, t, d = _tile(tl.program_id(0).to(tl.int64), blocks_t, blocks_d, TILE)
    inside = (t < tokens) & (d < channels)
    turned = (batch * channels + d) * pitch + t
    target = (batch * tokens + t) * channels + d
    through = tl.load(du + turned, mask=d < channels, other=0.0)
    if skip is not None:
        w = tl.load(skip + d * skip_step, mask=d < channels, other=0.0).to(ACC)
        through += w * tl.load(dv + turned, mask=d < channels, other=0.0).to(ACC)
    if gate_in is None:
        tl.store(dx + target, through, mask=inside)
    else:
        where = batch * gate_in_batch + t * gate_in_token + d * gate_in_channel
        tl.store(dx + target, through * tl.load(gate_in + where, mask=inside, other=0.0).to(ACC), mask=inside)
        where = batch * x_batch + t * x_token + d * x_channel
        tl.store(dgate_in + target, through * tl.load(x + where, mask=inside, other=0.0).to(ACC), mask=inside)
    if dgate_out is not None:
        out = tl.load(conv + turned, mask=d < channels, other=0.0)
        if skip is not None:
            out += w * tl.load(u + turned, mask=d < channels, other=0.0).to(ACC)
        where = batch * dy_batch + t * dy_token + d * dy_channel
        tl.store(dgate_out + target, out * tl.load(dy + where, mask=inside, other=0.0).to(ACC), mask=inside)


# One token.


@triton.jit(do_not_specialize=["held", "forgotten", "kept", "parts"])
def read_history(
    state, taps, new_state, sums, channels, reach, held, forgotten, kept, parts, blocks_d, state_batch, state_token,
    state_channel, taps_channel, taps_step, ACC: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: a part of the history of some channels, copied to the new state, and its product with the taps.

    A part goes by the taps' lags, backwards in time: so both are read in 128 bits.
    """
    program = tl.program_id(0).to(tl.int64)
    d = (program % blocks_d * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    part, batch = program // blocks_d % parts, program // blocks_d // parts
    lag = (part * TOKENS + tl.arange(0, TOKENS))[:, None]
    t = held - lag
    inside = (lag > 0) & (t >= 0) & (d < channels)
    u = tl.load(state + batch * state_batch + t * state_token + d * state_channel, mask=inside, other=0.0).to(ACC)
    tap = tl.load(taps + d * taps_channel + lag * taps_step, mask=(lag < reach) & (d < channels), other=0.0).to(ACC)
    target = new_state + (batch * kept + t - forgotten) * channels + d
    tl.store(target, u, mask=inside & (t >= forgotten))
    d = program % blocks_d * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.sum(tl.where(inside, u * tap, 0.0), 0)
    tl.store(sums + (batch * parts + part) * channels + d, total, mask=d < channels)


@triton.jit(do_not_specialize=["kept", "parts"])
def add_token(
    sums, x, taps, gate_in, gate_out, skip, y, new_state, channels, kept, parts, blocks_d, x_batch, x_channel,
    taps_channel, gate_in_batch, gate_in_channel, gate_out_batch, gate_out_channel, skip_step,
    ACC: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of some channels from the sums over their history, and the new state's last token."""
    program = tl.program_id(0).to(tl.int64)
    batch, d = program // blocks_d, program % blocks_d * CHANNELS + tl.arange(0, CHANNELS)
    inside = d < channels
    u = tl.load(x + batch * x_batch + d * x_channel, mask=inside, other=0.0).to(ACC)
    if gate_in is not None:
        u *= tl.load(gate_in + batch * gate_in_batch + d * gate_in_channel, mask=inside, other=0.0).to(ACC)
    out = tl.load(taps + d * taps_channel, mask=inside, other=0.0).to(ACC) * u
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        m_part = (part < parts) & inside[None, :]
        out += tl.sum(tl.load(sums + (batch * parts + part) * channels + d[None, :], mask=m_part, other=0.0), 0)
    if skip is not None:
        out += tl.load(skip + d * skip_step, mask=inside, other=0.0).to(ACC) * u
    if gate_out is not None:
        out *= tl.load(gate_out + batch * gate_out_batch + d * gate_out_channel, mask=inside, other=0.0).to(ACC)
    tl.store(y + batch * channels + d, out, mask=inside)
    if kept > 0:
        tl.store(new_state + (batch * kept + kept - 1) * channels + d, u, mask=inside)
