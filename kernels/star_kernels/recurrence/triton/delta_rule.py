"""The gated delta rule in Triton, in chunks of 64 tokens.

With L_ij the decay from token j to i of a chunk and g_i that from its start, what token i writes is
u = (I + A)^{-1} beta (v - g K S), A_ij = beta_i L_ij (k_i . k_j) for i > j. The inverse does not depend on the state S:
one kernel takes it for all chunks at once, block by block (a block of 2 m tokens has the inverses of its halves on the
diagonal, and below it their product with A between them). Then a walk over the chunks, then all outputs.

Backward is three kernels: the inverse again; the walk, and beside it the one of the states' gradients; the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._operands import like, like_or_none, score_factor, strides, wide
from star_kernels._triton import launch
from star_kernels._triton_math import accumulator, clean, next_power_of_2, product
from star_kernels.recurrence.triton import chunks as chunked
from star_kernels.recurrence.triton.chunks import (
    CHUNK,
    between,
    causal,
    chunk,
    crossing,
    halves,
    last,
    levels,
    poison_after,
    poison_before,
    running,
    sequence,
    since_start,
    until_end,
)
from star_kernels.recurrence.triton.memory import memory_operators

_STATE = 2048  # elements of a state that one program of a walk holds
_STEP_TILE = 2048


@triton.jit
def _rows(x, token, column, stop, columns, token_step, column_step):
    """Load a tile (tokens, columns) of one head."""
    inside = (token < stop)[:, None] & (column < columns)[None, :]
    return tl.load(x + token[:, None] * token_step + column[None, :] * column_step, mask=inside, other=0.0)


@triton.jit
def _entries(x, token, stop, token_step, ACC: tl.constexpr):
    """Load one number a token."""
    return tl.load(x + token * token_step, mask=token < stop, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def _inverses(
    k, logs, beta, ends, inverses, length, chunks, count, heads, keys, k_batch, k_token, k_head, k_channel, logs_batch,
    logs_token, logs_head, beta_batch, beta_token, beta_head,
    VARLEN: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: (I + A)^{-1} of a head in a chunk. What is not finite counts as zero: it shows in what is solved."""
    program = tl.program_id(0).to(tl.int64)
    head, slot = program % heads, program // heads
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    position = tl.arange(0, CHUNK)
    i, j = position[:, None], position[None, :]
    token = begin + position
    log = _entries(logs + batch * logs_batch + head * logs_head, token, stop, logs_token, ACC)
    b = clean(_entries(beta + batch * beta_batch + head * beta_head, token, stop, beta_token, ACC))
    k += batch * k_batch + head * k_head
    a = tl.zeros([CHUNK, CHUNK], ACC)
    for at in range(0, keys, BLOCK_K):
        b_k = clean(_rows(k, token, at + tl.arange(0, BLOCK_K), stop, keys, k_token, k_channel))
        a = product(b_k, tl.trans(b_k), a)
    high, low, resets = running(tl.where(log == log, log, 0.0))
    a *= between(high, low, resets) * b[:, None]
    inverse = tl.where(i == j, 1.0, tl.zeros([CHUNK, CHUNK], ACC))
    for level in range(levels(stop - begin)):
        across = tl.where(halves(level), a, 0.0)
        right = product(across, inverse, tl.zeros([CHUNK, CHUNK], ACC))
        inverse = product(-inverse, right, inverse)
    tl.store(inverses + (slot * heads + head) * CHUNK * CHUNK + i * CHUNK + j, inverse)


@triton.jit
def _walk(
    k, v, logs, beta, inverses, first, starts, written, final, head, heads, batch, begin, stop, slot, length, keys,
    values, o_k, o_v, k_token, k_channel, v_token, v_channel, logs_token, beta_token,
    ACC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Carry the state of some value channels over the chunks; store it at their starts, and what each token writes."""
    inside = (o_k < keys)[:, None] & (o_v < values)[None, :]
    tile = o_k.to(tl.int64)[:, None] * values + o_v[None, :]
    square = tl.arange(0, CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    state = tl.zeros([o_k.shape[0], o_v.shape[0]], ACC)
    if first is not None:
        state = tl.load(first, mask=inside, other=0.0).to(ACC)
    for index in range(tl.cdiv(stop - begin, CHUNK)):
        at = (slot + index) * heads + head
        tl.store(starts + at * keys * values + tile, state, mask=inside)
        token = begin + index * CHUNK + tl.arange(0, CHUNK)
        b_k = _rows(k, token, o_k, stop, keys, k_token, k_channel)
        b_v = _rows(v, token, o_v, stop, values, v_token, v_channel)
        b = _entries(beta, token, stop, beta_token, ACC)
        high, low, resets = running(_entries(logs, token, stop, logs_token, ACC))
        start, until = since_start(high, resets), until_end(high, low, resets)
        known = product(b_k, state, tl.zeros(b_v.shape, ACC))
        wanted = (b_v.to(ACC) - known * start[:, None]) * b[:, None]
        inverse = tl.load(inverses + at * CHUNK * CHUNK + square)
        u = poison_after(product(inverse, clean(wanted), tl.zeros(b_v.shape, ACC)), wanted)
        row = (batch * length + token) * heads + head
        m_v = (token < stop)[:, None] & (o_v < values)[None, :]
        tl.store(written + row[:, None] * values + o_v[None, :], u, mask=m_v)
        # Rows behind the last token hold no token's values.
        u = tl.where(m_v, u * until[:, None], 0.0)
        state = product(tl.trans(b_k), u, state * last(start))
    if final is not None:
        tl.store(final + tile, state, mask=inside)


@triton.jit
def _walk_back(
    q, k, do, logs, beta, inverses, dlast, dends, dwanted, dv, dfirst, head, heads, batch, begin, stop, slot, length,
    keys, values, o_k, o_v, q_token, q_channel, k_token, k_channel, do_token, do_channel, logs_token, beta_token,
    SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Carry the gradient of the state back over the chunks; store it at their ends, and w's, w = beta (v - g K S)."""
    inside = (o_k < keys)[:, None] & (o_v < values)[None, :]
    tile = o_k.to(tl.int64)[:, None] * values + o_v[None, :]
    square = tl.arange(0, CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    state = tl.zeros([o_k.shape[0], o_v.shape[0]], ACC)
    if dlast is not None:
        state = tl.load(dlast, mask=inside, other=0.0).to(ACC)
    count = tl.cdiv(stop - begin, CHUNK)
    for i in range(count):
        index = count - 1 - i
        at = (slot + index) * heads + head
        tl.store(dends + at * keys * values + tile, state, mask=inside)
        token = begin + index * CHUNK + tl.arange(0, CHUNK)
        b_q = _rows(q, token, o_k, stop, keys, q_token, q_channel)
        b_k = _rows(k, token, o_k, stop, keys, k_token, k_channel)
        d = _rows(do, token, o_v, stop, values, do_token, do_channel)
        b = _entries(beta, token, stop, beta_token, ACC)
        high, low, resets = running(_entries(logs, token, stop, logs_token, ACC))
        start, until = since_start(high, resets) * SCALE, until_end(high, low, resets)
        scores = product(b_q, tl.trans(b_k), tl.zeros([CHUNK, CHUNK], ACC))
        scores = tl.where(causal(), scores * between(high, low, resets) * SCALE, 0.0)
        du = product(b_k, state, tl.zeros(d.shape, ACC)) * until[:, None]
        # 0 beta: what is not finite must show, and the inverse does not hold it.
        du = poison_before(product(tl.trans(scores), clean(d), du), d) + (b * 0.0)[:, None]
        inverse = tl.load(inverses + at * CHUNK * CHUNK + square)
        dw = poison_before(product(tl.trans(inverse), clean(du), tl.zeros(d.shape, ACC)), du)
        m_v = (token < stop)[:, None] & (o_v < values)[None, :]
        where = ((batch * length + token) * heads + head)[:, None] * values + o_v[None, :]
        tl.store(dwanted + where, dw, mask=m_v)
        tl.store(dv + where, dw * b[:, None], mask=m_v)
        state *= last(since_start(high, resets))
        state = product(tl.trans(b_q), d.to(ACC) * start[:, None], state)
        dw = tl.where(m_v, dw * (b * since_start(high, resets))[:, None], 0.0)
        state = product(tl.trans(b_k), -dw, state)
    if dfirst is not None:
        tl.store(dfirst + tile, state, mask=inside)


@triton.jit(do_not_specialize=["length", "chunks"])
def _states(
    q, k, v, logs, beta, do, ends, inverses, first, dlast, starts, dends, written, dwanted, dv, final, dfirst, length,
    chunks, heads, keys, values, blocks_v, q_batch, q_token, q_head, q_channel, k_batch, k_token, k_head, k_channel,
    v_batch, v_token, v_head, v_channel, logs_batch, logs_token, logs_head, beta_batch, beta_token, beta_head,
    do_batch, do_token, do_head, do_channel, first_sequence, first_head, first_k, first_v, dlast_sequence, dlast_head,
    dlast_k, dlast_v,
    VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: some value channels of a head's state in a sequence. The grid's second row is the gradients'."""
    program = tl.program_id(0).to(tl.int64)
    head, index = program // blocks_v % heads, program // blocks_v // heads
    batch, begin, stop, slot = sequence(index, ends, length, chunks, VARLEN, CHUNK)
    o_k, o_v = tl.arange(0, BLOCK_K), program % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    k += batch * k_batch + head * k_head
    logs += batch * logs_batch + head * logs_head
    beta += batch * beta_batch + head * beta_head
    whole = (index * heads + head) * keys * values
    if dends is not None and tl.program_id(1) == 1:
        dlast_at = dlast
        if dlast is not None:
            dlast_at = dlast + (
                index * dlast_sequence + head * dlast_head + o_k[:, None] * dlast_k + o_v[None, :] * dlast_v
            )
        dfirst_at = dfirst
        if dfirst is not None:
            dfirst_at = dfirst + whole
        _walk_back(
            q + (batch * q_batch + head * q_head), k, do + (batch * do_batch + head * do_head), logs, beta, inverses,
            dlast_at, dends, dwanted, dv, dfirst_at, head, heads, batch, begin, stop, slot, length, keys, values, o_k,
            o_v, q_token, q_channel, k_token, k_channel, do_token, do_channel, logs_token, beta_token, SCALE, ACC,
            CHUNK,
        )  # fmt: skip
    else:
        first_at = first
        if first is not None:
            first_at = first + (
                index * first_sequence + head * first_head + o_k[:, None] * first_k + o_v[None, :] * first_v
            )
        final_at = final
        if final is not None:
            final_at = final + whole
        _walk(
            k, v + (batch * v_batch + head * v_head), logs, beta, inverses, first_at, starts, written, final_at, head,
            heads, batch, begin, stop, slot, length, keys, values, o_k, o_v, k_token, k_channel, v_token, v_channel,
            logs_token, beta_token, ACC, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def _outputs(
    q, k, logs, ends, starts, written, out, length, chunks, count, heads, keys, values, blocks_v, q_batch, q_token,
    q_head, q_channel, k_batch, k_token, k_head, k_channel, logs_batch, logs_token, logs_head,
    VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a block of a head's value channels in a chunk, o = g Q S + (L o Q K^T) u."""
    program = tl.program_id(0).to(tl.int64)
    head, slot = program // blocks_v % heads, program // blocks_v // heads
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    token = begin + tl.arange(0, CHUNK)
    o_v = program % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    high, low, resets = running(
        _entries(logs + batch * logs_batch + head * logs_head, token, stop, logs_token, ACC)
    )  # fmt: skip
    scores, y = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, BLOCK_V], ACC)
    for at in range(0, keys, BLOCK_K):
        o_k = at + tl.arange(0, BLOCK_K)
        b_q = _rows(q, token, o_k, stop, keys, q_token, q_channel)
        b_k = _rows(k, token, o_k, stop, keys, k_token, k_channel)
        where = (slot * heads + head) * keys * values + o_k.to(tl.int64)[:, None] * values + o_v[None, :]
        state = tl.load(starts + where, mask=(o_k < keys)[:, None] & (o_v < values)[None, :], other=0.0)
        scores = product(b_q, tl.trans(b_k), scores)
        y = product(b_q, state, y)
    row = (batch * length + token) * heads + head
    where, m_v = row[:, None] * values + o_v[None, :], (token < stop)[:, None] & (o_v < values)[None, :]
    u = tl.load(written + where, mask=m_v, other=0.0)
    scores = tl.where(causal(), scores * between(high, low, resets), 0.0)
    y = poison_after(product(scores, clean(u), y * since_start(high, resets)[:, None]), u) * SCALE
    tl.store(out + where, y, mask=m_v)


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def _gradients(
    do, q, k, v, logs, beta, ends, starts, dends, written, dwanted, dq, dk, dlogs, dbeta, length, chunks, count, heads,
    keys, values, do_batch, do_token, do_head, do_channel, q_batch, q_token, q_head, q_channel, k_batch, k_token,
    k_head, k_channel, v_batch, v_token, v_head, v_channel, logs_batch, logs_token, logs_head, beta_batch, beta_token,
    beta_head,
    VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a head in a chunk, the gradients of q, k, beta and the log decays."""
    program = tl.program_id(0).to(tl.int64)
    head, slot = program % heads, program // heads
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    position = tl.arange(0, CHUNK)
    after = position[:, None] > position[None, :]
    token = begin + position
    row = (batch * length + token) * heads + head
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    do += batch * do_batch + head * do_head
    high, low, resets = running(
        _entries(logs + batch * logs_batch + head * logs_head, token, stop, logs_token, ACC)
    )  # fmt: skip
    start, until = since_start(high, resets), until_end(high, low, resets)
    b = _entries(beta + batch * beta_batch + head * beta_head, token, stop, beta_token, ACC)
    read, inner = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, CHUNK], ACC)
    db = tl.zeros([CHUNK], ACC)
    for at in range(0, values, BLOCK_V):
        o_v = at + tl.arange(0, BLOCK_V)
        m_v = (token < stop)[:, None] & (o_v < values)[None, :]
        where = row[:, None] * values + o_v[None, :]
        u = tl.load(written + where, mask=m_v, other=0.0)
        dw = tl.load(dwanted + where, mask=m_v, other=0.0)
        read = product(_rows(do, token, o_v, stop, values, do_token, do_channel), tl.trans(u), read)
        inner = product(dw, tl.trans(u), inner)
        db += tl.sum(dw * _rows(v, token, o_v, stop, values, v_token, v_channel).to(ACC), 1)
    decay = between(high, low, resets)
    read = tl.where(causal(), read * decay * SCALE, 0.0)  # by q_i . k_j
    inner = tl.where(after, inner * decay, 0.0)  # by -beta_i (k_i . k_j)
    scores, squares = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, CHUNK], ACC)
    for at in range(0, keys, BLOCK_K):
        o_k = at + tl.arange(0, BLOCK_K)
        b_k = _rows(k, token, o_k, stop, keys, k_token, k_channel)
        scores = product(_rows(q, token, o_k, stop, keys, q_token, q_channel), tl.trans(b_k), scores)
        squares = product(b_k, tl.trans(b_k), squares)
    squares = tl.where(after, inner * squares, 0.0)
    db -= tl.sum(squares, 1)
    pairs = tl.where(causal(), read * scores, 0.0) - squares * b[:, None]
    inner *= -b[:, None]
    at_start, at_end, across = tl.zeros([CHUNK], ACC), tl.zeros([CHUNK], ACC), tl.zeros([BLOCK_K], ACC)
    for at_k in range(0, keys, BLOCK_K):
        o_k = at_k + tl.arange(0, BLOCK_K)
        b_q = _rows(q, token, o_k, stop, keys, q_token, q_channel)
        b_k = _rows(k, token, o_k, stop, keys, k_token, k_channel)
        b_dq = tl.zeros([CHUNK, BLOCK_K], ACC)
        known, b_dk = tl.zeros([CHUNK, BLOCK_K], ACC), tl.zeros([CHUNK, BLOCK_K], ACC)
        for at in range(0, values, BLOCK_V):
            o_v = at + tl.arange(0, BLOCK_V)
            m_v = (token < stop)[:, None] & (o_v < values)[None, :]
            m_kv = (o_k < keys)[:, None] & (o_v < values)[None, :]
            where = (slot * heads + head) * keys * values + o_k.to(tl.int64)[:, None] * values + o_v[None, :]
            first = tl.load(starts + where, mask=m_kv, other=0.0)
            end = tl.load(dends + where, mask=m_kv, other=0.0)
            where = row[:, None] * values + o_v[None, :]
            b_dq = product(_rows(do, token, o_v, stop, values, do_token, do_channel), tl.trans(first), b_dq)
            known = product(tl.load(dwanted + where, mask=m_v, other=0.0), tl.trans(first), known)
            b_dk = product(tl.load(written + where, mask=m_v, other=0.0), tl.trans(end), b_dk)
            across += tl.sum(first * end, 1)
        b_dq *= (start * SCALE)[:, None]
        known *= start[:, None]
        b_dk *= until[:, None]
        through = tl.sum(b_k.to(ACC) * known, 1)
        at_start += tl.sum(b_q.to(ACC) * b_dq, 1) - b * through
        at_end += tl.sum(b_k.to(ACC) * b_dk, 1)
        db -= through
        b_dk -= known * b[:, None]
        q_clean, k_clean = clean(b_q), clean(b_k)
        b_dq = poison_after(product(read, k_clean, b_dq), b_k)
        b_dk = product(tl.trans(read), q_clean, b_dk)
        b_dk = product(inner, k_clean, b_dk)
        b_dk = product(tl.trans(inner), k_clean, b_dk)
        b_dk = poison_before(poison_after(poison_before(b_dk, b_q), b_k), b_k)
        where = row[:, None] * keys + o_k[None, :]
        m_k = (token < stop)[:, None] & (o_k < keys)[None, :]
        tl.store(dq + where, b_dq, mask=m_k)
        tl.store(dk + where, b_dk, mask=m_k)
    dlog = crossing(pairs, at_start, at_end) + last(start) * tl.sum(across, 0)
    tl.store(dlogs + row, dlog, mask=token < stop)
    tl.store(dbeta + row, db, mask=token < stop)


@triton.jit
def _step(
    state, q, k, v, logs, beta, out, new_state, heads, keys, values, blocks_v, state_batch, state_head, state_k,
    state_v, q_batch, q_head, q_channel, k_batch, k_head, k_channel, v_batch, v_head, v_channel, logs_batch, logs_head,
    beta_batch, beta_head, SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a block of a head's value channels in a row of the batch, with all its keys."""
    program = tl.program_id(0).to(tl.int64)
    head, batch = program // blocks_v % heads, program // blocks_v // heads
    o_k = tl.arange(0, BLOCK_K)[:, None]
    o_v = (program % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    m_k, m_v, m_kv = o_k < keys, o_v < values, (o_k < keys) & (o_v < values)
    b_q = tl.load(q + batch * q_batch + head * q_head + o_k * q_channel, mask=m_k, other=0.0).to(ACC)
    b_k = tl.load(k + batch * k_batch + head * k_head + o_k * k_channel, mask=m_k, other=0.0).to(ACC)
    b_v = tl.load(v + batch * v_batch + head * v_head + o_v * v_channel, mask=m_v, other=0.0).to(ACC)
    decay = tl.exp(tl.load(logs + batch * logs_batch + head * logs_head).to(ACC))
    b = tl.load(beta + batch * beta_batch + head * beta_head).to(ACC)
    where = batch * state_batch + head * state_head + o_k * state_k + o_v * state_v
    memory = tl.load(state + where, mask=m_kv, other=0.0).to(ACC) * decay
    memory += b_k * (b * (b_v - tl.sum(b_k * memory, 0, keep_dims=True)))
    tl.store(new_state + ((batch * heads + head) * keys + o_k) * values + o_v, memory, mask=m_kv)
    y = tl.sum(b_q * SCALE * memory, 0, keep_dims=True)
    tl.store(out + (batch * heads + head) * values + o_v, y, mask=m_v)


def _options(q: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, most: int = 64) -> dict[str, Any]:
    """Return a kernel's constants; it holds at most so many channels at once."""
    return {
        "VARLEN": cu_seqlens is not None, "SCALE": scale, "ACC": accumulator(q), "CHUNK": CHUNK,
        "BLOCK_K": min(most, next_power_of_2(q.shape[3], 16)), "BLOCK_V": min(most, next_power_of_2(v.shape[3], 16)),
    }  # fmt: skip


def _launch_states(
    q: Tensor, k: Tensor, v: Tensor, logs: Tensor, beta: Tensor, scale: float, first: Tensor | None,
    ends: Tensor | None, final: Tensor | None, do: Tensor | None = None, dlast: Tensor | None = None,
    dfirst: Tensor | None = None, dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the states at the chunks' starts and what each token writes; given do, the gradients at ends and of w."""
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, ends)
    kind: dict[str, Any] = {"dtype": wide(q), "device": q.device}
    inverses = torch.empty(slots, heads, CHUNK, CHUNK, **kind)
    options = _options(q, v, scale, ends)
    launch(
        _inverses, (slots * heads,), k, logs, beta, ends, inverses, length, chunks, count, heads, keys, *k.stride(),
        *logs.stride(), *beta.stride(), VARLEN=ends is not None, ACC=accumulator(q), CHUNK=CHUNK,
        BLOCK_K=options["BLOCK_K"],
    )  # fmt: skip
    starts, written = torch.empty(slots, heads, keys, values, **kind), torch.empty(v.shape, **kind)
    dends, dwanted = (None, None) if do is None else (torch.empty_like(starts), torch.empty_like(written))
    block_k = next_power_of_2(keys, 16)
    block_v = min(options["BLOCK_V"], max(16, _STATE // block_k))
    blocks_v = triton.cdiv(values, block_v)
    options.update(BLOCK_K=block_k, BLOCK_V=block_v)
    launch(
        _states, (count * heads * blocks_v, 1 if do is None else 2), q, k, v, logs, beta, do, ends, inverses, first,
        dlast, starts, dends, written, dwanted, dv, final, dfirst, length, chunks, heads, keys, values, blocks_v,
        *q.stride(), *k.stride(), *v.stride(), *logs.stride(), *beta.stride(), *strides(do, 4),
        *strides(first, 4), *strides(dlast, 4), num_warps=8, **options,
    )  # fmt: skip
    return starts, written, dends, dwanted


def _delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, cu_seqlens)
    out = like(v)
    final = torch.empty(count, heads, keys, values, dtype=wide(q), device=q.device)
    starts, written, _, _ = _launch_states(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens, final)
    options = _options(q, v, scale, cu_seqlens)
    blocks_v = triton.cdiv(values, options["BLOCK_V"])
    launch(
        _outputs, (slots * heads * blocks_v,), q, k, log_decay, cu_seqlens, starts, written, out, length, chunks, count,
        heads, keys, values, blocks_v, *q.stride(), *k.stride(), *log_decay.stride(), **options,
    )  # fmt: skip
    return out, final


def _delta_gradients(
    do: Tensor | None, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
    initial_state: Tensor | None, scale: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, log_decay, beta and the initial state."""
    if do is None:
        do = torch.zeros(1, dtype=v.dtype, device=v.device).expand(v.shape)
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, cu_seqlens)
    dinitial, dv = like_or_none(initial_state, q), like(v)
    starts, written, dends, dwanted = _launch_states(
        q, k, v, log_decay, beta, scale, initial_state, cu_seqlens, None, do, dfinal,
        None if initial_state is None else dinitial, dv,
    )  # fmt: skip
    dq, dk, dlogs, dbeta = (like(one) for one in (q, k, log_decay, beta))
    launch(
        _gradients, (slots * heads,), do, q, k, v, log_decay, beta, cu_seqlens, starts, dends, written, dwanted, dq, dk,
        dlogs, dbeta, length, chunks, count, heads, keys, values, *do.stride(), *q.stride(), *k.stride(), *v.stride(),
        *log_decay.stride(), *beta.stride(), num_warps=8, **_options(q, v, scale, cu_seqlens, 32),
    )  # fmt: skip
    return dq, dk, dv, dlogs, dbeta, dinitial


def _delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (batch, heads, keys), values = q.shape, v.shape[2]
    out, new_state = like(v), torch.empty(state.shape, dtype=wide(q), device=q.device)
    block_k = next_power_of_2(keys, 16)
    block_v = min(64, next_power_of_2(values, 16), max(16, _STEP_TILE // block_k))
    blocks_v = triton.cdiv(values, block_v)
    launch(
        _step, (batch * heads * blocks_v,), state, q, k, v, log_decay, beta, out, new_state, heads, keys, values,
        blocks_v, *state.stride(), *q.stride(), *k.stride(), *v.stride(), *log_decay.stride(), *beta.stride(),
        SCALE=scale, ACC=accumulator(q), BLOCK_K=block_k, BLOCK_V=block_v,
    )  # fmt: skip
    return out, new_state


_operator, _step_operator = memory_operators("gated_delta_rule", _delta, _delta_gradients, _delta_step)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Serve `star_kernels.gated_delta_rule`."""
    o, final_state = _operator(q, k, v, log_decay, beta, score_factor(scale, q.shape[-1]), initial_state, cu_seqlens)
    return o, final_state


def gated_delta_rule_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.gated_delta_rule_step`."""
    o, new_state = _step_operator(state, q, k, v, log_decay, beta, score_factor(scale, q.shape[-1]))
    return o, new_state
