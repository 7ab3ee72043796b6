"""The Triton attention backward: a kernel for the queries' gradient, then one for the keys' and values'.

Weights are made again tile by tile from the row's saved maximum and inverse sum:

    P = 2^(factor (s - top)) inverse    dP = dO v^T    dZ = P (dP - delta)    delta = dO.O, row by row
    dv = P^T dO                         dk = scale dZ^T q                      dq = scale dZ k

and for differential attention, with one dP for both maps, dv = (P1 - lam P2)^T dO and dZ2 = -lam P2 (dP - delta2). Each
gradient is summed by one program, in one order: there are no atomic additions.

Tiles that the mask crosses lose what is not finite (`finite`). Who sees it still gets NaN: from the row's inverse sum
where it was in q or k, from delta where it was in dO.
"""

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels.attention.triton_forward import sink_weight
from star_kernels.attention.triton_tiles import (
    UNSPECIALISED,
    add_product,
    bent,
    key_ranges,
    load,
    load_finite,
    locate,
    multiply,
    num_tiles,
    query_ranges,
    scores,
    sees,
    sliced_product,
    tile_start,
)


@triton.jit
def _weights(s, top, inverse, visible, factor, EDGE: tl.constexpr):
    """Return the softmax of scores again; `top` and `inverse` broadcast to them."""
    p = tl.exp2((s - top) * factor) * inverse
    if EDGE:
        p = tl.where(visible, p, 0.0)
    return p


@triton.jit
def _slopes(p, dp, delta, s, visible, EDGE: tl.constexpr, CAP: tl.constexpr):
    """Return the gradient at the scores, without their scale."""
    dz = p * (dp - delta)
    if CAP:
        dz *= 1.0 - s * s
    if EDGE:
        dz = tl.where(visible, dz, 0.0)
    return dz


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_queries(
    q1, q2, k1, k2, v, do, lam, sinks, ends_q, ends_k, lengths, o, stats, delta, pull, dq1, dq2,
    q1_b, q1_t, q1_h, q1_d, q2_b, q2_t, q2_h, q2_d, k1_b, k1_t, k1_h, k1_d, k2_b, k2_t, k2_h, k2_d, v_b, v_t, v_h, v_d,
    do_b, do_t, do_h, do_e, lam_h, sinks_h, queries, keys, sequences, blocks, window, plane, heads, group, factor, bend,
    scale, MAPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, FLIP: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    NATIVE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One program: dq of a tile of queries of one head, and delta (MAPS, B, H, T); `pull` is what the sink receives."""
    program = tl.program_id(0).to(tl.int64)
    place = (program % blocks).to(tl.int32)
    if CAUSAL and not PACKED:
        place = blocks - 1 - place
    b = program // blocks // heads
    h = program // blocks % heads
    first_q, num_q, first_k, num_k, first = locate(
        ends_q, ends_k, lengths, place, b, sequences, queries, keys, PACKED, RAGGED, False, BLOCK_Q
    )
    o_i = first + tl.arange(0, BLOCK_Q)
    o_j = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    o_e = tl.arange(0, BLOCK_E)
    m_t, m_d, m_e = o_i < num_q, o_d < D, o_e < E
    MASK_D: tl.constexpr = D != BLOCK_D
    MASK_E: tl.constexpr = E != BLOCK_E
    t = first_q + o_i
    row = (b * heads + h) * queries + t
    r_q1 = q1 + b * q1_b + h * q1_h + t[:, None] * q1_t
    if SLICE >= BLOCK_D:
        b_q1 = load(r_q1 + o_d[None, :] * q1_d, m_t[:, None], m_d[None, :], True, MASK_D)
    r_do = do + b * do_b + h * do_h + t[:, None] * do_t
    b_do = load(r_do + o_e[None, :] * do_e, m_t[:, None], m_e[None, :], True, MASK_E)
    top1 = tl.load(stats + row, mask=m_t, other=0.0)
    inverse1 = tl.load(stats + plane + row, mask=m_t, other=0.0)
    p_o = o + ((b * queries + t) * heads + h)[:, None] * E + o_e[None, :]
    b_o = load(p_o, m_t[:, None], m_e[None, :], True, MASK_E).to(ACC)
    delta1 = tl.sum(b_do.to(ACC) * b_o, 1)
    tl.store(delta + row, delta1, mask=m_t)
    acc1 = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
    if SINKS:
        sink = tl.load(sinks + h * sinks_h).to(ACC)
        tl.store(pull + row, -sink_weight(sink, top1, factor) * inverse1 * delta1, mask=m_t)
    if MAPS == 2:
        r_q2 = q2 + b * q2_b + h * q2_h + t[:, None] * q2_t
        if SLICE >= BLOCK_D:
            b_q2 = load(r_q2 + o_d[None, :] * q2_d, m_t[:, None], m_d[None, :], True, MASK_D)
        top2 = tl.load(stats + 2 * plane + row, mask=m_t, other=0.0)
        inverse2 = tl.load(stats + 3 * plane + row, mask=m_t, other=0.0)
        b_o = load(p_o + plane * E, m_t[:, None], m_e[None, :], True, MASK_E).to(ACC)
        delta2 = tl.sum(b_do.to(ACC) * b_o, 1)
        tl.store(delta + plane + row, delta2, mask=m_t)
        acc2 = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
    k1 += b * k1_b + h // group * k1_h
    k2 += b * k2_b + h // group * k2_h
    v += b * v_b + h // group * v_h
    j64 = o_j.to(tl.int64)
    p_k1 = j64[:, None] * k1_t + o_d[None, :] * k1_d
    p_k2 = j64[:, None] * k2_t + o_d[None, :] * k2_d
    p_v = j64[None, :] * v_t + o_e[:, None] * v_d

    left, whole, right, end = key_ranges(first, num_q, num_k, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_K)
    for part in tl.static_range(2):
        for n in range(num_tiles(left, whole, right, end, part == 0, BLOCK_K)):
            start = tile_start(n, left, whole, right, part == 0, BLOCK_K)
            far = first_k + start
            held = start + o_j < num_k
            visible = held[None, :]
            if part == 0:
                visible = sees(o_i[:, None], (start + o_j)[None, :], num_q, num_k, window, CAUSAL, WINDOW)
            if SLICE < BLOCK_E:
                r_v = v + (far + j64)[:, None] * v_t
                dp = sliced_product(r_do, r_v, m_t, held, do_e, v_d, part == 0, E, SLICE, ACC)
            else:
                b_v = load(v + far * v_t + p_v, held[None, :], m_e[:, None], part == 0, MASK_E)
                dp = multiply(b_do, b_v, tl.zeros([BLOCK_Q, BLOCK_K], ACC), NATIVE)
            p_far1 = k1 + far * k1_t + p_k1
            if SLICE < BLOCK_D:
                r_k1 = k1 + (far + j64)[:, None] * k1_t
                s = sliced_product(r_q1, r_k1, m_t, held, q1_d, k1_d, part == 0, D, SLICE, ACC)
                s = bent(s, bend, CAP, FLIP)
            else:
                b_k1, _ = load_finite(p_far1, held[:, None], m_d[None, :], part == 0, MASK_D, ACC)
                s = scores(b_q1, tl.trans(b_k1), bend, CAP, FLIP, NATIVE, ACC)
            p = _weights(s, top1[:, None], inverse1[:, None], visible, factor, part == 0)
            dz = _slopes(p, dp, delta1[:, None], s, visible, part == 0, CAP)
            if SLICE < BLOCK_D:
                b_k1, _ = load_finite(p_far1, held[:, None], m_d[None, :], part == 0, MASK_D, ACC)
            acc1 = add_product(acc1, dz, b_k1, PRECISE, NATIVE)
            if MAPS == 2:
                p_far2 = k2 + far * k2_t + p_k2
                if SLICE < BLOCK_D:
                    r_k2 = k2 + (far + j64)[:, None] * k2_t
                    s = sliced_product(r_q2, r_k2, m_t, held, q2_d, k2_d, part == 0, D, SLICE, ACC)
                    s = bent(s, bend, CAP, FLIP)
                else:
                    b_k2, _ = load_finite(p_far2, held[:, None], m_d[None, :], part == 0, MASK_D, ACC)
                    s = scores(b_q2, tl.trans(b_k2), bend, CAP, FLIP, NATIVE, ACC)
                p = _weights(s, top2[:, None], inverse2[:, None], visible, factor, part == 0)
                dz = _slopes(p, dp, delta2[:, None], s, visible, part == 0, CAP)
                if SLICE < BLOCK_D:
                    b_k2, _ = load_finite(p_far2, held[:, None], m_d[None, :], part == 0, MASK_D, ACC)
                acc2 = add_product(acc2, dz, b_k2, PRECISE, NATIVE)

    p_dq = ((b * queries + t) * heads + h)[:, None] * D + o_d[None, :]
    m_dq = m_t[:, None] & m_d[None, :]
    tl.store(dq1 + p_dq, acc1 * scale, mask=m_dq)
    if MAPS == 2:
        tl.store(dq2 + p_dq, acc2 * (-scale * tl.load(lam + h * lam_h).to(ACC)), mask=m_dq)


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_keys(
    q1, q2, k1, k2, v, do, lam, ends_q, ends_k, lengths, stats, delta, dk1, dk2, dv,
    q1_b, q1_t, q1_h, q1_d, q2_b, q2_t, q2_h, q2_d, k1_b, k1_t, k1_h, k1_d, k2_b, k2_t, k2_h, k2_d, v_b, v_t, v_h, v_d,
    do_b, do_t, do_h, do_e, lam_h, queries, keys, sequences, blocks, window, plane, heads, group, factor, bend,
    scale, MAPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, FLIP: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    NATIVE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of a tile of keys of one key head, over its query heads in order. Tiles are transposed."""
    program = tl.program_id(0).to(tl.int64)
    place = (program % blocks).to(tl.int32)
    key_heads = heads // group
    b = program // blocks // key_heads
    key_head = program // blocks % key_heads
    first_q, num_q, first_k, num_k, first = locate(
        ends_q, ends_k, lengths, place, b, sequences, queries, keys, PACKED, RAGGED, True, BLOCK_K
    )
    o_i = tl.arange(0, BLOCK_Q)
    o_j = first + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    o_e = tl.arange(0, BLOCK_E)
    m_j, m_d, m_e = o_j < num_k, o_d < D, o_e < E
    MASK_D: tl.constexpr = D != BLOCK_D
    MASK_E: tl.constexpr = E != BLOCK_E
    t = first_k + o_j
    r_k1 = k1 + b * k1_b + key_head * k1_h + t[:, None] * k1_t
    if SLICE >= BLOCK_D:
        b_k1 = load(r_k1 + o_d[None, :] * k1_d, m_j[:, None], m_d[None, :], True, MASK_D)
    r_v = v + b * v_b + key_head * v_h + t[:, None] * v_t
    if SLICE >= BLOCK_E:
        b_v = load(r_v + o_e[None, :] * v_d, m_j[:, None], m_e[None, :], True, MASK_E)
    acc1 = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    acc_v = tl.zeros([BLOCK_K, BLOCK_E], ACC)
    if MAPS == 2:
        r_k2 = k2 + b * k2_b + key_head * k2_h + t[:, None] * k2_t
        if SLICE >= BLOCK_D:
            b_k2 = load(r_k2 + o_d[None, :] * k2_d, m_j[:, None], m_d[None, :], True, MASK_D)
        acc2 = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    i64 = o_i.to(tl.int64)
    p_q1 = i64[:, None] * q1_t + o_d[None, :] * q1_d
    p_q2 = i64[:, None] * q2_t + o_d[None, :] * q2_d
    p_do = i64[:, None] * do_t + o_e[None, :] * do_e

    left, whole, right, end = query_ranges(first, num_q, num_k, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_K)
    for member in range(group):
        h = key_head * group + member
        own_q1 = q1 + b * q1_b + h * q1_h
        own_q2 = q2 + b * q2_b + h * q2_h
        own_do = do + b * do_b + h * do_h
        own_row = (b * heads + h) * queries + first_q
        if MAPS == 2:
            share = tl.load(lam + h * lam_h).to(ACC)
        for part in tl.static_range(2):
            for n in range(num_tiles(left, whole, right, end, part == 0, BLOCK_Q)):
                start = tile_start(n, left, whole, right, part == 0, BLOCK_Q)
                far = first_q + start
                held = start + o_i < num_q
                row = own_row + start + o_i
                visible = held[None, :]
                if part == 0:
                    visible = sees((start + o_i)[None, :], o_j[:, None], num_q, num_k, window, CAUSAL, WINDOW)
                p_far1 = own_q1 + far * q1_t + p_q1
                if SLICE >= BLOCK_D:
                    b_q1, _ = load_finite(p_far1, held[:, None], m_d[None, :], part == 0, MASK_D, ACC)
                top1 = tl.load(stats + row, mask=held, other=0.0)
                inverse1 = tl.load(stats + plane + row, mask=held, other=0.0)
                if SLICE < BLOCK_D:
                    r_q1 = own_q1 + (far + i64)[:, None] * q1_t
                    s = sliced_product(r_k1, r_q1, m_j, held, k1_d, q1_d, part == 0, D, SLICE, ACC)
                    s = bent(s, bend, CAP, FLIP)
                else:
                    s = scores(b_k1, tl.trans(b_q1), bend, CAP, FLIP, NATIVE, ACC)
                p1 = _weights(s, top1[None, :], inverse1[None, :], visible, factor, part == 0)
                p_far = own_do + far * do_t + p_do
                if SLICE < BLOCK_E:
                    r_do = own_do + (far + i64)[:, None] * do_t
                    dp = sliced_product(r_v, r_do, m_j, held, v_d, do_e, part == 0, E, SLICE, ACC)
                else:
                    b_do, poison = load_finite(p_far, held[:, None], m_e[None, :], part == 0, MASK_E, ACC)
                    dp = multiply(b_v, tl.trans(b_do), tl.zeros([BLOCK_K, BLOCK_Q], ACC), NATIVE)
                delta1 = tl.load(delta + row, mask=held, other=0.0)
                dz = _slopes(p1, dp, delta1[None, :], s, visible, part == 0, CAP)
                if SLICE < BLOCK_D:
                    b_q1, _ = load_finite(p_far1, held[:, None], m_d[None, :], part == 0, MASK_D, ACC)
                acc1 = add_product(acc1, dz, b_q1, PRECISE, NATIVE)
                weights = p1
                if MAPS == 2:
                    p_far2 = own_q2 + far * q2_t + p_q2
                    if SLICE >= BLOCK_D:
                        b_q2, _ = load_finite(p_far2, held[:, None], m_d[None, :], part == 0, MASK_D, ACC)
                    top2 = tl.load(stats + 2 * plane + row, mask=held, other=0.0)
                    inverse2 = tl.load(stats + 3 * plane + row, mask=held, other=0.0)
                    if SLICE < BLOCK_D:
                        r_q2 = own_q2 + (far + i64)[:, None] * q2_t
                        s = sliced_product(r_k2, r_q2, m_j, held, k2_d, q2_d, part == 0, D, SLICE, ACC)
                        s = bent(s, bend, CAP, FLIP)
                    else:
                        s = scores(b_k2, tl.trans(b_q2), bend, CAP, FLIP, NATIVE, ACC)
                    p2 = _weights(s, top2[None, :], inverse2[None, :], visible, factor, part == 0) * share
                    delta2 = tl.load(delta + plane + row, mask=held, other=0.0)
                    dz = _slopes(p2, dp, delta2[None, :], s, visible, part == 0, CAP)
                    if SLICE < BLOCK_D:
                        b_q2, _ = load_finite(p_far2, held[:, None], m_d[None, :], part == 0, MASK_D, ACC)
                    acc2 = add_product(acc2, dz, b_q2, PRECISE, NATIVE)
                    weights -= p2
                if SLICE < BLOCK_E:
                    b_do, poison = load_finite(p_far, held[:, None], m_e[None, :], part == 0, MASK_E, ACC)
                if part == 0:
                    weights = tl.where(visible, weights + poison[None, :], 0.0)
                acc_v = add_product(acc_v, weights, b_do, PRECISE, NATIVE)

    # Of a ragged cache, what lies past the length is written too: zeros.
    m_out = t < keys if RAGGED else m_j
    head = (b * keys + t) * key_heads + key_head
    p_dk = head[:, None] * D + o_d[None, :]
    m_dk = m_out[:, None] & m_d[None, :]
    tl.store(dk1 + p_dk, acc1 * scale, mask=m_dk)
    tl.store(dv + head[:, None] * E + o_e[None, :], acc_v, mask=m_out[:, None] & m_e[None, :])
    if MAPS == 2:
        tl.store(dk2 + p_dk, acc2 * -scale, mask=m_dk)
