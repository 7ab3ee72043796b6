"""Softmax attention in Triton: one kernel forward and two backward, for one map or both of differential attention.

Where gradients may be wanted, a 16-bit call keeps its output in float32 beside the rounded one: the backward subtracts
dO.O from dP. It then also makes that output from weights of twice the digits, so the last bits of what a call returns
may differ between `torch.no_grad` and without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._operands import like, score_factor, wide
from star_kernels._triton import triton_operator
from star_kernels.attention.triton_problem import Problem, run_backward, run_forward
from star_kernels.attention.triton_step import attend_newest

Gradients = tuple[Tensor | None, ...]


def _ends(ends_q: Tensor | None, ends_k: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if ends_q is None or ends_k is None else (ends_q.contiguous(), ends_k.contiguous())


def _sinks_gradient(pull: Tensor, sinks: Tensor) -> Tensor:
    return pull.sum((0, 2)).to(sinks.dtype)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ends_q: Tensor | None,
    ends_k: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem((q,), (k,), v, _ends(ends_q, ends_k), None, causal, window, scale, softcap)
    o, stats, kept = run_forward(problem, None, sinks, keep)
    return o, stats, kept


def _attention_gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ends_q: Tensor | None,
    ends_k: Tensor | None,
    o: Tensor,
    stats: Tensor,
    kept: Tensor,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem((q,), (k,), v, _ends(ends_q, ends_k), None, causal, window, scale, softcap)
    exact = kept[0] if kept.shape[0] else o
    (dq,), (dk,), dv, _, pull = run_backward(problem, do, None, sinks, exact, stats)
    return dq, dk, dv, pull if sinks is None else _sinks_gradient(pull, sinks)


def _differential(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    ends_q: Tensor | None,
    ends_k: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem((q1, q2), (k1, k2), v, _ends(ends_q, ends_k), None, causal, window, scale, 0.0)
    o, stats, kept = run_forward(problem, lam, None, keep)
    return o, stats, kept


def _differential_gradients(
    do: Tensor,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    ends_q: Tensor | None,
    ends_k: Tensor | None,
    stats: Tensor,
    kept: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem((q1, q2), (k1, k2), v, _ends(ends_q, ends_k), None, causal, window, scale, 0.0)
    if not kept.shape[0]:
        _, stats, kept = run_forward(problem, lam, None, True)
    (dq1, dq2), (dk1, dk2), dv, delta, _ = run_backward(problem, do, lam, None, kept, stats)
    dlam = -(delta[1].sum((0, 2)) if lam.ndim else delta[1].sum())
    return dq1, dk1, dq2, dk2, dv, dlam.to(lam.dtype)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    lengths: Tensor | None,
    held: int,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    return attend_newest(q, k, v, sinks, lengths, held, window, scale, softcap)


def _step_gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    lengths: Tensor | None,
    held: int,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients as of `attention` with one query a row, which makes its rows' sums again."""
    if lengths is None:
        lengths = torch.full(q.shape[:1], held, dtype=torch.int32, device=q.device)
    problem = Problem((q.unsqueeze(1),), (k,), v, None, lengths.contiguous(), True, window, scale, softcap)
    o, stats, kept = run_forward(problem, None, sinks, q.element_size() == 2)
    exact = kept[0] if kept.shape[0] else o
    (dq,), (dk,), dv, _, pull = run_backward(problem, do.unsqueeze(1), None, sinks, exact, stats)
    return dq.squeeze(1), dk, dv, pull if sinks is None else _sinks_gradient(pull, sinks)


# What torch needs to know of them.


def _fake_forward(q: Tensor, v: Tensor, maps: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    o = q.new_empty(batch, queries, heads, v.shape[3])
    stats = q.new_empty(maps, 2, batch, heads, queries, dtype=wide(q))
    return o, stats, q.new_empty(kept, *o.shape, dtype=wide(q))


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(q, v, 1, int(options[-1]))


def _fake_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return like(q), like(k), like(v), q.new_empty(0, dtype=wide(q)) if sinks is None else like(sinks)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, causal, window, scale, softcap, _ = inputs
    ctx.options = causal, window, scale, softcap
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _attention_gradient(ctx: Any, do: Tensor | None, *_: Any) -> Gradients:
    if do is None:
        return (None,) * 11
    dq, dk, dv, dsinks = _attention_backward(do, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, dsinks if ctx.needs_input_grad[3] else None, *(None,) * 7


def _fake_differential(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(q1, v, 2, 2 * options[-1])


def _fake_differential_gradients(do: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(like(one) for one in inputs[:6])


def _save_differential(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, causal, window, scale, _ = inputs
    ctx.options = causal, window, scale
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _differential_gradient(ctx: Any, do: Tensor | None, *_: Any) -> Gradients:
    if do is None:
        return (None,) * 12
    return *_differential_backward(do, *ctx.saved_tensors, *ctx.options), *(None,) * 6


def _fake_step(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[3])


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _step_gradient(ctx: Any, do: Tensor) -> Gradients:
    dq, dk, dv, dsinks = _step_backward(do, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, dsinks if ctx.needs_input_grad[3] else None, *(None,) * 5


_attention_backward = triton_operator("attention_backward", _attention_gradients, fake=_fake_gradients)
_attention_forward = triton_operator(
    "attention", _attention, fake=_fake_attention, setup_context=_save_attention, backward=_attention_gradient
)
_differential_backward = triton_operator(
    "differential_attention_backward", _differential_gradients, fake=_fake_differential_gradients
)
_differential_forward = triton_operator(
    "differential_attention", _differential, fake=_fake_differential, setup_context=_save_differential,
    backward=_differential_gradient,
)  # fmt: skip
_step_backward = triton_operator("attention_step_backward", _step_gradients, fake=_fake_gradients)
_step_forward = triton_operator(
    "attention_step", _step, fake=_fake_step, setup_context=_save_step, backward=_step_gradient
)


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
    keep = torch.is_grad_enabled() and q.element_size() == 2
    options = causal, window or 0, score_factor(scale, q.shape[3]), softcap or 0.0, keep
    o: Tensor = _attention_forward(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, *options)[0]
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
    options = causal, window or 0, score_factor(scale, q1.shape[3]), torch.is_grad_enabled()
    o: Tensor = _differential_forward(q1, k1, q2, k2, v, lam, cu_seqlens_q, cu_seqlens_k, *options)[0]
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
    """Serve `star_kernels.attention_step`."""
    lengths = length if isinstance(length, Tensor) else None
    held = length if isinstance(length, int) else k.shape[1]
    o: Tensor = _step_forward(
        q, k, v, sinks, lengths, held, window or 0, score_factor(scale, q.shape[2]), softcap or 0.0
    )
    return o
