"""Linear cross entropy in Triton: products by the vendor's library, a block of rows at a time, and one kernel a block.

The kernel reads a row of logits twice: for the loss, and for the gradient that it writes in the dtype of the products
that follow. The mean and the sum make their gradients with the loss, from the same logits; separate losses ("none")
make the logits again in the backward.

Source: Hsu et al., "Liger Kernel", 2024, arXiv 2410.10989, section 3.2. Differs from it in: logits are float32 whatever
the inputs' dtype; rows that are ignored are not read; float16 gradients are lifted above that dtype's smallest number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._operands import wide
from star_kernels._triton import launch, triton_operator
from star_kernels._triton_math import accumulator, next_power_of_2, tanh

_HELD = 2**20  # logits that are held at once whatever their share of all
_MOST_HELD = 2**27  # 512 MB in float32
_LEAST_BLOCKS = 12  # float32 logits and 16-bit gradients of 1/12 of the rows are 1/8 of all logits
_LIFT = 2.0**14  # of float16 gradients: at most 1 each before, so at most a quarter of what float16 holds
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@triton.jit
def _logit(pointer, bias, inside, softcap, BIAS: tl.constexpr, CAP: tl.constexpr):
    """Return logits with their bias, capped, -inf outside; and the cap's slope."""
    x = tl.load(pointer, mask=inside, other=float("-inf"))
    if BIAS:
        x += tl.load(bias, mask=inside, other=0.0).to(x.dtype)
    slope = 1.0
    if CAP:
        t = tanh(x / softcap)
        slope = 1.0 - t * t
        x = tl.where(inside, softcap * t, float("-inf"))
    return x, slope


@triton.jit(do_not_specialize=["count", "ignore_index"])
def _rows(
    logits, bias, targets, slopes, losses, dlogits, count, vocabulary, targets_step, slopes_step, bias_step,
    ignore_index, smoothing, share, softcap, factor,
    BIAS: tl.constexpr, CAP: tl.constexpr, SMOOTH: tl.constexpr, SLOPES: tl.constexpr, LOSS: tl.constexpr,
    GRADIENT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS losses, and their logits' gradients: `factor` times `slopes` times that of the loss."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    target = tl.load(targets + row * targets_step, mask=row < count, other=0).to(tl.int64)
    live = (row < count) & (target != ignore_index)
    own = logits + row * vocabulary
    o_v = tl.arange(0, BLOCK)[None, :]
    top = tl.full([ROWS, 1], float("-inf"), ACC)
    sums = tl.zeros([ROWS, BLOCK], ACC)
    total = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(0, vocabulary, BLOCK):
        column = start + o_v
        inside = live & (column < vocabulary)
        x, _ = _logit(own + column, bias + column * bias_step, inside, softcap, BIAS, CAP)
        new = tl.maximum(top, tl.max(x, 1, keep_dims=True))
        shift = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(top - shift) + tl.exp(x - shift)
        if SMOOTH:
            total += tl.where(inside, x, 0.0)
        top = new
    shift = tl.where(top == float("-inf"), 0.0, top)
    log_sum = tl.log(tl.sum(sums, 1, keep_dims=True))
    if LOSS:
        here = live & (target >= 0) & (target < vocabulary)
        picked, _ = _logit(own + target, bias + target * bias_step, here, softcap, BIAS, CAP)
        # The maximum goes first: a common offset of the logits leaves no rounding in the loss.
        loss = (shift - tl.where(here, picked, float("nan"))) + log_sum
        if SMOOTH:
            mean = tl.sum(total, 1, keep_dims=True) / vocabulary
            loss = (1.0 - smoothing) * loss + smoothing * ((shift - mean) + log_sum)
        tl.store(losses + row, tl.where(live, loss, 0.0), mask=row < count)
    if GRADIENT:
        slope = tl.zeros([ROWS, 1], ACC) + factor
        if SLOPES:
            slope *= tl.load(slopes + row * slopes_step, mask=live, other=0.0).to(ACC)
        for start in range(0, vocabulary, BLOCK):
            column = start + o_v
            inside = live & (column < vocabulary)
            x, bend = _logit(own + column, bias + column * bias_step, inside, softcap, BIAS, CAP)
            d = tl.exp((x - shift) - log_sum) - share - (column == target).to(ACC) * (1.0 - smoothing)
            d = tl.where(live, d * bend * slope, 0.0)
            place = dlogits + row * vocabulary + column
            tl.store(place, d.to(dlogits.dtype.element_ty), mask=(row < count) & (column < vocabulary))


@dataclass(frozen=True)
class _Problem:
    """One call: hidden (R, D), weight (V, D), targets (R,), bias (V,) or None; softcap 0 for none."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    ignore_index: int
    smoothing: float
    softcap: float

    @property
    def acc(self) -> torch.dtype:
        return wide(self.hidden)

    @property
    def narrow(self) -> torch.dtype:
        """The dtype of the products' operands: the inputs' own where they agree."""
        return torch.promote_types(self.hidden.dtype, self.weight.dtype)

    def blocks(self) -> list[slice]:
        rows, vocabulary = self.hidden.shape[0], max(self.weight.shape[0], 1)
        size = max(_HELD // vocabulary, min(rows // _LEAST_BLOCKS, _MOST_HELD // vocabulary), 1)
        size = size // 64 * 64 or size
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def logits(self, rows: slice, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return a block's hidden rows, zeros where they are ignored, and its products with `weight`."""
        ignored = self.targets[rows] == self.ignore_index
        hidden = self.hidden[rows].to(self.narrow).masked_fill(ignored.unsqueeze(1), 0.0)
        return hidden, _product(hidden, weight.t(), self.acc)

    def run(
        self, logits: Tensor, rows: slice, losses: Tensor | None, slopes: Tensor | None, gradient: Tensor | None,
        factor: float,
    ) -> None:  # fmt: skip
        """Start the kernel for a block's logits."""
        count, vocabulary = logits.shape
        targets, bias = self.targets[rows], self.bias
        own_slopes = None if slopes is None else slopes[rows]
        block = min(4096, next_power_of_2(vocabulary, 16))
        tile = min(64, 4096 // block)
        launch(
            _rows, (triton.cdiv(count, tile) if vocabulary else 0,), logits, logits if bias is None else bias, targets,
            own_slopes, None if losses is None else losses[rows], gradient, count, vocabulary, targets.stride(0),
            0 if own_slopes is None else own_slopes.stride(0), 0 if bias is None else bias.stride(0),
            self.ignore_index, self.smoothing, self.smoothing / max(vocabulary, 1), self.softcap or 1.0, factor,
            BIAS=bias is not None, CAP=self.softcap > 0, SMOOTH=self.smoothing > 0, SLOPES=slopes is not None,
            LOSS=losses is not None, GRADIENT=gradient is not None, ACC=accumulator(logits), ROWS=tile, BLOCK=block,
            num_warps=max(1, min(16, tile * block // 512)), repeatable=gradient is not logits,
        )  # fmt: skip


def _product(a: Tensor, b: Tensor, acc: torch.dtype, add_to: Tensor | None = None) -> Tensor:
    """Return a b (+ add_to), summed and returned in `acc`, from operands of 16 bits too."""
    if a.dtype == acc:
        return torch.mm(a, b) if add_to is None else add_to.addmm_(a, b)
    if not a.is_cuda:  # torch has no such product there; only tests come here
        return _product(a.to(acc), b.to(acc), acc, add_to)
    if add_to is None:
        return torch.mm(a, b, out_dtype=acc)
    return torch.addmm(add_to, a, b, out_dtype=acc)


def _flat(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.reshape(targets.numel(), hidden.shape[-1]), targets.reshape(-1)


def _losses(problem: _Problem) -> Tensor:
    """Return the loss of each row."""
    losses = torch.zeros(problem.hidden.shape[0], dtype=problem.acc, device=problem.hidden.device)
    weight = problem.weight.to(problem.narrow)
    for rows in problem.blocks():
        problem.run(problem.logits(rows, weight)[1], rows, losses, None, None, 1.0)
    return losses


def _gradients(
    problem: _Problem, slopes: Tensor | None, losses: Tensor | None, wanted: tuple[bool, bool, bool]
) -> list[Tensor]:
    """Return the gradients of hidden, weight and bias in the sums' dtype, and fill `losses` if given.

    `slopes` are each row's gradient; None for 1. A gradient that is not wanted has no elements.
    """
    hidden, acc, device = problem.hidden, problem.acc, problem.hidden.device
    weight = problem.weight.to(problem.narrow)
    top = None
    factor = 1.0
    if problem.narrow == torch.float16:
        factor = _LIFT
        if slopes is not None:
            largest = slopes.abs().amax() if slopes.numel() else slopes.new_ones(())
            top = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
            slopes = slopes / top
    dhidden = torch.empty(hidden.shape if wanted[0] else (0,), dtype=acc, device=device)
    dweight = torch.zeros(weight.shape if wanted[1] else (0,), dtype=acc, device=device)
    dbias = torch.zeros(weight.shape[:1] if wanted[2] else (0,), dtype=acc, device=device)
    for rows in problem.blocks():
        own, logits = problem.logits(rows, weight)
        dlogits = logits if problem.narrow == acc else torch.empty_like(logits, dtype=problem.narrow)
        problem.run(logits, rows, losses, slopes, dlogits, factor)
        if wanted[0]:
            dhidden[rows] = _product(dlogits, weight, acc)
        if wanted[1]:
            dweight = _product(dlogits.t(), own, acc, dweight)
        if wanted[2]:
            dbias += dlogits.sum(0, dtype=acc)
    found = [dhidden, dweight, dbias]
    if factor != 1.0:
        found = [one / factor if top is None else one * (top / factor) for one in found]
    return found


def _mean_factor(problem: _Problem) -> Tensor:
    return 1.0 / (problem.targets != problem.ignore_index).sum().to(problem.acc)


def _reduce(problem: _Problem, losses: Tensor, reduction: int, shape: torch.Size) -> Tensor:
    if reduction == _REDUCTIONS["none"]:
        return losses.view(shape)
    return losses.sum() * _mean_factor(problem) if reduction == _REDUCTIONS["mean"] else losses.sum()


def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    softcap: float,
) -> Tensor:
    problem = _Problem(*_arranged(hidden, weight, targets, bias), ignore_index, label_smoothing, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        return _reduce(problem, _losses(problem), reduction, targets.shape)


def _arranged(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rows, labels = _flat(hidden, targets)
    return rows, weight, labels, bias


def _kept(x: Tensor) -> torch.dtype:
    """The dtype that a gradient waits in for the loss's own: a scale that comes with it saves small float16 numbers."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _loss_and_gradients(
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
    problem = _Problem(*_arranged(hidden, weight, targets, bias), ignore_index, label_smoothing, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        losses = torch.zeros(problem.hidden.shape[0], dtype=problem.acc, device=hidden.device)
        dhidden, dweight, dbias = _gradients(problem, None, losses, (wants_hidden, wants_weight, wants_bias))
        if reduction == _REDUCTIONS["mean"]:
            factor = _mean_factor(problem)
            factor = torch.where(factor.isinf(), 0.0, factor)  # no row at all: gradients of zero
            dhidden, dweight, dbias = dhidden * factor, dweight * factor, dbias * factor
        loss = _reduce(problem, losses, reduction, targets.shape)
    if wants_hidden:
        dhidden = dhidden.view(hidden.shape)
    like_bias = weight if bias is None else bias
    return loss, dhidden.to(_kept(hidden)), dweight.to(_kept(weight)), dbias.to(_kept(like_bias))


def _separate_gradients(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _Problem(*_arranged(hidden, weight, targets, bias), ignore_index, label_smoothing, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        slopes = dlosses.reshape(-1).masked_fill(problem.targets == ignore_index, 0.0)
        dhidden, dweight, dbias = _gradients(problem, slopes, None, (wants_hidden, wants_weight, wants_bias))
    if wants_hidden:
        dhidden = dhidden.view(hidden.shape)
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype if bias is None else bias.dtype)


# What torch needs to know of them.


def _fake_loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return torch.empty(() if options[1] else targets.shape, dtype=wide(hidden), device=hidden.device)


def _fake_gradient(of: Tensor, wanted: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty(of.shape if wanted else (0,), dtype=dtype, device=of.device)


def _fake_loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like_bias = weight.new_empty(weight.shape[:1]) if bias is None else bias
    return (
        _fake_loss(hidden, weight, targets, bias, *options),
        _fake_gradient(hidden, options[-3], _kept(hidden)),
        _fake_gradient(weight, options[-2], _kept(weight)),
        _fake_gradient(like_bias, options[-1], _kept(like_bias)),
    )


def _fake_separate_gradients(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    like_bias = weight.new_empty(weight.shape[:1]) if bias is None else bias
    return (
        _fake_gradient(hidden, options[-3], hidden.dtype),
        _fake_gradient(weight, options[-2], weight.dtype),
        _fake_gradient(like_bias, options[-1], like_bias.dtype),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, targets, bias, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, targets, bias)


def _gradient(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias = ctx.saved_tensors
    ignore_index, reduction, smoothing, softcap = ctx.settings
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]
    if reduction == _REDUCTIONS["mean"]:
        dloss = dloss / (targets != ignore_index).sum()
    slopes = dloss.expand(targets.shape)
    found = _separate_operator(slopes, hidden, weight, targets, bias, ignore_index, smoothing, softcap, *wanted)
    dhidden, dweight, dbias = (one if want else None for one, want in zip(found, wanted, strict=True))
    return dhidden, dweight, None, dbias, None, None, None, None


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, bias, *_ = inputs
    _, *gradients = output
    ctx.wanted = inputs[-3:]
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


def _scale_gradients(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None, None, None]
    if dloss is not None:
        for index, (gradient, want) in enumerate(zip(ctx.saved_tensors, ctx.wanted, strict=True)):
            if want:
                found[index] = (gradient * dloss).to(ctx.dtypes[index])
    dhidden, dweight, dbias = found
    return dhidden, dweight, None, dbias, *(None,) * 7


_separate_operator = triton_operator(
    "linear_cross_entropy_backward", _separate_gradients, fake=_fake_separate_gradients
)
_loss_operator = triton_operator(
    "linear_cross_entropy", _loss, fake=_fake_loss, setup_context=_save_inputs, backward=_gradient
)
_gradients_operator = triton_operator(
    "linear_cross_entropy_gradients", _loss_and_gradients, fake=_fake_loss_and_gradients,
    setup_context=_save_gradients, backward=_scale_gradients,
)  # fmt: skip


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
    """Serve `star_kernels.linear_cross_entropy`."""
    settings = (ignore_index, _REDUCTIONS[reduction], label_smoothing, softcap or 0.0)
    if reduction != "none" and torch.is_grad_enabled():
        wanted = hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
        if any(wanted):
            loss: Tensor = _gradients_operator(hidden, weight, targets, bias, *settings, *wanted)[0]
            return loss
    losses: Tensor = _loss_operator(hidden, weight, targets, bias, *settings)
    return losses
