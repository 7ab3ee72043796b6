"""The kernels of the gated delta rule's gradients after the walks: pairs of tokens of a chunk, then q, k and gates.

Between them lie, for each chunk of a head, three squares of scratch memory: with them in registers one kernel would
hold the tiles of sums beside.
"""

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import clean, product
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
from star_kernels.recurrence.triton.delta_rule_kernels import entries, keep, rows


@triton.jit(do_not_specialize=["length", "chunks", "count"])
def delta_pairs(
    do, q, k, v, logs, beta, ends, inverses, written, dwritten, dwanted, squares, dlogs, dbeta, dv, length, chunks,
    count, heads, keys, values, do_batch, do_token, do_head, do_channel, q_batch, q_token, q_head, q_channel, k_batch,
    k_token, k_head, k_channel, v_batch, v_token, v_head, v_channel, logs_batch, logs_token, logs_head, beta_batch,
    beta_token, beta_head,
    VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a head in a chunk. dv; the gradients by pairs of tokens; what these add to the gates'.

    `dwritten` is the gradient of what tokens write, du, and `dwanted` that of w, u = T w.
    """
    program = tl.program_id(0).to(tl.int64)
    head, slot = program % heads, program // heads
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    left, position = tl.minimum(stop - begin, CHUNK).to(tl.int32), tl.arange(0, CHUNK)
    after = position[:, None] > position[None, :]
    square = position[:, None] * CHUNK + position[None, :]
    row = (batch * length + begin) * heads + head
    q += batch * q_batch + begin * q_token + head * q_head
    k += batch * k_batch + begin * k_token + head * k_head
    v += batch * v_batch + begin * v_token + head * v_head
    do += batch * do_batch + begin * do_token + head * do_head
    b = entries(beta + (batch * beta_batch + begin * beta_token + head * beta_head), position, left, beta_token, ACC)
    read, inner = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, CHUNK], ACC)
    db = tl.zeros([CHUNK], ACC)
    inverse = tl.load(inverses + program * CHUNK * CHUNK + square)
    for at in range(0, values, BLOCK_V):
        o_v = at + tl.arange(0, BLOCK_V)
        du = rows(dwritten + row * values, position, o_v, left, values, heads * values, 1)
        dw = poison_before(product(inverse, clean(du), tl.zeros([CHUNK, BLOCK_V], ACC)), du)
        keep(dwanted + row * values, dw, position, o_v, left, values, heads * values)
        keep(dv + row * values, dw * b[:, None], position, o_v, left, values, heads * values)
        db += tl.sum(dw * rows(v, position, o_v, left, values, v_token, v_channel).to(ACC), 1)
        u = rows(written + row * values, position, o_v, left, values, heads * values, 1)
        inner = product(dw, u, inner, B_TURNED=True)
        read = product(rows(do, position, o_v, left, values, do_token, do_channel), u, read, B_TURNED=True)
    logs += batch * logs_batch + begin * logs_token + head * logs_head
    high, low, resets = running(entries(logs, position, left, logs_token, ACC))
    decay = between(high, low, resets)
    read = tl.where(causal(), read * decay * SCALE, 0.0)  # by q_i . k_j
    inner = tl.where(after, inner * decay, 0.0)  # by -beta_i (k_i . k_j)
    squares += program * 3 * CHUNK * CHUNK + square
    turned = inner * -b[:, None]
    tl.store(squares, read)
    tl.store(squares + CHUNK * CHUNK, tl.trans(read))
    tl.store(squares + 2 * CHUNK * CHUNK, turned + tl.trans(turned))
    products = tl.zeros([CHUNK, CHUNK], ACC)
    for at in range(0, keys, BLOCK_K):
        b_k = rows(k, position, at + tl.arange(0, BLOCK_K), left, keys, k_token, k_channel)
        products = product(b_k, b_k, products, B_TURNED=True)
    inner = tl.where(after, inner * products, 0.0)
    tl.store(dbeta + row + position * heads, db - tl.sum(inner, 1), mask=position < left)
    scores = tl.zeros([CHUNK, CHUNK], ACC)
    for at in range(0, keys, BLOCK_K):
        o_k = at + tl.arange(0, BLOCK_K)
        b_k = rows(k, position, o_k, left, keys, k_token, k_channel)
        scores = product(rows(q, position, o_k, left, keys, q_token, q_channel), b_k, scores, B_TURNED=True)
    pairs = tl.where(causal(), read * scores, 0.0) - inner * b[:, None]
    tl.store(dlogs + row + position * heads, within(pairs), mask=position < left)


@triton.jit(do_not_specialize=["tokens", "length", "chunks", "count"])
def delta_gradients(
    do, q, k, logs, beta, ends, starts, dends, written, dwanted, squares, pair_dlogs, pair_dbeta, dq, dk, dlogs, dbeta,
    tokens, length, chunks, count, heads, keys, values, blocks_k, do_batch, do_token, do_head, do_channel, q_batch,
    q_token, q_head, q_channel, k_batch, k_token, k_head, k_channel, logs_batch, logs_token, logs_head, beta_batch,
    beta_token, beta_head,
    VARLEN: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: a block of a head's keys in a chunk, dq, dk, and its part of the gates' gradients.

    It holds one tile of sums at a time: the states are read twice, from the cache the second time.
    """
    block, program = tl.program_id(0) % blocks_k, (tl.program_id(0) // blocks_k).to(tl.int64)
    head, slot = program % heads, program // heads
    batch, begin, stop = chunk(slot, ends, length, chunks, count, VARLEN, CHUNK)
    if begin >= stop:
        return
    left, position = tl.minimum(stop - begin, CHUNK).to(tl.int32), tl.arange(0, CHUNK)
    row = (batch * length + begin) * heads + head
    q += batch * q_batch + begin * q_token + head * q_head
    k += batch * k_batch + begin * k_token + head * k_head
    do += batch * do_batch + begin * do_token + head * do_head
    logs += batch * logs_batch + begin * logs_token + head * logs_head
    beta += batch * beta_batch + begin * beta_token + head * beta_head
    starts += program * keys * values
    dends += program * keys * values
    written += row * values
    dwanted += row * values
    squares += program * 3 * CHUNK * CHUNK + position[:, None] * CHUNK + position[None, :]
    high, low, resets = running(entries(logs, position, left, logs_token, ACC))
    start, until = since_start(high, resets), until_end(high, low, resets)
    o_k, across = block * BLOCK_K + tl.arange(0, BLOCK_K), tl.zeros([BLOCK_K], ACC)
    tile = tl.zeros([CHUNK, BLOCK_K], ACC)
    for at in range(0, values, BLOCK_V):
        o_v = at + tl.arange(0, BLOCK_V)
        first = rows(starts, o_k, o_v, keys, values, values, 1)
        tile = product(rows(do, position, o_v, left, values, do_token, do_channel), first, tile, B_TURNED=True)
    tile *= (start * SCALE)[:, None]
    # Keys and queries are loaded where they are needed and not kept: with them and two tiles registers would not do.
    at_start = tl.sum(rows(q, position, o_k, left, keys, q_token, q_channel).to(ACC) * tile, 1)
    b_k = rows(k, position, o_k, left, keys, k_token, k_channel)
    tile = poison_after(product(tl.load(squares), clean(b_k), tile), b_k)
    keep(dq + row * keys, tile, position, o_k, left, keys, heads * keys)
    known = tl.zeros([CHUNK, BLOCK_K], ACC)
    for at in range(0, values, BLOCK_V):
        o_v = at + tl.arange(0, BLOCK_V)
        first = rows(starts, o_k, o_v, keys, values, values, 1)
        across += tl.sum(first * rows(dends, o_k, o_v, keys, values, values, 1), 1)
        dw = rows(dwanted, position, o_v, left, values, heads * values, 1)
        known = product(dw, first, known, B_TURNED=True)
    known *= start[:, None]
    through = tl.sum(rows(k, position, o_k, left, keys, k_token, k_channel).to(ACC) * known, 1)
    b = entries(beta, position, left, beta_token, ACC)
    at_start -= b * through
    known *= b[:, None]
    if block == 0:
        through -= entries(pair_dbeta + row, position, left, heads, ACC)
    gates = row + block * tokens * heads + position * heads
    tl.store(dbeta + gates, -through, mask=position < left)
    tile = tl.zeros([CHUNK, BLOCK_K], ACC)
    for at in range(0, values, BLOCK_V):
        o_v = at + tl.arange(0, BLOCK_V)
        end = rows(dends, o_k, o_v, keys, values, values, 1)
        tile = product(rows(written, position, o_v, left, values, heads * values, 1), end, tile, B_TURNED=True)
    tile *= until[:, None]
    b_k = rows(k, position, o_k, left, keys, k_token, k_channel)
    dlog = passing(at_start, tl.sum(b_k.to(ACC) * tile, 1)) + last(start) * tl.sum(across, 0)
    if block == 0:
        dlog += entries(pair_dlogs + row, position, left, heads, ACC)
    tl.store(dlogs + gates, dlog, mask=position < left)
    tile -= known
    tile = product(tl.load(squares + 2 * CHUNK * CHUNK), clean(b_k), tile)
    tile = poison_before(poison_after(tile, b_k), b_k)
    b_q = rows(q, position, o_k, left, keys, q_token, q_channel)
    tile = poison_before(product(tl.load(squares + CHUNK * CHUNK), clean(b_q), tile), b_q)
    keep(dk + row * keys, tile, position, o_k, left, keys, heads * keys)
