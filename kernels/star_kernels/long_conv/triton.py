"""Long causal convolutions in Triton, as blocked Toeplitz products.

A channel's tokens, cut into blocks of 64, are the columns of a matrix U (64, blocks of all rows). Its outputs are
sum_m F_m U shifted by m blocks, where F_m (64, 64) holds the taps 64 m + i - j: matrix products, whose tiles F_m are
read off the taps. A channel's tokens must lie together for that, so u = gate_in x is turned to (B, D, T) first and the
result turned back, which is T / 64 times less work than the products are.

Forward is three kernels. Backward is four: u and gate_out dy turned; both convolutions at once, of u and backwards in
time of the gradient; the gradient of the taps, G_m = dY U^T shifted by m blocks, summed along its diagonals; the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from star_kernels._operands import given, like, sequences_of, strides, wide
from star_kernels._triton import gpu_of, interpreting, launch, triton_operator
from star_kernels._triton_math import accumulator, next_power_of_2
from star_kernels.long_conv.triton_kernels import (
    add_token,
    convolutions,
    finish,
    finish_gradients,
    read_history,
    tap_gradients,
    turn,
)

_BLOCK = 64  # tokens of a block
_TILE = 32  # tokens and channels that one program turns
_STEP_TOKENS, _STEP_CHANNELS = 128, 32  # what one program of a step reads of the history
_STEP_PARTS = 2 if interpreting() else 16  # sums of such programs that the second kernel of a step loads at once


def _turned(x: Tensor, gate: Tensor | None) -> Tensor:
    """Return an empty (B, D, pitch) for gate x, in x's dtype where there is no gate; the pitch is whole blocks."""
    batch, tokens, channels = x.shape
    pitch = triton.cdiv(tokens, _BLOCK) * _BLOCK
    return torch.empty(batch, channels, pitch, dtype=x.dtype if gate is None else wide(x), device=x.device)


class _Shape:
    """The sizes of a call, and how its tokens are shared out."""

    def __init__(self, x: Tensor, filter: Tensor, cu_seqlens: Tensor | None) -> None:
        self.batch, self.tokens, self.channels = x.shape
        self.reach = min(filter.shape[1], self.tokens)
        self.sequences = sequences_of(x, cu_seqlens)
        blocks = triton.cdiv(self.tokens, _BLOCK)
        self.tiles = blocks * _BLOCK // _TILE, triton.cdiv(self.channels, _TILE)
        self.programs = self.batch * self.tiles[0] * self.tiles[1]
        self.columns = self.batch * blocks if cu_seqlens is None else blocks + self.sequences
        self.search = self.sequences.bit_length()
        gpu = gpu_of(x)
        # Tokens of a product, and columns of one for the taps' gradient: twice as many spill.
        self.step = 64 if gpu.units == "shared" else 32
        self.block_columns = min(64, next_power_of_2(self.columns, 16))
        self.tap_columns = min(self.block_columns, 16 if gpu.units == "registers" else 32)
        self.options = {"VARLEN": cu_seqlens is not None, "ACC": accumulator(x), "BLOCK": _BLOCK}
        # On tcgen05 a float32 product in two stages spills 24 bytes a thread, and in one or three nothing.
        self.stages = 3 if gpu.matrix == "tcgen05" and x.element_size() > 2 else 2
        # 16 bytes of bfloat16 for each of 128 threads.
        warps = 2 if gpu.backend == "hip" else 4
        self.tiling = {"ACC": accumulator(x), "TILE": _TILE, "num_warps": warps}


def _launch_convolutions(
    shape: _Shape, filter: Tensor, ends: Tensor | None, u: Tensor, dv: Tensor | None, convolve: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return u convolved, if asked, and dv backwards in time, if given."""
    kind: dict[str, Any] = {"dtype": wide(u), "device": u.device}
    y = torch.empty(u.shape, **kind) if convolve else None
    du = None if dv is None else torch.empty(u.shape, **kind)
    blocks = triton.cdiv(shape.columns, shape.block_columns)
    launch(
        convolutions, (blocks * shape.channels, 2 if convolve and dv is not None else 1), u, filter, y, dv, du, ends,
        shape.tokens, u.shape[2], shape.channels, shape.batch, shape.columns, blocks, shape.reach, shape.sequences,
        shape.search, *filter.stride(), CONVOLVE=convolve, TURN=dv is not None, COLUMNS=shape.block_columns,
        STEP=shape.step, num_warps=8, num_stages=shape.stages, **shape.options,
    )  # fmt: skip
    return y, du


def _long_conv(
    x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    y = like(x)
    if not x.numel():
        return y
    shape, u = _Shape(x, filter, cu_seqlens), _turned(x, gate_in)
    sizes = (shape.tokens, u.shape[2], shape.channels, *shape.tiles)
    launch(
        turn, (shape.programs,), x, gate_in, u, None, None, None, *sizes, *x.stride(), *strides(gate_in, 3),
        *(0,) * 6, **shape.tiling,
    )  # fmt: skip
    conv, _ = _launch_convolutions(shape, filter, cu_seqlens, u, None, True)
    launch(
        finish, (shape.programs,), conv, u, gate_out, skip, y, *sizes, *strides(gate_out, 3), *strides(skip, 1),
        **shape.tiling,
    )  # fmt: skip
    return y


def _long_conv_gradients(
    dy: Tensor, x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, filter, gate_in, gate_out and skip."""
    dx, dfilter, dgate_in, dgate_out, dskip = _fake_gradients(dy, x, filter, gate_in, gate_out, skip, cu_seqlens)
    if not x.numel():
        return dx, dfilter.zero_(), dgate_in, dgate_out, dskip.zero_()
    shape, u, dv = _Shape(x, filter, cu_seqlens), _turned(x, gate_in), _turned(dy, gate_out)
    sizes = (shape.tokens, u.shape[2], shape.channels, *shape.tiles)
    launch(
        turn, (shape.programs,), x, gate_in, u, dy, gate_out, dv, *sizes, *x.stride(), *strides(gate_in, 3),
        *dy.stride(), *strides(gate_out, 3), **shape.tiling,
    )  # fmt: skip
    conv, du = _launch_convolutions(shape, filter, cu_seqlens, u, dv, gate_out is not None)
    if shape.reach < filter.shape[1]:
        dfilter.zero_()
    skip_sums = torch.empty(shape.channels, dtype=wide(x), device=x.device)
    launch(
        tap_gradients, (shape.channels * triton.cdiv(shape.reach, _BLOCK),), u, dv, skip_sums, dfilter, cu_seqlens,
        shape.tokens, u.shape[2], shape.channels, shape.batch, shape.columns, shape.reach, filter.shape[1],
        shape.sequences, shape.search, COLUMNS=shape.tap_columns, num_warps=8,
        **shape.options,
    )  # fmt: skip
    launch(
        finish_gradients, (shape.programs,), conv, u, dv, du, dy, x, gate_in, skip, dx, dgate_in,
        None if gate_out is None else dgate_out, *sizes, *dy.stride(), *x.stride(), *strides(gate_in, 3),
        *strides(skip, 1), **shape.tiling,
    )  # fmt: skip
    return dx, dfilter, dgate_in, dgate_out, dskip if skip is None else skip_sums.to(skip.dtype, copy=True)


def _fake_long_conv(x: Tensor, *rest: Any) -> Tensor:
    return like(x)


def _fake_gradients(dy: Tensor, x: Tensor, *rest: Tensor | None) -> Any:
    """Return empty gradients; no elements for what was not given."""
    return tuple(
        torch.empty((0,) if one is None else one.shape, dtype=x.dtype if one is None else one.dtype, device=x.device)
        for one in (x, *rest[:-1])
    )


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _long_conv_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    found = _backward_operator(dy, *inputs)
    return *map(given, inputs[:-1], found), None


# One token.


def _long_conv_step(
    state: Tensor, x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, new_state = _fake_step(state, x, filter)
    (batch, channels), held, kept = x.shape, state.shape[1], new_state.shape[1]
    parts, blocks = triton.cdiv(held + 1, _STEP_TOKENS), triton.cdiv(channels, _STEP_CHANNELS)
    sums = torch.empty(batch, parts, channels, dtype=new_state.dtype, device=x.device)
    launch(
        read_history, (batch * parts * blocks,), state, filter, new_state, sums, channels, filter.shape[1], held,
        held + 1 - kept, kept, parts, blocks, *state.stride(), *filter.stride(), ACC=accumulator(x),
        TOKENS=_STEP_TOKENS, CHANNELS=_STEP_CHANNELS,
    )  # fmt: skip
    launch(
        add_token, (batch * blocks,), sums, x, filter, gate_in, gate_out, skip, y, new_state, channels, kept, parts,
        blocks, *x.stride(), filter.stride(0), *strides(gate_in, 2), *strides(gate_out, 2), *strides(skip, 1),
        ACC=accumulator(x), CHANNELS=_STEP_CHANNELS, PARTS=_STEP_PARTS, num_warps=1,
    )  # fmt: skip
    return y, new_state


def _fake_step(state: Tensor, x: Tensor, filter: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], min(state.shape[1] + 1, filter.shape[1] - 1), x.shape[1])
    return like(x), torch.empty(shape, dtype=wide(x), device=x.device)


def _step_gradient(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate one token in torch: nobody trains by single steps, and each product is one of vectors."""
    inputs = ctx.saved_tensors
    state, x, filter, gate_in, gate_out, skip = inputs
    acc, held = wide(x), state.shape[1]
    one = torch.ones((), dtype=acc, device=x.device)
    inward, outward, through = (one if each is None else each.to(acc) for each in (gate_in, gate_out, skip))
    u, dy = x.to(acc) * inward, dy.to(acc)
    dv = dy * outward
    history = torch.cat([state.to(acc), u.unsqueeze(1)], dim=1)
    taps = filter.to(acc)[:, : held + 1].flip(-1).t()
    dhistory = dv.unsqueeze(1) * taps
    dhistory[:, held + 1 - dstate.shape[1] :] += dstate
    du = dhistory[:, held]
    dfilter = torch.zeros(filter.shape, dtype=acc, device=x.device)
    dfilter[:, : held + 1] = (dv.unsqueeze(1) * history).sum(0).flip(0).t()
    out = (history * taps).sum(1)
    if skip is not None:
        du, out = du + dv * through, out + u * through
    gradients = (
        dhistory[:, :held], du * inward, dfilter, None if gate_in is None else du * x.to(acc),
        None if gate_out is None else dy * out, None if skip is None else (dv * u).sum(0),
    )  # fmt: skip
    return tuple(None if each is None else each.to(given.dtype) for each, given in zip(gradients, inputs, strict=True))


_backward_operator = triton_operator("long_conv_backward", _long_conv_gradients, fake=_fake_gradients)
_operator = triton_operator(
    "long_conv", _long_conv, fake=_fake_long_conv, setup_context=_save, backward=_long_conv_gradient
)
_step_operator = triton_operator(
    "long_conv_step", _long_conv_step, fake=_fake_step, setup_context=_save, backward=_step_gradient
)


def long_conv(
    x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """Serve `star_kernels.long_conv`."""
    y: Tensor = _operator(x, filter, gate_in, gate_out, skip, cu_seqlens)
    return y


def long_conv_step(
    state: Tensor, x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.long_conv_step`."""
    y, new_state = _step_operator(state, x, filter, gate_in, gate_out, skip)
    return y, new_state
