"""Diagonal recurrences in plain torch: h_t = a_t h_{t-1} + x_t, and the RG-LRU built on it.

Time-major loops of one fused multiply-add a token, under a hand-written gradient. No division and no cumulative
product: a decay may be zero or negative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._numerics import accumulator, apply, over_sequences


class _Scan(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + x_t over time-major (T, B, D) tensors of one dtype, from state (B, D)."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor, state: Tensor) -> Tensor:
        h = torch.empty_like(x)
        previous = state
        for a_t, x_t, h_t in zip(decay.unbind(0), x.unbind(0), h.unbind(0), strict=True):
            previous = torch.addcmul(x_t, a_t, previous, out=h_t)
        ctx.save_for_backward(decay, h, state)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, h, state = ctx.saved_tensors
        pull = dh.clone(memory_format=torch.contiguous_format)
        rows, decays = pull.unbind(0), decay.unbind(0)
        for t in range(len(rows) - 1, 0, -1):
            rows[t - 1].addcmul_(decays[t], rows[t])
        ddecay = torch.empty_like(pull)
        torch.mul(pull[1:], h[:-1], out=ddecay[1:])
        torch.mul(pull[:1], state, out=ddecay[:1])
        return ddecay, pull, decay[0] * pull[0]


def diagonal_scan(
    decay: Tensor, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.diagonal_scan`."""
    acc = accumulator(x.dtype)
    h, final_state = _scan(decay.to(acc), x.to(acc), initial_state, cu_seqlens)
    return h.to(x.dtype), final_state


def diagonal_scan_step(state: Tensor, decay: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.diagonal_scan_step`."""
    acc = accumulator(x.dtype)
    h = torch.addcmul(x.to(acc), decay.to(acc), state.to(acc))
    return h.to(x.dtype), h


class _InputScale(torch.autograd.Function):
    """(1 - exp(2 l))^(1/2) for l <= 0, through expm1; the slope is that at 1 - a^2 = 1e-12 where it is steeper."""

    @staticmethod
    def forward(ctx: Any, log_a: Tensor) -> Tensor:
        scale = torch.expm1(2 * log_a).neg_().sqrt_()
        ctx.save_for_backward(log_a, scale)
        return scale

    @staticmethod
    def backward(ctx: Any, dscale: Tensor) -> Tensor:
        log_a, scale = ctx.saved_tensors
        slope: Tensor = torch.exp(2 * log_a) / scale.clamp_min(1e-6)
        return -dscale * slope


def rg_lru(
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    log_lambda: Tensor,
    c: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.rg_lru`."""
    decay, driven = _rg_lru_terms(x, recurrence_gate, input_gate, log_lambda, c)
    h, final_state = _scan(decay, driven, initial_state, cu_seqlens)
    return h.to(x.dtype), final_state


def rg_lru_step(
    state: Tensor, x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.rg_lru_step`."""
    decay, driven = _rg_lru_terms(x, recurrence_gate, input_gate, log_lambda, c)
    h = torch.addcmul(driven, decay, state.to(driven.dtype))
    return h.to(x.dtype), h


def _rg_lru_terms(
    x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    acc = accumulator(x.dtype)
    log_a = torch.sigmoid(recurrence_gate.to(acc)) * (c * log_lambda.to(acc))
    scale: Tensor = apply(_InputScale, log_a)
    return torch.exp(log_a), scale * (torch.sigmoid(input_gate.to(acc)) * x.to(acc))


def _scan(decay: Tensor, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scan batch-first tensors of the accumulation dtype; returns (B, T, D) and (S, D)."""

    def run(decay: Tensor, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        start = x.new_zeros(batch, width) if state is None else state.to(x.dtype)
        if length == 0:
            return x, start.clone()
        h = apply(_Scan, decay.transpose(0, 1).contiguous(), x.transpose(0, 1).contiguous(), start)
        return h.transpose(0, 1).contiguous(), h[-1].clone()

    if cu_seqlens is None:
        return run(decay, x, initial_state)
    return over_sequences(run, (decay, x), initial_state, cu_seqlens)
