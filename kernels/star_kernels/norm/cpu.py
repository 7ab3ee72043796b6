"""The compiled normalisations and rotary positions: fakes and gradients for the operators of cpu.cpp,
cpu_rotary.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._native import native_operator, serve
from star_kernels._numerics import accumulator


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _empty_like(x)


def _fake_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_like(x), _empty_like(weight)


def _fake_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_like(x), _empty_like(residual)


def _fake_add_norm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _empty_like(total), _empty_like(weight)


def _fake_rotary(x: Tensor, positions: Tensor, base: float, interleaved: bool, inverse: bool) -> Tensor:
    return _empty_like(x)


def _save_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _norm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(dy, x, weight, ctx.eps)
    return dx, dweight, None


def _save_add_norm(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, ctx.eps = inputs
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _add_norm_backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    dsum, dweight = dtotal, None
    if dy is not None:
        dsum, dweight = _add_rms_norm_backward(dy, dtotal, total, weight, ctx.eps)
    return None if dsum is None else dsum.to(ctx.dtype), dsum, dweight, None


def _save_rotary(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool, bool], output: Tensor) -> None:
    _, positions, ctx.base, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(positions)


def _rotary_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    (positions,) = ctx.saved_tensors
    return _rotate(dy, positions, ctx.base, ctx.interleaved, not ctx.inverse), None, None, None, None


_rms_norm_backward = native_operator("rms_norm_backward", fake=_fake_norm_backward)
_add_rms_norm_backward = native_operator("add_rms_norm_backward", fake=_fake_add_norm_backward)
rms_norm = native_operator("rms_norm", fake=_fake_norm, setup_context=_save_norm, backward=_norm_backward)
_add_rms_norm = native_operator(
    "add_rms_norm", fake=_fake_add_norm, setup_context=_save_add_norm, backward=_add_norm_backward
)
_rotate = native_operator("rotary", fake=_fake_rotary, setup_context=_save_rotary, backward=_rotary_backward)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.add_rms_norm`: fused for the usual pairs of dtypes, in two steps for the others."""
    if residual.dtype == x.dtype or (x.dtype == torch.bfloat16 and residual.dtype == torch.float32):
        y, total = _add_rms_norm(x, residual, weight, eps)
        return y, total
    total = (x.to(accumulator(x.dtype)) + residual).to(residual.dtype)
    y = rms_norm(total.to(accumulator(total.dtype)), weight, eps)
    return y.to(x.dtype), total


def rotary(x: Tensor, positions: Tensor, base: float, interleaved: bool) -> Tensor:
    """Serve `star_kernels.rotary`."""
    y: Tensor = _rotate(x, positions, base, interleaved, False)
    return y


serve("rms_norm", rms_norm)
serve("add_rms_norm", add_rms_norm)
serve("rotary", rotary)
