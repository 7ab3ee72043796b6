"""Gated linear attention (a decay a channel) in plain torch, in chunks of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels._numerics import accumulator, all_finite, hide, nonfinite, over_sequences
from star_kernels.recurrence.reference.chunks import decays_between, from_chunks, scan_chunks, to_chunks

CHUNK = 8
"""Short, because the decays inside a chunk are a tensor (B, T, H, Q, K): at B 16, T 256, 4 heads of 32, forward and
backward take 79 ms on one core, and 280 ms with chunks of 16."""


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.gated_linear_attention`."""
    acc = accumulator(q.dtype)
    factor = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    packed = (q.to(acc) * factor, k.to(acc), v.to(acc), log_decay.to(acc))
    if cu_seqlens is None:
        o, final_state = _scan(*packed, initial_state)
    else:
        o, final_state = over_sequences(_scan, packed, initial_state, cu_seqlens)
    return o.to(v.dtype), final_state


def gated_linear_attention_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.gated_linear_attention_step`."""
    acc = accumulator(q.dtype)
    factor = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    added = k.to(acc).unsqueeze(-1) * v.to(acc).unsqueeze(-2)
    memory = torch.addcmul(added, log_decay.to(acc).exp().unsqueeze(-1), state.to(acc))
    o = ((q.to(acc) * factor).unsqueeze(-2) @ memory).squeeze(-2)
    return o.to(v.dtype), memory


def _scan(q: Tensor, k: Tensor, v: Tensor, logs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run S_t = diag(exp(logs_t)) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t over (B, T, H, K or V)."""
    batch, _, heads, width = q.shape
    start = v.new_zeros(batch, heads, width, v.shape[3]) if state is None else state.to(v.dtype)
    if v.numel() == 0 or q.numel() == 0:
        return v * 0.0, start.clone()
    if all_finite(k, v):
        return _scan_in_chunks(q, k, v, logs, start, CHUNK)
    bad = nonfinite(k) | nonfinite(v)
    exact, exact_state = _scan_in_chunks(q, k, v, logs, start, 1)
    clean, clean_state = _scan_in_chunks(q, hide(k, bad), hide(v, bad), logs, start, CHUNK)
    since_bad = bad.cummax(1).values
    final_state = torch.where(since_bad[:, -1, :, None, None], exact_state, clean_state)
    return torch.where(since_bad.unsqueeze(-1), exact, clean), final_state


def _scan_in_chunks(q: Tensor, k: Tensor, v: Tensor, logs: Tensor, start: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    chunk = min(chunk, length)
    q_c, k_c, v_c, log = (to_chunks(one, chunk) for one in (q, k, v, logs))
    between = decays_between(log)
    since_start = log.cumsum(-2).exp()
    scores = (between * q_c.unsqueeze(-2) * k_c.unsqueeze(-3)).sum(-1)
    added = (k_c * between[..., -1, :, :]).transpose(-1, -2) @ v_c
    starts, final_state = scan_chunks(since_start[..., -1, :].unsqueeze(-1), added, start)
    o = scores @ v_c + (q_c * since_start) @ starts
    return from_chunks(o, length), final_state
