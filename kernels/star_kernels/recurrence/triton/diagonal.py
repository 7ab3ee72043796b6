"""The diagonal scan and the RG-LRU in Triton: one kernel forward, one backward, one for a step.

A program runs through a sequence with a block of channels, SEGMENTS times TOKENS tokens at a time. Each of its rows is
a segment of consecutive tokens in registers: what a segment makes of a state is the pair (product of its decays, its
own end), an associative scan over the segments gives each one its start, and then it runs token after token. Inputs
are read once, the sequence is worked on in parallel whatever the batch, and nothing is divided by. A product of decays,
over up to 126 tokens, has to stay below 3.4e38 where the state is not 0, as it does for decays up to 2: beyond that a
small state is infinite too early, and a decay of 0 behind it makes NaN of it.
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
from star_kernels.recurrence.triton.diagonal_kernels import diagonal_backward, diagonal_forward, diagonal_step

_SEGMENTS, _TOKENS = (4, 4) if interpreting() else (64, 2)
_BLOCK = 16  # channels of a program: 32 bytes of bfloat16 from each token, what a GPU reads at least

Tensors = tuple[Tensor, ...]


def _tile(first: Tensor, segments: int, most: int) -> tuple[int, int, int]:
    """Return a program's channels, how many blocks of them there are, and its warps: 16 bytes of a row to a thread."""
    width = first.shape[2]
    block = min(next_power_of_2(width, 8), most)
    return block, triton.cdiv(width, block), max(1, segments * block * first.element_size() // (16 * _lanes(first)))


def _lanes(x: Tensor) -> int:
    """Return the threads of a warp."""
    return 64 if gpu_of(x).backend == "hip" else 32


def _scan(
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    log_lambda: Tensor | None,
    c: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan (decay, x) or, with the third, (x, recurrence gate, input gate); the states before each span if asked."""
    h, final, kept = _fake_scan(first, second, third, log_lambda, c, state, cu_seqlens, keep)
    length, width = first.shape[1:]
    block, blocks, warps = _tile(first, _SEGMENTS, _BLOCK)
    launch(
        diagonal_forward, (sequences_of(first, cu_seqlens) * blocks,),
        first, second, either(third, first), either(log_lambda, first),
        either(state, first), either(cu_seqlens, first), h, final, kept, c, length,
        triton.cdiv(length, _SEGMENTS * _TOKENS), width, blocks, *first.stride(), *second.stride(), *strides(third, 3),
        *strides(log_lambda, 1), *strides(state, 2), *strides(cu_seqlens, 1), LRU=third is not None,
        STATE=state is not None, KEEP=keep, PACKED=cu_seqlens is not None, ACC=accumulator(first), SEGMENTS=_SEGMENTS,
        TOKENS=_TOKENS, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return h, final, kept


def _scan_gradients(
    dh: Tensor | None,
    dfinal: Tensor | None,
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    log_lambda: Tensor | None,
    c: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at the inputs, log_lambda and the state; no elements where there is none."""
    dfirst, dsecond, dthird, dlambda, dstate = _fake_gradients(
        dh, dfinal, first, second, third, log_lambda, c, state, cu_seqlens, kept
    )
    length, width = first.shape[1:]
    # The RG-LRU's terms take more registers: half as many elements to a thread.
    split = 1 if third is None else 2
    segments, tokens = _SEGMENTS * split, _TOKENS // split
    most = _BLOCK if third is None or first.element_size() == 2 else _BLOCK // 2
    block, blocks, warps = _tile(first, segments, most)
    sequences = sequences_of(first, cu_seqlens)
    sums = torch.empty(0 if log_lambda is None else sequences, width, dtype=wide(first), device=first.device)
    launch(
        diagonal_backward, (sequences * blocks,),
        either(dh, first), either(dfinal, first), first, second, either(third, first),
        either(log_lambda, first), either(cu_seqlens, first), kept, dfirst, dsecond, dthird, sums, dstate, c, length,
        triton.cdiv(length, _SEGMENTS * _TOKENS), width, blocks, *strides(dh, 3), *strides(dfinal, 2),
        *first.stride(), *second.stride(), *strides(third, 3), *strides(log_lambda, 1), *strides(cu_seqlens, 1),
        LRU=third is not None, HIDDEN=dh is not None, FINAL=dfinal is not None, PACKED=cu_seqlens is not None,
        ACC=accumulator(first), SEGMENTS=segments, TOKENS=tokens, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if log_lambda is not None:
        dlambda.copy_(sums.sum(0))
    return dfirst, dsecond, dthird, dlambda, dstate


def _one_step(
    state: Tensor, first: Tensor, second: Tensor, third: Tensor | None, log_lambda: Tensor | None, c: float
) -> tuple[Tensor, Tensor]:
    h, new = _fake_step(state, first, second, third, log_lambda, c)
    width = first.shape[1]
    block = 8 * _lanes(first)  # 16 bytes to a thread: of bfloat16 in one warp, of float32 in two
    blocks = triton.cdiv(width, block)
    launch(
        diagonal_step, (first.shape[0] * blocks,),
        state, first, second, either(third, first), either(log_lambda, first), h, new, c,
        width, blocks, *state.stride(), *first.stride(), *second.stride(), *strides(third, 2),
        *strides(log_lambda, 1), LRU=third is not None, ACC=accumulator(first), BLOCK=block,
        num_warps=first.element_size() // 2,
    )  # fmt: skip
    return h, new


def _fake_scan(
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    log_lambda: Tensor | None,
    c: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = first.shape
    span = _SEGMENTS * _TOKENS
    sequences = sequences_of(first, cu_seqlens)
    # One axis for slots and channels: with an axis of slots, torch.compile would guard on there being more than one.
    slots = batch * ((length + span - 1) // span) if cu_seqlens is None else length // span + sequences
    kept, final = (
        torch.empty(shape, dtype=wide(first), device=first.device)
        for shape in ((slots * width if keep else 0,), (sequences, width))
    )
    return like(first), final, kept


def _fake_gradients(
    dh: Tensor | None,
    dfinal: Tensor | None,
    first: Tensor,
    second: Tensor,
    third: Tensor | None,
    log_lambda: Tensor | None,
    c: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dstate = like_or_none(state, first)
    if state is None:
        dstate = torch.empty((sequences_of(first, cu_seqlens), first.shape[2]), dtype=wide(first), device=first.device)
    return like(first), like(second), like_or_none(third, first), like_or_none(log_lambda, first), dstate


def _fake_step(
    state: Tensor, first: Tensor, second: Tensor, third: Tensor | None, log_lambda: Tensor | None, c: float
) -> tuple[Tensor, Tensor]:
    return like(first), torch.empty(first.shape, dtype=wide(first), device=first.device)


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.c, state, cu_seqlens, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, state, cu_seqlens, output[2])


def _scan_gradient(ctx: Any, dh: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, state, cu_seqlens, kept = ctx.saved_tensors
    gradients = _backward_operator(dh, dfinal, *tensors, ctx.c, state, cu_seqlens, kept)
    *own, dstate = map(given, (*tensors, state), gradients)
    return *own, None, dstate, None, None


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.c = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _step_gradient(ctx: Any, dh: Tensor | None, dnew: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate a step as a sequence of one token; the state is the one kept before it."""
    state, *timed, log_lambda = ctx.saved_tensors
    tokens = [one_token(one) for one in (dh, *timed)]
    kept = state.to(wide(timed[0])).contiguous()
    gradients = _backward_operator(tokens[0], dnew, *tokens[1:], log_lambda, ctx.c, state, None, kept)
    *inputs, dlambda, dstate = map(given, (*timed, log_lambda, state), gradients)
    return dstate, *(None if one is None else one.squeeze(1) for one in inputs), dlambda, None


_backward_operator = triton_operator("diagonal_scan_backward", _scan_gradients, fake=_fake_gradients)
_scan_operator = triton_operator(
    "diagonal_scan", _scan, fake=_fake_scan, setup_context=_save_scan, backward=_scan_gradient
)
_step_operator = triton_operator(
    "diagonal_scan_step", _one_step, fake=_fake_step, setup_context=_save_step, backward=_step_gradient
)


def diagonal_scan(
    decay: Tensor, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.diagonal_scan`."""
    keep = will_differentiate(decay, x, initial_state)
    h, final, _ = _scan_operator(decay, x, None, None, 1.0, initial_state, cu_seqlens, keep)
    return h, final


def diagonal_scan_step(state: Tensor, decay: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.diagonal_scan_step`."""
    h, new = _step_operator(state, decay, x, None, None, 1.0)
    return h, new


def rg_lru(
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    log_lambda: Tensor,
    c: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.rg_lru`."""
    keep = will_differentiate(x, recurrence_gate, input_gate, log_lambda, initial_state)
    h, final, _ = _scan_operator(x, recurrence_gate, input_gate, log_lambda, float(c), initial_state, cu_seqlens, keep)
    return h, final


def rg_lru_step(
    state: Tensor, x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.rg_lru_step`."""
    h, new = _step_operator(state, x, recurrence_gate, input_gate, log_lambda, float(c))
    return h, new
