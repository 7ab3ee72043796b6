"""Gated memoryless units and channel mixing in plain torch; the gated units recompute their activation in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from star_kernels._numerics import accumulator, apply


class _GatedUnit(torch.autograd.Function):
    """y = act(gate) * up, saving the two inputs and no intermediate."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        acc = accumulator(gate.dtype)
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        y: Tensor = _activate(gate.to(acc), kind).mul_(up.to(acc))
        return y.to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        acc = accumulator(gate.dtype)
        wide_gate, wide_dy = gate.to(acc), dy.to(acc)
        dgate = dup = None
        if ctx.needs_input_grad[0]:
            dgate = _activation_gradient(wide_dy * up.to(acc), wide_gate, ctx.kind).to(gate.dtype)
        if ctx.needs_input_grad[1]:
            dup = _activate(wide_gate, ctx.kind).mul_(wide_dy).to(up.dtype)
        return dgate, dup, None


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return functional.silu(x)
    return functional.gelu(x) if kind == "gelu" else functional.relu(x)


def _activation_gradient(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    aten: Any = torch.ops.aten
    dx: Tensor
    if kind == "silu":
        dx = aten.silu_backward(dy, x)
    elif kind == "gelu":
        dx = aten.gelu_backward(dy, x)
    else:
        dx = aten.threshold_backward(dy, x, 0)
    return dx


def _gated_unit(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    y: Tensor = apply(_GatedUnit, gate, up, kind)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Define `star_kernels.swiglu`."""
    return _gated_unit(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Define `star_kernels.geglu`."""
    return _gated_unit(gate, up, "gelu")


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """Define `star_kernels.reglu`."""
    return _gated_unit(gate, up, "relu")


def channel_mix(x: Tensor, weight: Tensor) -> Tensor:
    """Define `star_kernels.channel_mix`."""
    acc = accumulator(x.dtype)
    wide_x, wide_weight = x.to(acc), weight.to(acc)
    if weight.ndim == 1:
        return (wide_x * wide_weight).to(x.dtype)
    if weight.ndim == 2:
        return functional.linear(wide_x, wide_weight).to(x.dtype)
    groups, width = weight.shape[:2]
    rows = wide_x.reshape(x.numel() // max(x.shape[-1], 1), groups, width).transpose(0, 1)
    mixed = torch.bmm(rows, wide_weight.transpose(1, 2)).transpose(0, 1)
    return mixed.reshape(x.shape).to(x.dtype)
