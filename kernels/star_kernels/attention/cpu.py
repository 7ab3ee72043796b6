"""The compiled attention: fakes and gradients for the operators of the cpu_*.cpp files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._native import native_operator, serve
from star_kernels._operands import like, score_factor, wide

Gradients = tuple[Tensor | None, ...]


def _fake_forward(q: Tensor, v: Tensor, maps: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    o = q.new_empty(batch, tokens, heads, v.shape[3])
    stats = q.new_empty(maps, 2, batch, heads, tokens, dtype=wide(q))
    return o, stats, q.new_empty(kept, *o.shape, dtype=wide(q))


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(q, v, 1, int(q.dtype == torch.bfloat16))


def _fake_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return like(q), like(k), like(v), q.new_empty(0, dtype=wide(q)) if sinks is None else like(sinks)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sinks, ends_q, ends_k, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sinks, ends_q, ends_k, *output)


def _attention_gradient(ctx: Any, do: Tensor | None, *_: Any) -> Gradients:
    if do is None:
        return (None,) * 10
    dq, dk, dv, dsinks = _attention_backward(do, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, dsinks if ctx.needs_input_grad[3] else None, *(None,) * 6


def _fake_differential(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(q1, v, 2, 2)


def _fake_differential_backward(do: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(like(one) for one in inputs[:6])


def _save_differential(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = inputs[8:]
    ctx.save_for_backward(*inputs[:8], *output[1:])


def _differential_gradient(ctx: Any, do: Tensor | None, *_: Any) -> Gradients:
    if do is None:
        return (None,) * 11
    return *_differential_backward(do, *ctx.saved_tensors, *ctx.options), *(None,) * 5


def _fake_step(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[3])


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _step_gradient(ctx: Any, do: Tensor) -> Gradients:
    dq, dk, dv, dsinks = _step_backward(do, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, dsinks if ctx.needs_input_grad[3] else None, *(None,) * 5


_attention_backward = native_operator("attention_backward", fake=_fake_attention_backward)
_attention = native_operator(
    "attention", fake=_fake_attention, setup_context=_save_attention, backward=_attention_gradient
)
_differential_backward = native_operator("differential_attention_backward", fake=_fake_differential_backward)
_differential = native_operator(
    "differential_attention", fake=_fake_differential, setup_context=_save_differential, backward=_differential_gradient
)
_step_backward = native_operator("attention_step_backward", fake=_fake_attention_backward)
_step = native_operator("attention_step", fake=_fake_step, setup_context=_save_step, backward=_step_gradient)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Serve `star_kernels.attention`."""
    factor = score_factor(scale, q.shape[3])
    o: Tensor = _attention(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, causal, window or 0, factor, softcap or 0.0)[0]
    return o


def differential_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Serve `star_kernels.differential_attention`."""
    factor = score_factor(scale, q1.shape[3])
    o: Tensor = _differential(q1, k1, q2, k2, v, lam, cu_seqlens_q, cu_seqlens_k, causal, window or 0, factor)[0]
    return o


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: int | Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Serve `star_kernels.attention_step`, whose check finds the words for what is refused here."""
    if isinstance(length, Tensor):
        lengths, held = length, -1
    elif length is None or length >= 0:
        lengths, held = None, -1 if length is None else length
    else:
        raise ValueError("length needs to be at least 0")
    if (window is not None and window < 1) or (softcap is not None and not softcap > 0):
        raise ValueError("window or softcap is out of its range")
    if sinks is not None and sinks.ndim != 1:
        raise ValueError("sinks needs one axis")
    o: Tensor = _step(q, k, v, sinks, lengths, held, window or 0, score_factor(scale, q.shape[2]), softcap or 0.0)
    return o


serve("attention", attention)
serve("differential_attention", differential_attention)
serve("attention_step", attention_step, checks=True)
