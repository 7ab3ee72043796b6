"""The kernels that run the gated delta rule: each chunk by itself, the walks over chunks, outputs, a step."""

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import clean, product
from star_kernels.recurrence.triton.chunks import (
    between,
    causal,
    chunk,
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


@triton.jit
def _along(column, step):
    """Return columns' offsets, in 64 bits unless they lie side by side."""
    if isinstance(step, tl.constexpr):
        return column
    else:
        return column.to(tl.int64) * step


@triton.jit
def rows(x, token, column, stop, columns, token_step, column_step):
    """Load a tile (tokens, columns) of one head. Tokens are compared as they are, and multiplied in 64 bits."""
    inside = (token < stop)[:, None] & (column < columns)[None, :]
    where = token.to(tl.int64)[:, None] * token_step + _along(column, column_step)[None, :]
    return tl.load(x + where, mask=inside, other=0.0)


@triton.jit
def turned_rows(x, token, column, stop, columns, token_step, column_step):
    """Load a tile (columns, tokens) of one head.

    A float32 one from its place: turned after, it would be loaded number by number. A narrower one turns on its way
    from shared memory.
    """
    if x.dtype.element_ty == tl.float32:
        inside = (column < columns)[:, None] & (token < stop)[None, :]
        where = token.to(tl.int64)[None, :] * token_step + _along(column, column_step)[:, None]
        return tl.load(x + where, mask=inside, other=0.0)
    else:
        return tl.trans(rows(x, token, column, stop, columns, token_step, column_step))


@triton.jit
def keep(x, tile, token, column, stop, columns, token_step):
    """Store a tile (tokens, columns) of one head, whose columns lie side by side."""
    inside = (token < stop)[:, None] & (column < columns)[None, :]
    tl.store(x + (token.to(tl.int64)[:, None] * token_step + column[None, :]), tile, mask=inside)


@triton.jit
def entries(x, token, stop, token_step, ACC: tl.constexpr):
    """Load one number a token."""
    return tl.load(x + token.to(tl.int64) * token_step, mask=token < stop, other=0.0).to(ACC)


@triton.jit
def _solved(
    k, v, b, high, low, resets, inverses, turned, weights, own, position, left, keys, values, k_token, k_channel,
    v_token, v_channel, weights_token, own_token,
    ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store a chunk's W = T beta g K and T beta V, T = (I + A)^{-1}; for gradients T and W turned.

    T is that of what is finite; what is not shows in the others.
    """
    i, j = position[:, None], position[None, :]
    a = tl.zeros([CHUNK, CHUNK], ACC)
    for at in range(0, keys, BLOCK_K):
        b_k = rows(k, position, at + tl.arange(0, BLOCK_K), left, keys, k_token, k_channel)
        a = product(b_k, b_k, a, B_TURNED=True)
    a = clean(a * between(high, low, resets) * b[:, None])
    inverse = tl.where(i == j, 1.0, tl.zeros([CHUNK, CHUNK], ACC))
    for level in range(levels(left)):
        across = tl.where(halves(level), a, 0.0)
        right = product(across, inverse, tl.zeros([CHUNK, CHUNK], ACC))
        inverse = product(-inverse, right, inverse)
    if inverses is not None:
        tl.store(inverses + j * CHUNK + i, inverse)
    scaled = inverse * clean(b)[None, :]
    for at in range(0, values, BLOCK_V):
        o_v = at + tl.arange(0, BLOCK_V)
        b_v = rows(v, position, o_v, left, values, v_token, v_channel)
        u = product(scaled, clean(b_v), tl.zeros([CHUNK, BLOCK_V], ACC))
        u = poison_after(u, b_v.to(ACC) * b[:, None])
        keep(own, u, position, o_v, left, values, own_token)
    decayed = b * since_start(high, resets)
    scaled = inverse * clean(decayed)[None, :]
    for at in range(0, keys, BLOCK_K):
        o_k = at + tl.arange(0, BLOCK_K)
        b_k = rows(k, position, o_k, left, keys, k_token, k_channel)
        w = product(scaled, clean(b_k), tl.zeros([CHUNK, BLOCK_K], ACC))
        w = poison_after(w, b_k.to(ACC) * decayed[:, None])
        keep(weights, w, position, o_k, left, keys, weights_token)
        if turned is not None:
            tl.store(turned + (o_k[None, :] * CHUNK + i), w, mask=(o_k < keys)[None, :])


@triton.jit
def _read_back(
    q, k, do, b, high, low, resets, pulled, position, left, keys, values, q_token, q_channel, k_token, k_channel,
    do_token, do_channel, pulled_token,
    SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store what a chunk's own outputs add to the gradient of what its tokens write, (L o Q K^T)^T dO."""
    scores = tl.zeros([CHUNK, CHUNK], ACC)
    for at in range(0, keys, BLOCK_K):
        o_k = at + tl.arange(0, BLOCK_K)
        b_k = rows(k, position, o_k, left, keys, k_token, k_channel)
        scores = product(b_k, rows(q, position, o_k, left, keys, q_token, q_channel), scores, B_TURNED=True)
    scores = tl.where(tl.trans(causal()), scores * tl.trans(between(high, low, resets)) * SCALE, 0.0)
    for at in range(0, values, BLOCK_V):
        o_v = at + tl.arange(0, BLOCK_V)
        d = rows(do, position, o_v, left, values, do_token, do_channel)
        # 0 beta: what is not finite must show, and T does not hold it.
        du = poison_before(product(scores, clean(d), tl.zeros([CHUNK, BLOCK_V], ACC)), d) + (b * 0.0)[:, None]
        keep(pulled, du, position, o_v, left, values, pulled_token)


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def delta_prepare(
    q, k, v, logs, beta, do, ends, inverses, turned, weights, own, pulled, length, chunks, count, heads, keys,
    values, q_batch, q_token, q_head, q_channel, k_batch, k_token, k_head, k_channel, v_batch, v_token, v_head,
    v_channel, logs_batch, logs_token, logs_head, beta_batch, beta_token, beta_head, do_batch, do_token, do_head,
    do_channel,
    VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a head in a chunk, what does not depend on the state. The grid's second row is the gradients'."""
    program = tl.program_id(0).to(tl.int64)
    head, slot = program % heads, program // heads
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    left, position = tl.minimum(stop - begin, CHUNK).to(tl.int32), tl.arange(0, CHUNK)
    row = (batch * length + begin) * heads + head
    k += batch * k_batch + begin * k_token + head * k_head
    beta += batch * beta_batch + begin * beta_token + head * beta_head
    logs += batch * logs_batch + begin * logs_token + head * logs_head
    b = entries(beta, position, left, beta_token, ACC)
    high, low, resets = running(entries(logs, position, left, logs_token, ACC))
    if pulled is not None and tl.program_id(1) == 1:
        q += batch * q_batch + begin * q_token + head * q_head
        do += batch * do_batch + begin * do_token + head * do_head
        _read_back(
            q, k, do, b, high, low, resets, pulled + row * values, position, left, keys, values, q_token, q_channel,
            k_token, k_channel, do_token, do_channel, heads * values, SCALE, ACC, CHUNK, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    else:
        v += batch * v_batch + begin * v_token + head * v_head
        inverses_at, turned_at = inverses, turned
        if inverses is not None:
            inverses_at += program * CHUNK * CHUNK
            turned_at += program * keys * CHUNK
        _solved(
            k, v, b, high, low, resets, inverses_at, turned_at, weights + row * keys, own + row * values, position,
            left, keys, values, k_token, k_channel, v_token, v_channel, heads * keys, heads * values, ACC, CHUNK,
            BLOCK_K, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _walk(
    k, logs, weights, first, starts, own, written, final, head, heads, batch, begin, stop, slot, length, keys, values,
    o_k, o_v, k_token, k_channel, logs_token, ACC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Carry the state of some value channels over the chunks; store it at their starts, and what each token writes."""
    inside = (o_k < keys)[:, None] & (o_v < values)[None, :]
    tile = o_k[:, None] * values + o_v[None, :]
    state = tl.zeros([o_k.shape[0], o_v.shape[0]], ACC)
    if first is not None:
        state = tl.load(first, mask=inside, other=0.0).to(ACC)
    position = tl.arange(0, CHUNK)
    # Pointers move on from chunk to chunk, so that a thread holds one offset for each of its loads.
    starts += (slot * heads + head) * keys * values
    weights += ((batch * length + begin) * heads + head) * keys
    own += ((batch * length + begin) * heads + head) * values
    written += ((batch * length + begin) * heads + head) * values
    k += begin * k_token
    logs += begin * logs_token
    for index in range(tl.cdiv(stop - begin, CHUNK)):
        tl.store(starts + tile, state, mask=inside)
        left = tl.minimum(stop - begin - index * CHUNK, CHUNK).to(tl.int32)
        m_v = (position < left)[:, None] & (o_v < values)[None, :]
        b_w = rows(weights, position, o_k, left, keys, heads * keys, 1)
        u = product(b_w, -state, rows(own, position, o_v, left, values, heads * values, 1))
        keep(written, u, position, o_v, left, values, heads * values)
        high, low, resets = running(entries(logs, position, left, logs_token, ACC))
        # Rows behind the last token hold no token's values.
        u = tl.where(m_v, u * until_end(high, low, resets)[:, None], 0.0)
        b_k = turned_rows(k, position, o_k, left, keys, k_token, k_channel)
        state = product(b_k, u, state * last(since_start(high, resets)))
        starts += heads * keys * values
        weights += CHUNK * heads * keys
        own += CHUNK * heads * values
        written += CHUNK * heads * values
        k += CHUNK * k_token
        logs += CHUNK * logs_token
    if final is not None:
        tl.store(final + tile, state, mask=inside)


@triton.jit
def _walk_back(
    q, k, do, logs, turned, dlast, dends, pulled, dwritten, dfirst, head, heads, batch, begin, stop, slot, length, keys,
    values, o_k, o_v, q_token, q_channel, k_token, k_channel, do_token, do_channel, logs_token,
    SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Carry the gradient of the state back over the chunks; store it at their ends, and that of what tokens write."""
    inside = (o_k < keys)[:, None] & (o_v < values)[None, :]
    tile = o_k[:, None] * values + o_v[None, :]
    state = tl.zeros([o_k.shape[0], o_v.shape[0]], ACC)
    if dlast is not None:
        state = tl.load(dlast, mask=inside, other=0.0).to(ACC)
    position = tl.arange(0, CHUNK)
    before = tl.cdiv(stop - begin, CHUNK) - 1
    dends += ((slot + before) * heads + head) * keys * values
    begin += before * CHUNK
    turned += ((slot + before) * heads + head) * keys * CHUNK
    pulled += ((batch * length + begin) * heads + head) * values
    dwritten += ((batch * length + begin) * heads + head) * values
    q += begin * q_token
    k += begin * k_token
    do += begin * do_token
    logs += begin * logs_token
    for index in range(before + 1):
        tl.store(dends + tile, state, mask=inside)
        left = tl.minimum(stop - begin + index * CHUNK, CHUNK).to(tl.int32)
        m_v = (position < left)[:, None] & (o_v < values)[None, :]
        high, low, resets = running(entries(logs, position, left, logs_token, ACC))
        start = since_start(high, resets)
        b_k = rows(k, position, o_k, left, keys, k_token, k_channel)
        du = product(b_k, state, tl.zeros([CHUNK, o_v.shape[0]], ACC)) * until_end(high, low, resets)[:, None]
        du += rows(pulled, position, o_v, left, values, heads * values, 1)
        keep(dwritten, du, position, o_v, left, values, heads * values)
        d = rows(do, position, o_v, left, values, do_token, do_channel).to(ACC) * (start * SCALE)[:, None]
        b_q = turned_rows(q, position, o_k, left, keys, q_token, q_channel)
        state = product(b_q, d, state * last(start))
        b_w = rows(turned, o_k, position, keys, CHUNK, CHUNK, 1)
        state = product(b_w, tl.where(m_v, -du, 0.0), state)
        dends -= heads * keys * values
        turned -= heads * keys * CHUNK
        pulled -= CHUNK * heads * values
        dwritten -= CHUNK * heads * values
        q -= CHUNK * q_token
        k -= CHUNK * k_token
        do -= CHUNK * do_token
        logs -= CHUNK * logs_token
    if dfirst is not None:
        tl.store(dfirst + tile, state, mask=inside)


@triton.jit(do_not_specialize=["length", "chunks"])
def delta_states(
    q, k, logs, do, ends, weights, turned, first, dlast, starts, dends, own, written, pulled, dwritten, final, dfirst,
    length, chunks, heads, keys, values, blocks_v, q_batch, q_token, q_head, q_channel, k_batch, k_token, k_head,
    k_channel, logs_batch, logs_token, logs_head, do_batch, do_token, do_head, do_channel, first_sequence, first_head,
    first_k, first_v, dlast_sequence, dlast_head, dlast_k, dlast_v,
    VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: some value channels of a head's state in a sequence. The grid's second row is the gradients'."""
    program = tl.program_id(0).to(tl.int64)
    head, index = program // blocks_v % heads, program // blocks_v // heads
    batch, begin, stop, slot = sequence(index, ends, length, chunks, VARLEN, CHUNK)
    o_k, o_v = tl.arange(0, BLOCK_K), (program % blocks_v).to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    k += batch * k_batch + head * k_head
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
        _walk_back(
            q + (batch * q_batch + head * q_head), k, do + (batch * do_batch + head * do_head), logs, turned,
            dlast_at, dends, pulled, dwritten, dfirst_at, head, heads, batch, begin, stop, slot, length, keys, values,
            o_k, o_v, q_token, q_channel, k_token, k_channel, do_token, do_channel, logs_token, SCALE, ACC, CHUNK,
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
            k, logs, weights, first_at, starts, own, written, final_at, head, heads, batch, begin, stop, slot, length,
            keys, values, o_k, o_v, k_token, k_channel, logs_token, ACC, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def delta_outputs(
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
    left, position = tl.minimum(stop - begin, CHUNK).to(tl.int32), tl.arange(0, CHUNK)
    o_v = (program % blocks_v).to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    q += batch * q_batch + begin * q_token + head * q_head
    k += batch * k_batch + begin * k_token + head * k_head
    logs += batch * logs_batch + begin * logs_token + head * logs_head
    starts += (slot * heads + head) * keys * values
    row = (batch * length + begin) * heads + head
    high, low, resets = running(entries(logs, position, left, logs_token, ACC))
    scores, y = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, BLOCK_V], ACC)
    for at in range(0, keys, BLOCK_K):
        o_k = at + tl.arange(0, BLOCK_K)
        b_q = rows(q, position, o_k, left, keys, q_token, q_channel)
        b_k = rows(k, position, o_k, left, keys, k_token, k_channel)
        scores = product(b_q, b_k, scores, B_TURNED=True)
        y = product(b_q, rows(starts, o_k, o_v, keys, values, values, 1), y)
    u = rows(written + row * values, position, o_v, left, values, heads * values, 1)
    scores = tl.where(causal(), scores * between(high, low, resets), 0.0)
    y = poison_after(product(scores, clean(u), y * since_start(high, resets)[:, None]), u) * SCALE
    keep(out + row * values, y, position, o_v, left, values, heads * values)


@triton.jit
def delta_step(
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
