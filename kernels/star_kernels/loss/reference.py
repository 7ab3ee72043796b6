"""Linear cross entropy in plain torch, a block of rows at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from star_kernels._numerics import accumulator, apply

BLOCK_ELEMENTS = 2**20
"""Logits held at once: 4 MB in float32."""

LEAST_BLOCKS = 16
"""Blocks that a batch too large for one is cut into at least, which holds the peak at 1/16 of all logits."""


class _Settings(NamedTuple):
    ignore_index: int
    label_smoothing: float
    softcap: float | None


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses (R,) of rows (R, D) against weight (V, D); logits are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        acc = accumulator(hidden.dtype)
        wide_weight = weight.to(acc)
        losses = torch.zeros(hidden.shape[0], dtype=acc, device=hidden.device)
        for rows in _blocks(hidden.shape[0], weight.shape[0]):
            logits, _ = _logits(hidden[rows].to(acc), wide_weight, bias, settings.softcap)
            losses[rows] = _losses(logits, targets[rows], settings)[0]
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings = settings
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias, targets = ctx.saved_tensors
        dhidden, dweight, dbias = _gradients(ctx, hidden, weight, bias, targets, dlosses)
        return _cast(dhidden, hidden), _cast(dweight, weight), _cast(dbias, bias), None, None


class _ReducedLinearCrossEntropy(torch.autograd.Function):
    """The sum of all losses times `factor`; gradients are computed with the loss, from the same logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: _Settings,
        factor: Tensor,
    ) -> Tensor:
        ctx.settings = settings
        losses = torch.zeros(hidden.shape[0], dtype=factor.dtype, device=hidden.device)
        spread = factor.expand(hidden.shape[0])
        # Kept in the accumulation dtype: a loss scale that comes with dloss is there to save small float16 gradients.
        ctx.save_for_backward(*_gradients(ctx, hidden, weight, bias, targets, spread, losses), hidden, weight, bias)
        return losses.sum() * factor

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under torch.utils.checkpoint a second look is an error
        gradients, inputs = saved[:3], saved[3:]
        scaled = (None if one is None else one * dloss for one in gradients)
        return (*(_cast(one, like) for one, like in zip(scaled, inputs, strict=True)), None, None, None)


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
) -> Tensor:
    """Define `star_kernels.linear_cross_entropy`."""
    settings = _Settings(ignore_index, label_smoothing, softcap)
    rows, labels = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.reshape(-1)
    if reduction == "none":
        losses: Tensor = apply(_LinearCrossEntropy, rows, weight, bias, labels, settings)
        return losses.view(targets.shape)
    acc = accumulator(hidden.dtype)
    factor = torch.ones((), dtype=acc, device=hidden.device)
    if reduction == "mean":
        factor = factor / (labels != ignore_index).sum()
    wants_gradient = any(one is not None and one.requires_grad for one in (hidden, weight, bias))
    if wants_gradient and torch.is_grad_enabled():
        loss: Tensor = apply(_ReducedLinearCrossEntropy, rows, weight, bias, labels, settings, factor)
        return loss
    losses = apply(_LinearCrossEntropy, rows, weight, bias, labels, settings)
    return losses.sum() * factor


def _blocks(rows: int, vocabulary: int) -> list[slice]:
    if vocabulary == 0:
        return []  # every row is ignored: no target is below 0
    size = max(1, BLOCK_ELEMENTS // vocabulary)
    if size < rows:
        size = max(1, min(max(size, 128), rows // LEAST_BLOCKS))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return the logits, capped, and the cap's tanh."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits += bias.to(logits.dtype)
    if softcap is None:
        return logits, None
    bounded = logits.div_(softcap).tanh_()
    return bounded * softcap, bounded


def _losses(logits: Tensor, targets: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Return each row's loss, zero where ignored, and its sum of exponentials, which replace the logits in place."""
    ignored = targets == settings.ignore_index
    smoothing = settings.label_smoothing
    shifted = logits.sub_(logits.amax(-1, keepdim=True))
    target = (1 - smoothing) * shifted.gather(1, _picked(targets, ignored)).squeeze(1)
    if smoothing:
        target += smoothing * shifted.mean(-1)
    total = shifted.exp_().sum(-1)
    return (total.log() - target).masked_fill(ignored, 0.0), total


def _picked(targets: Tensor, ignored: Tensor) -> Tensor:
    """Return the targets as a column of indices, 0 where ignored."""
    return targets.masked_fill(ignored, 0).long().unsqueeze(1)


def _gradients(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dlosses: Tensor,
    losses: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the needed gradients of hidden, weight and bias in the accumulation dtype; fills `losses` if given."""
    acc = accumulator(hidden.dtype)
    settings: _Settings = ctx.settings
    wide_weight = weight.to(acc)
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dhidden = torch.zeros_like(hidden, dtype=acc) if needs_hidden else None
    dweight = torch.zeros_like(wide_weight) if needs_weight else None
    dbias = torch.zeros(weight.shape[0], dtype=acc, device=hidden.device) if needs_bias else None
    for rows in _blocks(hidden.shape[0], weight.shape[0]):
        block = hidden[rows].to(acc)
        logits, bounded = _logits(block, wide_weight, bias, settings.softcap)
        block_losses, total = _losses(logits, targets[rows], settings)
        if losses is not None:
            losses[rows] = block_losses
        dlogits = _logit_gradients(logits, total, targets[rows], dlosses[rows].to(acc), settings)
        if bounded is not None:
            dlogits.mul_(1 - bounded * bounded)
        if dhidden is not None:
            torch.matmul(dlogits, wide_weight, out=dhidden[rows])
        if dweight is not None:
            dweight.addmm_(dlogits.t(), block)
        if dbias is not None:
            dbias += dlogits.sum(0)
    return dhidden, dweight, dbias


def _logit_gradients(
    exponentials: Tensor, total: Tensor, targets: Tensor, dlosses: Tensor, settings: _Settings
) -> Tensor:
    """Turn exponentials into dL/dlogits in place: (softmax - smoothed one-hot) times the row's gradient."""
    ignored = targets == settings.ignore_index
    smoothing = settings.label_smoothing
    # Filled, not multiplied by zero: the factor of a mean over no row is infinite.
    slope = dlosses.masked_fill(ignored, 0.0).unsqueeze(1)
    dlogits = exponentials.mul_(slope / total.unsqueeze(1))
    if smoothing:
        dlogits.sub_(slope * (smoothing / dlogits.shape[1]))
    return dlogits.scatter_add_(1, _picked(targets, ignored), slope * (smoothing - 1))
