"""The kernels of gated linear attention: states at the chunks' starts, outputs, gradients of keys, a step."""

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import clean, product
from star_kernels.recurrence.triton.chunks import (
    causal,
    chunk,
    halves,
    levels,
    ones,
    poison_after,
    poison_before,
    sequence,
)

_LEAST = tl.constexpr(-1000.0)  # exp of it is 0, and no product of it is NaN


@triton.jit
def _until(logs, begin, stop, k, keys, token_step, channel_step, ACC: tl.constexpr, CHUNK: tl.constexpr):
    """Return the decay from each token to the chunk's end: sums of the logs after it."""
    following = begin + 1 + tl.arange(0, CHUNK)
    inside = ((following < stop) & (following < begin + CHUNK))[:, None] & (k < keys)[None, :]
    where = following[:, None] * token_step + k[None, :] * channel_step
    return tl.exp(tl.cumsum(tl.load(logs + where, mask=inside, other=0.0).to(ACC), 0, reverse=True))


@triton.jit
def _second(level):
    """Return which tokens lie in the second half of their block of 2 m, m = 2^level, as a column."""
    return ((tl.arange(0, 64) >> level) & 1 == 1)[:, None]


@triton.jit
def _reach(level):
    """Return, by token i, the tokens t between it and the inner boundary of its half of 2^level tokens.

    Those are the tokens up to i in a second half, and those after i in a first.
    """
    token = tl.arange(0, 64)
    i, t = token[:, None], token[None, :]
    return ((i ^ t) >> level == 0) & ((((i >> level) & 1) == 1) == (t <= i))


@triton.jit
def _spread(where, x):
    """Return, for every token t, the sum of the x_i whose row of `where` marks it; what is not finite goes to no other.

    A sum is masked, so it is no accumulator of a loop: there it would stop Triton's compiler for Blackwell, whose pass
    over tensor memory (HoistTMEMAlloc) takes the mask for a scalar.
    """
    turned = tl.trans(ones(where))
    hits = product(turned, ones((tl.abs(x) < float("inf")) == 0), tl.zeros(x.shape, x.dtype))
    return tl.where(hits > 0.0, float("nan"), product(turned, clean(x), tl.zeros(x.shape, x.dtype)))


@triton.jit
def _met(level):
    """Return which pairs of tokens lie in the two halves of one block of 2 m, m = 2^level, in either order."""
    half = tl.arange(0, 64) >> level
    return half[None, :] == (half ^ 1)[:, None]


@triton.jit
def _double(level, until, after):
    """Return the sums of a half until each token, itself included, and after it, for halves of twice as many tokens."""
    token = tl.arange(0, 64)
    second = _second(level)
    # Every token of the other half knows that half's sum.
    other = tl.gather(until + after, tl.broadcast_to((token ^ (1 << level))[:, None], until.shape), 0)
    return until + tl.where(second, other, 0.0), after + tl.where(second, 0.0, other)


@triton.jit
def _scores(q, k, log, scores, tokens):
    """Add q_i . (decay o k_j) to `scores`, for i >= j."""
    token = tl.arange(0, 64)
    until = tl.where(log > _LEAST, log, _LEAST)
    after = tl.zeros(until.shape, until.dtype)
    scores += tl.where(token[:, None] == token[None, :], tl.sum(q * k, 1)[:, None], 0.0)
    for level in tl.range(levels(tokens), disable_licm=True):
        second = _second(level)
        # A level's pairs take a query from the second half and a key from the first: one factor holds both.
        factor = tl.where(second, q, k) * tl.exp(tl.where(second, until, after))
        part = product(factor, tl.trans(factor), tl.zeros(scores.shape, scores.dtype))
        scores += tl.where(halves(level), part, 0.0)
        until, after = _double(level, until, after)
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
    for i in tl.range(count, disable_licm=True):
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
def gla_states(
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
def gla_mix(
    q, k, v, logs, ends, states, out, length, chunks, count, heads, keys, values, blocks_v, q_batch, q_token,
    q_head, q_channel, k_batch, k_token, k_head, k_channel, v_batch, v_token, v_head, v_channel, logs_batch,
    logs_token, logs_head, logs_channel,
    TURNED: tl.constexpr, VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program: SPAN of a head's value channels in a chunk, o = scores v + (q o decay since the start) S.

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
    q += batch * q_batch + head * q_head + token[:, None] * q_token
    k += batch * k_batch + head * k_head + token[:, None] * k_token
    logs += batch * logs_batch + head * logs_head
    v += batch * v_batch + head * v_head + token[:, None] * v_token
    row = (batch * length + token) * heads + head
    scores = tl.zeros([CHUNK, CHUNK], ACC)
    for at in tl.range(0, keys, BLOCK_K, disable_licm=True):
        o_k = at + tl.arange(0, BLOCK_K)
        m_k = inside[:, None] & (o_k < keys)[None, :]
        b_q = tl.load(q + o_k[None, :] * q_channel, mask=m_k, other=0.0).to(ACC) * SCALE
        b_k = tl.load(k + o_k[None, :] * k_channel, mask=m_k, other=0.0).to(ACC)
        log = tl.load(logs + token[:, None] * logs_token + o_k[None, :] * logs_channel, mask=m_k, other=0.0).to(ACC)
        scores = _scores(b_q, b_k, log, scores, stop - begin)
    if TURNED:
        scores = tl.trans(scores)
    first = (program % blocks_v * SPAN).to(tl.int32)
    for at_v in tl.range(first, tl.minimum(first + SPAN, values), BLOCK_V, disable_licm=True):
        o_v = at_v + tl.arange(0, BLOCK_V)
        y = tl.zeros([CHUNK, BLOCK_V], ACC)
        for at in tl.range(0, keys, BLOCK_K, disable_licm=True):
            o_k = at + tl.arange(0, BLOCK_K)
            m_k = inside[:, None] & (o_k < keys)[None, :]
            where = (slot * heads + head) * keys * values + o_k.to(tl.int64)[:, None] * values + o_v[None, :]
            state = tl.load(states + where, mask=(o_k < keys)[:, None] & (o_v < values)[None, :], other=0.0)
            if TURNED:
                factor = tl.load(k + o_k[None, :] * k_channel, mask=m_k, other=0.0).to(ACC)
                factor *= _until(logs, begin, stop, o_k, keys, logs_token, logs_channel, ACC, CHUNK)
            else:
                where_log = token[:, None] * logs_token + o_k[None, :] * logs_channel
                log = tl.load(logs + where_log, mask=m_k, other=0.0).to(ACC)
                factor = tl.load(q + o_k[None, :] * q_channel, mask=m_k, other=0.0).to(ACC) * SCALE
                factor *= tl.exp(tl.cumsum(log, 0))
            y = product(factor, state, y)
        m_v = inside[:, None] & (o_v < values)[None, :]
        b_v = tl.load(v + o_v[None, :] * v_channel, mask=m_v, other=0.0)
        y = product(scores, clean(b_v), y)
        y = poison_before(y, b_v) if TURNED else poison_after(y, b_v)
        tl.store(out + row[:, None] * values + o_v[None, :], y, mask=m_v)


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def gla_key_gradients(
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
    q += batch * q_batch + head * q_head + token[:, None] * q_token
    k += batch * k_batch + head * k_head + token[:, None] * k_token
    pairs = tl.zeros([CHUNK, CHUNK], ACC)  # do_i . v_j
    for at in tl.range(0, values, BLOCK_V, disable_licm=True):
        o_v = at + tl.arange(0, BLOCK_V)
        m_v = inside[:, None] & (o_v < values)[None, :]
        d = tl.load(do + token[:, None] * do_token + o_v[None, :] * do_channel, mask=m_v, other=0.0)
        b_v = tl.load(v + token[:, None] * v_token + o_v[None, :] * v_channel, mask=m_v, other=0.0)
        pairs = product(d, tl.trans(b_v), pairs)
    b_q = tl.load(q + o_k[None, :] * q_channel, mask=m_k, other=0.0).to(ACC) * SCALE
    b_k = tl.load(k + o_k[None, :] * k_channel, mask=m_k, other=0.0).to(ACC)
    log = tl.load(logs + token[:, None] * logs_token + o_k[None, :] * logs_channel, mask=m_k, other=0.0).to(ACC)
    own = tl.sum(tl.where(i == j, pairs, 0.0), 1)[:, None]
    b_dq, b_dk, dlog = own * b_k, own * b_q, tl.zeros([CHUNK, BLOCK_K], ACC)
    # A level's pairs take a query from the second half and a key from the first, so one product gives the gradients of
    # both: each row that of its own, from the others. Each decay's gradient goes to the log decays that it sums, and to
    # no other.
    pairs = tl.where(causal(), pairs, 0.0)
    pairs += tl.trans(pairs)
    until, after = tl.where(log > _LEAST, log, _LEAST), tl.zeros([CHUNK, BLOCK_K], ACC)
    for level in tl.range(levels(stop - begin), disable_licm=True):
        second = _second(level)
        decay = tl.exp(tl.where(second, until, after))
        until, after = _double(level, until, after)
        one = tl.where(second, b_q, b_k)
        part = product(tl.where(_met(level), pairs, 0.0), clean(one * decay), tl.zeros([CHUNK, BLOCK_K], ACC)) * decay
        b_dq += tl.where(second, part, 0.0)
        b_dk += tl.where(second, 0.0, part)
        dlog += _spread(_reach(level), one * part)
    # The states' part comes last, as beside `pairs` it needs more registers than there are: do and v are loaded again.
    from_start, from_end = tl.zeros([CHUNK, BLOCK_K], ACC), tl.zeros([CHUNK, BLOCK_K], ACC)
    across = tl.zeros([BLOCK_K], ACC)
    for at in tl.range(0, values, BLOCK_V, disable_licm=True):
        o_v = at + tl.arange(0, BLOCK_V)
        m_v, m_kv = inside[:, None] & (o_v < values)[None, :], (o_k < keys)[:, None] & (o_v < values)[None, :]
        d = tl.load(do + token[:, None] * do_token + o_v[None, :] * do_channel, mask=m_v, other=0.0)
        b_v = tl.load(v + token[:, None] * v_token + o_v[None, :] * v_channel, mask=m_v, other=0.0)
        where = (slot * heads + head) * keys * values + o_k.to(tl.int64)[:, None] * values + o_v[None, :]
        start = tl.load(starts + where, mask=m_kv, other=0.0)
        end = tl.load(dends + where, mask=m_kv, other=0.0)
        from_start = product(d, tl.trans(start), from_start)
        from_end = product(b_v, tl.trans(end), from_end)
        across += tl.sum(start * end, 1)
    log = tl.load(logs + token[:, None] * logs_token + o_k[None, :] * logs_channel, mask=m_k, other=0.0).to(ACC)
    from_start *= tl.exp(tl.cumsum(log, 0))
    from_end *= _until(logs, begin, stop, o_k, keys, logs_token, logs_channel, ACC, CHUNK)
    dlog += (tl.exp(tl.sum(log, 0)) * across)[None, :]
    dlog += _spread(i >= j, b_q * from_start)
    dlog += _spread(i < j, b_k * from_end)
    b_dq, b_dk = poison_after(b_dq + from_start, b_k), poison_before(b_dk + from_end, b_q)
    row = ((batch * length + token) * heads + head)[:, None] * keys + o_k[None, :]
    tl.store(dq + row, b_dq * SCALE, mask=m_k)
    tl.store(dk + row, b_dk, mask=m_k)
    tl.store(dlogs + row, dlog, mask=m_k)


@triton.jit
def gla_step(
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
