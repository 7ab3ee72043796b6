"""The compiled short convolutions: fakes and gradients for the operators of cpu.cpp, cpu_backward.cpp, cpu_step.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._native import native_operator, serve
from star_kernels._numerics import accumulator


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _parameter_gradients(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return fakes of the gradients of the filter and the bias; the latter is empty where there is no bias."""
    dbias = _empty(weight, (0,), weight.dtype) if bias is None else _empty(bias, tuple(bias.shape), bias.dtype)
    return _empty(weight, tuple(weight.shape), weight.dtype), dbias


def _final_state(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return _empty(x, (sequences, x.shape[-1], weight.shape[1] - 1), accumulator(x.dtype))


def _state_gradient(state: Tensor | None, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return _final_state(x, weight, cu_seqlens) if state is None else _empty(state, tuple(state.shape), state.dtype)


def _fake_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _empty(x, tuple(x.shape), x.dtype), _final_state(x, weight, cu_seqlens)


def _fake_conv_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    dstate = _state_gradient(state, x, weight, cu_seqlens)
    return (_empty(x, tuple(x.shape), x.dtype), *_parameter_gradients(weight, bias), dstate)


def _fake_gated(
    x: Tensor,
    gate_in: Tensor,
    gate_out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _empty(x, tuple(x.shape), x.dtype), _final_state(x, weight, cu_seqlens)


def _fake_gated_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    gate_in: Tensor,
    gate_out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    inputs = tuple(_empty(x, tuple(x.shape), x.dtype) for _ in range(3))
    return (*inputs, *_parameter_gradients(weight, bias), _state_gradient(state, x, weight, cu_seqlens))


def _fake_conv_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    return _empty(x, tuple(x.shape), x.dtype), _final_state(x, weight, None)


def _fake_gated_step(
    state: Tensor, x: Tensor, gate_in: Tensor, gate_out: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _empty(x, tuple(x.shape), x.dtype), _final_state(x, weight, None)


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.silu, state, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, state, cu_seqlens)


def _conv_backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dstate = _conv_gradient(dy, dfinal, x, weight, bias, ctx.silu, state, cu_seqlens)
    return dx, dweight, None if bias is None else dbias, None, None if state is None else dstate, None


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _gated_backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under torch.utils.checkpoint a second look is an error
    x, _gate_in, _gate_out, _weight, bias, state, _cu_seqlens = saved
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dgate_in, dgate_out, dweight, dbias, dstate = _gated_gradient(dy, dfinal, *saved)
    dbias = None if bias is None else dbias
    return dx, dgate_in, dgate_out, dweight, dbias, None if state is None else dstate, None


def _save_conv_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    state, x, weight, bias, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(state, x, weight, bias)


def _conv_step_backward(ctx: Any, dy: Tensor | None, dnew: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate a step as a sequence of one token."""
    state, x, weight, bias = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dstate = _conv_gradient(
        dy.unsqueeze(1), dnew, x.unsqueeze(1), weight, bias, ctx.silu, state, None
    )
    return dstate, dx.squeeze(1), dweight, None if bias is None else dbias, None


def _gated_step_backward(ctx: Any, dy: Tensor | None, dnew: Tensor | None) -> tuple[Tensor | None, ...]:
    state, x, gate_in, gate_out, weight, bias = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    tokens = (one.unsqueeze(1) for one in (x, gate_in, gate_out))
    *inputs, dweight, dbias, dstate = _gated_gradient(dy.unsqueeze(1), dnew, *tokens, weight, bias, state, None)
    return dstate, *(one.squeeze(1) for one in inputs), dweight, None if bias is None else dbias


_conv_gradient = native_operator("causal_conv1d_backward", fake=_fake_conv_backward)
_gated_gradient = native_operator("gated_short_conv_backward", fake=_fake_gated_backward)
_conv = native_operator("causal_conv1d", fake=_fake_conv, setup_context=_save_conv, backward=_conv_backward)
_conv_step = native_operator(
    "causal_conv1d_step", fake=_fake_conv_step, setup_context=_save_conv_step, backward=_conv_step_backward
)
gated_short_conv = native_operator(
    "gated_short_conv", fake=_fake_gated, setup_context=_save_gated, backward=_gated_backward
)
gated_short_conv_step = native_operator(
    "gated_short_conv_step", fake=_fake_gated_step, setup_context=_save_gated, backward=_gated_step_backward
)

_SILU = {None: False, "silu": True, "swish": True}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.causal_conv1d`; both names of the activation are one."""
    y, final_state = _conv(x, weight, bias, activation is not None, initial_state, cu_seqlens)
    return y, final_state


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.causal_conv1d_step`, which relies on the refusal of an unknown activation (KeyError)."""
    y, new_state = _conv_step(state, x, weight, bias, _SILU[activation])
    return y, new_state


serve("causal_conv1d", causal_conv1d)
serve("causal_conv1d_step", causal_conv1d_step, checks=True)
serve("gated_short_conv", gated_short_conv)
serve("gated_short_conv_step", gated_short_conv_step, checks=True)
