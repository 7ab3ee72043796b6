"""The kernels that run Mamba-2's scan forward: the states at the chunks' starts, the outputs, a step."""

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import clean, product, sigmoid, silu, softplus
from star_kernels.recurrence.triton.chunks import (
    between,
    causal,
    chunk,
    last,
    poison_after,
    running,
    sequence,
    since_start,
    until_end,
)


@triton.jit
def steps(
    dt, bias, rate, head, token, inside, dt_token, bias_head, rate_head, SOFTPLUS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Return step sizes, their derivative by dt, their log decays and the head's rate."""
    raw = tl.load(dt + token * dt_token, mask=inside, other=0.0).to(ACC)
    if bias is not None:
        raw += tl.load(bias + head * bias_head).to(ACC)
    a = tl.load(rate + head * rate_head).to(ACC)
    step, slope = raw, raw * 0.0 + 1.0
    if SOFTPLUS:
        step, slope = softplus(raw), sigmoid(raw)
    return tl.where(inside, step, 0.0), slope, tl.where(inside, step * a, 0.0), a


@triton.jit
def upstream(dy, gate, where, gate_where, inside, ACC: tl.constexpr):
    """Return dy and the gradient before the gate, dy silu(z)."""
    plain = tl.load(dy + where, mask=inside, other=0.0)
    if gate is None:
        return plain, plain
    else:
        z = tl.load(gate + gate_where, mask=inside, other=0.0).to(ACC)
        return plain, plain.to(ACC) * silu(z)


@triton.jit
def _walk(
    dt, bias, rate, values, gate, keys, first, states, final, head, heads, begin, stop, slot, width, size, p, n,
    dt_token, bias_head, rate_head, values_token, values_channel, gate_token, gate_channel, keys_token, keys_channel,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Carry a tile of a head's state over its chunks and store what each begins with.

    In reverse: the gradient of the state, and what each chunk ends with; `values` are then dy, and `keys` C.
    """
    inside_state = (p < width)[:, None] & (n < size)[None, :]
    tile = p.to(tl.int64)[:, None] * size + n[None, :]
    state = tl.zeros([p.shape[0], n.shape[0]], ACC)
    if first is not None:
        state = tl.load(first, mask=inside_state, other=0.0).to(ACC)
    count = tl.cdiv(stop - begin, CHUNK)
    for i in tl.range(count, disable_licm=True):
        index = i * 0 + i
        if REVERSE:
            index = count - 1 - i
        tl.store(states + ((slot + index) * heads + head) * width * size + tile, state, mask=inside_state)
        token = begin + index * CHUNK + tl.arange(0, CHUNK)
        inside = token < stop
        step, _slope, log, _a = steps(
            dt, bias, rate, head, token, inside, dt_token, bias_head, rate_head, SOFTPLUS, ACC
        )  # fmt: skip
        high, low, resets = running(log)
        start = since_start(high, resets)
        m_p, m_n = inside[:, None] & (p < width)[None, :], inside[:, None] & (n < size)[None, :]
        where = token[:, None] * values_token + p[None, :] * values_channel
        k = tl.load(keys + token[:, None] * keys_token + n[None, :] * keys_channel, mask=m_n, other=0.0)
        if REVERSE:
            gate_where = token[:, None] * gate_token + p[None, :] * gate_channel
            _plain, v = upstream(values, gate, where, gate_where, m_p, ACC)
            weight = start
        else:
            v = tl.load(values + where, mask=m_p, other=0.0)
            weight = step * until_end(high, low, resets)
        state = product(tl.trans(v.to(ACC) * weight[:, None]), k, state * last(start))
    if final is not None:
        tl.store(final + tile, state, mask=inside_state)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_states(
    x, dt, rate, bias, inward, outward, gate, dy, ends, first, dlast, starts, dends, final, dfirst, length, chunks,
    heads, heads_a_group, width, size, blocks_p, blocks_n, x_batch, x_token, x_head, x_channel, dt_batch, dt_token,
    dt_head, rate_head, bias_head, inward_batch, inward_token, inward_group, inward_channel, outward_batch,
    outward_token, outward_group, outward_channel, gate_batch, gate_token, gate_head, gate_channel, dy_batch, dy_token,
    dy_head, dy_channel, first_sequence, first_head, first_p, first_n, dlast_sequence, dlast_head, dlast_p, dlast_n,
    SOFTPLUS: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of a head's state in a sequence. In backward the grid's second row is the gradients'."""
    program = tl.program_id(0).to(tl.int64)
    tile = program % (blocks_p * blocks_n)
    head = program // (blocks_p * blocks_n) % heads
    index = program // (blocks_p * blocks_n) // heads
    group = head // heads_a_group
    batch, begin, stop, slot = sequence(index, ends, length, chunks, VARLEN, CHUNK)
    p, n = tile // blocks_n * BLOCK_P + tl.arange(0, BLOCK_P), tile % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dt += batch * dt_batch + head * dt_head
    whole = (index * heads + head) * width * size
    if dends is not None and tl.program_id(1) == 1:
        dy += batch * dy_batch + head * dy_head
        gate_at = gate
        if gate is not None:
            gate_at += batch * gate_batch + head * gate_head
        outward += batch * outward_batch + group * outward_group
        dlast_at = dlast
        if dlast is not None:
            dlast_at = dlast + (
                index * dlast_sequence + head * dlast_head + p[:, None] * dlast_p + n[None, :] * dlast_n
            )
        dfirst_at = dfirst
        if dfirst is not None:
            dfirst_at = dfirst + whole
        _walk(
            dt, bias, rate, dy, gate_at, outward, dlast_at, dends, dfirst_at, head, heads, begin, stop, slot, width,
            size, p, n, dt_token, bias_head, rate_head, dy_token, dy_channel, gate_token, gate_channel, outward_token,
            outward_channel, True, SOFTPLUS, ACC, CHUNK,
        )  # fmt: skip
    else:
        x += batch * x_batch + head * x_head
        inward += batch * inward_batch + group * inward_group
        first_at = first
        if first is not None:
            first_at = first + (
                index * first_sequence + head * first_head + p[:, None] * first_p + n[None, :] * first_n
            )
        final_at = final
        if final is not None:
            final_at = final + whole
        _walk(
            dt, bias, rate, x, None, inward, first_at, starts, final_at, head, heads, begin, stop, slot, width, size, p,
            n, dt_token, bias_head, rate_head, x_token, x_channel, 0, 0, inward_token, inward_channel, False, SOFTPLUS,
            ACC, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def ssd_outputs(
    x, dt, rate, bias, inward, outward, gate, skip, ends, starts, y, length, chunks, count, heads, heads_a_group, width,
    size, blocks_p, x_batch, x_token, x_head, x_channel, dt_batch, dt_token, dt_head, rate_head, bias_head,
    inward_batch, inward_token, inward_group, inward_channel, outward_batch, outward_token, outward_group,
    outward_channel, gate_batch, gate_token, gate_head, gate_channel, skip_head,
    SOFTPLUS: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a block of a head's channels in a chunk, y = ((L o C B^T) s x + g C S + D x) silu(z)."""
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks_p % heads
    slot = program // blocks_p // heads
    group = head // heads_a_group
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    token = begin + tl.arange(0, CHUNK)
    inside = token < stop
    p = program % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    step, _slope, log, _a = steps(
        dt + batch * dt_batch + head * dt_head, bias, rate, head, token, inside, dt_token, bias_head, rate_head,
        SOFTPLUS, ACC,
    )  # fmt: skip
    high, low, resets = running(log)
    inward += batch * inward_batch + group * inward_group + token[:, None] * inward_token
    outward += batch * outward_batch + group * outward_group + token[:, None] * outward_token
    starts += (slot * heads + head) * width * size + p.to(tl.int64)[:, None] * size
    scores = tl.zeros([CHUNK, CHUNK], ACC)
    carried = tl.zeros([CHUNK, BLOCK_P], ACC)
    for at in tl.range(0, size, BLOCK_N, disable_licm=True):
        n = at + tl.arange(0, BLOCK_N)
        m_n = inside[:, None] & (n < size)[None, :]
        b = tl.load(inward + n[None, :] * inward_channel, mask=m_n, other=0.0)
        c = tl.load(outward + n[None, :] * outward_channel, mask=m_n, other=0.0)
        state = tl.load(starts + n[None, :], mask=(p < width)[:, None] & (n < size)[None, :], other=0.0)
        scores = product(c, tl.trans(b), scores)
        carried = product(c, tl.trans(state), carried)
    m_p = inside[:, None] & (p < width)[None, :]
    v = tl.load(
        x + batch * x_batch + head * x_head + token[:, None] * x_token + p[None, :] * x_channel, mask=m_p, other=0.0
    )
    weights = tl.where(causal(), between(high, low, resets) * scores * step[None, :], 0.0)
    out = product(weights, clean(v), carried * since_start(high, resets)[:, None])
    out = poison_after(out, v)
    if skip is not None:
        out += tl.load(skip + head * skip_head).to(ACC) * v.to(ACC)
    if gate is not None:
        gate += batch * gate_batch + head * gate_head
        z = tl.load(gate + token[:, None] * gate_token + p[None, :] * gate_channel, mask=m_p, other=0.0).to(ACC)
        out *= silu(z)
    row = (batch * length + token) * heads + head
    tl.store(y + row[:, None] * width + p[None, :], out, mask=m_p)


@triton.jit
def ssd_one_step(
    state, x, dt, rate, bias, inward, outward, gate, skip, y, new_state, heads, heads_a_group, width, size, blocks_p,
    state_batch, state_head, state_p, state_n, x_batch, x_head, x_channel, dt_batch, dt_head, rate_head, bias_head,
    inward_batch, inward_group, inward_channel, outward_batch, outward_group, outward_channel, gate_batch, gate_head,
    gate_channel, skip_head,
    SOFTPLUS: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a block of a head's channels in a row of the batch."""
    program = tl.program_id(0).to(tl.int64)
    head, batch = program // blocks_p % heads, program // blocks_p // heads
    group = head // heads_a_group
    p = (program % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    step = tl.load(dt + batch * dt_batch + head * dt_head).to(ACC)
    if bias is not None:
        step += tl.load(bias + head * bias_head).to(ACC)
    if SOFTPLUS:
        step = softplus(step)
    decay = tl.exp(step * tl.load(rate + head * rate_head).to(ACC))
    v = tl.load(x + batch * x_batch + head * x_head + p * x_channel, mask=p < width, other=0.0).to(ACC)
    out = tl.zeros([BLOCK_P, 1], ACC)
    for at in tl.range(0, size, BLOCK_N, disable_licm=True):
        n = (at + tl.arange(0, BLOCK_N))[None, :]
        m_pn = (p < width) & (n < size)
        b = tl.load(inward + batch * inward_batch + group * inward_group + n * inward_channel, mask=n < size, other=0.0)
        c = tl.load(
            outward + batch * outward_batch + group * outward_group + n * outward_channel, mask=n < size, other=0.0
        )
        h = tl.load(
            state + batch * state_batch + head * state_head + p * state_p + n * state_n, mask=m_pn, other=0.0
        ).to(ACC)
        h = h * decay + v * step * b.to(ACC)
        tl.store(new_state + ((batch * heads + head) * width + p) * size + n, h, mask=m_pn)
        out += tl.sum(h * c.to(ACC), 1, keep_dims=True)
    if skip is not None:
        out += tl.load(skip + head * skip_head).to(ACC) * v
    if gate is not None:
        z = tl.load(gate + batch * gate_batch + head * gate_head + p * gate_channel, mask=p < width, other=0.0)
        out *= silu(z.to(ACC))
    tl.store(y + (batch * heads + head) * width + p, out, mask=p < width)
