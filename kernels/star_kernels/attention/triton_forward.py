"""The Triton attention forward: one program a tile of queries of one head, over the tiles of keys that it sees.

Source: Dao, "FlashAttention-2", 2023, arXiv 2307.08691, algorithm 1. Differs from it in: the row's maximum and sum are
saved in place of its log-sum-exp; both maps of differential attention are made in one pass; NaN behind the mask stays
there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels.attention.triton_tiles import (
    UNSPECIALISED,
    add_product,
    finite,
    key_ranges,
    load,
    locate,
    num_tiles,
    scores,
    sees,
    tile_start,
)


@triton.jit
def _absorb(
    acc, top, total, q, keys_t, values, visible, poison, factor, bend,
    EDGE: tl.constexpr, CAP: tl.constexpr, FLIP: tl.constexpr, PRECISE: tl.constexpr,
    NATIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys and values into a map's running output, maximum and sum."""
    s = scores(q, keys_t, bend, CAP, FLIP, NATIVE, ACC)
    if EDGE:
        s = tl.where(visible, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    keep = tl.where(top == float("-inf"), 0.0, tl.exp2((top - new) * factor))
    p = tl.exp2((s - new[:, None]) * factor)
    if EDGE:
        p = tl.where(visible, p, 0.0)
    total = total * keep + tl.sum(p, 1)
    if EDGE:
        p = tl.where(visible, p + poison[None, :], 0.0)
    return add_product(acc * keep[:, None], p, values, PRECISE, NATIVE), new, total


@triton.jit
def finish(top, total, sink, factor, SINKS: tl.constexpr):
    """Return a row's maximum and the inverse of its sum: 0 and 0 where it sees nothing."""
    top = tl.where(top == float("-inf"), 0.0, top)
    if SINKS:
        total += sink_weight(sink, top, factor)
    return top, tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def sink_weight(sink, top, factor):
    """Return 2^(sink - factor top): above 2^126 the sink takes the whole sum, and the sum must stay finite."""
    excess = sink * 1.4426950408889634 - top * factor
    return tl.exp2(tl.where(excess > 126.0, 126.0, excess))


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward(
    q1, q2, k1, k2, v, lam, sinks, ends_q, ends_k, lengths, o, kept, stats,
    q1_b, q1_t, q1_h, q1_d, q2_b, q2_t, q2_h, q2_d, k1_b, k1_t, k1_h, k1_d, k2_b, k2_t, k2_h, k2_d, v_b, v_t, v_h, v_d,
    lam_h, sinks_h, queries, keys, sequences, blocks, window, plane, heads, group, factor, bend,
    MAPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, FLIP: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, KEEP: tl.constexpr, PRECISE: tl.constexpr,
    ACC: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    NATIVE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """o = softmax(q1 k1) v, or (softmax(q1 k1) - lam softmax(q2 k2)) v with two maps.

    `stats` (MAPS, 2, B, H, T) gets each row's maximum and inverse sum, `kept` (MAPS, B, T, H, E) each map's output as
    it is before it is rounded. With PRECISE the weights of the values have twice the digits of the tensors' dtype: the
    backward subtracts dO.O from dP, and what is lost there would be all of it where the two are nearly the same.
    """
    program = tl.program_id(0).to(tl.int64)
    place = (program % blocks).to(tl.int32)
    if CAUSAL and not PACKED:
        place = blocks - 1 - place  # the longest rows first
    b = program // blocks // heads
    h = program // blocks % heads
    first_q, num_q, first_k, num_k, first = locate(
        ends_q, ends_k, lengths, place, b, sequences, queries, keys, PACKED, RAGGED, False, BLOCK_Q
    )
    o_i = first + tl.arange(0, BLOCK_Q)
    o_j = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    o_e = tl.arange(0, BLOCK_E)
    t = first_q + o_i
    m_t = o_i < num_q
    m_d = o_d < D
    m_e = o_e < E
    MASK_D: tl.constexpr = D != BLOCK_D
    p_q1 = q1 + b * q1_b + h * q1_h + t[:, None] * q1_t + o_d[None, :] * q1_d
    b_q1 = load(p_q1, m_t[:, None], m_d[None, :], True, MASK_D)
    acc1 = tl.zeros([BLOCK_Q, BLOCK_E], ACC)
    top1 = tl.full([BLOCK_Q], float("-inf"), ACC)
    total1 = tl.zeros([BLOCK_Q], ACC)
    if MAPS == 2:
        p_q2 = q2 + b * q2_b + h * q2_h + t[:, None] * q2_t + o_d[None, :] * q2_d
        b_q2 = load(p_q2, m_t[:, None], m_d[None, :], True, MASK_D)
        acc2 = tl.zeros([BLOCK_Q, BLOCK_E], ACC)
        top2 = tl.full([BLOCK_Q], float("-inf"), ACC)
        total2 = tl.zeros([BLOCK_Q], ACC)
    k1 += b * k1_b + h // group * k1_h
    k2 += b * k2_b + h // group * k2_h
    v += b * v_b + h // group * v_h
    j64 = o_j.to(tl.int64)
    p_k1 = j64[None, :] * k1_t + o_d[:, None] * k1_d
    p_k2 = j64[None, :] * k2_t + o_d[:, None] * k2_d
    p_v = j64[:, None] * v_t + o_e[None, :] * v_d

    left, whole, right, end = key_ranges(first, num_q, num_k, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_K)
    for part in tl.static_range(2):
        for n in range(num_tiles(left, whole, right, end, part == 0, BLOCK_K)):
            start = tile_start(n, left, whole, right, part == 0, BLOCK_K)
            far = first_k + start
            held = start + o_j < num_k
            b_k1 = load(k1 + far * k1_t + p_k1, held[None, :], m_d[:, None], part == 0, MASK_D)
            b_v = load(v + far * v_t + p_v, held[:, None], m_e[None, :], part == 0, E != BLOCK_E)
            if part == 0:
                visible = sees(o_i[:, None], (start + o_j)[None, :], num_q, num_k, window, CAUSAL, WINDOW)
                b_v, poison = finite(b_v, ACC)
            else:
                visible = held
                poison = held
            acc1, top1, total1 = _absorb(
                acc1, top1, total1, b_q1, b_k1, b_v, visible, poison, factor, bend, part == 0, CAP, FLIP, PRECISE,
                NATIVE, ACC,
            )  # fmt: skip
            if MAPS == 2:
                b_k2 = load(k2 + far * k2_t + p_k2, held[None, :], m_d[:, None], part == 0, MASK_D)
                acc2, top2, total2 = _absorb(
                    acc2, top2, total2, b_q2, b_k2, b_v, visible, poison, factor, bend, part == 0, CAP, FLIP, PRECISE,
                    NATIVE, ACC,
                )  # fmt: skip

    sink = 0.0
    if SINKS:
        sink = tl.load(sinks + h * sinks_h).to(ACC)
    row = (b * heads + h) * queries + t
    top1, inverse1 = finish(top1, total1, sink, factor, SINKS)
    tl.store(stats + row, top1, mask=m_t)
    tl.store(stats + plane + row, inverse1, mask=m_t)
    out = acc1 * inverse1[:, None]
    p_o = ((b * queries + t) * heads + h)[:, None] * E + o_e[None, :]
    m_o = m_t[:, None] & m_e[None, :]
    if KEEP:
        tl.store(kept + p_o, out, mask=m_o)
    if MAPS == 2:
        top2, inverse2 = finish(top2, total2, sink, factor, SINKS)
        tl.store(stats + 2 * plane + row, top2, mask=m_t)
        tl.store(stats + 3 * plane + row, inverse2, mask=m_t)
        second = acc2 * inverse2[:, None]
        if KEEP:
            tl.store(kept + plane * E + p_o, second, mask=m_o)
        out -= tl.load(lam + h * lam_h).to(ACC) * second
    tl.store(o + p_o, out, mask=m_o)
