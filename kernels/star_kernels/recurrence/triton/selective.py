"""The selective scan in Triton: one kernel forward, one backward, one for a step.

A program is one warp with a tile of states, channels by state size, in registers; it runs through a sequence token
after token, and loads some tokens ahead. The forward keeps the states before every 64th token; the backward takes
those chunks from the last to the first, runs through each again and leaves the state before every second token in a
buffer that the cache holds, then takes two tokens at a time in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from star_kernels._operands import (
    either,
    given,
    like,
    like_or_none,
    one_token,
    sequences_of,
    strides,
    wide,
    will_differentiate,
)
from star_kernels._triton import interpreting, launch, triton_operator
from star_kernels._triton_math import accumulator, next_power_of_2
from star_kernels.recurrence.triton.chunks import CHUNK, layout
from star_kernels.recurrence.triton.selective_kernels import selective_backward, selective_forward, selective_step

_AHEAD = 4 if interpreting() else 8  # tokens that the forward loads at once
_GROUP = 4 if interpreting() else 2  # tokens that the backward holds at once; four spill
_STATES = 512  # states of a program forward: 16 for each thread
_STATES_BACKWARD = 256  # twice as many spill

Tensors = tuple[Tensor, ...]


def _tile(A: Tensor, B: Tensor, states: int) -> tuple[int, int, int, int]:
    """Return a program's channels and state size, a group's channels, and the blocks of a group."""
    width, size = A.shape
    block_n = next_power_of_2(size, 2)
    per_group = width // B.shape[-2]
    block = min(next_power_of_2(per_group, 2), max(2, states // block_n))
    return block, block_n, per_group, triton.cdiv(per_group, block)


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, final, kept = _fake_scan(x, dt, A, B, C, D, z, bias, dt_softplus, state, cu_seqlens, keep)
    sequences, chunks, _ = layout(x, cu_seqlens)
    width, size = A.shape
    block, block_n, per_group, parts = _tile(A, B, _STATES)
    blocks = parts * B.shape[2]
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    launch(
        selective_forward, (sequences * blocks,),
        x, dt, A, B, C, either(D, x), either(z, x), either(bias, x), either(state, x),
        either(ends, x), y, final, kept, x.shape[1], chunks, width, size, per_group, parts, blocks, *x.stride(),
        *dt.stride(), *A.stride(), *B.stride(), *C.stride(), *strides(D, 1), *strides(z, 3), *strides(bias, 1),
        *strides(state, 3), SOFTPLUS=dt_softplus, SKIP=D is not None, GATED=z is not None, BIAS=bias is not None,
        STATE=state is not None, KEEP=keep, VARLEN=ends is not None, ACC=accumulator(x), PADDED=block_n != size,
        SPAN=CHUNK, AHEAD=_AHEAD, BLOCK=block, BLOCK_N=block_n, num_warps=1,
    )  # fmt: skip
    return y, final, kept


def _scan_gradients(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
) -> list[Tensor]:
    """Return the gradients at x, dt, A, B, C, D, z, bias and state; no elements where there is none."""
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = gradients = _fake_gradients(
        dy, dfinal, x, dt, A, B, C, D, z, bias, dt_softplus, state, cu_seqlens, kept
    )
    sequences, chunks, _ = layout(x, cu_seqlens)
    width, size = A.shape
    block, block_n, per_group, parts = _tile(A, B, _STATES_BACKWARD)
    blocks = parts * B.shape[2]
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=wide(x), device=x.device)

    buffer = empty(sequences * blocks * (CHUNK // _GROUP) * block * block_n)
    sums_A, sums_D, sums_bias = empty(sequences, width, size), empty(sequences, width), empty(sequences, width)
    sums_B, sums_C = empty(parts, *B.shape), empty(parts, *B.shape)
    into_state = empty(sequences, width, size) if state is None else dstate
    launch(
        selective_backward, (sequences * blocks,),
        either(dy, x), either(dfinal, x), x, dt, A, B, C, either(D, x), either(z, x),
        either(bias, x), either(ends, x), kept, buffer, dx, ddt, sums_A, sums_B, sums_C, sums_D, dz, sums_bias,
        into_state, x.shape[1], chunks, width, size, per_group, parts, blocks, x.shape[0] * x.shape[1], *strides(dy, 3),
        *strides(dfinal, 3), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), *strides(D, 1),
        *strides(z, 3), *strides(bias, 1), SOFTPLUS=dt_softplus, SKIP=D is not None, GATED=z is not None,
        BIAS=bias is not None, OUTPUT=dy is not None, FINAL=dfinal is not None, VARLEN=ends is not None,
        ACC=accumulator(x), PADDED=block_n != size, SPAN=CHUNK, GROUP=_GROUP, BLOCK=block, BLOCK_N=block_n,
        num_warps=1,
    )  # fmt: skip
    summed = ((dA, sums_A), (dB, sums_B), (dC, sums_C), (dD, sums_D), (dbias, sums_bias))
    for gradient, sums in summed:
        if gradient.shape == sums.shape[1:]:
            gradient.copy_(sums.sum(0))
    return gradients


def _one_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    y, new = _fake_step(state, x, dt, A, B, C, D, z, bias, dt_softplus)
    width, size = A.shape
    block, block_n, per_group, parts = _tile(A, B, _STATES)
    blocks = parts * B.shape[1]
    launch(
        selective_step, (x.shape[0] * blocks,),
        state, x, dt, A, B, C, either(D, x), either(z, x), either(bias, x), y, new, width, size,
        per_group, parts, blocks, *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(),
        *strides(D, 1), *strides(z, 2), *strides(bias, 1), SOFTPLUS=dt_softplus, SKIP=D is not None,
        GATED=z is not None, BIAS=bias is not None, ACC=accumulator(x), PADDED=block_n != size, BLOCK=block,
        BLOCK_N=block_n, num_warps=1,
    )  # fmt: skip
    return y, new


def _fake_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = sequences_of(x, cu_seqlens)
    chunks = (x.shape[1] + CHUNK - 1) // CHUNK
    slots = x.shape[0] * chunks if cu_seqlens is None else chunks + sequences
    # One axis for all: with an axis of slots, torch.compile would guard on there being more than one.
    kept = slots * A.shape[0] * A.shape[1] if keep else 0
    final = torch.empty((sequences, *A.shape), dtype=wide(x), device=x.device)
    return like(x), final, torch.empty(kept, dtype=wide(x), device=x.device)


def _fake_gradients(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
) -> list[Tensor]:
    return [like_or_none(one, x) for one in (x, dt, A, B, C, D, z, bias, state)]


def _fake_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    return like(x), torch.empty(state.shape, dtype=wide(x), device=x.device)


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.dt_softplus, state, cu_seqlens, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, state, cu_seqlens, output[2])


def _scan_gradient(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, state, cu_seqlens, kept = ctx.saved_tensors
    found = _backward_operator(dy, dfinal, *tensors, ctx.dt_softplus, state, cu_seqlens, kept)
    *own, dstate = map(given, (*tensors, state), found)
    return *own, None, dstate, None, None


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.dt_softplus = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _step_gradient(ctx: Any, dy: Tensor | None, dnew: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate a step as a sequence of one token; the state is the one kept before it."""
    state, x, dt, A, B, C, D, z, bias = ctx.saved_tensors
    kept = state.to(wide(x)).contiguous().view(-1)
    timed = (one_token(x), one_token(dt), A, one_token(B), one_token(C), D, one_token(z), bias)
    found = _backward_operator(one_token(dy), dnew, *timed, ctx.dt_softplus, state, None, kept)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = map(given, (*timed, state), found)
    dx, ddt, dB, dC, dz = (None if one is None else one.squeeze(1) for one in (dx, ddt, dB, dC, dz))
    return dstate, dx, ddt, dA, dB, dC, dD, dz, dbias, None


_backward_operator = triton_operator("selective_scan_backward", _scan_gradients, fake=_fake_gradients)
_scan_operator = triton_operator(
    "selective_scan", _scan, fake=_fake_scan, setup_context=_save_scan, backward=_scan_gradient
)
selective_scan_step = triton_operator(
    "selective_scan_step", _one_step, fake=_fake_step, setup_context=_save_step, backward=_step_gradient
)


def selective_scan(
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
    """Serve `star_kernels.selective_scan`."""
    tensors = (x, dt, A, B, C, D, z, dt_bias)
    keep = will_differentiate(*tensors, initial_state)
    y, final, _ = _scan_operator(*tensors, dt_softplus, initial_state, cu_seqlens, keep)
    return y, final
