"""Short causal convolutions in Triton: one kernel forward, one backward, one for a step.

A program takes a chunk of one sequence's tokens and a block of channels. Each of its rows is a segment of consecutive
tokens that lie in registers, so that a token is loaded once, with W - 1 more before (and behind, for the gradient) that
the cache has; an activation and its slope are computed once; and the filter's gradient is added up before threads meet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from star_kernels._operands import either, given, one_token, sequences_of, strides, wide
from star_kernels._triton import gpu_of, interpreting, launch, triton_operator
from star_kernels._triton_math import accumulator, next_power_of_2
from star_kernels.short_conv.triton_kernels import conv_backward, conv_forward, conv_step

# Segments of a chunk, and tokens of a segment. At 8 tokens and W = 4, 11 rows are read for 8. The backward holds more
# of a token: 4 of them with 8 channels a thread spill on sm_90.
_FORWARD, _BACKWARD = ((4, 4), (4, 3)) if interpreting() else ((16, 8), (32, 3))


def _slots(x: Tensor, cu_seqlens: Tensor | None, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Return the chunks of an unpacked sequence, how many sequences there are, and the slots of all."""
    chunk = shape[0] * shape[1]
    if cu_seqlens is None:
        chunks = max(1, triton.cdiv(x.shape[1], chunk))
        return chunks, x.shape[0], x.shape[0] * chunks
    sequences = cu_seqlens.shape[0] - 1
    return 1, sequences, x.shape[1] // chunk + sequences if sequences else 0


def _lanes(x: Tensor) -> int:
    """Return the threads of a warp."""
    return 64 if gpu_of(x).backend == "hip" else 32


def _program(x: Tensor, shape: tuple[int, int]) -> dict[str, Any]:
    """Return how a program is shared out: 16 bytes of each of a segment's tokens for each of 128 threads."""
    return {
        "SEGMENTS": shape[0],
        "TOKENS": shape[1],
        "BLOCK": min(next_power_of_2(x.shape[-1], 16), 128 * 16 // (x.element_size() * shape[0])),
        "num_warps": 128 // _lanes(x),
    }


def _conv(
    x: Tensor,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, final = _fake_conv(x, gate_in, gate_out, weight, bias, silu, state, cu_seqlens)
    width, taps = weight.shape
    chunks, sequences, slots = _slots(x, cu_seqlens, _FORWARD)
    program = _program(x, _FORWARD)
    blocks = triton.cdiv(width, program["BLOCK"])
    launch(
        conv_forward, (slots * blocks,),
        x, either(gate_in, x), either(gate_out, x), weight, either(bias, x), either(state, x),
        either(cu_seqlens, x), y, final, x.shape[1], chunks, sequences, width, blocks, *x.stride(),
        *strides(gate_in, 3), *strides(gate_out, 3), *weight.stride(), *strides(bias, 1), *strides(state, 3),
        *strides(cu_seqlens, 1), GATED=gate_in is not None, SILU=silu, BIAS=bias is not None,
        STATE=state is not None and taps > 1, PACKED=cu_seqlens is not None, WIDTH=taps, ACC=accumulator(x),
        **program,
    )  # fmt: skip
    return y, final


def _conv_gradients(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at x, both gates, the filter, the bias and the state; no elements where there is none."""
    dx, dgate_in, dgate_out, dweight, dbias, dstate = _fake_gradients(
        dy, dfinal, x, gate_in, gate_out, weight, bias, silu, state, cu_seqlens
    )
    width, taps = weight.shape
    chunks, sequences, slots = _slots(x, cu_seqlens, _BACKWARD)
    program = _program(x, _BACKWARD)
    blocks = triton.cdiv(width, program["BLOCK"])
    sums = torch.empty(slots, taps + 1, width, dtype=wide(x), device=x.device)
    launch(
        conv_backward, (slots * blocks,),
        dy, either(dfinal, x), x, either(gate_in, x), either(gate_out, x), weight, either(bias, x),
        either(state, x), either(cu_seqlens, x), dx, dgate_in, dgate_out, dstate, sums, x.shape[1], chunks, sequences,
        width, blocks, *dy.stride(), *strides(dfinal, 3), *x.stride(), *strides(gate_in, 3), *strides(gate_out, 3),
        *weight.stride(), *strides(bias, 1), *strides(state, 3), *strides(cu_seqlens, 1),
        GATED=gate_in is not None, SILU=silu, BIAS=bias is not None, STATE=state is not None and taps > 1,
        FINAL=dfinal is not None and taps > 1, PACKED=cu_seqlens is not None, WIDTH=taps, ACC=accumulator(x),
        **program,
    )  # fmt: skip
    total = sums.sum(0)
    dweight.copy_(total[:-1].t())
    if bias is not None:
        dbias.copy_(total[-1])
    return dx, dgate_in, dgate_out, dweight, dbias, dstate


def _conv_step(
    state: Tensor,
    x: Tensor,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    y, new = _fake_step(state, x, gate_in, gate_out, weight, bias, silu)
    width, taps = weight.shape
    block = min(next_power_of_2(width, 16), _lanes(x) * 16 // x.element_size())
    blocks = triton.cdiv(width, block)
    launch(
        conv_step, (x.shape[0] * blocks,),
        state, x, either(gate_in, x), either(gate_out, x), weight, either(bias, x), y, new, width,
        blocks, *state.stride(), *x.stride(), *strides(gate_in, 2), *strides(gate_out, 2), *weight.stride(),
        *strides(bias, 1), GATED=gate_in is not None, SILU=silu, BIAS=bias is not None, WIDTH=taps,
        ACC=accumulator(x), BLOCK=block, num_warps=1,
    )  # fmt: skip
    return y, new


def _like(one: Tensor | None, first: Tensor) -> Tensor:
    """Return an empty tensor like the first; without elements for None."""
    return first.new_empty(0) if one is None else torch.empty(one.shape, dtype=one.dtype, device=one.device)


def _fake_conv(
    x: Tensor,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sequences = sequences_of(x, cu_seqlens)
    shape = (sequences, x.shape[-1], weight.shape[1] - 1)
    return _like(x, x), torch.empty(shape, dtype=wide(x), device=x.device)


def _fake_gradients(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dgate_in, dgate_out, dweight, dbias, dstate = (
        _like(one, x) for one in (x, gate_in, gate_out, weight, bias, state)
    )
    return dx, dgate_in, dgate_out, dweight, dbias, dstate


def _fake_step(
    state: Tensor,
    x: Tensor,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape, weight.shape[1] - 1)
    return _like(x, x), torch.empty(shape, dtype=wide(x), device=x.device)


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu, state, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, state, cu_seqlens)


def _conv_gradient(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    gradients = _backward_operator(dy, dfinal, *tensors, ctx.silu, state, cu_seqlens)
    *own, dstate = map(given, (*tensors, state), gradients)
    return *own, None, dstate, None


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _step_gradient(ctx: Any, dy: Tensor | None, dnew: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate a step as a sequence of one token."""
    state, *timed, weight, bias = ctx.saved_tensors
    dy = torch.zeros_like(timed[0]) if dy is None else dy
    tokens = [one_token(one) for one in timed]
    gradients = _backward_operator(dy.unsqueeze(1), dnew, *tokens, weight, bias, ctx.silu, state, None)
    dx, din, dout, dweight, dbias, dstate = map(given, (*timed, weight, bias, state), gradients)
    dx, din, dout = (None if one is None else one.squeeze(1) for one in (dx, din, dout))
    return dstate, dx, din, dout, dweight, dbias, None


_backward_operator = triton_operator("short_conv_backward", _conv_gradients, fake=_fake_gradients)
_forward_operator = triton_operator(
    "short_conv", _conv, fake=_fake_conv, setup_context=_save_conv, backward=_conv_gradient
)
_step_operator = triton_operator(
    "short_conv_step", _conv_step, fake=_fake_step, setup_context=_save_step, backward=_step_gradient
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.causal_conv1d`; both names of the activation are one."""
    y, final = _forward_operator(x, None, None, weight, bias, activation is not None, initial_state, cu_seqlens)
    return y, final


def gated_short_conv(
    x: Tensor,
    gate_in: Tensor,
    gate_out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.gated_short_conv`."""
    y, final = _forward_operator(x, gate_in, gate_out, weight, bias, False, initial_state, cu_seqlens)
    return y, final


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.causal_conv1d_step`."""
    y, new = _step_operator(state, x, None, None, weight, bias, activation is not None)
    return y, new


def gated_short_conv_step(
    state: Tensor, x: Tensor, gate_in: Tensor, gate_out: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.gated_short_conv_step`."""
    y, new = _step_operator(state, x, gate_in, gate_out, weight, bias, False)
    return y, new
