"""The compiled linear cross entropy: fakes and gradients for the operators of cpu.cpp.

The mean and the sum compute their gradients together with the loss, from the same logits, and scale them in the
backward; separate losses ("none") compute the logits again there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._native import native_operator, serve
from star_kernels._operands import wide

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _fake_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    softcap: float,
) -> Tensor:
    return torch.empty(() if reduction else targets.shape, dtype=wide(hidden), device=hidden.device)


def _fake_gradients(
    dloss: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    softcap: float,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def gradient(of: Tensor, wanted: bool) -> Tensor:
        return torch.empty(of.shape if wanted else (0,), dtype=of.dtype, device=hidden.device)

    loss = _fake_loss(hidden, weight, targets, bias, ignore_index, reduction, label_smoothing, softcap)
    dbias = gradient(weight if bias is None else bias, wants_bias and bias is not None)
    return loss, gradient(hidden, wants_hidden), gradient(weight, wants_weight), dbias


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, targets, bias, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, targets, bias)


def _gradient(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    _, dhidden, dweight, dbias = _gradients(dloss, hidden, weight, targets, bias, *ctx.settings, *wanted)
    found = (one if want else None for one, want in zip((dhidden, dweight, dbias), wanted, strict=True))
    dhidden, dweight, dbias = found
    return dhidden, dweight, None, dbias, None, None, None, None


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    ctx.settings = inputs[5:]
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        ctx.held, ctx.pure = None, True
        ctx.save_for_backward(*gradients)
    else:
        ctx.held, ctx.pure = gradients, False
        ctx.save_for_backward(*inputs[1:5])


def _scale_gradients(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Give the gradients away, scaled where they lie: a copy of dweight would be the peak of the whole call.

    A second backward through the same graph makes them again.
    """
    found: list[Tensor | None] = [None, None, None]
    wanted = ctx.settings[-3:]
    if dloss is not None:
        if ctx.pure:
            gradients = [one * dloss if want else one for one, want in zip(ctx.saved_tensors, wanted, strict=True)]
        else:
            gradients, ctx.held = ctx.held, None
            if gradients is None:
                _, *gradients = _gradients(None, *ctx.saved_tensors, *ctx.settings)
            if dloss.item() != 1:  # `loss.backward()` sends 1: reading that number saves a pass over dweight
                gradients = [one.mul_(dloss) for one in gradients]
        found = [one if want else None for one, want in zip(gradients, wanted, strict=True)]
    dhidden, dweight, dbias = found
    return None, dhidden, dweight, None, dbias, None, None, None, None, None, None, None


_loss = native_operator("linear_cross_entropy", fake=_fake_loss, setup_context=_save_inputs, backward=_gradient)
_gradients = native_operator(
    "linear_cross_entropy_gradients", fake=_fake_gradients, setup_context=_save_gradients, backward=_scale_gradients
)


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
) -> Tensor:
    settings = (ignore_index, _REDUCTIONS[reduction], label_smoothing, softcap or 0.0)
    if reduction != "none" and torch.is_grad_enabled():
        wanted = hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
        if any(wanted):
            loss: Tensor = _gradients(None, hidden, weight, targets, bias, *settings, *wanted)[0]
            return loss
    losses: Tensor = _loss(hidden, weight, targets, bias, *settings)
    return losses


serve("linear_cross_entropy", _linear_cross_entropy)
