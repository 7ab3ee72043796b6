"""What the chunked recurrences share: cutting time into chunks, and decays between the tokens of one chunk."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from star_kernels._numerics import apply


class _Decays(torch.autograd.Function):
    """exp(l_{j+1} + ... + l_i) for j <= i, else 0: from logs (..., Q, K) to (..., Q, Q, K) with axes i, j.

    Sums run over the tokens between j and i alone. Differences of running sums would lose exp(-1) behind a token of
    -3e4 (an ulp is 0.002 there), and are NaN after one of -inf.
    """

    @staticmethod
    def forward(ctx: Any, logs: Tensor) -> Tensor:
        size = logs.shape[-2]
        later = torch.ones(size, size, dtype=torch.bool, device=logs.device).tril(-1).unsqueeze(-1)
        sums = torch.where(later, (logs * math.log2(math.e)).unsqueeze(-2), 0.0)
        decays = sums.cumsum_(-3).exp2_()
        decays.masked_fill_(later.transpose(0, 1), 0.0)
        ctx.save_for_backward(decays)
        return decays

    @staticmethod
    def backward(ctx: Any, ddecays: Tensor) -> Tensor:
        (decays,) = ctx.saved_tensors
        # Token t's log enters every decay with j < t <= i. Sums of those terms alone: a difference of sums over rows
        # and
        # columns would leave a rounding error that a step size of 3e4 then multiplies.
        earlier = (ddecays * decays).cumsum(-2)
        size = earlier.shape[-2]
        later = torch.ones(size, size, dtype=torch.bool, device=earlier.device).tril(-1).unsqueeze(-1)
        through: Tensor = earlier.masked_fill_(~later, 0.0).sum(-3)
        return functional.pad(through[..., :-1, :], (0, 0, 1, 0))


def decays_between(logs: Tensor) -> Tensor:
    """Return the decay from each earlier token to each later one, (..., Q, Q, K) from log decays (..., Q, K)."""
    decays: Tensor = apply(_Decays, logs)
    return decays


def to_chunks(x: Tensor, size: int) -> Tensor:
    """Turn (B, T, H, K) into (B, H, T/Q, Q, K), with zeros after the last token where Q does not divide T."""
    batch, length, heads, width = x.shape
    missing = -length % size
    if missing:
        x = functional.pad(x, (0, 0, 0, 0, 0, missing))
    return x.view(batch, x.shape[1] // size, size, heads, width).permute(0, 3, 1, 2, 4).contiguous()


def from_chunks(x: Tensor, length: int) -> Tensor:
    """Turn (B, H, T/Q, Q, V) back into (B, T, H, V)."""
    batch, heads, chunks, size, width = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(batch, chunks * size, heads, width)[:, :length]


def scan_chunks(decay: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Carry a state over chunks: S_{c+1} = decay_c S_c + added_c.

    Args:
        decay: (B, H, C, ...), broadcast against `added`.
        added: (B, H, C, K, V).
        state: (B, H, K, V).

    Returns:
        The states at the chunks' starts, (B, H, C, K, V), and the state after the last.
    """
    starts = []
    for decay_c, added_c in zip(decay.unbind(2), added.unbind(2), strict=True):
        starts.append(state)
        state = torch.addcmul(added_c, decay_c, state)
    return torch.stack(starts, dim=2), state
