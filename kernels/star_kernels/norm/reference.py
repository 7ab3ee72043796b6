"""RMS normalisation and rotary positions in plain torch, with hand-written gradients that save the inputs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._numerics import accumulator, apply


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps)^(-1/2); saves x, w and one r a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        acc = accumulator(x.dtype)
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=acc).square_()
        scale = scale.div_(max(x.shape[-1], 1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = (x.to(acc) * scale).mul_(weight.to(acc))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        acc, width = scale.dtype, x.shape[-1]
        wide_x, wide_dy, wide_weight = x.to(acc), dy.to(acc), weight.to(acc)
        product = wide_dy * wide_x
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (scale.reshape(1, -1) @ product.reshape(scale.numel(), width)).reshape(width).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            pull = (product @ wide_weight).unsqueeze(-1).mul_(scale.square()).div_(max(width, 1))
            dx = (wide_dy * wide_weight).addcmul_(wide_x, pull, value=-1).mul_(scale).to(x.dtype)
        return dx, dweight, None


class _Rotate(torch.autograd.Function):
    """Rotate pairs of channels; the gradient is the rotation back, so only the angles are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, ctx.interleaved, -1.0), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: float) -> Tensor:
    wide = x.to(cos.dtype)
    half = x.shape[-1] // 2
    if interleaved:
        out = wide * cos.repeat_interleave(2, dim=-1)
        out[..., 0::2].addcmul_(wide[..., 1::2], sin, value=-sign)
        out[..., 1::2].addcmul_(wide[..., 0::2], sin, value=sign)
    else:
        out = wide * torch.cat([cos, cos], dim=-1)
        out[..., :half].addcmul_(wide[..., half:], sin, value=-sign)
        out[..., half:].addcmul_(wide[..., :half], sin, value=sign)
    return out.to(x.dtype).contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Define `star_kernels.rms_norm`."""
    y: Tensor = apply(_RMSNorm, x, weight, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Define `star_kernels.add_rms_norm`: the norm sees the sum as it is returned, rounded to the residual's dtype."""
    total = (x.to(accumulator(x.dtype)) + residual).to(residual.dtype)
    return rms_norm(total, weight, eps).to(x.dtype), total


def rotary(x: Tensor, positions: Tensor, base: float, interleaved: bool) -> Tensor:
    """Define `star_kernels.rotary`."""
    acc = accumulator(x.dtype)
    half = x.shape[-1] // 2
    exponents = torch.arange(half, dtype=acc, device=x.device) / max(half, 1)
    angles = positions.to(acc).unsqueeze(-1) * torch.pow(base, -exponents)
    angles = angles.unsqueeze(-2)  # one axis for the heads: (T, 1, D/2) or (B, T, 1, D/2)
    y: Tensor = apply(_Rotate, x, angles.cos(), angles.sin(), interleaved)
    return y
