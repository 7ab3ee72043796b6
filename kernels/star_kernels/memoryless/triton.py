"""Gated memoryless units and channel mixing in Triton.

A gated unit is one kernel forward and one backward, which recomputes the activation. Diagonal mixing is one kernel each
way too; grouped and dense mixing are matrix products, which the vendor's library does best.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from star_kernels._operands import like, wide
from star_kernels._triton import launch, triton_operator
from star_kernels._triton_math import accumulator, next_power_of_2, rows, silu, silu_slope

_BLOCK = 2048  # elements of a program: 16 bytes of bfloat16 for each of AMD's 256 threads
_ROWS_OF_SUM = 64  # rows that one program of a weight gradient adds up


@triton.jit
def _activate(x, KIND: tl.constexpr):
    if KIND == "silu":
        return silu(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return tl.where(x <= 0.0, 0.0, x)  # NaN passes


@triton.jit
def _slope(x, KIND: tl.constexpr):
    if KIND == "silu":
        return silu_slope(x)
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + tl.where(density == 0.0, 0.0, x * density)
    else:
        return tl.where(x <= 0.0, 0.0, 1.0)


@triton.jit
def _position(width, blocks, BLOCK: tl.constexpr):
    """Return this program's row and columns, and which of the columns exist."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < width


@triton.jit
def _unit_forward(
    gate, up, y, width, blocks, gate_row, gate_column, up_row, up_column,
    KIND: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = _position(width, blocks, BLOCK)
    g = tl.load(gate + row * gate_row + column * gate_column, mask=inside, other=0.0).to(ACC)
    u = tl.load(up + row * up_row + column * up_column, mask=inside, other=0.0).to(ACC)
    tl.store(y + row * width + column, _activate(g, KIND) * u, mask=inside)


@triton.jit
def _unit_backward(
    dy, gate, up, dgate, dup, width, blocks, dy_row, dy_column, gate_row, gate_column, up_row, up_column,
    KIND: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = _position(width, blocks, BLOCK)
    d = tl.load(dy + row * dy_row + column * dy_column, mask=inside, other=0.0).to(ACC)
    g = tl.load(gate + row * gate_row + column * gate_column, mask=inside, other=0.0).to(ACC)
    u = tl.load(up + row * up_row + column * up_column, mask=inside, other=0.0).to(ACC)
    tl.store(dgate + row * width + column, d * u * _slope(g, KIND), mask=inside)
    tl.store(dup + row * width + column, d * _activate(g, KIND), mask=inside)


def _flat(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors as (rows, D): as one row where all lie without gaps."""
    if all(one.is_contiguous() for one in tensors):
        return [one.view(1, -1) for one in tensors]
    return [rows(one) for one in tensors]


def _gated_unit(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    y = like(gate)
    if gate.numel():
        g, u = _flat(gate, up)
        blocks = triton.cdiv(g.shape[1], _BLOCK)
        launch(
            _unit_forward, (g.shape[0] * blocks,), g, u, y, g.shape[1], blocks, *g.stride(), *u.stride(),
            KIND=kind, ACC=accumulator(gate), BLOCK=_BLOCK,
        )  # fmt: skip
    return y


def _gated_unit_backward(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    dgate, dup = (like(gate) for _ in range(2))
    if gate.numel():
        d, g, u = _flat(dy, gate, up)
        blocks = triton.cdiv(g.shape[1], _BLOCK)
        launch(
            _unit_backward, (g.shape[0] * blocks,), d, g, u, dgate, dup, g.shape[1], blocks,
            *d.stride(), *g.stride(), *u.stride(), KIND=kind, ACC=accumulator(gate), BLOCK=_BLOCK,
        )  # fmt: skip
    return dgate, dup


def _fake_unit(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return like(gate)


def _fake_unit_backward(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return _fake_unit(gate, up, kind), _fake_unit(gate, up, kind)


def _save_unit(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _unit_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_unit_backward_operator(dy, *ctx.saved_tensors, ctx.kind), None


_unit_backward_operator = triton_operator("gated_unit_backward", _gated_unit_backward, fake=_fake_unit_backward)
_unit = triton_operator("gated_unit", _gated_unit, fake=_fake_unit, setup_context=_save_unit, backward=_unit_gradient)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Serve `star_kernels.swiglu`."""
    y: Tensor = _unit(gate, up, "silu")
    return y


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Serve `star_kernels.geglu`."""
    y: Tensor = _unit(gate, up, "gelu")
    return y


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """Serve `star_kernels.reglu`."""
    y: Tensor = _unit(gate, up, "relu")
    return y


# Diagonal mixing.


@triton.jit
def _scale_forward(
    x, weight, y, width, blocks, x_row, x_column, weight_step, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column, inside = _position(width, blocks, BLOCK)
    v = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(ACC)
    w = tl.load(weight + column * weight_step, mask=inside, other=0.0).to(ACC)
    tl.store(y + row * width + column, v * w, mask=inside)


@triton.jit
def _scale_backward(
    dy, x, weight, dx, sums, count, width, blocks, dy_row, dy_column, x_row, x_column, weight_step,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of a block of columns, and their part of the weight's gradient."""
    chunk, column, inside = _position(width, blocks, BLOCK)
    w = tl.load(weight + column * weight_step, mask=inside, other=0.0).to(ACC)
    total = tl.zeros([BLOCK], ACC)
    for row in range(chunk * ROWS, tl.minimum((chunk + 1) * ROWS, count)):
        d = tl.load(dy + row * dy_row + column * dy_column, mask=inside, other=0.0).to(ACC)
        v = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(ACC)
        tl.store(dx + row * width + column, d * w, mask=inside)
        total += d * v
    tl.store(sums + chunk * width + column, total, mask=inside)


def _scale(x: Tensor, weight: Tensor) -> Tensor:
    y = like(x)
    if x.numel():
        v = rows(x)
        block = min(_BLOCK, next_power_of_2(v.shape[1], 16))
        blocks = triton.cdiv(v.shape[1], block)
        launch(
            _scale_forward, (v.shape[0] * blocks,), v, weight, y, v.shape[1], blocks, *v.stride(), weight.stride(0),
            ACC=accumulator(x), BLOCK=block, num_warps=max(1, block // 512),
        )  # fmt: skip
    return y


def _scale_gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dx = like(x)
    if not x.numel():
        return dx, torch.zeros(weight.shape, dtype=weight.dtype, device=x.device)
    d, v = rows(dy), rows(x)
    count, width = v.shape
    block = min(_BLOCK, next_power_of_2(width, 16))
    chunks, blocks = triton.cdiv(count, _ROWS_OF_SUM), triton.cdiv(width, block)
    sums = torch.empty(chunks, width, dtype=wide(x), device=x.device)
    launch(
        _scale_backward, (chunks * blocks,), d, v, weight, dx, sums, count, width, blocks,
        *d.stride(), *v.stride(), weight.stride(0), ACC=accumulator(x), ROWS=_ROWS_OF_SUM, BLOCK=block,
        num_warps=max(1, block // 512),
    )  # fmt: skip
    return dx, sums.sum(0).to(weight.dtype)


def _fake_scale(x: Tensor, weight: Tensor) -> Tensor:
    return like(x)


def _fake_scale_gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_scale(x, weight), torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _save_scale(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _scale_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = _scale_backward_operator(dy, *ctx.saved_tensors)
    return dx, dweight


_scale_backward_operator = triton_operator("scale_backward", _scale_gradients, fake=_fake_scale_gradients)
_scale_operator = triton_operator(
    "scale", _scale, fake=_fake_scale, setup_context=_save_scale, backward=_scale_gradient
)


def channel_mix(x: Tensor, weight: Tensor) -> Tensor:
    """Serve `star_kernels.channel_mix`."""
    if weight.ndim == 1:
        scaled: Tensor = _scale_operator(x, weight)
        return scaled
    with torch.autocast(x.device.type, enabled=False):
        common = torch.promote_types(x.dtype, weight.dtype)
        x_wide, weight = x.to(common), weight.to(common)
        if weight.ndim == 2:
            return functional.linear(x_wide, weight).to(x.dtype)
        groups, width = weight.shape[:2]
        grouped = x_wide.reshape(math.prod(x.shape[:-1]), groups, width).transpose(0, 1)
        return torch.bmm(grouped, weight.transpose(1, 2)).transpose(0, 1).reshape(x.shape).to(x.dtype)
