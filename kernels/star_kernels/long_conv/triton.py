"""Long causal convolutions in Triton, as blocked Toeplitz products.

A channel's tokens, cut into blocks of 64, are the columns of a matrix U (64, blocks of all rows). Its outputs are
sum_m F_m U shifted by m blocks, where F_m (64, 64) holds the taps 64 m + i - j: matrix products, whose tiles F_m are
read off the taps. A channel's tokens must lie together for that, so u = gate_in x is turned to (B, D, T) first and the
result turned back, which is T / 64 times less work than the products are.

Forward is three kernels. Backward is four: u and gate_out dy turned; both convolutions at once, of u and backwards in
time of the gradient; the gradient of the taps, G_m = dY U^T shifted by m blocks, summed along its diagonals; the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._operands import given, like, sequences_of, strides, wide
from star_kernels._triton import launch, triton_operator
from star_kernels._triton_math import accumulator, clean, next_power_of_2, product

_BLOCK = 64  # tokens of a block
_TILE = 32  # tokens and channels that one program turns
_STEP_TOKENS, _STEP_CHANNELS = 128, 32  # what one program of a step reads of the history


@triton.jit
def _tile(program, tokens, blocks_t, blocks_d, TILE: tl.constexpr):
    """Return the batch row, tokens and channels of a program, shaped (tokens, channels)."""
    d = program % blocks_d * TILE + tl.arange(0, TILE)
    t = program // blocks_d % blocks_t * TILE + tl.arange(0, TILE)
    return program // blocks_d // blocks_t, t[:, None], d[None, :]


@triton.jit(do_not_specialize=["tokens", "blocks_t"])
def _turn(
    x, gate, out, dy, gate_out, dout, tokens, pitch, channels, blocks_t, blocks_d, x_batch, x_token, x_channel,
    gate_batch,
    gate_token, gate_channel, dy_batch, dy_token, dy_channel, gate_out_batch, gate_out_token, gate_out_channel,
    ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store gate x and, in backward, gate_out dy as (B, D, T)."""
    batch, t, d = _tile(tl.program_id(0).to(tl.int64), tokens, blocks_t, blocks_d, TILE)
    inside = (t < tokens) & (d < channels)
    u = tl.load(x + batch * x_batch + t * x_token + d * x_channel, mask=inside, other=0.0)
    if gate is not None:
        where = batch * gate_batch + t * gate_token + d * gate_channel
        u = u.to(ACC) * tl.load(gate + where, mask=inside, other=0.0).to(ACC)
    target = (batch * channels + d) * pitch + t
    tl.store(out + target, u, mask=inside)
    if dy is not None:
        v = tl.load(dy + batch * dy_batch + t * dy_token + d * dy_channel, mask=inside, other=0.0)
        if gate_out is not None:
            where = batch * gate_out_batch + t * gate_out_token + d * gate_out_channel
            v = v.to(ACC) * tl.load(gate_out + where, mask=inside, other=0.0).to(ACC)
        tl.store(dout + target, v, mask=inside)


@triton.jit
def _columns(column, ends, tokens, batch, columns, count, steps, VARLEN: tl.constexpr, BLOCK: tl.constexpr):
    """Return, for each block of tokens, its batch row, first token, and its sequence's first and end.

    Blocks of many rows go by their place in time, so that neighbours see as many earlier blocks.
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
        stop = tl.load(ends + low + 1).to(tl.int64)
        begin = start + (column - start // BLOCK - low) * BLOCK
        return low * 0, begin, start, tl.where(column < columns, stop, 0)
    else:
        return column % batch, column // batch * BLOCK, column * 0, tl.where(column < columns, column * 0 + tokens, 0)


@triton.jit
def _convolve(
    u, taps, y, row, begin, start, stop, reach, taps_step, TURNED: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Convolve some blocks of tokens of one channel; turned, backwards in time.

    What is not finite is no factor, as other tokens and taps are multiplied by zero there: it is put in at the end.
    """
    i = tl.arange(0, BLOCK)
    length, at = (stop - start).to(tl.int32), (begin - start).to(tl.int32)
    first = u + row + begin
    out = tl.zeros([BLOCK, begin.shape[0]], ACC)
    bad = tl.zeros([BLOCK, begin.shape[0]], tl.int32)
    first_bad = tl.max(length, 0)
    if TURNED:
        most = tl.max(tl.where(at < length, (length - 1 - at) // BLOCK, -1), 0)
    else:
        most = tl.max(tl.where(at < length, at // BLOCK, -1), 0)
    for m in range(tl.minimum(most, (reach + BLOCK - 2) // BLOCK) + 1):
        if TURNED:
            lag = m * BLOCK + i[None, :] - i[:, None]
            token = m * BLOCK + i
        else:
            lag = m * BLOCK + i[:, None] - i[None, :]
            token = i - m * BLOCK
        held = (at[None, :] >= -token[:, None]) & (at[None, :] < length[None, :] - token[:, None])
        b_u = tl.load(first[None, :] + token[:, None], mask=held, other=0.0)
        tile = tl.load(taps + lag.to(tl.int64) * taps_step, mask=(lag >= 0) & (lag < reach), other=0.0)
        out = product(clean(tile), clean(b_u), out)
        some = m * BLOCK + i
        tap = tl.load(taps + some.to(tl.int64) * taps_step, mask=some < reach, other=0.0).to(ACC)
        first_bad = tl.minimum(first_bad, tl.min(tl.where(tl.abs(tap) < float("inf"), first_bad, some), 0))
        fine = tl.abs(b_u.to(tl.float32)) < float("inf")
        least = tl.min(tl.where(fine, BLOCK, i[:, None]), 0)
        if tl.min(least, 0) < BLOCK:
            greatest = tl.max(tl.where(fine, -1, i[:, None]), 0)
            if TURNED:
                ahead = (i - m * BLOCK)[:, None]
                seen = (greatest[None, :] >= ahead) & (least[None, :] < ahead + reach)
            else:
                back = (i + m * BLOCK)[:, None]
                seen = (least[None, :] <= back) & (greatest[None, :] > back - reach)
            bad = tl.where(seen & (greatest >= 0)[None, :], 1, bad)
    if TURNED:
        bad = tl.where(length[None, :] - at[None, :] - i[:, None] > first_bad, 1, bad)
    else:
        bad = tl.where(at[None, :] + i[:, None] >= first_bad, 1, bad)
    target = y + row[None, :] + begin[None, :] + i[:, None]
    inside = at[None, :] + i[:, None] < length[None, :]
    tl.store(target, tl.where(bad > 0, float("nan"), out), mask=inside)


@triton.jit(do_not_specialize=["tokens", "columns", "blocks", "reach", "count", "steps"])
def _convolutions(
    u, taps, y, dv, du, ends, tokens, pitch, channels, batch, columns, blocks, reach, count, steps, taps_channel,
    taps_step,
    CONVOLVE: tl.constexpr, TURN: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: some blocks of tokens of a channel; u convolved, and in the grid's last row dv backwards in time."""
    program = tl.program_id(0).to(tl.int64)
    # Blocks far from the start first: they take longest.
    column = (blocks - 1 - program // channels) * COLUMNS + tl.arange(0, COLUMNS)
    channel = program % channels
    index, begin, start, stop = _columns(column, ends, tokens, batch, columns, count, steps, VARLEN, BLOCK)
    row = (index * channels + channel) * pitch
    taps += channel * taps_channel
    if CONVOLVE and TURN:
        if tl.program_id(1) == 1:
            _convolve(dv, taps, du, row, begin, start, stop, reach, taps_step, True, ACC, BLOCK)
        else:
            _convolve(u, taps, y, row, begin, start, stop, reach, taps_step, False, ACC, BLOCK)
    elif TURN:
        _convolve(dv, taps, du, row, begin, start, stop, reach, taps_step, True, ACC, BLOCK)
    else:
        _convolve(u, taps, y, row, begin, start, stop, reach, taps_step, False, ACC, BLOCK)


@triton.jit(do_not_specialize=["tokens", "columns", "reach", "length", "count", "steps"])
def _tap_gradients(
    u, dv, skip_sums, dtaps, ends, tokens, pitch, channels, batch, columns, reach, length, count, steps,
    VARLEN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: 64 taps of a channel, sum_t dv_t u_{t - lag} over all rows. The first also sums dv u."""
    program = tl.program_id(0).to(tl.int64)
    channel, m = program % channels, program // channels
    i = tl.arange(0, BLOCK)
    now = i - (m * BLOCK).to(tl.int32)
    same, earlier = tl.zeros([BLOCK, BLOCK], ACC), tl.zeros([BLOCK, BLOCK], ACC)
    touched = tl.min(i, 0) - 1  # the last lag at which something not finite enters
    skipped = tl.zeros([COLUMNS], ACC)
    for at in range(0, columns, COLUMNS):
        column = (at + tl.arange(0, COLUMNS)).to(tl.int64)
        index, begin, start, stop = _columns(column, ends, tokens, batch, columns, count, steps, VARLEN, BLOCK)
        held, at_token = (stop - start).to(tl.int32), (begin - start).to(tl.int32)
        held = tl.where(at_token < held, held, 0)
        where = (index * channels + channel) * pitch + begin
        token = at_token[None, :] + i[:, None]
        b_dv = tl.load(dv + where[None, :] + i[:, None], mask=token < held[None, :], other=0.0)
        token = at_token[None, :] + now[:, None]
        b_now = tl.load(
            u + where[None, :] + now[:, None], mask=(token >= 0) & (token < held[None, :]), other=0.0
        )  # fmt: skip
        b_before = tl.load(
            u + where[None, :] + (now - BLOCK)[:, None], mask=(token >= BLOCK) & (held > 0)[None, :], other=0.0
        )
        same = product(clean(b_dv), tl.trans(clean(b_now)), same)
        earlier = product(clean(b_dv), tl.trans(clean(b_before)), earlier)
        skipped += tl.sum(b_dv.to(ACC) * b_now.to(ACC), 0)
        left = held[None, :] - 1 - token
        touched = tl.maximum(touched, _last_lag(b_dv, at_token[None, :] + i[:, None]))
        touched = tl.maximum(touched, _last_lag(b_now, left))
        touched = tl.maximum(touched, _last_lag(b_before, left + BLOCK))
    diagonals = tl.where(i[:, None] >= i[None, :], same, earlier)
    sums = tl.sum(tl.gather(diagonals, (i[:, None] + i[None, :]) % BLOCK, 0), 1)
    lag = m * BLOCK + i
    sums = tl.where(lag <= touched, float("nan"), sums)
    tl.store(dtaps + channel * length + lag, sums, mask=lag < reach)
    if m == 0:
        tl.store(skip_sums + channel, tl.sum(skipped, 0))


@triton.jit
def _last_lag(x, lag):
    """Return the largest of the lags where x is not finite, or -1."""
    return tl.max(tl.max(tl.where(tl.abs(x.to(tl.float32)) < float("inf"), -1, lag), 1), 0)


@triton.jit(do_not_specialize=["tokens", "blocks_t"])
def _finish(
    conv, u, gate, skip, y, tokens, pitch, channels, blocks_t, blocks_d, gate_batch, gate_token, gate_channel,
    skip_step,
    ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y = gate (conv + skip u), turned back to (B, T, D)."""
    batch, t, d = _tile(tl.program_id(0).to(tl.int64), tokens, blocks_t, blocks_d, TILE)
    inside = (t < tokens) & (d < channels)
    turned = (batch * channels + d) * pitch + t
    out = tl.load(conv + turned, mask=inside, other=0.0)
    if skip is not None:
        w = tl.load(skip + d * skip_step, mask=d < channels, other=0.0).to(ACC)
        out += w * tl.load(u + turned, mask=inside, other=0.0).to(ACC)
    if gate is not None:
        where = batch * gate_batch + t * gate_token + d * gate_channel
        out *= tl.load(gate + where, mask=inside, other=0.0).to(ACC)
    tl.store(y + (batch * tokens + t) * channels + d, out, mask=inside)


@triton.jit(do_not_specialize=["tokens", "blocks_t"])
def _finish_gradients(
    conv, u, dv, du, dy, x, gate_in, skip, dx, dgate_in, dgate_out, tokens, pitch, channels, blocks_t, blocks_d,
    dy_batch,
    dy_token, dy_channel, x_batch, x_token, x_channel, gate_in_batch, gate_in_token, gate_in_channel, skip_step,
    ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx = gate_in (du + skip dv), dgate_in = x (du + skip dv), dgate_out = dy (conv + skip u)."""
    batch, t, d = _tile(tl.program_id(0).to(tl.int64), tokens, blocks_t, blocks_d, TILE)
    inside = (t < tokens) & (d < channels)
    turned = (batch * channels + d) * pitch + t
    target = (batch * tokens + t) * channels + d
    through = tl.load(du + turned, mask=inside, other=0.0)
    if skip is not None:
        w = tl.load(skip + d * skip_step, mask=d < channels, other=0.0).to(ACC)
        through += w * tl.load(dv + turned, mask=inside, other=0.0).to(ACC)
    if gate_in is None:
        tl.store(dx + target, through, mask=inside)
    else:
        where = batch * gate_in_batch + t * gate_in_token + d * gate_in_channel
        tl.store(dx + target, through * tl.load(gate_in + where, mask=inside, other=0.0).to(ACC), mask=inside)
        where = batch * x_batch + t * x_token + d * x_channel
        tl.store(dgate_in + target, through * tl.load(x + where, mask=inside, other=0.0).to(ACC), mask=inside)
    if dgate_out is not None:
        out = tl.load(conv + turned, mask=inside, other=0.0)
        if skip is not None:
            out += w * tl.load(u + turned, mask=inside, other=0.0).to(ACC)
        where = batch * dy_batch + t * dy_token + d * dy_channel
        tl.store(dgate_out + target, out * tl.load(dy + where, mask=inside, other=0.0).to(ACC), mask=inside)


def _turned(x: Tensor, gate: Tensor | None) -> Tensor:
    """Return an empty (B, D, T) for gate x, in x's dtype where there is no gate; T is filled up for wide loads."""
    batch, tokens, channels = x.shape
    pitch = triton.cdiv(tokens, _BLOCK) * _BLOCK
    return torch.empty(batch, channels, pitch, dtype=x.dtype if gate is None else wide(x), device=x.device)


class _Shape:
    """The sizes of a call, and how its tokens are shared out."""

    def __init__(self, x: Tensor, filter: Tensor, cu_seqlens: Tensor | None) -> None:
        self.batch, self.tokens, self.channels = x.shape
        self.reach = min(filter.shape[1], self.tokens)
        self.tiles = triton.cdiv(self.tokens, _TILE), triton.cdiv(self.channels, _TILE)
        self.programs = self.batch * self.tiles[0] * self.tiles[1]
        self.sequences = sequences_of(x, cu_seqlens)
        blocks = triton.cdiv(self.tokens, _BLOCK)
        self.columns = self.batch * blocks if cu_seqlens is None else blocks + self.sequences
        self.search = self.sequences.bit_length()
        self.options = {
            "VARLEN": cu_seqlens is not None, "ACC": accumulator(x), "BLOCK": _BLOCK,
            "COLUMNS": min(64, next_power_of_2(self.columns, 16)),
        }  # fmt: skip
        self.tiling = {"ACC": accumulator(x), "TILE": _TILE}


def _launch_convolutions(
    shape: _Shape, filter: Tensor, ends: Tensor | None, u: Tensor, dv: Tensor | None, convolve: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return u convolved, if asked, and dv backwards in time, if given."""
    kind: dict[str, Any] = {"dtype": wide(u), "device": u.device}
    y = torch.empty(u.shape, **kind) if convolve else None
    du = None if dv is None else torch.empty(u.shape, **kind)
    blocks = triton.cdiv(shape.columns, shape.options["COLUMNS"])
    launch(
        _convolutions, (blocks * shape.channels, 2 if convolve and dv is not None else 1), u, filter, y, dv, du, ends,
        shape.tokens, u.shape[2], shape.channels, shape.batch, shape.columns, blocks, shape.reach, shape.sequences,
        shape.search,
        *filter.stride(), CONVOLVE=convolve, TURN=dv is not None, num_warps=8, **shape.options,
    )  # fmt: skip
    return y, du


def _long_conv(
    x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    y = like(x)
    if not x.numel():
        return y
    shape, u = _Shape(x, filter, cu_seqlens), _turned(x, gate_in)
    sizes = (shape.tokens, u.shape[2], shape.channels, *shape.tiles)
    launch(
        _turn, (shape.programs,), x, gate_in, u, None, None, None, *sizes, *x.stride(), *strides(gate_in, 3),
        *(0,) * 6, **shape.tiling,
    )  # fmt: skip
    conv, _ = _launch_convolutions(shape, filter, cu_seqlens, u, None, True)
    launch(
        _finish, (shape.programs,), conv, u, gate_out, skip, y, *sizes, *strides(gate_out, 3), *strides(skip, 1),
        **shape.tiling,
    )  # fmt: skip
    return y


def _long_conv_gradients(
    dy: Tensor, x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, filter, gate_in, gate_out and skip."""
    dx, dfilter, dgate_in, dgate_out, dskip = _fake_gradients(dy, x, filter, gate_in, gate_out, skip, cu_seqlens)
    if not x.numel():
        return dx, dfilter.zero_(), dgate_in, dgate_out, dskip.zero_()
    shape, u, dv = _Shape(x, filter, cu_seqlens), _turned(x, gate_in), _turned(dy, gate_out)
    sizes = (shape.tokens, u.shape[2], shape.channels, *shape.tiles)
    launch(
        _turn, (shape.programs,), x, gate_in, u, dy, gate_out, dv, *sizes, *x.stride(), *strides(gate_in, 3),
        *dy.stride(), *strides(gate_out, 3), **shape.tiling,
    )  # fmt: skip
    conv, du = _launch_convolutions(shape, filter, cu_seqlens, u, dv, gate_out is not None)
    if shape.reach < filter.shape[1]:
        dfilter.zero_()
    skip_sums = torch.empty(shape.channels, dtype=wide(x), device=x.device)
    launch(
        _tap_gradients, (shape.channels * triton.cdiv(shape.reach, _BLOCK),), u, dv, skip_sums, dfilter, cu_seqlens,
        shape.tokens, u.shape[2], shape.channels, shape.batch, shape.columns, shape.reach, filter.shape[1],
        shape.sequences,
        shape.search, num_warps=8, **shape.options,
    )  # fmt: skip
    launch(
        _finish_gradients, (shape.programs,), conv, u, dv, du, dy, x, gate_in, skip, dx, dgate_in,
        None if gate_out is None else dgate_out, *sizes, *dy.stride(), *x.stride(), *strides(gate_in, 3),
        *strides(skip, 1), **shape.tiling,
    )  # fmt: skip
    return dx, dfilter, dgate_in, dgate_out, dskip if skip is None else skip_sums.to(skip.dtype, copy=True)


def _fake_long_conv(x: Tensor, *rest: Any) -> Tensor:
    return like(x)


def _fake_gradients(dy: Tensor, x: Tensor, *rest: Tensor | None) -> Any:
    """Return empty gradients; no elements for what was not given."""
    return tuple(
        torch.empty((0,) if one is None else one.shape, dtype=x.dtype if one is None else one.dtype, device=x.device)
        for one in (x, *rest[:-1])
    )


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _long_conv_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    found = _backward_operator(dy, *inputs)
    return *map(given, inputs[:-1], found), None


# One token.


@triton.jit(do_not_specialize=["held", "forgotten", "kept", "parts"])
def _read(
    state, taps, new_state, sums, channels, held, forgotten, kept, parts, blocks_d, state_batch, state_token,
    state_channel, taps_channel, taps_step, ACC: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: a part of the history of some channels, copied to the new state, and its product with the taps."""
    program = tl.program_id(0).to(tl.int64)
    d = (program % blocks_d * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    part, batch = program // blocks_d % parts, program // blocks_d // parts
    t = (part * TOKENS + tl.arange(0, TOKENS))[:, None]
    inside = (t < held) & (d < channels)
    u = tl.load(state + batch * state_batch + t * state_token + d * state_channel, mask=inside, other=0.0).to(ACC)
    tap = tl.load(taps + d * taps_channel + (held - t) * taps_step, mask=inside, other=0.0).to(ACC)
    target = new_state + (batch * kept + t - forgotten) * channels + d
    tl.store(target, u, mask=inside & (t >= forgotten))
    d = program % blocks_d * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(sums + (batch * parts + part) * channels + d, tl.sum(u * tap, 0), mask=d < channels)


@triton.jit(do_not_specialize=["kept", "parts"])
def _step(
    sums, x, taps, gate_in, gate_out, skip, y, new_state, channels, kept, parts, blocks_d, x_batch, x_channel,
    taps_channel, gate_in_batch, gate_in_channel, gate_out_batch, gate_out_channel, skip_step,
    ACC: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of some channels from the sums over their history, and the new state's last token."""
    program = tl.program_id(0).to(tl.int64)
    batch, d = program // blocks_d, program % blocks_d * CHANNELS + tl.arange(0, CHANNELS)
    inside = d < channels
    u = tl.load(x + batch * x_batch + d * x_channel, mask=inside, other=0.0).to(ACC)
    if gate_in is not None:
        u *= tl.load(gate_in + batch * gate_in_batch + d * gate_in_channel, mask=inside, other=0.0).to(ACC)
    out = tl.load(taps + d * taps_channel, mask=inside, other=0.0).to(ACC) * u
    for part in range(parts):
        out += tl.load(sums + (batch * parts + part) * channels + d, mask=inside, other=0.0)
    if skip is not None:
        out += tl.load(skip + d * skip_step, mask=inside, other=0.0).to(ACC) * u
    if gate_out is not None:
        out *= tl.load(gate_out + batch * gate_out_batch + d * gate_out_channel, mask=inside, other=0.0).to(ACC)
    tl.store(y + batch * channels + d, out, mask=inside)
    if kept > 0:
        tl.store(new_state + (batch * kept + kept - 1) * channels + d, u, mask=inside)


def _long_conv_step(
    state: Tensor, x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, new_state = _fake_step(state, x, filter)
    (batch, channels), held, kept = x.shape, state.shape[1], new_state.shape[1]
    parts, blocks = triton.cdiv(held, _STEP_TOKENS), triton.cdiv(channels, _STEP_CHANNELS)
    sums = torch.empty(batch, parts, channels, dtype=new_state.dtype, device=x.device)
    launch(
        _read, (batch * parts * blocks,), state, filter, new_state, sums, channels, held, held + 1 - kept, kept, parts,
        blocks, *state.stride(), *filter.stride(), ACC=accumulator(x), TOKENS=_STEP_TOKENS, CHANNELS=_STEP_CHANNELS,
    )  # fmt: skip
    launch(
        _step, (batch * blocks,), sums, x, filter, gate_in, gate_out, skip, y, new_state, channels, kept, parts, blocks,
        *x.stride(), filter.stride(0), *strides(gate_in, 2), *strides(gate_out, 2), *strides(skip, 1),
        ACC=accumulator(x), CHANNELS=_STEP_CHANNELS, num_warps=1,
    )  # fmt: skip
    return y, new_state


def _fake_step(state: Tensor, x: Tensor, filter: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], min(state.shape[1] + 1, filter.shape[1] - 1), x.shape[1])
    return like(x), torch.empty(shape, dtype=wide(x), device=x.device)


def _step_gradient(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate one token in torch: nobody trains by single steps, and each product is one of vectors."""
    state, x, filter, gate_in, gate_out, skip = ctx.saved_tensors
    acc, held = wide(x), state.shape[1]
    one = torch.ones((), dtype=acc, device=x.device)
    inward, outward, through = (one if each is None else each.to(acc) for each in (gate_in, gate_out, skip))
    u, dy = x.to(acc) * inward, dy.to(acc)
    dv = dy * outward
    history = torch.cat([state.to(acc), u.unsqueeze(1)], dim=1)
    taps = filter.to(acc)[:, : held + 1].flip(-1).t()
    dhistory = dv.unsqueeze(1) * taps
    dhistory[:, held + 1 - dstate.shape[1] :] += dstate
    du = dhistory[:, held]
    dfilter = torch.zeros(filter.shape, dtype=acc, device=x.device)
    dfilter[:, : held + 1] = (dv.unsqueeze(1) * history).sum(0).flip(0).t()
    out = (history * taps).sum(1)
    if skip is not None:
        du, out = du + dv * through, out + u * through
    gradients = (
        dhistory[:, :held], du * inward, dfilter, None if gate_in is None else du * x.to(acc),
        None if gate_out is None else dy * out, None if skip is None else (dv * u).sum(0),
    )  # fmt: skip
    return tuple(
        None if each is None else each.to(given.dtype) for each, given in zip(gradients, ctx.saved_tensors, strict=True)
    )


_backward_operator = triton_operator("long_conv_backward", _long_conv_gradients, fake=_fake_gradients)
_operator = triton_operator(
    "long_conv", _long_conv, fake=_fake_long_conv, setup_context=_save, backward=_long_conv_gradient
)
_step_operator = triton_operator(
    "long_conv_step", _long_conv_step, fake=_fake_step, setup_context=_save, backward=_step_gradient
)


def long_conv(
    x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """Serve `star_kernels.long_conv`."""
    y: Tensor = _operator(x, filter, gate_in, gate_out, skip, cu_seqlens)
    return y


def long_conv_step(
    state: Tensor, x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.long_conv_step`."""
    y, new_state = _step_operator(state, x, filter, gate_in, gate_out, skip)
    return y, new_state
