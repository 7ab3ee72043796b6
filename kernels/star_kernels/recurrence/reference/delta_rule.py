"""The gated delta rule in plain torch: a triangular solve inside each chunk, matrix products between chunks.

Inside a chunk that starts from state S, with G_ij the decay from token j to i and g_i that from the start to i, what
token i writes is u_i = beta_i (v_i - g_i S^T k_i - sum_{j<i} G_ij (k_i . k_j) u_j): a unit lower triangular system.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels._numerics import accumulator, all_finite, hide, nonfinite, over_sequences
from star_kernels.recurrence.reference.chunks import decays_between, from_chunks, to_chunks

CHUNK = 64


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.gated_delta_rule`."""
    acc = accumulator(q.dtype)
    factor = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    packed = (q.to(acc) * factor, k.to(acc), v.to(acc), log_decay.to(acc), beta.to(acc))
    if cu_seqlens is None:
        o, final_state = _scan(*packed, initial_state)
    else:
        o, final_state = over_sequences(_scan, packed, initial_state, cu_seqlens)
    return o.to(v.dtype), final_state


def gated_delta_rule_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.gated_delta_rule_step`."""
    acc = accumulator(q.dtype)
    factor = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    key = k.to(acc)
    memory = state.to(acc) * log_decay.to(acc).exp()[..., None, None]
    read = (key.unsqueeze(-2) @ memory).squeeze(-2)
    written = beta.to(acc).unsqueeze(-1) * (v.to(acc) - read)
    memory = torch.addcmul(memory, key.unsqueeze(-1), written.unsqueeze(-2))
    o = ((q.to(acc) * factor).unsqueeze(-2) @ memory).squeeze(-2)
    return o.to(v.dtype), memory


def _scan(q: Tensor, k: Tensor, v: Tensor, logs: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run S_t = exp(logs_t) S_{t-1} + k_t u_t^T, o_t = S_t^T q_t over (B, T, H, K or V) and (B, T, H)."""
    batch, _, heads, width = q.shape
    start = v.new_zeros(batch, heads, width, v.shape[3]) if state is None else state.to(v.dtype)
    if v.numel() == 0 or q.numel() == 0:
        return v * 0.0, start.clone()
    if all_finite(k, v, logs.clamp_min(-1.0), beta):
        return _scan_in_chunks(q, k, v, logs, beta, start, CHUNK)
    bad = nonfinite(k) | nonfinite(v) | nonfinite(logs.clamp_min(-1.0)) | nonfinite(beta)
    exact, exact_state = _scan_in_chunks(q, k, v, logs, beta, start, 1)
    clean, clean_state = _scan_in_chunks(q, hide(k, bad), hide(v, bad), hide(logs, bad), hide(beta, bad), start, CHUNK)
    since_bad = bad.cummax(1).values
    final_state = torch.where(since_bad[:, -1, :, None, None], exact_state, clean_state)
    return torch.where(since_bad.unsqueeze(-1), exact, clean), final_state


def _scan_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, logs: Tensor, beta: Tensor, memory: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    chunk = min(chunk, length)
    q_c, k_c, v_c = (to_chunks(one, chunk) for one in (q, k, v))
    log, strength = (to_chunks(one.unsqueeze(-1), chunk) for one in (logs, beta))
    between = decays_between(log).squeeze(-1)
    since_start = log.cumsum(-2).exp()
    keys_by_keys = (k_c * strength) @ k_c.transpose(-1, -2) * between
    right = torch.cat([v_c * strength, k_c * (strength * since_start)], dim=-1)
    # unitriangular: the diagonal and what lies above it are not read.
    solved = torch.linalg.solve_triangular(keys_by_keys.tril(-1), right, upper=False, unitriangular=True)
    fresh, recalled = solved[..., : v.shape[3]], solved[..., v.shape[3] :]
    scores = q_c @ k_c.transpose(-1, -2) * between
    outward = q_c * since_start
    inward = (k_c * between[..., -1, :].unsqueeze(-1)).transpose(-1, -2)
    kept = since_start[..., -1:, :]
    outputs = []
    for c in range(q_c.shape[2]):
        written = fresh[:, :, c] - recalled[:, :, c] @ memory
        outputs.append(outward[:, :, c] @ memory + scores[:, :, c] @ written)
        memory = kept[:, :, c] * memory + inward[:, :, c] @ written
    return from_chunks(torch.stack(outputs, dim=2), length), memory
