"""Gated linear attention in Triton, in chunks of 64 tokens.

The decay between two tokens of a chunk differs by key channel, so their scores are no single product. Of the 2 m tokens
of a block, those in the second half meet those in the first through the boundary between the halves: the decay is one
factor of the query and one of the key, each a sum of log decays <= 0 from the nearer end of its half. With m = 1, 2 ..
32 that covers every pair of a chunk, in six products. No sum is ever subtracted: -inf, -3e4 and 0 are exact.

Forward is two kernels (states, outputs) and backward three: the states and their gradients; those of q, k and the
decays; those of v, by the kernel of the outputs with the roles turned.
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
    causal,
    chunk,
    halves,
    levels,
    ones,
    poison_after,
    poison_before,
    sequence,
)
from star_kernels.recurrence.triton.memory import memory_operators

_LEAST = tl.constexpr(-1000.0)  # exp of it is 0, and no product of it is NaN
_STEP_TILE = 2048  # elements of a state that one program of a step holds


@triton.jit
def _until(logs, begin, stop, k, keys, token_step, channel_step, ACC: tl.constexpr, CHUNK: tl.constexpr):
    """Return the decay from each token to the chunk's end: sums of the logs after it."""
    following = begin + 1 + tl.arange(0, CHUNK)
    inside = ((following < stop) & (following < begin + CHUNK))[:, None] & (k < keys)[None, :]
    where = following[:, None] * token_step + k[None, :] * channel_step
    return tl.exp(tl.cumsum(tl.load(logs + where, mask=inside, other=0.0).to(ACC), 0, reverse=True))


@triton.jit
def _reach(level):
    """Return, by token i, the tokens t between it and the inner boundary of its half of 2^level tokens.

    Those are the tokens up to i in a second half, and those after i in a first.
    """
    token = tl.arange(0, 64)
    i, t = token[:, None], token[None, :]
    return ((i ^ t) >> level == 0) & ((((i >> level) & 1) == 1) == (t <= i))


@triton.jit
def _spread(where, x, total):
    """Add x_i to every token t that row i of `where` marks; what is not finite goes to those alone."""
    turned = tl.trans(ones(where))
    finite = tl.abs(x) < float("inf")
    hits = product(turned, ones(finite == 0), tl.zeros(total.shape, total.dtype))
    return tl.where(hits > 0.0, float("nan"), product(turned, clean(x), total))


@triton.jit
def _scores(q, k, log, scores, tokens):
    """Add q_i . (decay o k_j) to `scores`, for i >= j."""
    token = tl.arange(0, 64)
    bounded = tl.where(log > _LEAST, log, _LEAST)
    scores += tl.where(token[:, None] == token[None, :], tl.sum(q * k, 1)[:, None], 0.0)
    for level in range(levels(tokens)):
        decay = tl.exp(product(ones(_reach(level)), bounded, tl.zeros(log.shape, log.dtype)))
        part = product(q * decay, tl.trans(k * decay), tl.zeros(scores.shape, scores.dtype))
        scores += tl.where(halves(level), part, 0.0)
    return scores


@triton.jit
def _walk(
    keys_of, logs, values_of, first, states, final, head, heads, begin, stop, slot, keys, values, k, v,
    keys_token, keys_channel, logs_token, logs_channel, values_token, values_channel,
    REVERSE: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Carry a tile of a head's state over its chunks and store what each begins with.

    In reverse: the gradient of the state, and what each chunk ends with; then q stands for k, and do for v.
    """
    inside_state = (k < keys)[:, None] & (v < values)[None, :]
    tile = k.to(tl.int64)[:, None] * values + v[None, :]
    state = tl.zeros([k.shape[0], v.shape[0]], ACC)
    if first is not None:
        state = tl.load(first, mask=inside_state, other=0.0).to(ACC)
    count = tl.cdiv(stop - begin, CHUNK)
    for i in range(count):
        index = i * 0 + i
        if REVERSE:
            index = count - 1 - i
        tl.store(states + ((slot + index) * heads + head) * keys * values + tile, state, mask=inside_state)
        start = begin + index * CHUNK
        token = start + tl.arange(0, CHUNK)
        m_k, m_v = (token < stop)[:, None] & (k < keys)[None, :], (token < stop)[:, None] & (v < values)[None, :]
        b_k = tl.load(
            keys_of + token[:, None] * keys_token + k[None, :] * keys_channel, mask=m_k, other=0.0
        ).to(ACC)  # fmt: skip
        b_v = tl.load(values_of + token[:, None] * values_token + v[None, :] * values_channel, mask=m_v, other=0.0)
        log = tl.load(logs + token[:, None] * logs_token + k[None, :] * logs_channel, mask=m_k, other=0.0).to(ACC)
        if REVERSE:
            b_k *= SCALE * tl.exp(tl.cumsum(log, 0))
        else:
            b_k *= _until(logs, start, stop, k, keys, logs_token, logs_channel, ACC, CHUNK)
        state = product(tl.trans(b_k), b_v, state * tl.exp(tl.sum(log, 0))[:, None])
    if final is not None:
        tl.store(final + tile, state, mask=inside_state)


@triton.jit(do_not_specialize=["length", "chunks"])
def _states(
    q, k, v, logs, do, ends, first, dlast, starts, dends, final, dfirst, length, chunks, heads, keys, values, blocks_k,
    blocks_v, q_batch, q_token, q_head, q_channel, k_batch, k_token, k_head, k_channel, v_batch, v_token,
    v_head, v_channel, logs_batch, logs_token, logs_head, logs_channel, do_batch, do_token, do_head, do_channel,
    first_sequence, first_head, first_k, first_v, dlast_sequence, dlast_head, dlast_k, dlast_v,
    VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a tile of a head's state in a sequence. In backward the grid's second row is the gradients'."""
    program = tl.program_id(0).to(tl.int64)
    tile = program % (blocks_k * blocks_v)
    head = program // (blocks_k * blocks_v) % heads
    index = program // (blocks_k * blocks_v) // heads
    batch, begin, stop, slot = sequence(index, ends, length, chunks, VARLEN, CHUNK)
    o_k = tile // blocks_v * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = tile % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    logs += batch * logs_batch + head * logs_head
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
        _walk(
            q + (batch * q_batch + head * q_head), logs, do + (batch * do_batch + head * do_head), dlast_at, dends,
            dfirst_at, head, heads, begin, stop, slot, keys, values, o_k, o_v, q_token, q_channel, logs_token,
            logs_channel, do_token, do_channel, True, SCALE, ACC, CHUNK,
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
            k + (batch * k_batch + head * k_head), logs, v + (batch * v_batch + head * v_head), first_at, starts,
            final_at, head, heads, begin, stop, slot, keys, values, o_k, o_v, k_token, k_channel, logs_token,
            logs_channel, v_token, v_channel, False, SCALE, ACC, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def _mix(
    q, k, v, logs, ends, states, out, length, chunks, count, heads, keys, values, blocks_v, q_batch, q_token,
    q_head, q_channel, k_batch, k_token, k_head, k_channel, v_batch, v_token, v_head, v_channel, logs_batch,
    logs_token, logs_head, logs_channel,
    TURNED: tl.constexpr, VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a block of a head's value channels in a chunk, o = scores v + (q o decay since the start) S.

    Turned, v stands for do and the states for the gradients at the chunks' ends: dv = scores^T do + (k o decay until
    the end) dS.
    """
    program = tl.program_id(0).to(tl.int64)
    head, slot = program // blocks_v % heads, program // blocks_v // heads
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    token = begin + tl.arange(0, CHUNK)
    inside = token < stop
    o_v = program % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    logs += batch * logs_batch + head * logs_head
    scores, y = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, BLOCK_V], ACC)
    for at in range(0, keys, BLOCK_K):
        o_k = at + tl.arange(0, BLOCK_K)
        m_k = inside[:, None] & (o_k < keys)[None, :]
        b_q = tl.load(q + token[:, None] * q_token + o_k[None, :] * q_channel, mask=m_k, other=0.0).to(ACC) * SCALE
        b_k = tl.load(k + token[:, None] * k_token + o_k[None, :] * k_channel, mask=m_k, other=0.0).to(ACC)
        log = tl.load(logs + token[:, None] * logs_token + o_k[None, :] * logs_channel, mask=m_k, other=0.0).to(ACC)
        scores = _scores(b_q, b_k, log, scores, stop - begin)
        where = (slot * heads + head) * keys * values + o_k.to(tl.int64)[:, None] * values + o_v[None, :]
        state = tl.load(states + where, mask=(o_k < keys)[:, None] & (o_v < values)[None, :], other=0.0)
        if TURNED:
            y = product(b_k * _until(logs, begin, stop, o_k, keys, logs_token, logs_channel, ACC, CHUNK), state, y)
        else:
            y = product(b_q * tl.exp(tl.cumsum(log, 0)), state, y)
    m_v = inside[:, None] & (o_v < values)[None, :]
    b_v = tl.load(
        v + batch * v_batch + head * v_head + token[:, None] * v_token + o_v[None, :] * v_channel, mask=m_v, other=0.0
    )
    if TURNED:
        y = poison_before(product(tl.trans(scores), clean(b_v), y), b_v)
    else:
        y = poison_after(product(scores, clean(b_v), y), b_v)
    row = (batch * length + token) * heads + head
    tl.store(out + row[:, None] * values + o_v[None, :], y, mask=m_v)


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def _key_gradients(
    do, q, k, v, logs, ends, starts, dends, dq, dk, dlogs, length, chunks, count, heads, keys, values, blocks_k,
    do_batch, do_token, do_head, do_channel, q_batch, q_token, q_head, q_channel, k_batch, k_token, k_head, k_channel,
    v_batch, v_token, v_head, v_channel, logs_batch, logs_token, logs_head, logs_channel,
    VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a block of a head's key channels in a chunk, the gradients of q, k and the log decays."""
    program = tl.program_id(0).to(tl.int64)
    head, slot = program // blocks_k % heads, program // blocks_k // heads
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    position = tl.arange(0, CHUNK)
    i, j = position[:, None], position[None, :]
    token = begin + position
    inside = token < stop
    o_k = program % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = inside[:, None] & (o_k < keys)[None, :]
    do += batch * do_batch + head * do_head
    v += batch * v_batch + head * v_head
    logs += batch * logs_batch + head * logs_head
    pairs = tl.zeros([CHUNK, CHUNK], ACC)  # do_i . v_j
    from_start, from_end = tl.zeros([CHUNK, BLOCK_K], ACC), tl.zeros([CHUNK, BLOCK_K], ACC)
    across = tl.zeros([BLOCK_K], ACC)
    for at in range(0, values, BLOCK_V):
        o_v = at + tl.arange(0, BLOCK_V)
        m_v, m_kv = inside[:, None] & (o_v < values)[None, :], (o_k < keys)[:, None] & (o_v < values)[None, :]
        d = tl.load(do + token[:, None] * do_token + o_v[None, :] * do_channel, mask=m_v, other=0.0)
        b_v = tl.load(v + token[:, None] * v_token + o_v[None, :] * v_channel, mask=m_v, other=0.0)
        where = (slot * heads + head) * keys * values + o_k.to(tl.int64)[:, None] * values + o_v[None, :]
        start = tl.load(starts + where, mask=m_kv, other=0.0)
        end = tl.load(dends + where, mask=m_kv, other=0.0)
        pairs = product(d, tl.trans(b_v), pairs)
        from_start = product(d, tl.trans(start), from_start)
        from_end = product(b_v, tl.trans(end), from_end)
        across += tl.sum(start * end, 1)
    pairs = tl.where(causal(), pairs, 0.0)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    b_q = tl.load(q + token[:, None] * q_token + o_k[None, :] * q_channel, mask=m_k, other=0.0).to(ACC) * SCALE
    b_k = tl.load(k + token[:, None] * k_token + o_k[None, :] * k_channel, mask=m_k, other=0.0).to(ACC)
    log = tl.load(logs + token[:, None] * logs_token + o_k[None, :] * logs_channel, mask=m_k, other=0.0).to(ACC)
    bounded = tl.where(log > _LEAST, log, _LEAST)
    b_dq = from_start * tl.exp(tl.cumsum(log, 0))
    b_dk = from_end * _until(logs, begin, stop, o_k, keys, logs_token, logs_channel, ACC, CHUNK)
    # Each decay's gradient goes to the log decays that it sums, and to no other.
    dlog = tl.zeros([CHUNK, BLOCK_K], ACC) + (tl.exp(tl.sum(log, 0)) * across)[None, :]
    dlog = _spread(i >= j, b_q * b_dq, dlog)
    dlog = _spread(i < j, b_k * b_dk, dlog)
    own = tl.sum(tl.where(i == j, pairs, 0.0), 1)[:, None]
    b_dq += own * b_k
    b_dk += own * b_q
    # Two loops, as one of both needs more registers than there are.
    for level in range(levels(stop - begin)):
        reach, second = _reach(level), ((position >> level) & 1 == 1)[:, None]
        decay = tl.exp(product(ones(reach), bounded, tl.zeros([CHUNK, BLOCK_K], ACC)))
        met = tl.where(halves(level), pairs, 0.0)
        part = product(met, clean(b_k * decay), tl.zeros([CHUNK, BLOCK_K], ACC)) * decay
        b_dq += part
        dlog = _spread(reach, tl.where(second, b_q * part, 0.0), dlog)
    for level in range(levels(stop - begin)):
        reach, second = _reach(level), ((position >> level) & 1 == 1)[:, None]
        decay = tl.exp(product(ones(reach), bounded, tl.zeros([CHUNK, BLOCK_K], ACC)))
        met = tl.where(halves(level), pairs, 0.0)
        part = product(tl.trans(met), clean(b_q * decay), tl.zeros([CHUNK, BLOCK_K], ACC)) * decay
        b_dk += part
        dlog = _spread(reach, tl.where(second, 0.0, b_k * part), dlog)
    b_dq, b_dk = poison_after(b_dq, b_k), poison_before(b_dk, b_q)
    row = ((batch * length + token) * heads + head)[:, None] * keys + o_k[None, :]
    tl.store(dq + row, b_dq * SCALE, mask=m_k)
    tl.store(dk + row, b_dk, mask=m_k)
    tl.store(dlogs + row, dlog, mask=m_k)


@triton.jit
def _step(
    state, q, k, v, logs, out, new_state, heads, keys, values, blocks_v, state_batch, state_head, state_k,
    state_v, q_batch, q_head, q_channel, k_batch, k_head, k_channel, v_batch, v_head, v_channel, logs_batch, logs_head,
    logs_channel, SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a block of a head's value channels in a row of the batch."""
    program = tl.program_id(0).to(tl.int64)
    head, batch = program // blocks_v % heads, program // blocks_v // heads
    o_v = (program % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    b_v = tl.load(v + batch * v_batch + head * v_head + o_v * v_channel, mask=o_v < values, other=0.0).to(ACC)
    y = tl.zeros([1, BLOCK_V], ACC)
    for at in range(0, keys, BLOCK_K):
        o_k = (at + tl.arange(0, BLOCK_K))[:, None]
        m_k, m_kv = o_k < keys, (o_k < keys) & (o_v < values)
        b_q = tl.load(q + batch * q_batch + head * q_head + o_k * q_channel, mask=m_k, other=0.0).to(ACC)
        b_k = tl.load(k + batch * k_batch + head * k_head + o_k * k_channel, mask=m_k, other=0.0).to(ACC)
        log = tl.load(logs + batch * logs_batch + head * logs_head + o_k * logs_channel, mask=m_k, other=0.0).to(ACC)
        where = batch * state_batch + head * state_head + o_k * state_k + o_v * state_v
        memory = tl.load(state + where, mask=m_kv, other=0.0).to(ACC) * tl.exp(log) + b_k * b_v
        tl.store(new_state + ((batch * heads + head) * keys + o_k) * values + o_v, memory, mask=m_kv)
        y += tl.sum(b_q * SCALE * memory, 0, keep_dims=True)
    tl.store(out + (batch * heads + head) * values + o_v, y, mask=o_v < values)


def _options(
    q: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, most_keys: int = 64, most_values: int = 64
) -> dict[str, Any]:
    """Return a kernel's constants; it holds at most so many channels at once."""
    return {
        "VARLEN": cu_seqlens is not None, "SCALE": scale, "ACC": accumulator(q), "CHUNK": CHUNK,
        "BLOCK_K": min(most_keys, next_power_of_2(q.shape[3], 16)),
        "BLOCK_V": min(most_values, next_power_of_2(v.shape[3], 16)),
    }  # fmt: skip


def _launch_states(
    q: Tensor, k: Tensor, v: Tensor, logs: Tensor, scale: float, first: Tensor | None, ends: Tensor | None,
    final: Tensor | None, do: Tensor | None = None, dlast: Tensor | None = None, dfirst: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the states that chunks begin with and, given do, the gradients of those that they end with."""
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, ends)
    starts = torch.empty(slots, heads, keys, values, dtype=wide(q), device=q.device)
    dends = None if do is None else torch.empty_like(starts)
    options = _options(q, v, scale, ends)
    blocks_k, blocks_v = triton.cdiv(keys, options["BLOCK_K"]), triton.cdiv(values, options["BLOCK_V"])
    launch(
        _states, (count * heads * blocks_k * blocks_v, 1 if do is None else 2), q, k, v, logs, do, ends, first, dlast,
        starts, dends, final, dfirst, length, chunks, heads, keys, values, blocks_k, blocks_v, *q.stride(),
        *k.stride(), *v.stride(), *logs.stride(), *strides(do, 4), *strides(first, 4),
        *strides(dlast, 4), num_warps=8, **options,
    )  # fmt: skip
    return starts, dends


def _launch_mix(
    q: Tensor, k: Tensor, v: Tensor, logs: Tensor, scale: float, ends: Tensor | None, states: Tensor, turned: bool
) -> Tensor:
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, ends)
    out = like(v)
    options = _options(q, v, scale, ends, 16)
    blocks_v = triton.cdiv(values, options["BLOCK_V"])
    launch(
        _mix, (slots * heads * blocks_v,), q, k, v, logs, ends, states, out, length, chunks, count, heads, keys, values,
        blocks_v, *q.stride(), *k.stride(), *v.stride(), *logs.stride(), TURNED=turned, num_warps=8, **options,
    )  # fmt: skip
    return out


def _gla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count = chunked.layout(q, cu_seqlens)[0]
    final = torch.empty(count, *q.shape[2:], v.shape[3], dtype=wide(q), device=q.device)
    starts, _ = _launch_states(q, k, v, log_decay, scale, initial_state, cu_seqlens, final)
    return _launch_mix(q, k, v, log_decay, scale, cu_seqlens, starts, False), final


def _gla_gradients(
    do: Tensor | None, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor,
    initial_state: Tensor | None, scale: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, log_decay and the initial state."""
    if do is None:
        do = torch.zeros(1, dtype=v.dtype, device=v.device).expand(v.shape)
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, cu_seqlens)
    dinitial = like_or_none(initial_state, q)
    starts, dends = _launch_states(
        q, k, v, log_decay, scale, initial_state, cu_seqlens, None, do, dfinal,
        None if initial_state is None else dinitial,
    )  # fmt: skip
    assert dends is not None
    dq, dk, dlogs = like(q), like(k), like(log_decay)
    options = _options(q, v, scale, cu_seqlens, 16, 32)
    blocks_k = triton.cdiv(keys, options["BLOCK_K"])
    launch(
        _key_gradients, (slots * heads * blocks_k,), do, q, k, v, log_decay, cu_seqlens, starts, dends, dq, dk, dlogs,
        length, chunks, count, heads, keys, values, blocks_k, *do.stride(), *q.stride(), *k.stride(),
        *v.stride(), *log_decay.stride(), num_warps=8, **options,
    )  # fmt: skip
    return dq, dk, _launch_mix(q, k, do, log_decay, scale, cu_seqlens, dends, True), dlogs, dinitial


def _gla_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (batch, heads, keys), values = q.shape, v.shape[2]
    out, new_state = like(v), torch.empty(state.shape, dtype=wide(q), device=q.device)
    block_v = min(64, next_power_of_2(values, 16))
    block_k = min(next_power_of_2(keys), _STEP_TILE // block_v)
    blocks_v = triton.cdiv(values, block_v)
    launch(
        _step, (batch * heads * blocks_v,), state, q, k, v, log_decay, out, new_state, heads, keys, values, blocks_v,
        *state.stride(), *q.stride(), *k.stride(), *v.stride(), *log_decay.stride(), SCALE=scale, ACC=accumulator(q),
        BLOCK_K=block_k, BLOCK_V=block_v,
    )  # fmt: skip
    return out, new_state


_operator, _step_operator = memory_operators("gated_linear_attention", _gla, _gla_gradients, _gla_step)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Serve `star_kernels.gated_linear_attention`."""
    o, final_state = _operator(q, k, v, log_decay, score_factor(scale, q.shape[-1]), initial_state, cu_seqlens)
    return o, final_state


def gated_linear_attention_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.gated_linear_attention_step`."""
    o, new_state = _step_operator(state, q, k, v, log_decay, score_factor(scale, q.shape[-1]))
    return o, new_state
