"""The kernels of the gradients of Mamba-2's scan in a chunk: those of a head, and those that heads of a group share."""

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import clean, product, silu_slope
from star_kernels.recurrence.triton.chunks import (
    between,
    causal,
    chunk,
    last,
    passing,
    poison_after,
    poison_before,
    running,
    since_start,
    until_end,
    within,
)
from star_kernels.recurrence.triton.ssd_kernels import steps, upstream


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def ssd_head_gradients(
    dy, x, dt, rate, bias, inward, outward, gate, skip, ends, starts, dends, dx, ddt, dgate, sums, edges, length,
    chunks, count, heads, heads_a_group, width, size, edge, dy_batch, dy_token, dy_head, dy_channel, x_batch, x_token,
    x_head, x_channel, dt_batch, dt_token, dt_head, rate_head, bias_head, inward_batch, inward_token, inward_group,
    inward_channel, outward_batch, outward_token, outward_group, outward_channel, gate_batch, gate_token, gate_head,
    gate_channel, skip_head,
    SOFTPLUS: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program: a head in a chunk. dx, dz, ddt, and the chunk's part of the gradients of A, D and the bias.

    All at once (PART 0), or dz (1), dx (2) and then the rest (3), which takes up a number a token of each from `edges`:
    with float32 parts as the factors of mma.sync, all at once spills 136 bytes, and dz with dx 16.
    """
    START: tl.constexpr = PART == 0 or PART == 1
    END: tl.constexpr = PART == 0 or PART == 2
    program = tl.program_id(0).to(tl.int64)
    head, slot = program % heads, program // heads
    group = head // heads_a_group
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    token = begin + tl.arange(0, CHUNK)
    inside = token < stop
    row = (batch * length + token) * heads + head
    step, slope, log, a = steps(
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
    for at in tl.range(0, size, BLOCK_N, disable_licm=True):
        n = at + tl.arange(0, BLOCK_N)
        m_n = inside[:, None] & (n < size)[None, :]
        b = tl.load(inward + n[None, :] * inward_channel, mask=m_n, other=0.0)
        c = tl.load(outward + n[None, :] * outward_channel, mask=m_n, other=0.0)
        scores = product(c, tl.trans(b), scores)
    scores = tl.where(causal(), between(high, low, resets) * scores, 0.0)
    at_start, at_end = step * 0.0, step * 0.0
    weight = 0.0
    if skip is not None:
        weight = tl.load(skip + head * skip_head).to(ACC)
    if PART != 3:
        for at_p in tl.range(0, width, BLOCK_P, disable_licm=True):
            p = at_p + tl.arange(0, BLOCK_P)
            m_p = inside[:, None] & (p < width)[None, :]
            carried, pulled = tl.zeros([CHUNK, BLOCK_P], ACC), tl.zeros([CHUNK, BLOCK_P], ACC)
            for at in tl.range(0, size, BLOCK_N, disable_licm=True):
                n = at + tl.arange(0, BLOCK_N)
                m_n, m_pn = inside[:, None] & (n < size)[None, :], (p < width)[:, None] & (n < size)[None, :]
                where = (slot * heads + head) * width * size + p.to(tl.int64)[:, None] * size + n[None, :]
                if START:
                    c = tl.load(outward + n[None, :] * outward_channel, mask=m_n, other=0.0)
                    carried = product(c, tl.trans(tl.load(starts + where, mask=m_pn, other=0.0)), carried)
                if END:
                    b = tl.load(inward + n[None, :] * inward_channel, mask=m_n, other=0.0)
                    pulled = product(b, tl.trans(tl.load(dends + where, mask=m_pn, other=0.0)), pulled)
            v = tl.load(x + p[None, :] * x_channel, mask=m_p, other=0.0)
            if START:
                plain, d = upstream(dy, gate, p[None, :] * dy_channel, p[None, :] * gate_channel, m_p, ACC)
                carried *= start[:, None]
            if END:
                pulled *= until[:, None]
            if START:
                at_start += tl.sum(d.to(ACC) * carried, 1)
            if END:
                at_end += tl.sum(v.to(ACC) * pulled, 1)
            if START and gate is not None:
                before = poison_after(product(scores * step[None, :], clean(v), carried), v) + weight * v.to(ACC)
                z = tl.load(gate + p[None, :] * gate_channel, mask=m_p, other=0.0).to(ACC)
                tl.store(dgate + row[:, None] * width + p[None, :], plain.to(ACC) * before * silu_slope(z), mask=m_p)
            if END:
                # Loaded again, as a factor of a product is held by every warp: 32 of a thread's registers.
                _plain, late = upstream(dy, gate, p[None, :] * dy_channel, p[None, :] * gate_channel, m_p, ACC)
                dvalue = poison_before(product(tl.trans(scores), clean(late), pulled), late)
                dvalue = dvalue * step[:, None] + weight * late.to(ACC)
                tl.store(dx + row[:, None] * width + p[None, :], dvalue, mask=m_p)
    if PART == 1:
        tl.store(edges + row, at_start, mask=inside)
    if PART == 2:
        tl.store(edges + edge + row, at_end, mask=inside)
    if PART == 0 or PART == 3:
        if PART == 3:
            at_start = tl.load(edges + row, mask=inside, other=0.0)
            at_end = tl.load(edges + edge + row, mask=inside, other=0.0)
        # x and dy are loaded again, as two matrices over pairs of tokens above need more registers than there are.
        pairs, dskip = tl.zeros([CHUNK, CHUNK], ACC), step * 0.0  # dy_i . x_j
        for at_p in tl.range(0, width, BLOCK_P, disable_licm=True):
            p = at_p + tl.arange(0, BLOCK_P)
            m_p = inside[:, None] & (p < width)[None, :]
            v = tl.load(x + p[None, :] * x_channel, mask=m_p, other=0.0)
            plain, d = upstream(dy, gate, p[None, :] * dy_channel, p[None, :] * gate_channel, m_p, ACC)
            pairs = product(d, tl.trans(v), pairs)
            if skip is not None:
                dskip += tl.sum(d.to(ACC) * v.to(ACC), 1)
        inner = tl.where(causal(), scores * pairs, 0.0)
        # x_j . dL/d(s_j x_j), and the gradient at the decay over the whole chunk
        through = tl.sum(inner, 0) + at_end
        across = tl.zeros([BLOCK_P, BLOCK_N], ACC)
        for at_p in tl.range(0, width, BLOCK_P, disable_licm=True):
            for at in tl.range(0, size, BLOCK_N, disable_licm=True):
                p, n = at_p + tl.arange(0, BLOCK_P), at + tl.arange(0, BLOCK_N)
                m_pn = (p < width)[:, None] & (n < size)[None, :]
                where = (slot * heads + head) * width * size + p.to(tl.int64)[:, None] * size + n[None, :]
                across += tl.load(starts + where, mask=m_pn, other=0.0) * tl.load(dends + where, mask=m_pn, other=0.0)
        dlog = within(inner * step[None, :]) + passing(at_start, at_end * step)
        dlog += last(start) * tl.sum(tl.sum(across, 1), 0)
        dstep = (dlog * a + through) * slope
        tl.store(ddt + row, dstep, mask=inside)
        sums += (slot * heads + head) * 3
        tl.store(sums, tl.sum(tl.where(inside, dlog * step, 0.0), 0))
        tl.store(sums + 1, tl.sum(tl.where(inside, dstep, 0.0), 0))
        tl.store(sums + 2, tl.sum(dskip, 0))


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def ssd_group_gradients(
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
    for index in tl.range(part * HEADS, tl.minimum((part + 1) * HEADS, heads_a_group), disable_licm=True):
        head = group * heads_a_group + index
        step, _slope, log, _a = steps(
            dt + batch * dt_batch + head * dt_head, bias, rate, head, token, inside, dt_token, bias_head, rate_head,
            SOFTPLUS, ACC,
        )  # fmt: skip
        high, low, resets = running(log)
        pairs = tl.zeros([CHUNK, CHUNK], ACC)
        from_start, from_end = tl.zeros([CHUNK, BLOCK_N], ACC), tl.zeros([CHUNK, BLOCK_N], ACC)
        gate_at = gate
        if gate is not None:
            gate_at = gate + batch * gate_batch + head * gate_head
        for at in tl.range(0, width, BLOCK_P, disable_licm=True):
            p = at + tl.arange(0, BLOCK_P)
            m_p, m_pn = inside[:, None] & (p < width)[None, :], (p < width)[:, None] & (n < size)[None, :]
            v = tl.load(
                x + batch * x_batch + head * x_head + token[:, None] * x_token + p[None, :] * x_channel,
                mask=m_p, other=0.0,
            )  # fmt: skip
            _plain, d = upstream(
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
