"""The compiled RMS normalisation: fakes and gradients for the operators of cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._native import native_operator, serve


def _fake_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _fake_norm(x, weight, eps), torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _save_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _norm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(dy, x, weight, ctx.eps)
    return dx, dweight, None


_rms_norm_backward = native_operator("rms_norm_backward", fake=_fake_norm_backward)
rms_norm = native_operator("rms_norm", fake=_fake_norm, setup_context=_save_norm, backward=_norm_backward)
serve("rms_norm", rms_norm)
