"""The compiled recurrences with a matrix state: fakes and gradients for cpu_ssd.cpp, cpu_gla.cpp and
cpu_delta_rule.cpp.

A forward that will be differentiated also returns the states at the starts of its chunks; the backward starts from
those. A step's gradient is the sequence operator's for one token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._native import native_operator, serve
from star_kernels._operands import (
    given,
    like,
    like_or_none,
    one_token,
    score_factor,
    sequences_of,
    wide,
    will_differentiate,
)

Gradients = tuple[Tensor | None, ...]

CHUNK, BLOCK = 64, 16
"""Tokens of a chunk and what the axes of a kept state are padded to: kChunk and kBlock of chunked.h."""


def _state(x: Tensor, cu_seqlens: Tensor | None, *shape: int) -> Tensor:
    return torch.empty((sequences_of(x, cu_seqlens), *shape), dtype=wide(x), device=x.device)


def _kept(x: Tensor, keep: bool, rows: int, columns: int) -> Tensor:
    """Return the empty states that a forward of (B, T, H, ...) keeps, in one axis."""
    batch, length, heads = x.shape[:3]
    # At least as many as there are chunks that do not begin a sequence, and never none: torch.compile would guard on
    # that, and compile again.
    slots = batch * ((length + CHUNK - 1) // CHUNK)
    padded = [(size + BLOCK - 1) // BLOCK * BLOCK for size in (rows, columns)]
    elements = slots * heads * padded[0] * padded[1] if keep else 0
    return torch.empty((elements,), dtype=wide(x), device=x.device)


def _nothing_kept(x: Tensor) -> Tensor:
    """Return what a forward of one token keeps."""
    return torch.empty((0,), dtype=wide(x), device=x.device)


def _fake_gradients(first: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Build a gradient for each input, an empty tensor for one that was not given."""
    return tuple(like_or_none(one, first) for one in inputs)


# ssd


def _fake_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, cu_seqlens, keep = rest
    final_state = _state(x, cu_seqlens, *x.shape[2:], B.shape[3])
    return like(x), final_state, _kept(x, keep, B.shape[3], x.shape[3])


def _fake_ssd_backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
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
) -> tuple[Tensor, ...]:
    return _fake_gradients(x, x, dt, A, B, C, D, z, dt_bias, initial_state)


def _save_ssd(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.dt_softplus, initial_state, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _ssd_gradient(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: None) -> Gradients:
    *tensors, initial_state, cu_seqlens, kept = ctx.saved_tensors
    found = _ssd_backward(dy, dfinal, *tensors, ctx.dt_softplus, initial_state, cu_seqlens, kept)
    *gradients, dinitial = map(given, (*tensors, initial_state), found)
    return (*gradients, None, dinitial, None, None)


def _fake_ssd_step(state: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like(x), torch.empty(state.shape, dtype=wide(x), device=x.device)


def _save_ssd_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.dt_softplus = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _ssd_step_gradient(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> Gradients:
    state, x, dt, A, B, C, D, z, dt_bias = ctx.saved_tensors
    timed = (one_token(x), one_token(dt), A, one_token(B), one_token(C), D, one_token(z), dt_bias)
    found = _ssd_backward(one_token(dy), dstate, *timed, ctx.dt_softplus, state, None, _nothing_kept(x))
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = map(given, (*timed, state), found)
    one = (dx, ddt, dB, dC, dz)
    dx, ddt, dB, dC, dz = (None if each is None else each.squeeze(1) for each in one)
    return (dinitial, dx, ddt, dA, dB, dC, dD, dz, dbias, None)


_ssd_backward = native_operator("ssd_backward", fake=_fake_ssd_backward)
_ssd = native_operator("ssd", fake=_fake_ssd, setup_context=_save_ssd, backward=_ssd_gradient)
ssd_step = native_operator("ssd_step", fake=_fake_ssd_step, setup_context=_save_ssd_step, backward=_ssd_step_gradient)


def ssd(
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
    """Serve `star_kernels.ssd`."""
    keep = will_differentiate(x, dt, A, B, C, D, z, dt_bias, initial_state)
    y, final_state, _ = _ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, keep)
    return y, final_state


# gated linear attention and the gated delta rule: `gates` are (log_decay,) and (log_decay, beta)


def _fake_memory(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, cu_seqlens, keep = rest
    final_state = _state(q, cu_seqlens, *q.shape[2:], v.shape[3])
    return like(v), final_state, _kept(q, keep, q.shape[3], v.shape[3])


def _fake_memory_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like(v), torch.empty(state.shape, dtype=wide(q), device=q.device)


def _fake_memory_backward(dout: Tensor | None, dfinal: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    *tensors, _, initial_state, _, _ = inputs
    return _fake_gradients(tensors[0], *tensors, initial_state)


def _save_memory(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, initial_state, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _save_memory_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _memory_operators(name: str) -> tuple[Any, Any]:
    """Complete an operator and its step."""
    gradient = native_operator(f"{name}_backward", fake=_fake_memory_backward)

    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None, _: None) -> Gradients:
        *tensors, initial_state, cu_seqlens, kept = ctx.saved_tensors
        found = gradient(dout, dfinal, *tensors, ctx.scale, initial_state, cu_seqlens, kept)
        *gradients, dinitial = map(given, (*tensors, initial_state), found)
        return (*gradients, None, dinitial, None, None)

    def step_backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> Gradients:
        state, *tensors = ctx.saved_tensors
        token = [one_token(one) for one in tensors]
        found = gradient(one_token(dout), dstate, *token, ctx.scale, state, None, _nothing_kept(tensors[0]))
        *gradients, dinitial = found
        return (dinitial, *(one.squeeze(1) for one in gradients), None)

    whole = native_operator(name, fake=_fake_memory, setup_context=_save_memory, backward=backward)
    step = native_operator(
        f"{name}_step", fake=_fake_memory_step, setup_context=_save_memory_step, backward=step_backward
    )
    return whole, step


_gla, _gla_step = _memory_operators("gated_linear_attention")
_delta, _delta_step = _memory_operators("gated_delta_rule")


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.gated_linear_attention`."""
    keep = will_differentiate(q, k, v, log_decay, initial_state)
    o, final_state, _ = _gla(q, k, v, log_decay, score_factor(scale, q.shape[-1]), initial_state, cu_seqlens, keep)
    return o, final_state


def gated_linear_attention_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float | None
) -> Any:
    """Serve `star_kernels.gated_linear_attention_step`."""
    return _gla_step(state, q, k, v, log_decay, score_factor(scale, q.shape[-1]))


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.gated_delta_rule`."""
    keep = will_differentiate(q, k, v, log_decay, beta, initial_state)
    o, final_state, _ = _delta(
        q, k, v, log_decay, beta, score_factor(scale, q.shape[-1]), initial_state, cu_seqlens, keep
    )
    return o, final_state


def gated_delta_rule_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float | None
) -> Any:
    """Serve `star_kernels.gated_delta_rule_step`."""
    return _delta_step(state, q, k, v, log_decay, beta, score_factor(scale, q.shape[-1]))


serve("ssd", ssd)
serve("ssd_step", ssd_step, checks=True)
serve("gated_linear_attention", gated_linear_attention)
serve("gated_linear_attention_step", gated_linear_attention_step, checks=True)
serve("gated_delta_rule", gated_delta_rule)
serve("gated_delta_rule_step", gated_delta_rule_step, checks=True)
