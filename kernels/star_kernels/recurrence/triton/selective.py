"""The selective scan in Triton: in parallel over chunks of tokens, whatever the batch, so that no row's bits change.

Forward: each chunk's end from no state, and the sum of its step sizes, which is all that its decays come to; a scan
over chunks, which leaves each one's start; the outputs. Backward the same from the end. A program of these is a warp
with a tile of states, channels by state size, in registers: it runs through a chunk token after token, and loads two
tokens at once. The last kernel backward runs through a chunk from its start again, leaves the state before every second
token in a buffer, then takes two tokens at a time from the end. Up to one chunk, the last kernels serve alone.

One pass over all tokens would start width / 64 warps for a row, where an H100 takes thousands, but read less: for 64
tokens of a channel with 16 states in bfloat16, 512 bytes against 1,024 here (x and dt a second time: 256; states
written, turned into starts and read: 256). And it would take half the exponentials, which bind by count: of 32 here an
H100's multiprocessor does 16 a clock, in which it reads 14 bytes. A choice between the two could not know the batch.
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
from star_kernels._triton import gpu_of, interpreting, launch, triton_operator
from star_kernels._triton_math import accumulator, next_power_of_2
from star_kernels.recurrence.triton.selective_gradient_kernels import selective_backward, selective_pulls
from star_kernels.recurrence.triton.selective_kernels import (
    selective_carry,
    selective_ends,
    selective_forward,
    selective_step,
)

_SPAN = 8 if interpreting() else 64  # tokens of a chunk
_CARRY_AHEAD = 2 if interpreting() else 8  # chunks that the scan over chunks loads at once
_CARRY_BLOCK = 64  # channels of its programs
_GROUP = 2  # tokens that the backward holds at once; four spill
_STATES = 1024  # states of a program forward: 32 for each thread
_STATES_BACKWARD = 256  # states of a warp backward; twice as many spill
_STATES_STEP = 256  # fewer: a step starts few programs

# The backward's buffer is a program's own, and so their number is bounded: 8 for each of a B200's 148 multiprocessors,
# which is what 255 registers a thread let one hold, or of an MI300X's 304. Which program takes an item changes no bit.
_PROGRAMS = {"cuda": 8 * 148, "hip": 8 * 304}

Tensors = tuple[Tensor, ...]


def _tile(A: Tensor, B: Tensor, states: int) -> tuple[int, int, int, int]:
    """Return a program's channels and state size, a group's channels, and the blocks of a group."""
    width, size = A.shape
    block_n = next_power_of_2(size, 2)
    per_group = width // B.shape[-2]
    block = min(next_power_of_2(per_group, 2), max(2, states // block_n))
    return block, block_n, per_group, triton.cdiv(per_group, block)


def _warps(A: Tensor) -> int:
    """Return the warps of a program backward: one for every 16 states of a channel, 8 at most."""
    return max(1, min(next_power_of_2(A.shape[1]), 128) // 16)


def _ahead(A: Tensor) -> int:
    """Return the tokens that a program forward loads at once: more spill."""
    return 2 if A.shape[1] <= 32 else 1


def _slots(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Return how many sequences there are, the chunks of an unpacked one, and the slots of all.

    An empty sequence has a chunk too: its state has to pass.
    """
    chunks = max(1, (x.shape[1] + _SPAN - 1) // _SPAN)
    sequences = sequences_of(x, cu_seqlens)
    if cu_seqlens is None:
        return sequences, chunks, sequences * chunks
    return sequences, chunks, x.shape[1] // _SPAN + sequences if sequences else 0


def _half(width: int) -> int:
    """Return half the length of a row of channels in a chunk's states: odd."""
    return (width + 1) // 2 | 1


def _rows(A: Tensor, x: Tensor) -> Tensor:
    """Return A as the states of a chunk lie, (states, channels)."""
    rows = torch.empty((A.shape[1], 2 * _half(A.shape[0])), dtype=wide(x), device=x.device)
    rows[:, : A.shape[0]] = A.T
    return rows


def _carry(
    first: Tensor | None, x: Tensor, rows: Tensor, width: int, ends: Tensor | None, states: Tensor, sums: Tensor,
    last: Tensor, backward: bool,
) -> None:  # fmt: skip
    """Turn what chunks end with alone into what they begin with, in place, from `first` to `last`."""
    sequences, chunks, _ = _slots(x, ends)
    size = rows.shape[0]
    block = min(next_power_of_2(width, 32), _CARRY_BLOCK)
    blocks = triton.cdiv(width, block)
    launch(
        selective_carry, (sequences * size * blocks,),
        either(first, x), rows, either(ends, x), states, sums, last, x.shape[1], chunks, width, size, _half(width),
        blocks, *strides(first, 3), FIRST=first is not None, VARLEN=ends is not None, REVERSED=backward,
        ACC=accumulator(x), SPAN=_SPAN, AHEAD=_CARRY_AHEAD, BLOCK=block, num_warps=1,
        repeatable=False,
    )  # fmt: skip


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
    sequences, chunks, slots = _slots(x, cu_seqlens)
    width, size = A.shape
    block, block_n, per_group, parts = _tile(A, B, _STATES)
    blocks, half, carried = parts * B.shape[2], _half(width), x.shape[1] > _SPAN
    rows = _rows(A, x)
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    shape = x.shape[1], chunks, sequences, width, size, half, per_group, parts, blocks
    both = {"SOFTPLUS": dt_softplus, "BIAS": bias is not None, "VARLEN": ends is not None, "ACC": accumulator(x)}
    tile: dict[str, Any] = {"SPAN": _SPAN, "AHEAD": _ahead(A), "BLOCK": block, "BLOCK_N": block_n, "num_warps": 1}
    states = kept
    if carried:
        if not keep:
            states = kept.new_empty(slots * size * 2 * half)
        sums = kept.new_empty(slots * width)
        launch(
            selective_ends, (slots * blocks,),
            x, dt, rows, B, either(bias, x), either(ends, x), states, sums, *shape, *x.stride(), *dt.stride(),
            *B.stride(), *strides(bias, 1), **both, **tile,
        )  # fmt: skip
        _carry(state, x, rows, width, ends, states, sums, final, False)
    launch(
        selective_forward, (slots * blocks,),
        x, dt, rows, B, C, either(D, x), either(z, x), either(bias, x), either(state, x),
        either(ends, x), y, final, states, *shape, *x.stride(), *dt.stride(), *B.stride(), *C.stride(),
        *strides(D, 1), *strides(z, 3), *strides(bias, 1), *strides(state, 3), **both, SKIP=D is not None,
        GATED=z is not None, STATE=state is not None, KEEP=keep, CARRIED=carried, PADDED=block_n != size, **tile,
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
    sequences, chunks, slots = _slots(x, cu_seqlens)
    width, size = A.shape
    half, carried = _half(width), x.shape[1] > _SPAN
    rows = _rows(A, x)
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    both = {
        "SOFTPLUS": dt_softplus, "BIAS": bias is not None, "VARLEN": ends is not None, "ACC": accumulator(x),
        "GATED": z is not None, "OUTPUT": dy is not None, "SPAN": _SPAN,
    }  # fmt: skip

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=wide(x), device=x.device)

    sums_A = empty(slots, size, 2 * half)
    pulls = torch.empty_like(sums_A) if carried else sums_A
    into_state = empty(sequences, width, size) if state is None else dstate
    if carried:
        block, block_n, per_group, parts = _tile(A, B, _STATES)
        blocks = parts * B.shape[2]
        sums = empty(slots, width)
        launch(
            selective_pulls, (slots * blocks,),
            either(dy, x), dt, rows, C, either(z, x), either(bias, x), either(ends, x), pulls, sums, x.shape[1], chunks,
            sequences, width, size, half, per_group, parts, blocks, *strides(dy, 3), *dt.stride(),
            *C.stride(), *strides(z, 3), *strides(bias, 1), **both, AHEAD=_ahead(A), BLOCK=block, BLOCK_N=block_n,
            num_warps=1,
        )  # fmt: skip
        _carry(dfinal, x, rows, width, ends, pulls, sums, into_state, True)
    warps = _warps(A)
    block, block_n, per_group, parts = _tile(A, B, _STATES_BACKWARD * warps)
    blocks = parts * B.shape[2]
    items = slots * blocks
    programs = min(items, 3 if interpreting() else _PROGRAMS[gpu_of(x).backend] // warps)
    buffer = empty(programs * (_SPAN // _GROUP) * (block + 2) * block_n)
    sums_D, sums_bias = empty(slots, width), empty(slots, width)
    sums_B, sums_C = empty(parts, *B.shape), empty(parts, *B.shape)
    launch(
        selective_backward, (programs,),
        either(dy, x), either(dfinal, x), x, dt, rows, B, C, either(D, x), either(z, x),
        either(bias, x), either(ends, x), kept, pulls, buffer, dx, ddt, sums_A, sums_B, sums_C, sums_D, dz, sums_bias,
        into_state, x.shape[1], chunks, sequences, width, size, half, per_group, parts, blocks, items,
        x.shape[0] * x.shape[1], *strides(dy, 3), *strides(dfinal, 3), *x.stride(), *dt.stride(),
        *B.stride(), *C.stride(), *strides(D, 1), *strides(z, 3), *strides(bias, 1), **both, SKIP=D is not None,
        FINAL=dfinal is not None, CARRIED=carried, PADDED=block_n != size, GROUP=_GROUP, BLOCK=block, BLOCK_N=block_n,
        num_warps=warps,
    )  # fmt: skip
    dA.copy_(sums_A[:, :, :width].sum(0).T)
    for gradient, sums in ((dB, sums_B), (dC, sums_C), (dD, sums_D), (dbias, sums_bias)):
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
    block, block_n, per_group, parts = _tile(A, B, _STATES_STEP)
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
    sequences, _, slots = _slots(x, cu_seqlens)
    # One axis for all: with an axis of slots, torch.compile would guard on there being more than one.
    kept = slots * A.shape[1] * 2 * _half(A.shape[0]) if keep else 0
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
    kept = torch.empty((*state.shape[::2], 2 * _half(state.shape[1])), dtype=wide(x), device=x.device)
    kept[:, :, : state.shape[1]] = state.transpose(1, 2)
    timed = (one_token(x), one_token(dt), A, one_token(B), one_token(C), D, one_token(z), bias)
    found = _backward_operator(one_token(dy), dnew, *timed, ctx.dt_softplus, state, None, kept.view(-1))
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
