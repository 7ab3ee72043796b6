"""Mamba-2's scan in Triton, in chunks of 64 tokens.

Forward is two kernels: the states at the chunks' starts, one program a tile of a head's state that walks over the
chunks; then every chunk's outputs at once. Backward is three: the states again and, beside them, their gradients at the
chunks' ends; the gradients of a head; those of B and C, which heads of a group share. These are summed over up to four
heads a program, then over the programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._operands import given, like, like_or_none, one_token, strides, wide
from star_kernels._triton import launch, triton_operator
from star_kernels._triton_math import accumulator, clean, next_power_of_2, product, sigmoid, silu, silu_slope, softplus
from star_kernels.recurrence.triton import chunks as chunked
from star_kernels.recurrence.triton.chunks import (
    CHUNK,
    between,
    causal,
    chunk,
    crossing,
    last,
    poison_after,
    poison_before,
    running,
    sequence,
    since_start,
    until_end,
)

_HEADS = 4  # heads of a group that one program of dB and dC adds up
_STEP_TILE = 2048  # elements of a state that one program of a step holds


@triton.jit
def _steps(
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
def _upstream(dy, gate, where, gate_where, inside, ACC: tl.constexpr):
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
    for i in range(count):
        index = i * 0 + i
        if REVERSE:
            index = count - 1 - i
        tl.store(states + ((slot + index) * heads + head) * width * size + tile, state, mask=inside_state)
        token = begin + index * CHUNK + tl.arange(0, CHUNK)
        inside = token < stop
        step, _slope, log, _a = _steps(
            dt, bias, rate, head, token, inside, dt_token, bias_head, rate_head, SOFTPLUS, ACC
        )  # fmt: skip
        high, low, resets = running(log)
        start = since_start(high, resets)
        m_p, m_n = inside[:, None] & (p < width)[None, :], inside[:, None] & (n < size)[None, :]
        where = token[:, None] * values_token + p[None, :] * values_channel
        k = tl.load(keys + token[:, None] * keys_token + n[None, :] * keys_channel, mask=m_n, other=0.0)
        if REVERSE:
            gate_where = token[:, None] * gate_token + p[None, :] * gate_channel
            _plain, v = _upstream(values, gate, where, gate_where, m_p, ACC)
            weight = start
        else:
            v = tl.load(values + where, mask=m_p, other=0.0)
            weight = step * until_end(high, low, resets)
        state = product(tl.trans(v.to(ACC) * weight[:, None]), k, state * last(start))
    if final is not None:
        tl.store(final + tile, state, mask=inside_state)


@triton.jit(do_not_specialize=["length", "chunks"])
def _states(
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
def _outputs(
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
    step, _slope, log, _a = _steps(
        dt + batch * dt_batch + head * dt_head, bias, rate, head, token, inside, dt_token, bias_head, rate_head,
        SOFTPLUS, ACC,
    )  # fmt: skip
    high, low, resets = running(log)
    inward += batch * inward_batch + group * inward_group + token[:, None] * inward_token
    outward += batch * outward_batch + group * outward_group + token[:, None] * outward_token
    starts += (slot * heads + head) * width * size + p.to(tl.int64)[:, None] * size
    scores = tl.zeros([CHUNK, CHUNK], ACC)
    carried = tl.zeros([CHUNK, BLOCK_P], ACC)
    for at in range(0, size, BLOCK_N):
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


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def _head_gradients(
    dy, x, dt, rate, bias, inward, outward, gate, skip, ends, starts, dends, dx, ddt, dgate, sums, length, chunks,
    count, heads, heads_a_group, width, size, dy_batch, dy_token, dy_head, dy_channel, x_batch, x_token, x_head,
    x_channel, dt_batch, dt_token, dt_head, rate_head, bias_head, inward_batch, inward_token, inward_group,
    inward_channel, outward_batch, outward_token, outward_group, outward_channel, gate_batch, gate_token, gate_head,
    gate_channel, skip_head,
    SOFTPLUS: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a head in a chunk. dx, dz, ddt, and the chunk's part of the gradients of A, D and the bias."""
    program = tl.program_id(0).to(tl.int64)
    head, slot = program % heads, program // heads
    group = head // heads_a_group
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    token = begin + tl.arange(0, CHUNK)
    inside = token < stop
    row = (batch * length + token) * heads + head
    step, slope, log, a = _steps(
        dt + batch * dt_batch + head * dt_head, bias, rate, head, token, inside, dt_token, bias_head, rate_head,
        SOFTPLUS, ACC,
    )  # fmt: skip
    high, low, resets = running(log)
    start, until = since_start(high, resets), until_end(high, low, resets)
    inward += batch * inward_batch + group * inward_group + token[:, None] * inward_token
    outward += batch * outward_batch + group * outward_group + token[:, None] * outward_token
    x += batch * x_batch + head * x_head + token[:, None] * x_token
    dy += batch * dy_batch + head * dy_head + token[:, None] * dy_token
    if gate is not None:
        gate += batch * gate_batch + head * gate_head + token[:, None] * gate_token
    scores = tl.zeros([CHUNK, CHUNK], ACC)
    for at in range(0, size, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        m_n = inside[:, None] & (n < size)[None, :]
        b = tl.load(inward + n[None, :] * inward_channel, mask=m_n, other=0.0)
        c = tl.load(outward + n[None, :] * outward_channel, mask=m_n, other=0.0)
        scores = product(c, tl.trans(b), scores)
    scores = tl.where(causal(), between(high, low, resets) * scores, 0.0)
    pairs = tl.zeros([CHUNK, CHUNK], ACC)  # dy_i . x_j
    at_start, at_end, dskip = step * 0.0, step * 0.0, step * 0.0
    weight = 0.0
    if skip is not None:
        weight = tl.load(skip + head * skip_head).to(ACC)
    for at_p in range(0, width, BLOCK_P):
        p = at_p + tl.arange(0, BLOCK_P)
        m_p = inside[:, None] & (p < width)[None, :]
        v = tl.load(x + p[None, :] * x_channel, mask=m_p, other=0.0)
        plain, d = _upstream(dy, gate, p[None, :] * dy_channel, p[None, :] * gate_channel, m_p, ACC)
        pairs = product(d, tl.trans(v), pairs)
        if skip is not None:
            dskip += tl.sum(d.to(ACC) * v.to(ACC), 1)
        carried = tl.zeros([CHUNK, BLOCK_P], ACC)
        for at in range(0, size, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            m_n, m_pn = inside[:, None] & (n < size)[None, :], (p < width)[:, None] & (n < size)[None, :]
            where = (slot * heads + head) * width * size + p.to(tl.int64)[:, None] * size + n[None, :]
            c = tl.load(outward + n[None, :] * outward_channel, mask=m_n, other=0.0)
            carried = product(c, tl.trans(tl.load(starts + where, mask=m_pn, other=0.0)), carried)
        carried *= start[:, None]
        at_start += tl.sum(d.to(ACC) * carried, 1)
        if gate is not None:
            before = poison_after(product(scores * step[None, :], clean(v), carried), v) + weight * v.to(ACC)
            z = tl.load(gate + p[None, :] * gate_channel, mask=m_p, other=0.0).to(ACC)
            tl.store(dgate + row[:, None] * width + p[None, :], plain.to(ACC) * before * silu_slope(z), mask=m_p)
        pulled = tl.zeros([CHUNK, BLOCK_P], ACC)
        for at in range(0, size, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            m_n, m_pn = inside[:, None] & (n < size)[None, :], (p < width)[:, None] & (n < size)[None, :]
            where = (slot * heads + head) * width * size + p.to(tl.int64)[:, None] * size + n[None, :]
            b = tl.load(inward + n[None, :] * inward_channel, mask=m_n, other=0.0)
            pulled = product(b, tl.trans(tl.load(dends + where, mask=m_pn, other=0.0)), pulled)
        pulled *= until[:, None]
        at_end += tl.sum(v.to(ACC) * pulled, 1)
        dvalue = poison_before(product(tl.trans(scores), clean(d), pulled), d) * step[:, None] + weight * d.to(ACC)
        tl.store(dx + row[:, None] * width + p[None, :], dvalue, mask=m_p)
    inner = tl.where(causal(), scores * pairs, 0.0)
    # x_j . dL/d(s_j x_j), and the gradient at the decay over the whole chunk
    through = tl.sum(inner, 0) + at_end
    across = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    for at_p in range(0, width, BLOCK_P):
        for at in range(0, size, BLOCK_N):
            p, n = at_p + tl.arange(0, BLOCK_P), at + tl.arange(0, BLOCK_N)
            m_pn = (p < width)[:, None] & (n < size)[None, :]
            where = (slot * heads + head) * width * size + p.to(tl.int64)[:, None] * size + n[None, :]
            across += tl.load(starts + where, mask=m_pn, other=0.0) * tl.load(dends + where, mask=m_pn, other=0.0)
    dlog = crossing(inner * step[None, :], at_start, at_end * step) + last(start) * tl.sum(tl.sum(across, 1), 0)
    dstep = (dlog * a + through) * slope
    tl.store(ddt + row, dstep, mask=inside)
    sums += (slot * heads + head) * 3
    tl.store(sums, tl.sum(tl.where(inside, dlog * step, 0.0), 0))
    tl.store(sums + 1, tl.sum(tl.where(inside, dstep, 0.0), 0))
    tl.store(sums + 2, tl.sum(dskip, 0))


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def _group_gradients(
    dy, x, dt, rate, bias, inward, outward, gate, ends, starts, dends, dinward, doutward, length, chunks, count, heads,
    heads_a_group, groups, slices, tokens, width, size, blocks_n, dy_batch, dy_token, dy_head, dy_channel, x_batch,
    x_token, x_head, x_channel, dt_batch, dt_token, dt_head, rate_head, bias_head, inward_batch, inward_token,
    inward_group, inward_channel, outward_batch, outward_token, outward_group, outward_channel, gate_batch, gate_token,
    gate_head, gate_channel,
    SOFTPLUS: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: up to HEADS heads of a group in a chunk, a block of channels of dB and dC."""
    program = tl.program_id(0).to(tl.int64)
    n = program % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    program = program // blocks_n
    part, group, slot = program % slices, program // slices % groups, program // slices // groups
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    token = begin + tl.arange(0, CHUNK)
    inside = token < stop
    both = tl.zeros([CHUNK, CHUNK], ACC)
    db, dc = tl.zeros([CHUNK, BLOCK_N], ACC), tl.zeros([CHUNK, BLOCK_N], ACC)
    for index in range(part * HEADS, tl.minimum((part + 1) * HEADS, heads_a_group)):
        head = group * heads_a_group + index
        step, _slope, log, _a = _steps(
            dt + batch * dt_batch + head * dt_head, bias, rate, head, token, inside, dt_token, bias_head, rate_head,
            SOFTPLUS, ACC,
        )  # fmt: skip
        high, low, resets = running(log)
        pairs = tl.zeros([CHUNK, CHUNK], ACC)
        from_start, from_end = tl.zeros([CHUNK, BLOCK_N], ACC), tl.zeros([CHUNK, BLOCK_N], ACC)
        gate_at = gate
        if gate is not None:
            gate_at = gate + batch * gate_batch + head * gate_head
        for at in range(0, width, BLOCK_P):
            p = at + tl.arange(0, BLOCK_P)
            m_p, m_pn = inside[:, None] & (p < width)[None, :], (p < width)[:, None] & (n < size)[None, :]
            v = tl.load(
                x + batch * x_batch + head * x_head + token[:, None] * x_token + p[None, :] * x_channel,
                mask=m_p, other=0.0,
            )  # fmt: skip
            _plain, d = _upstream(
                dy + batch * dy_batch + head * dy_head, gate_at, token[:, None] * dy_token + p[None, :] * dy_channel,
                token[:, None] * gate_token + p[None, :] * gate_channel, m_p, ACC,
            )  # fmt: skip
            pairs = product(d, tl.trans(v), pairs)
            where = (slot * heads + head) * width * size + p.to(tl.int64)[:, None] * size + n[None, :]
            from_start = product(d, tl.load(starts + where, mask=m_pn, other=0.0), from_start)
            from_end = product(v, tl.load(dends + where, mask=m_pn, other=0.0), from_end)
        both += tl.where(causal(), between(high, low, resets) * pairs * step[None, :], 0.0)
        dc += from_start * since_start(high, resets)[:, None]
        db += from_end * (until_end(high, low, resets) * step)[:, None]
    m_n = inside[:, None] & (n < size)[None, :]
    b = tl.load(
        inward + batch * inward_batch + group * inward_group + token[:, None] * inward_token
        + n[None, :] * inward_channel, mask=m_n, other=0.0,
    )  # fmt: skip
    c = tl.load(
        outward + batch * outward_batch + group * outward_group + token[:, None] * outward_token
        + n[None, :] * outward_channel, mask=m_n, other=0.0,
    )  # fmt: skip
    dc = poison_after(product(both, clean(b), dc), b)
    db = poison_before(product(tl.trans(both), clean(c), db), c)
    row = (part * tokens + batch * length + token) * groups + group
    tl.store(dinward + row[:, None] * size + n[None, :], db, mask=m_n)
    tl.store(doutward + row[:, None] * size + n[None, :], dc, mask=m_n)


def _options(
    x: Tensor, dt_softplus: bool, cu_seqlens: Tensor | None, size: int, most_p: int = 64, most_n: int = 64
) -> dict[str, Any]:
    """Return a kernel's constants; it holds at most so many channels of P and of N at once."""
    return {
        "SOFTPLUS": dt_softplus, "VARLEN": cu_seqlens is not None, "ACC": accumulator(x), "CHUNK": CHUNK,
        "BLOCK_P": min(most_p, next_power_of_2(x.shape[3], 16)), "BLOCK_N": min(most_n, next_power_of_2(size, 16)),
    }  # fmt: skip


def _launch_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, first: Tensor | None, ends: Tensor | None, final: Tensor | None, dy: Tensor | None = None,
    dlast: Tensor | None = None, dfirst: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the states that chunks begin with and, given dy, the gradients of those that they end with."""
    heads, width = x.shape[2:]
    groups, size = B.shape[2:]
    count, chunks, slots = chunked.layout(x, ends)
    starts = torch.empty(slots, heads, width, size, dtype=wide(x), device=x.device)
    dends = None if dy is None else torch.empty_like(starts)
    options = _options(x, dt_softplus, ends, size)
    blocks_p, blocks_n = triton.cdiv(width, options["BLOCK_P"]), triton.cdiv(size, options["BLOCK_N"])
    launch(
        _states, (count * heads * blocks_p * blocks_n, 1 if dy is None else 2), x, dt, A, dt_bias, B, C, z, dy, ends,
        first, dlast, starts, dends, final, dfirst, x.shape[1], chunks, heads, heads // groups, width, size, blocks_p,
        blocks_n, *x.stride(), *dt.stride(), A.stride(0), *strides(dt_bias, 1), *B.stride(), *C.stride(),
        *strides(z, 4), *strides(dy, 4), *strides(first, 4), *strides(dlast, 4),
        num_warps=4 if dy is None else 8, **options,
    )  # fmt: skip
    return starts, dends


def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads, width = x.shape[2:]
    groups, size = B.shape[2:]
    count, chunks, slots = chunked.layout(x, cu_seqlens)
    y = like(x)
    final = torch.empty(count, heads, width, size, dtype=wide(x), device=x.device)
    starts, _ = _launch_states(x, dt, A, B, C, z, dt_bias, dt_softplus, initial_state, cu_seqlens, final)
    options = _options(x, dt_softplus, cu_seqlens, size)
    blocks_p = triton.cdiv(width, options["BLOCK_P"])
    launch(
        _outputs, (slots * heads * blocks_p,), x, dt, A, dt_bias, B, C, z, D, cu_seqlens, starts, y, x.shape[1], chunks,
        count, heads, heads // groups, width, size, blocks_p, *x.stride(), *dt.stride(), A.stride(0),
        *strides(dt_bias, 1), *B.stride(), *C.stride(), *strides(z, 4), *strides(D, 1),
        **options,
    )  # fmt: skip
    return y, final


def _fake_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    count = x.shape[0] if rest[-1] is None else rest[-1].shape[0] - 1
    state = torch.empty((count, *x.shape[2:], B.shape[3]), dtype=wide(x), device=x.device)
    return like(x), state


def _ssd_gradients(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, dt_softplus: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias and the initial state."""
    if dy is None:
        dy = torch.zeros(1, dtype=x.dtype, device=x.device).expand(x.shape)
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    count, chunks, slots = chunked.layout(x, cu_seqlens)
    dx, ddt, dz = like(x), like(dt), like_or_none(z, x)
    dinitial = like_or_none(initial_state, x)
    starts, dends = _launch_states(
        x, dt, A, B, C, z, dt_bias, dt_softplus, initial_state, cu_seqlens, None, dy, dfinal,
        None if initial_state is None else dinitial,
    )  # fmt: skip
    sums = torch.zeros(slots, heads, 3, dtype=starts.dtype, device=x.device)
    options = _options(x, dt_softplus, cu_seqlens, size, 16, 32)
    steps = (*x.stride(), *dt.stride(), A.stride(0), *strides(dt_bias, 1), *B.stride(), *C.stride())
    launch(
        _head_gradients, (slots * heads,), dy, x, dt, A, dt_bias, B, C, z, D, cu_seqlens, starts, dends, dx, ddt, dz,
        sums, length, chunks, count, heads, heads // groups, width, size, *dy.stride(), *steps, *strides(z, 4),
        *strides(D, 1), num_warps=8, **options,
    )  # fmt: skip
    slices, blocks_n = triton.cdiv(heads // groups, _HEADS), triton.cdiv(size, options["BLOCK_N"])
    shape = (slices, batch, length, groups, size)
    dtypes = (B.dtype, C.dtype) if slices == 1 else (starts.dtype, starts.dtype)
    db, dc = (torch.empty(shape, dtype=dtype, device=x.device) for dtype in dtypes)
    launch(
        _group_gradients, (slots * groups * slices * blocks_n,), dy, x, dt, A, dt_bias, B, C, z, cu_seqlens, starts,
        dends, db, dc, length, chunks, count, heads, heads // groups, groups, slices, batch * length, width, size,
        blocks_n, *dy.stride(), *steps, *strides(z, 4), HEADS=_HEADS, num_warps=8, **options,
    )  # fmt: skip
    dB, dC = (one[0] if slices == 1 else one.sum(0).to(B.dtype) for one in (db, dc))
    totals = sums.sum(0)
    dA, dbias, dD = (
        like_or_none(one, x) if one is None else totals[:, i].to(one.dtype, copy=True)
        for i, one in enumerate((A, dt_bias, D))
    )
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


def _fake_gradients(dy: Tensor | None, dfinal: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(like_or_none(one, x) for one in (x, *rest[:-2]))


def _save_ssd(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.dt_softplus, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _ssd_gradient(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    found = _ssd_backward_operator(dy, dfinal, *tensors, ctx.dt_softplus, cu_seqlens)
    *gradients, dinitial = map(given, tensors, found)
    return *gradients, None, dinitial, None


@triton.jit
def _step(
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
    for at in range(0, size, BLOCK_N):
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


def _ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, width = x.shape
    groups, size = B.shape[1:]
    y, new_state = like(x), torch.empty(state.shape, dtype=wide(x), device=x.device)
    block_n = min(128, next_power_of_2(size, 16))
    block_p = min(next_power_of_2(width), _STEP_TILE // block_n)
    blocks_p = triton.cdiv(width, block_p)
    launch(
        _step, (batch * heads * blocks_p,), state, x, dt, A, dt_bias, B, C, z, D, y, new_state, heads, heads // groups,
        width, size, blocks_p, *state.stride(), *x.stride(), *dt.stride(), A.stride(0), *strides(dt_bias, 1),
        *B.stride(), *C.stride(), *strides(z, 3), *strides(D, 1), SOFTPLUS=dt_softplus,
        ACC=accumulator(x), BLOCK_P=block_p, BLOCK_N=block_n,
    )  # fmt: skip
    return y, new_state


def _fake_step(state: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like(x), torch.empty(state.shape, dtype=wide(x), device=x.device)


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.dt_softplus = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _step_gradient(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    """Take the gradient of a sequence of one token."""
    state, x, dt, A, B, C, D, z, dt_bias = ctx.saved_tensors
    timed = (one_token(x), one_token(dt), A, one_token(B), one_token(C), D, one_token(z), dt_bias, state)
    found = _ssd_backward_operator(one_token(dy), dstate, *timed, ctx.dt_softplus, None)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = map(given, timed, found)
    dx, ddt, dB, dC, dz = (None if one is None else one.squeeze(1) for one in (dx, ddt, dB, dC, dz))
    return dinitial, dx, ddt, dA, dB, dC, dD, dz, dbias, None


_ssd_backward_operator = triton_operator("ssd_backward", _ssd_gradients, fake=_fake_gradients)
_operator = triton_operator("ssd", _ssd, fake=_fake_ssd, setup_context=_save_ssd, backward=_ssd_gradient)
_step_operator = triton_operator(
    "ssd_step", _ssd_step, fake=_fake_step, setup_context=_save_step, backward=_step_gradient
)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Serve `star_kernels.ssd`."""
    y, final_state = _operator(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    return y, final_state


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Serve `star_kernels.ssd_step`."""
    y, new_state = _step_operator(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return y, new_state
