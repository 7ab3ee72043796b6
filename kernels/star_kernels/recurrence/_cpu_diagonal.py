"""The compiled recurrences with a diagonal state: fakes and gradients for their operators in cpu_*.cpp.

A forward that will be differentiated also returns the state before every 64th token; the backward starts from those.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from star_kernels._native import native_operator, serve
from star_kernels._numerics import accumulator
from star_kernels._operands import one_token, sequences_of, will_differentiate

BLOCK = 64
"""Tokens between kept states: kScanBlock of scan.h."""

Tensors = tuple[Tensor, ...]


def _like(one: Tensor | None) -> Tensor:
    """Return an empty contiguous tensor like the argument; without elements for None."""
    return torch.empty(0) if one is None else torch.empty(one.shape, dtype=one.dtype, device=one.device)


def _states(x: Tensor, cu_seqlens: Tensor | None, keep: bool, *rest: int) -> tuple[Tensor, Tensor]:
    """Return empty final states (S, D, ...) and kept states, B * slots of them in one axis.

    With an axis of slots, torch.compile would guard on there being more than one, and compile again.
    """
    sequences = sequences_of(x, cu_seqlens)
    slots = (x.shape[1] + BLOCK - 1) // BLOCK if keep else 0
    wide = accumulator(x.dtype)
    size = (x.shape[2], *rest)
    final_state = torch.empty((sequences, *size), dtype=wide, device=x.device)
    return final_state, torch.empty(x.shape[0] * slots * math.prod(size), dtype=wide, device=x.device)


def _one_token(*tensors: Tensor | None) -> list[Tensor | None]:
    """Give tensors (B, ...) a time axis of one token."""
    return [one_token(one) for one in tensors]


def _squeezed(*tensors: Tensor) -> list[Tensor]:
    return [one.squeeze(1) for one in tensors]


# The diagonal scan.


def _fake_scan(
    decay: Tensor, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, keep: bool
) -> Tensors:
    return _like(x), *_states(x, cu_seqlens, keep)


def _fake_scan_backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    decay: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
) -> Tensors:
    final_state, _ = _states(x, cu_seqlens, False)
    return _like(decay), _like(x), final_state if initial_state is None else _like(initial_state)


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:4], output[2])


def _scan_gradient(ctx: Any, dh: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    decay, x, initial_state, cu_seqlens, kept = ctx.saved_tensors
    ddecay, dx, dstate = _diagonal_scan_backward(dh, dfinal_state, decay, x, initial_state, cu_seqlens, kept)
    return ddecay, dx, None if initial_state is None else dstate, None, None


_diagonal_scan_backward = native_operator("diagonal_scan_backward", fake=_fake_scan_backward)
_diagonal_scan = native_operator("diagonal_scan", fake=_fake_scan, setup_context=_save_scan, backward=_scan_gradient)


def diagonal_scan(
    decay: Tensor, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.diagonal_scan`."""
    keep = will_differentiate(decay, x, initial_state)
    h, final_state, _ = _diagonal_scan(decay, x, initial_state, cu_seqlens, keep)
    return h, final_state


def _fake_step(state: Tensor, decay: Tensor, x: Tensor) -> Tensors:
    return _like(x), torch.empty(state.shape, dtype=accumulator(x.dtype), device=x.device)


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _step_gradient(ctx: Any, dh: Tensor | None, dnew_state: Tensor | None) -> Tensors:
    state, decay, x = ctx.saved_tensors
    dh, decay, x = _one_token(dh, decay, x)
    kept = state.new_empty(0, dtype=accumulator(state.dtype))
    ddecay, dx, dstate = _diagonal_scan_backward(dh, dnew_state, decay, x, state, None, kept)
    return dstate, *_squeezed(ddecay, dx)


serve("diagonal_scan", diagonal_scan)
serve(
    "diagonal_scan_step",
    native_operator("diagonal_scan_step", fake=_fake_step, setup_context=_save_step, backward=_step_gradient),
    checks=True,
)


# The RG-LRU.


def _fake_lru(
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    log_lambda: Tensor,
    c: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> Tensors:
    return _like(x), *_states(x, cu_seqlens, keep)


def _fake_lru_backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    log_lambda: Tensor,
    c: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
) -> Tensors:
    final_state, _ = _states(x, cu_seqlens, False)
    dstate = final_state if initial_state is None else _like(initial_state)
    return _like(x), _like(x), _like(x), _like(log_lambda), dstate


def _save_lru(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.c = inputs[4]
    ctx.save_for_backward(*inputs[:4], *inputs[5:7], output[2])


def _lru_gradient(ctx: Any, dh: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *inputs, initial_state, cu_seqlens, kept = ctx.saved_tensors
    *gradients, dstate = _rg_lru_backward(dh, dfinal_state, *inputs, ctx.c, initial_state, cu_seqlens, kept)
    return *gradients, None, None if initial_state is None else dstate, None, None


_rg_lru_backward = native_operator("rg_lru_backward", fake=_fake_lru_backward)
_rg_lru = native_operator("rg_lru", fake=_fake_lru, setup_context=_save_lru, backward=_lru_gradient)


def rg_lru(
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    log_lambda: Tensor,
    c: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.rg_lru`."""
    keep = will_differentiate(x, recurrence_gate, input_gate, log_lambda, initial_state)
    h, final_state, _ = _rg_lru(x, recurrence_gate, input_gate, log_lambda, c, initial_state, cu_seqlens, keep)
    return h, final_state


def _fake_lru_step(
    state: Tensor, x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor, c: float
) -> Tensors:
    return _like(x), torch.empty(state.shape, dtype=accumulator(x.dtype), device=x.device)


def _save_lru_step(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.c = inputs[5]
    ctx.save_for_backward(*inputs[:5])


def _lru_step_gradient(ctx: Any, dh: Tensor | None, dnew_state: Tensor | None) -> tuple[Tensor | None, ...]:
    state, *timed, log_lambda = ctx.saved_tensors
    dh, *timed = _one_token(dh, *timed)
    kept = state.new_empty(0, dtype=accumulator(state.dtype))
    *gradients, dlog_lambda, dstate = _rg_lru_backward(dh, dnew_state, *timed, log_lambda, ctx.c, state, None, kept)
    return dstate, *_squeezed(*gradients), dlog_lambda, None


serve("rg_lru", rg_lru)
serve(
    "rg_lru_step",
    native_operator("rg_lru_step", fake=_fake_lru_step, setup_context=_save_lru_step, backward=_lru_step_gradient),
    checks=True,
)


# The selective scan.


def _fake_selective(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> Tensors:
    return _like(x), *_states(x, cu_seqlens, keep, A.shape[1])


def _fake_selective_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
) -> Tensors:
    return tuple(_like(one) for one in (x, dt, A, B, C, D, z, dt_bias, initial_state))


def _save_selective(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.dt_softplus = inputs[8]
    ctx.save_for_backward(*inputs[:8], *inputs[9:11], output[2])


def _selective_gradient(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *inputs, initial_state, cu_seqlens, kept = ctx.saved_tensors
    gradients = _selective_scan_backward(dy, dfinal_state, *inputs, ctx.dt_softplus, initial_state, cu_seqlens, kept)
    *own, dstate = _given(gradients, (*inputs, initial_state))
    return *own, None, dstate, None, None


def _given(gradients: Tensors, arguments: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Return None as the gradient of an argument that was None."""
    return [None if one is None else gradient for gradient, one in zip(gradients, arguments, strict=True)]


_selective_scan_backward = native_operator("selective_scan_backward", fake=_fake_selective_backward)
_selective_scan = native_operator(
    "selective_scan", fake=_fake_selective, setup_context=_save_selective, backward=_selective_gradient
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.selective_scan`."""
    keep = will_differentiate(x, dt, A, B, C, D, z, dt_bias, initial_state)
    y, final_state, _ = _selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, keep)
    return y, final_state


def _fake_selective_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensors:
    return _like(x), torch.empty(state.shape, dtype=accumulator(x.dtype), device=x.device)


def _save_selective_step(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.dt_softplus = inputs[9]
    ctx.save_for_backward(*inputs[:9])


def _selective_step_gradient(ctx: Any, dy: Tensor | None, dnew_state: Tensor | None) -> tuple[Tensor | None, ...]:
    state, x, dt, A, B, C, D, z, dt_bias = ctx.saved_tensors
    dy, x, dt, B, C, z = _one_token(dy, x, dt, B, C, z)
    kept = state.new_empty(0, dtype=accumulator(state.dtype))
    gradients = _selective_scan_backward(
        dy, dnew_state, x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, state, None, kept
    )
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = _given(gradients, (x, dt, A, B, C, D, z, dt_bias, state))
    dx, ddt, dB, dC, dz = (None if one is None else one.squeeze(1) for one in (dx, ddt, dB, dC, dz))
    return dstate, dx, ddt, dA, dB, dC, dD, dz, dbias, None


serve("selective_scan", selective_scan)
serve(
    "selective_scan_step",
    native_operator(
        "selective_scan_step",
        fake=_fake_selective_step,
        setup_context=_save_selective_step,
        backward=_selective_step_gradient,
    ),
    checks=True,
)
