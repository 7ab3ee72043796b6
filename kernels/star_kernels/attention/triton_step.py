"""One new token's attention to a cache in Triton: parts of the cache side by side, then a kernel that joins them.

A part is `_PART` keys whatever the batch and the cache's size, and begins at a multiple of that: a row's sums have one
order. All query heads of a group share a program, which reads each key and value once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._operands import wide
from star_kernels._triton import gpu_of, launch
from star_kernels._triton_math import accumulator, next_power_of_2
from star_kernels.attention.triton_forward import finish
from star_kernels.attention.triton_tiles import add_product, load, scores

_PART = 256  # keys of a program: 128 programs for 8 key heads and 4096 keys, about one for each multiprocessor
_JOINED = 16  # parts that the second kernel takes at once


@triton.jit(do_not_specialize=["keys", "window", "splits"])
def attend_parts(
    q, k, v, sinks, lengths, o, tops, totals, q_b, q_h, q_d, k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d, sinks_h, lengths_b,
    keys, window, splits, heads, group, chunks, factor, bend,
    WINDOW: tl.constexpr, CAP: tl.constexpr, FLIP: tl.constexpr, SINKS: tl.constexpr, RAGGED: tl.constexpr,
    ALONE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, NATIVE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program: up to HEADS query heads of a group against one part. `o` gets the output, or the part's sum."""
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    chunk = program // splits % chunks
    key_head = program // splits // chunks % (heads // group)
    b = program // splits // chunks // (heads // group)
    held = keys
    if RAGGED:
        held = tl.load(lengths + b * lengths_b).to(tl.int32)
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(held - window, 0)
    own = (lowest // PART + split).to(tl.int32) * PART
    stop = tl.minimum(own + PART, held)
    o_d = tl.arange(0, BLOCK_D)
    o_e = tl.arange(0, BLOCK_E)
    o_j = tl.arange(0, BLOCK)
    o_g = chunk * HEADS + tl.arange(0, HEADS)
    m_g, m_d, m_e = o_g < group, o_d < D, o_e < E
    h = key_head * group + o_g
    b_q = load(q + b * q_b + h[:, None] * q_h + o_d[None, :] * q_d, m_g[:, None], m_d[None, :], True, D != BLOCK_D)
    acc = tl.zeros([HEADS, BLOCK_E], ACC)
    top = tl.full([HEADS], float("-inf"), ACC)
    total = tl.zeros([HEADS], ACC)
    k += b * k_b + key_head * k_h
    v += b * v_b + key_head * v_h
    j64 = o_j.to(tl.int64)
    p_k = j64[None, :] * k_t + o_d[:, None] * k_d
    p_v = j64[:, None] * v_t + o_e[None, :] * v_d
    for start in range(tl.maximum(own, lowest // BLOCK * BLOCK), stop, BLOCK):
        far = b * 0 + start
        m_j = (start + o_j >= lowest) & (start + o_j < stop)
        b_k = load(k + far * k_t + p_k, m_j[None, :], m_d[:, None], True, D != BLOCK_D)
        b_v = load(v + far * v_t + p_v, m_j[:, None], m_e[None, :], True, E != BLOCK_E)
        s = tl.where(m_j[None, :], scores(b_q, b_k, bend, CAP, FLIP, NATIVE, ACC), float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        keep = tl.where(top == float("-inf"), 0.0, tl.exp2((top - new) * factor))
        p = tl.where(m_j[None, :], tl.exp2((s - new[:, None]) * factor), 0.0)
        total = total * keep + tl.sum(p, 1)
        acc = add_product(acc * keep[:, None], p, b_v, False, NATIVE)
        top = new
    row = b * heads + h
    if ALONE:
        sink = tl.load(sinks + h * sinks_h, mask=m_g, other=0.0).to(ACC) if SINKS else 0.0
        _, inverse = finish(top, total, sink, factor, SINKS)
        acc *= inverse[:, None]
        row_out = row
    else:
        row_out = row * splits + split
        tl.store(tops + row_out, top, mask=m_g)
        tl.store(totals + row_out, total, mask=m_g)
    tl.store(o + row_out[:, None] * E + o_e[None, :], acc, mask=m_g[:, None] & m_e[None, :])


@triton.jit(do_not_specialize=["splits"])
def join_parts(
    parts, tops, totals, sinks, o, sinks_h, splits, heads, factor,
    SINKS: tl.constexpr, ACC: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: the output of one row's head from its parts, in order. A part without keys has a total of 0."""
    row = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_E], ACC)
    top = row * 0.0 + float("-inf")
    top = top.to(ACC)
    total = tl.zeros_like(top)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        place = row * splits + split
        b_top = tl.load(tops + place, mask=split < splits, other=float("-inf"))
        b_total = tl.load(totals + place, mask=split < splits, other=0.0)
        m_part = (b_total != 0.0)[:, None] & (o_e < E)[None, :]
        b_part = tl.load(parts + place[:, None] * E + o_e[None, :], mask=m_part, other=0.0)
        new = tl.maximum(top, tl.max(b_top, 0))
        keep = tl.where(top == float("-inf"), 0.0, tl.exp2((top - new) * factor))
        weight = tl.where(b_total == 0.0, 0.0, tl.exp2((b_top - new) * factor))
        total = total * keep + tl.sum(b_total * weight, 0)
        acc = acc * keep + tl.sum(b_part * weight[:, None], 0)
        top = new
    sink = tl.load(sinks + row % heads * sinks_h).to(ACC) if SINKS else 0.0
    _, inverse = finish(top, total, sink, factor, SINKS)
    tl.store(o + row * E + o_e, acc * inverse, mask=o_e < E)


def attend_newest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    lengths: Tensor | None,
    held: int,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Return o (B, Hq, E) of queries (B, Hq, D) against the newest of the first `lengths`, or `held`, keys."""
    batch, heads, width = q.shape
    size, key_heads = k.shape[1:3]
    value_width, group = v.shape[3], heads // max(key_heads, 1)
    o = torch.empty(batch, heads, value_width, dtype=q.dtype, device=q.device)
    if not o.numel():
        return o
    if lengths is None:
        splits = triton.cdiv(held, _PART) - (max(held - window, 0) // _PART if window else 0)
    else:
        splits = min(triton.cdiv(size, _PART), triton.cdiv(window, _PART) + 1 if window else size)
    splits = max(splits, 1)
    alone = splits == 1
    acc = wide(q)
    parts = o if alone else torch.empty(batch, heads, splits, value_width, dtype=acc, device=q.device)
    sums = torch.empty(0 if alone else 2, batch, heads, splits, dtype=acc, device=q.device)
    tops, totals = (o, o) if alone else (sums[0], sums[1])
    own_heads = min(64, next_power_of_2(group, 16))
    chunks = triton.cdiv(group, own_heads)
    widest = max(width, value_width)
    shared: dict[str, Any] = {
        "SINKS": sinks is not None,
        "ACC": accumulator(q),
        "E": value_width,
        "BLOCK_E": next_power_of_2(value_width, 16),
    }
    units = (softcap / math.log(2), scale / softcap) if softcap else (abs(scale) / math.log(2), 0.0)
    sink_stride = 0 if sinks is None else sinks.stride(0)
    launch(
        attend_parts, (batch * key_heads * chunks * splits,), q, k, v, sinks, lengths, parts, tops, totals,
        *q.stride(), *k.stride(), *v.stride(), sink_stride, 0 if lengths is None else lengths.stride(0), held, window,
        splits, heads, group, chunks, *units, WINDOW=window > 0, CAP=softcap > 0, FLIP=scale < 0 and not softcap,
        RAGGED=lengths is not None, ALONE=alone, D=width, BLOCK_D=next_power_of_2(width, 16), HEADS=own_heads,
        NATIVE=gpu_of(q).units == "native", BLOCK=64 if widest <= 128 else 16, PART=_PART, **shared,
    )  # fmt: skip
    if not alone:
        launch(
            join_parts, (batch * heads,), parts, tops, totals, sinks, o, sink_stride, splits, heads, units[0],
            SPLITS=_JOINED, **shared,
        )  # fmt: skip
    return o
