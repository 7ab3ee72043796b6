"""Short causal depthwise convolutions in plain torch.

W shifted multiply-adds over (B, T, D) with a hand-written gradient: at B 16, T 256, D 128, W 4 on 2 cores, forward and
backward take 1.2 ms, where `conv1d` on the transposed input takes 5.2 ms and the same shifts under autograd 3.4 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from star_kernels._numerics import accumulator, apply, over_sequences


class _ShiftedSums(torch.autograd.Function):
    """y_t = sum_w taps[w] * padded[t + w], over padded (B, W - 1 + T, D) and taps (W, D) in one dtype."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(padded, taps)
        width = taps.shape[0]
        length = padded.shape[1] - width + 1
        y = padded[:, :length] * taps[0]
        for w in range(1, width):
            y.addcmul_(padded[:, w : w + length], taps[w])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        padded, taps = ctx.saved_tensors
        length, width = dy.shape[1], taps.shape[0]
        dpadded = dtaps = None
        if ctx.needs_input_grad[0]:
            dpadded = torch.zeros_like(padded)
            for w in range(width):
                dpadded[:, w : w + length].addcmul_(dy, taps[w])
        if ctx.needs_input_grad[1]:
            dtaps = torch.empty_like(taps)
            product = torch.empty_like(padded[:, :length])
            for w in range(width):
                torch.sum(torch.mul(dy, padded[:, w : w + length], out=product), (0, 1), out=dtaps[w])
        return dpadded, dtaps


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.causal_conv1d`."""
    acc = accumulator(x.dtype)
    y, final_state = _convolve(x.to(acc), weight, bias, initial_state, cu_seqlens)
    if activation is not None:
        y = functional.silu(y)
    return y.to(x.dtype), final_state


def gated_short_conv(
    x: Tensor,
    gate_in: Tensor,
    gate_out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.gated_short_conv`."""
    acc = accumulator(x.dtype)
    y, final_state = _convolve(gate_in.to(acc) * x.to(acc), weight, bias, initial_state, cu_seqlens)
    return (gate_out.to(acc) * y).to(x.dtype), final_state


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.causal_conv1d_step`."""
    acc = accumulator(x.dtype)
    y, new_state = _convolve_step(state, x.to(acc), weight, bias)
    if activation is not None:
        y = functional.silu(y)
    return y.to(x.dtype), new_state


def gated_short_conv_step(
    state: Tensor, x: Tensor, gate_in: Tensor, gate_out: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.gated_short_conv_step`."""
    acc = accumulator(x.dtype)
    y, new_state = _convolve_step(state, gate_in.to(acc) * x.to(acc), weight, bias)
    return (gate_out.to(acc) * y).to(x.dtype), new_state


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convolve (B, T, D) in the accumulation dtype; the final state is the padded input's last W - 1 tokens."""
    taps = weight.to(x.dtype).t().contiguous()

    def run(part: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        history = taps.shape[0] - 1
        if state is None:
            padded = functional.pad(part, (0, 0, history, 0))
        else:
            padded = torch.cat([state.to(part.dtype).transpose(1, 2), part], dim=1)
        return apply(_ShiftedSums, padded, taps), padded[:, part.shape[1] :].transpose(1, 2).contiguous()

    if cu_seqlens is None:
        y, final_state = run(x, initial_state)
    else:
        y, final_state = over_sequences(run, (x,), initial_state, cu_seqlens)
    return (y if bias is None else y + bias.to(y.dtype)), final_state


def _convolve_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    window = torch.cat([state.to(x.dtype), x.unsqueeze(-1)], dim=-1)
    y = (window * weight.to(x.dtype)).sum(-1)
    return (y if bias is None else y + bias.to(y.dtype)), window[..., 1:].contiguous()
