"""The compiled gated units and channel mixing: fakes and gradients for the operators of cpu.cpp and cpu_mix.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from star_kernels._native import Function, native_operator, serve
from star_kernels._numerics import accumulator


def _fake_unit(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _fake_unit_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_unit(gate, up), _fake_unit(gate, up)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gated_unit(name: str) -> Function:
    gradient = native_operator(f"{name}_backward", fake=_fake_unit_backward)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = gradient(dy, *ctx.saved_tensors)
        return gradients

    return native_operator(name, fake=_fake_unit, setup_context=_save_inputs, backward=backward)


for _name in ("swiglu", "geglu", "reglu"):
    serve(_name, _gated_unit(_name))


def _fake_mix(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_mix_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_mix(x, weight), torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _mix(name: str) -> Function:
    gradient = native_operator(f"{name}_backward", fake=_fake_mix_backward)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = gradient(dy, *ctx.saved_tensors)
        return gradients

    return native_operator(name, fake=_fake_mix, setup_context=_save_inputs, backward=backward)


_scale_channels = _mix("scale_channels")
_mix_in_groups = _mix("mix_in_groups")


def channel_mix(x: Tensor, weight: Tensor) -> Tensor:
    """Serve `star_kernels.channel_mix`; a dense matrix is a linear layer, which torch's own libraries do best."""
    if weight.ndim == 1:
        y: Tensor = _scale_channels(x, weight)
    elif weight.ndim == 3:
        y = _mix_in_groups(x, weight)
    elif torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            y = _dense(x, weight)
    else:
        y = _dense(x, weight)
    return y


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply in x's dtype if the weight has it too (the library sums in float32), else both in float32."""
    if x.dtype == weight.dtype:
        return functional.linear(x, weight)
    acc = accumulator(x.dtype)
    return functional.linear(x.to(acc), weight.to(acc)).to(x.dtype)


serve("channel_mix", channel_mix)
