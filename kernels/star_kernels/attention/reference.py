"""Softmax attention in plain torch: dense maps, and torch's fused operator where it means exactly the same."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from star_kernels._numerics import accumulator, all_finite, hide, nonfinite


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Define `star_kernels.attention`."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _attend(q, k, v, causal, window, scale, softcap, sinks)
    ends_q: list[int] = cu_seqlens_q.tolist()
    ends_k: list[int] = cu_seqlens_k.tolist()
    bounds = zip(pairwise(ends_q), pairwise(ends_k), strict=True)
    parts = [
        _attend(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], causal, window, scale, softcap, sinks)
        for (q0, q1), (k0, k1) in bounds
    ]
    return torch.cat(parts, dim=1) if parts else q.new_zeros(*q.shape[:3], v.shape[3])


def differential_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Define `star_kernels.differential_attention`."""
    acc = accumulator(q1.dtype)
    values = v.to(acc)
    first, second = (
        attention(q.to(acc), k.to(acc), values, causal, window, scale, None, None, cu_seqlens_q, cu_seqlens_k)
        for q, k in ((q1, k1), (q2, k2))
    )
    return torch.addcmul(first, second, lam.to(acc).unsqueeze(-1), value=-1).to(q1.dtype)


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int | Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Define `star_kernels.attention_step`."""
    query = q.unsqueeze(1)
    if isinstance(length, Tensor):
        rows = [
            _attend_newest(query[i : i + 1], k[i : i + 1], v[i : i + 1], held, window, scale, softcap, sinks)
            for i, held in enumerate(length.tolist())
        ]
        return torch.cat(rows).squeeze(1) if rows else q.new_zeros(0, q.shape[1], v.shape[3])
    held = k.shape[1] if length is None else length
    return _attend_newest(query, k, v, held, window, scale, softcap, sinks).squeeze(1)


def _attend_newest(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    held: int,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend from one query to the newest of the cache's first `held` tokens; what lies beyond is never read."""
    oldest = 0 if window is None else max(0, held - window)
    return _dense(query, k[:, oldest:held], v[:, oldest:held], None, scale, softcap, sinks)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if all_finite(q, k, v):
        return _attend_at_once(q, k, v, causal, window, scale, softcap, sinks)
    bad_q, bad = nonfinite(q), nonfinite(k) | nonfinite(v)
    clean = _attend_at_once(hide(q, bad_q), hide(k, bad), hide(v, bad), causal, window, scale, softcap, sinks)
    exact = _attend_by_query(q, k, v, causal, window, scale, softcap, sinks)
    queries, keys = q.shape[1], k.shape[1]
    seen = visible(queries, keys, window, q.device) if causal else bad.new_ones(queries, keys)
    sees_bad = torch.einsum("qk,bkh->bqh", seen.float(), bad.float()) > 0
    sees_bad = sees_bad.repeat_interleave(q.shape[2] // k.shape[2], dim=2) | bad_q
    return torch.where(sees_bad.unsqueeze(-1), exact, clean)


def _attend_at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    # torch's operator aligns its causal mask top-left, leaves a row without keys to the implementation, and scales what
    # it has masked.
    every_row_sees_a_key = keys > 0 and (not causal or queries <= keys)
    positive = scale is None or scale > 0
    if softcap is not None or sinks is not None or not every_row_sees_a_key or not positive or q.numel() == 0:
        mask = visible(queries, keys, window, q.device) if causal else None
        return _dense(q, k, v, mask, scale, softcap, sinks)
    # torch's own causal mask, where it means the same. Chosen by a branch, as the groups are: neither `is_causal` nor,
    # before torch 2.13, `enable_gqa` may be symbolic.
    square = queries == keys and (window is None or window >= keys)
    mask = visible(queries, keys, window, q.device) if causal and not square else None
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    acc = accumulator(q.dtype)
    o: Tensor = functional.scaled_dot_product_attention(
        q.to(acc).transpose(1, 2),
        k.to(acc).transpose(1, 2),
        v.to(acc).transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        **grouped,
    )
    return o.transpose(1, 2).to(q.dtype)


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each query sees, (Tq, Tk) bool: causal, aligned bottom-right, the last `window` keys."""
    position = torch.arange(queries, device=device).unsqueeze(1) + (keys - queries)
    key = torch.arange(keys, device=device)
    mask = key <= position
    return mask if window is None else mask & (key > position - window)


def _attend_by_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend query by query to the visible keys alone, so that a NaN behind the mask is never multiplied by zero."""
    queries, keys = q.shape[1], k.shape[1]
    rows = []
    for i in range(queries):
        stop = max(0, i + 1 + keys - queries) if causal else keys
        start = 0 if window is None else max(0, stop - window)
        rows.append(_dense(q[:, i : i + 1], k[:, start:stop], v[:, start:stop], None, scale, softcap, sinks))
    return torch.cat(rows, dim=1) if rows else q.new_zeros(*q.shape[:3], v.shape[3])


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend through the whole map, in float32: the heads of one group are rows of one matrix product."""
    acc = accumulator(q.dtype)
    batch, queries, heads, width = q.shape
    keys, key_heads, value_width = k.shape[1], k.shape[2], v.shape[3]
    group = heads // key_heads if key_heads else 1
    rows = q.to(acc).transpose(1, 2).reshape(batch, key_heads, group * queries, width)
    scores = rows @ k.to(acc).permute(0, 2, 3, 1)
    scores = scores.view(batch, key_heads, group, queries, keys) * (max(width, 1) ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.to(acc).view(1, key_heads, group, 1, 1).expand(batch, -1, -1, queries, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :keys]
    else:
        weights = torch.softmax(scores, dim=-1)
    if mask is not None and queries > keys:
        weights = weights.masked_fill(~mask, 0.0)  # the softmax of a row without a key is NaN
    o = weights.reshape(batch, key_heads, group * queries, keys) @ v.to(acc).transpose(1, 2)
    return o.view(batch, heads, queries, value_width).transpose(1, 2).to(q.dtype)
