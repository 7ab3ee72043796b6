"""What gated linear attention and the gated delta rule share in Triton: how torch learns of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._operands import given, like, like_or_none, one_token, sequences_of, wide
from star_kernels._triton import Function, triton_operator


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    state = (sequences_of(q, rest[-1]), *q.shape[2:], v.shape[3])
    return like(v), torch.empty(state, dtype=wide(q), device=q.device)


def _fake_gradients(do: Tensor | None, dfinal: Tensor | None, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(like_or_none(one, q) for one in (q, *rest[:-2]))


def _fake_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like(v), torch.empty(state.shape, dtype=wide(q), device=q.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def memory_operators(name: str, function: Function, gradients: Function, step: Function) -> tuple[Function, Function]:
    """Make an operator with a memory from keys to values, and its step.

    Args:
        name: The operator's name.
        function: Takes q, k, v, further tensors of a token, the scale, the initial state and cu_seqlens; returns the
            output and the final state.
        gradients: Takes the gradients of those, the same tensors, the initial state, the scale and cu_seqlens; returns
            the gradients of the tensors and of the initial state.
        step: Takes the state, one token's tensors and the scale; returns the output and the new state.
    """
    differentiate = triton_operator(f"{name}_backward", gradients, fake=_fake_gradients)

    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, cu_seqlens = ctx.saved_tensors
        found = differentiate(do, dfinal, *tensors, ctx.scale, cu_seqlens)
        *own, dinitial = map(given, tensors, found)
        return *own, None, dinitial, None

    def step_backward(ctx: Any, do: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        """Take the gradient of a sequence of one token."""
        state, *tensors = ctx.saved_tensors
        timed = [one_token(one) for one in tensors]
        *own, dinitial = differentiate(one_token(do), dstate, *timed, state, ctx.scale, None)
        return dinitial, *(one.squeeze(1) for one in own), None

    return (
        triton_operator(name, function, fake=_fake, setup_context=_save, backward=backward),
        triton_operator(f"{name}_step", step, fake=_fake_step, setup_context=_save_step, backward=step_backward),
    )
