"""Mamba-2's scan (one scalar decay a head) in plain torch, in chunks of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from star_kernels._numerics import accumulator, all_finite, hide, nonfinite, over_sequences
from star_kernels.recurrence.reference.chunks import decays_between, from_chunks, scan_chunks, to_chunks
from star_kernels.recurrence.reference.selective import step_sizes

CHUNK = 64


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.ssd`."""
    acc = accumulator(x.dtype)
    wide_x, step = x.to(acc), step_sizes(dt, dt_bias, dt_softplus, acc)
    packed = (wide_x * step.unsqueeze(-1), step * A.to(acc), B.to(acc), C.to(acc))
    if cu_seqlens is None:
        y, final_state = _scan(*packed, initial_state)
    else:
        y, final_state = over_sequences(_scan, packed, initial_state, cu_seqlens)
    return _finish(y, wide_x, D, z).to(x.dtype), final_state


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.ssd_step`."""
    acc = accumulator(x.dtype)
    group = x.shape[1] // B.shape[1]
    wide_x, step = x.to(acc), step_sizes(dt, dt_bias, dt_softplus, acc)
    inward = B.to(acc).repeat_interleave(group, dim=1)
    outward = C.to(acc).repeat_interleave(group, dim=1)
    decay = torch.exp(step * A.to(acc))[..., None, None]
    h = torch.addcmul((wide_x * step.unsqueeze(-1)).unsqueeze(-1) * inward.unsqueeze(-2), decay, state.to(acc))
    y = (h @ outward.unsqueeze(-1)).squeeze(-1)
    return _finish(y, wide_x, D, z).to(x.dtype), h


def _finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = torch.addcmul(y, x, D.to(x.dtype).unsqueeze(-1))
    return y if z is None else y * functional.silu(z.to(x.dtype))


def _scan(values: Tensor, logs: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run S_t = exp(logs_t) S_{t-1} + values_t B_t^T, y_t = S_t C_t over (B, T, H, P), (B, T, H), (B, T, G, N)."""
    batch, _, heads, width = values.shape
    groups, size = B.shape[2:]
    start = values.new_zeros(batch, heads, width, size) if state is None else state.to(values.dtype)
    if values.numel() == 0:
        return values, start.clone()
    if all_finite(values, B):
        return _scan_in_chunks(values, logs, B, C, start, CHUNK)
    bad_B = nonfinite(B)
    bad = nonfinite(values) | bad_B.repeat_interleave(heads // groups, dim=2)
    exact, exact_state = _scan_in_chunks(values, logs, B, C, start, 1)
    clean, clean_state = _scan_in_chunks(hide(values, bad), logs, hide(B, bad_B), C, start, CHUNK)
    since_bad = bad.cummax(1).values
    final_state = torch.where(since_bad[:, -1, :, None, None], exact_state, clean_state)
    return torch.where(since_bad.unsqueeze(-1), exact, clean), final_state


def _scan_in_chunks(
    values: Tensor, logs: Tensor, B: Tensor, C: Tensor, start: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = values.shape
    groups, size = B.shape[2:]
    chunk = min(chunk, length)
    split = (batch, groups, heads // groups)
    v = to_chunks(values, chunk)
    inward, outward = to_chunks(B, chunk).unsqueeze(2), to_chunks(C, chunk).unsqueeze(2)
    log = to_chunks(logs.unsqueeze(-1), chunk)
    between = decays_between(log).squeeze(-1)
    since_start = log.cumsum(-2).exp()

    # Heads of one group share the products of C and B.
    scores = (outward @ inward.transpose(-1, -2)) * between.view(*split, *between.shape[2:])
    within = scores.view(between.shape) @ v
    arriving = (v * between[..., -1, :].unsqueeze(-1)).transpose(-1, -2)
    added = arriving.view(*split, *arriving.shape[2:]) @ inward
    chunks = (v.shape[2], width, size)
    starts, final_state = scan_chunks(since_start[..., -1:, :], added.view(batch, heads, *chunks), start)
    carried = outward @ starts.view(*split, *chunks).transpose(-1, -2)
    y = torch.addcmul(within, since_start, carried.view(within.shape))
    return from_chunks(y, length), final_state
