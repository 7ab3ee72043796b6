"""The compiled long convolution and its step: fakes and gradients for the operators of cpu.cpp and cpu_step.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._native import native_operator, serve
from star_kernels._operands import given, like, like_or_none, wide


def _gate_gradient(gate: Tensor | None, x: Tensor) -> Tensor:
    """Stand for the gradient of a gate: the operators return no elements of x's dtype where there is none."""
    return torch.empty(0, dtype=x.dtype, device=x.device) if gate is None else like(gate)


def _fake_long_conv(
    x: Tensor,
    filter: Tensor,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return like(x)


def _fake_long_conv_backward(
    dy: Tensor,
    x: Tensor,
    filter: Tensor,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    skip: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gates = _gate_gradient(gate_in, x), _gate_gradient(gate_out, x)
    return like(x), like(filter), *gates, like_or_none(skip, x)


def _save_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _long_conv_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, filter, gate_in, gate_out, skip, cu_seqlens = ctx.saved_tensors
    dx, dfilter, dgate_in, dgate_out, dskip = _long_conv_backward(dy, x, filter, gate_in, gate_out, skip, cu_seqlens)
    return dx, dfilter, given(gate_in, dgate_in), given(gate_out, dgate_out), given(skip, dskip), None


def _fake_step(
    state: Tensor,
    x: Tensor,
    filter: Tensor,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kept = min(state.shape[1] + 1, filter.shape[1] - 1)
    shape = (x.shape[0], kept, x.shape[1])
    return like(x), torch.empty(shape, dtype=wide(x), device=x.device)


def _fake_step_backward(
    dy: Tensor,
    dnew_state: Tensor,
    state: Tensor,
    x: Tensor,
    filter: Tensor,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gates = _gate_gradient(gate_in, x), _gate_gradient(gate_out, x)
    return like(state), like(x), like(filter), *gates, like_or_none(skip, x)


def _step_gradient(ctx: Any, dy: Tensor, dnew_state: Tensor) -> tuple[Tensor | None, ...]:
    state, x, filter, gate_in, gate_out, skip = ctx.saved_tensors
    dstate, dx, dfilter, dgate_in, dgate_out, dskip = _step_backward(
        dy, dnew_state, state, x, filter, gate_in, gate_out, skip
    )
    return dstate, dx, dfilter, given(gate_in, dgate_in), given(gate_out, dgate_out), given(skip, dskip)


_long_conv_backward = native_operator("long_conv_backward", fake=_fake_long_conv_backward)
_step_backward = native_operator("long_conv_step_backward", fake=_fake_step_backward)
serve(
    "long_conv",
    native_operator("long_conv", fake=_fake_long_conv, setup_context=_save_inputs, backward=_long_conv_gradient),
)
serve(
    "long_conv_step",
    native_operator("long_conv_step", fake=_fake_step, setup_context=_save_inputs, backward=_step_gradient),
    checks=True,
)
