"""RMS normalisation and rotary positions in Triton: one kernel forward and one backward."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._operands import like, wide
from star_kernels._triton import launch, triton_operator
from star_kernels._triton_math import accumulator, next_power_of_2, rows

_WIDEST = 8192  # columns that one program holds at once; wider rows are read in pieces, and once more for the gradient
_TILE = 2048  # elements that a program holds of narrow rows
_ROWS_OF_SUM = 64  # rows that one program of the weight's gradient adds up


@triton.jit
def _norm_forward(
    x, residual, weight, y, total, scale, count, width, x_row, x_column, residual_row, residual_column, weight_step,
    eps, ADD: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = t r w with t = x (+ residual, as it is rounded to be stored) and r = (mean(t^2) + eps)^(-1/2)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    squares = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < count) & (column < width)
        t = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(ACC)
        if ADD:
            t += tl.load(residual + row * residual_row + column * residual_column, mask=inside, other=0.0).to(ACC)
            stored = t.to(total.dtype.element_ty)
            tl.store(total + row * width + column, stored, mask=inside)
            t = stored.to(ACC)
        squares += t * t
    r = 1.0 / tl.sqrt(tl.sum(squares, 1, keep_dims=True) / width + eps)
    tl.store(scale + row, r, mask=row < count)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < count) & (column < width)
        if ADD:
            t = tl.load(total + row * width + column, mask=inside, other=0.0).to(ACC)
        else:
            t = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(ACC)
        w = tl.load(weight + column * weight_step, mask=column < width, other=0.0).to(ACC)
        tl.store(y + row * width + column, t * r * w, mask=inside)


@triton.jit
def _norm_backward(
    dy, dtotal, x, weight, scale, dx, sums, count, width, dy_row, dy_column, dtotal_row, dtotal_column, x_row, x_column,
    weight_step, EXTRA: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = r w dy - x r^3 mean(w dy x) (+ dtotal), for GROUPS times ROWS rows; their part of the weight's gradient."""
    program = tl.program_id(0).to(tl.int64)
    dweight = tl.zeros([ROWS, BLOCK], ACC)
    for group in range(GROUPS):
        row = (program * GROUPS + group) * ROWS + tl.arange(0, ROWS)[:, None]
        r = tl.load(scale + row, mask=row < count, other=0.0)
        products = tl.zeros([ROWS, BLOCK], ACC)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = (row < count) & (column < width)
            d = tl.load(dy + row * dy_row + column * dy_column, mask=inside, other=0.0).to(ACC)
            t = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(ACC)
            w = tl.load(weight + column * weight_step, mask=column < width, other=0.0).to(ACC)
            products += d * w * t
            if SUM:
                dweight += d * t * r
        pull = tl.sum(products, 1, keep_dims=True) / width * r * r
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = (row < count) & (column < width)
            d = tl.load(dy + row * dy_row + column * dy_column, mask=inside, other=0.0).to(ACC)
            t = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(ACC)
            w = tl.load(weight + column * weight_step, mask=column < width, other=0.0).to(ACC)
            gradient = (d * w - t * pull) * r
            if EXTRA:
                gradient += tl.load(dtotal + row * dtotal_row + column * dtotal_column, mask=inside, other=0.0).to(ACC)
            tl.store(dx + row * width + column, gradient, mask=inside)
    if SUM:
        column = tl.arange(0, BLOCK)
        tl.store(sums + program * width + column, tl.sum(dweight, 0), mask=column < width)


@triton.jit
def _norm_weight(
    dy, x, scale, sums, count, width, blocks, dy_row, dy_column, x_row, x_column,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight's gradient alone, of ROWS rows and BLOCK columns, for rows too wide to hold."""
    program = tl.program_id(0).to(tl.int64)
    chunk = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dweight = tl.zeros([BLOCK], ACC)
    for row in range(chunk * ROWS, tl.minimum((chunk + 1) * ROWS, count)):
        d = tl.load(dy + row * dy_row + column * dy_column, mask=inside, other=0.0).to(ACC)
        t = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(ACC)
        dweight += d * t * tl.load(scale + row)
    tl.store(sums + chunk * width + column, dweight, mask=inside)


def _tile(width: int) -> tuple[int, int]:
    """Return how many rows and columns a program holds."""
    block = min(_WIDEST, next_power_of_2(width, 16))
    return max(1, min(16, _TILE // block)), block


def _warps(tile: int) -> int:
    return max(1, min(16, tile // 512))


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the sum (no elements without a residual) and one factor a row."""
    y = like(x)
    kept = x if residual is None else residual
    total = torch.empty((0,) if residual is None else x.shape, dtype=kept.dtype, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=wide(x), device=x.device)
    if x.numel():
        v, other = rows(x), rows(kept)
        count, width = v.shape
        tile, block = _tile(width)
        launch(
            _norm_forward, (triton.cdiv(count, tile),), v, other, weight, y, total, scale, count, width,
            *v.stride(), *other.stride(), weight.stride(0), eps,
            ADD=residual is not None, ACC=accumulator(x), ROWS=tile, BLOCK=block, num_warps=_warps(tile * block),
        )  # fmt: skip
    return y, total, scale


def _norm_gradients(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients at the normalised tensor and at the weight."""
    dx = like(x)
    if not x.numel():
        return dx, torch.zeros(weight.shape, dtype=weight.dtype, device=x.device)
    d, v = rows(dy), rows(x)
    extra = d if dtotal is None else rows(dtotal)
    count, width = v.shape
    tile, block = _tile(width)
    held = width <= block
    groups = max(1, _ROWS_OF_SUM // tile) if held else 1
    programs = triton.cdiv(count, tile * groups)
    sums = torch.empty(
        programs if held else triton.cdiv(count, _ROWS_OF_SUM), width, dtype=scale.dtype, device=x.device
    )
    launch(
        _norm_backward, (programs,), d, extra, v, weight, scale, dx, sums, count, width, *d.stride(), *extra.stride(),
        *v.stride(), weight.stride(0), EXTRA=dtotal is not None, SUM=held, ACC=accumulator(x), ROWS=tile,
        GROUPS=groups, BLOCK=block, num_warps=_warps(tile * block),
    )  # fmt: skip
    if not held:
        blocks = triton.cdiv(width, _TILE)
        launch(
            _norm_weight, (sums.shape[0] * blocks,), d, v, scale, sums, count, width, blocks, *d.stride(), *v.stride(),
            ACC=accumulator(x), ROWS=_ROWS_OF_SUM, BLOCK=_TILE,
        )  # fmt: skip
    return dx, sums.sum(0).to(weight.dtype)


def _fake_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    kept = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    y = like(x)
    return y, kept, torch.empty(x.shape[:-1], dtype=wide(x), device=x.device)


def _fake_gradients(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    dx = like(x)
    return dx, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.x_dtype = None if residual is None else x.dtype
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])


def _norm_gradient(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    t, weight, scale = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(t)
    dt, dweight = _backward(dy, None if ctx.x_dtype is None else dtotal, t, weight, scale)
    if ctx.x_dtype is None:
        return dt, None, dweight, None
    return dt.to(ctx.x_dtype), dt, dweight, None


_backward = triton_operator("rms_norm_backward", _norm_gradients, fake=_fake_gradients)
_forward = triton_operator("rms_norm", _norm, fake=_fake_norm, setup_context=_save_norm, backward=_norm_gradient)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Serve `star_kernels.rms_norm`."""
    y: Tensor = _forward(x, None, weight, eps)[0]
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.add_rms_norm`."""
    y, total, _ = _forward(x, residual, weight, eps)
    return y, total


# Rotary positions.


@triton.jit
def _rotate(
    x, positions, frequencies, y, tokens, heads, half, x_batch, x_token, x_head, x_channel, position_batch,
    position_token, SIGN: tl.constexpr, INTERLEAVED: tl.constexpr, ACC: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """One program: all heads of a token. Pairs are (i, i + half), or (2 i, 2 i + 1) if interleaved."""
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tokens, program % tokens
    pair = tl.arange(0, HALF)[None, :]
    position = tl.load(positions + batch * position_batch + token * position_token).to(ACC)
    angle = position * tl.load(frequencies + pair, mask=pair < half, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle) * SIGN
    first = 2 * pair if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else first + half
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)[:, None]).to(tl.int64)
        inside = (head < heads) & (pair < half)
        source = x + batch * x_batch + token * x_token + head * x_head
        a = tl.load(source + first * x_channel, mask=inside, other=0.0).to(ACC)
        b = tl.load(source + second * x_channel, mask=inside, other=0.0).to(ACC)
        target = y + (program * heads + head) * (2 * half)
        tl.store(target + first, a * cos - b * sin, mask=inside)
        tl.store(target + second, b * cos + a * sin, mask=inside)


@lru_cache(maxsize=64)
def _frequencies(half: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    exponents = torch.arange(half, dtype=torch.float64) / max(half, 1)
    return torch.pow(base, -exponents).to(device, dtype)


def _rotated(x: Tensor, positions: Tensor, base: float, interleaved: bool, sign: float) -> Tensor:
    batch, tokens, heads, width = x.shape
    y = like(x)
    half = width // 2
    block = next_power_of_2(half, 16)
    group = max(1, min(16, _TILE // block))
    at = (0, positions.stride(0)) if positions.ndim == 1 else positions.stride()
    if x.numel():
        frequencies = _frequencies(half, base, wide(x), x.device)
        launch(
            _rotate, (batch * tokens,), x, positions, frequencies, y, tokens, heads, half, *x.stride(), *at,
            SIGN=sign, INTERLEAVED=interleaved, ACC=accumulator(x), HEADS=group, HALF=block,
            num_warps=_warps(group * block),
        )  # fmt: skip
    return y


def _fake_rotated(x: Tensor, positions: Tensor, base: float, interleaved: bool, sign: float) -> Tensor:
    return like(x)


def _save_rotated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, *ctx.options = inputs
    ctx.save_for_backward(positions)


def _rotated_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Rotate back."""
    base, interleaved, sign = ctx.options
    return _rotated_operator(dy, *ctx.saved_tensors, base, interleaved, -sign), None, None, None, None


_rotated_operator = triton_operator(
    "rotary", _rotated, fake=_fake_rotated, setup_context=_save_rotated, backward=_rotated_gradient
)


def rotary(x: Tensor, positions: Tensor, base: float, interleaved: bool) -> Tensor:
    """Serve `star_kernels.rotary`."""
    y: Tensor = _rotated_operator(x, positions, base, interleaved, 1.0)
    return y
