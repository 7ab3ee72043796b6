"""Mamba-2's scan in Triton, in chunks of 64 tokens.

Forward is two kernels: the states at the chunks' starts, one program a tile of a head's state that walks over the
chunks; then every chunk's outputs at once. Backward is three: the states again and, beside them, their gradients at the
chunks' ends; the gradients of a head; those of B and C, which heads of a group share. These are summed over up to four
heads a program, then over the programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from star_kernels._operands import given, like, like_or_none, one_token, sequences_of, strides, wide
from star_kernels._triton import gpu_of, launch, triton_operator
from star_kernels._triton_math import accumulator, next_power_of_2
from star_kernels.recurrence.triton import chunks as chunked
from star_kernels.recurrence.triton.chunks import CHUNK
from star_kernels.recurrence.triton.ssd_gradient_kernels import ssd_group_gradients, ssd_head_gradients
from star_kernels.recurrence.triton.ssd_kernels import ssd_one_step, ssd_outputs, ssd_states

_HEADS = 4  # heads of a group that one program of dB and dC adds up
_STEP_TILE = 2048  # elements of a state that one program of a step holds


def _options(
    x: Tensor, dt_softplus: bool, cu_seqlens: Tensor | None, size: int, most_p: int = 64, most_n: int = 64
) -> dict[str, Any]:
    """Return a kernel's constants; it holds at most so many channels of P and of N at once."""
    return {
        "SOFTPLUS": dt_softplus, "VARLEN": cu_seqlens is not None, "ACC": accumulator(x), "CHUNK": CHUNK,
        "BLOCK_P": min(most_p, next_power_of_2(x.shape[3], 16)), "BLOCK_N": min(most_n, next_power_of_2(size, 16)),
    }  # fmt: skip


def _launch_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, first: Tensor | None, ends: Tensor | None, final: Tensor | None, dy: Tensor | None = None,
    dlast: Tensor | None = None, dfirst: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the states that chunks begin with and, given dy, the gradients of those that they end with."""
    heads, width = x.shape[2:]
    groups, size = B.shape[2:]
    count, chunks, slots = chunked.layout(x, ends)
    starts = torch.empty(slots, heads, width, size, dtype=wide(x), device=x.device)
    dends = None if dy is None else torch.empty_like(starts)
    # A float32 factor is three parts, and would spill beside a tile of 64 x 64.
    single, num_warps = x.element_size() > 2, 8
    most_p, most_n = 64, 32 if single and dy is not None else 64
    if single and gpu_of(x).units == "registers":
        most_p, most_n, num_warps = 16, 32, 4
    elif gpu_of(x).backend == "hip" or (dy is None and not single):
        num_warps = 4
    options = _options(x, dt_softplus, ends, size, most_p, most_n)
    blocks_p, blocks_n = triton.cdiv(width, options["BLOCK_P"]), triton.cdiv(size, options["BLOCK_N"])
    launch(
        ssd_states, (count * heads * blocks_p * blocks_n, 1 if dy is None else 2), x, dt, A, dt_bias, B, C, z, dy, ends,
        first, dlast, starts, dends, final, dfirst, x.shape[1], chunks, heads, heads // groups, width, size, blocks_p,
        blocks_n, *x.stride(), *dt.stride(), A.stride(0), *strides(dt_bias, 1), *B.stride(), *C.stride(),
        *strides(z, 4), *strides(dy, 4), *strides(first, 4), *strides(dlast, 4),
        num_warps=num_warps, **options,
    )  # fmt: skip
    return starts, dends


def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads, width = x.shape[2:]
    groups, size = B.shape[2:]
    count, chunks, slots = chunked.layout(x, cu_seqlens)
    y = like(x)
    final = torch.empty(count, heads, width, size, dtype=wide(x), device=x.device)
    starts, _ = _launch_states(x, dt, A, B, C, z, dt_bias, dt_softplus, initial_state, cu_seqlens, final)
    single, tight = x.element_size() > 2, gpu_of(x).units == "registers"
    options = _options(x, dt_softplus, cu_seqlens, size, 32 if single else 64, 16 if single and tight else 32)
    blocks_p = triton.cdiv(width, options["BLOCK_P"])
    launch(
        ssd_outputs, (slots * heads * blocks_p,), x, dt, A, dt_bias, B, C, z, D, cu_seqlens, starts, y, x.shape[1],
        chunks, count, heads, heads // groups, width, size, blocks_p, *x.stride(), *dt.stride(), A.stride(0),
        *strides(dt_bias, 1), *B.stride(), *C.stride(), *strides(z, 4), *strides(D, 1),
        **options,
    )  # fmt: skip
    return y, final


def _fake_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    state = torch.empty((sequences_of(x, rest[-1]), *x.shape[2:], B.shape[3]), dtype=wide(x), device=x.device)
    return like(x), state


def _ssd_gradients(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, dt_softplus: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias and the initial state."""
    if dy is None:
        dy = torch.zeros(1, dtype=x.dtype, device=x.device).expand(x.shape)
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    count, chunks, slots = chunked.layout(x, cu_seqlens)
    dx, ddt, dz = like(x), like(dt), like_or_none(z, x)
    dinitial = like_or_none(initial_state, x)
    starts, dends = _launch_states(
        x, dt, A, B, C, z, dt_bias, dt_softplus, initial_state, cu_seqlens, None, dy, dfinal,
        None if initial_state is None else dinitial,
    )  # fmt: skip
    sums = torch.zeros(slots, heads, 3, dtype=starts.dtype, device=x.device)
    gpu, single = gpu_of(x), x.element_size() > 2
    num_warps = 4 if gpu.backend == "hip" else 8
    tight = single and gpu.units == "registers"
    # Tiles of 64 x 32 in half precision are 16 bytes a thread, where 64 x 16 are 8. With mma.sync's factors, which lie
    # in registers, they spill 152 bytes for a head and 24 for a group; float32 has its 16 bytes at 16 channels.
    wide_tiles = not single and gpu.units != "registers"
    options = _options(x, dt_softplus, cu_seqlens, size, 32 if wide_tiles else 16, 32)
    steps = (*x.stride(), *dt.stride(), A.stride(0), *strides(dt_bias, 1), *B.stride(), *C.stride())
    edges = torch.empty(2, batch, length, heads, dtype=starts.dtype, device=x.device) if tight else None
    # On tcgen05 a head's spill 8 bytes in two stages and 16 in three.
    stages = 1 if wide_tiles and gpu.matrix == "tcgen05" else 2
    for part in (1, 2, 3) if tight else (0,):
        launch(
            ssd_head_gradients, (slots * heads,), dy, x, dt, A, dt_bias, B, C, z, D, cu_seqlens, starts, dends, dx, ddt,
            dz, sums, edges, length, chunks, count, heads, heads // groups, width, size, batch * length * heads,
            *dy.stride(), *steps, *strides(z, 4), *strides(D, 1), PART=part, num_warps=num_warps, num_stages=stages,
            **options,
        )  # fmt: skip
    if tight:
        options["BLOCK_N"] = 16
    slices, blocks_n = triton.cdiv(heads // groups, _HEADS), triton.cdiv(size, options["BLOCK_N"])
    shape = (slices, batch, length, groups, size)
    dtypes = (B.dtype, C.dtype) if slices == 1 else (starts.dtype, starts.dtype)
    db, dc = (torch.empty(shape, dtype=dtype, device=x.device) for dtype in dtypes)
    launch(
        ssd_group_gradients, (slots * groups * slices * blocks_n,), dy, x, dt, A, dt_bias, B, C, z, cu_seqlens, starts,
        dends, db, dc, length, chunks, count, heads, heads // groups, groups, slices, batch * length, width, size,
        blocks_n, *dy.stride(), *steps, *strides(z, 4), HEADS=_HEADS, num_warps=num_warps,
        **options,
    )  # fmt: skip
    dB, dC = (one[0] if slices == 1 else one.sum(0).to(B.dtype) for one in (db, dc))
    totals = sums.sum(0)
    dA, dbias, dD = (
        like_or_none(one, x) if one is None else totals[:, i].to(one.dtype, copy=True)
        for i, one in enumerate((A, dt_bias, D))
    )
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


def _fake_gradients(dy: Tensor | None, dfinal: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(like_or_none(one, x) for one in (x, *rest[:-2]))


def _save_ssd(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.dt_softplus, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _ssd_gradient(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    found = _ssd_backward_operator(dy, dfinal, *tensors, ctx.dt_softplus, cu_seqlens)
    *gradients, dinitial = map(given, tensors, found)
    return *gradients, None, dinitial, None


def _ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, width = x.shape
    groups, size = B.shape[1:]
    y, new_state = like(x), torch.empty(state.shape, dtype=wide(x), device=x.device)
    block_n = min(128, next_power_of_2(size, 16))
    block_p = min(next_power_of_2(width), _STEP_TILE // block_n)
    blocks_p = triton.cdiv(width, block_p)
    launch(
        ssd_one_step, (batch * heads * blocks_p,), state, x, dt, A, dt_bias, B, C, z, D, y, new_state, heads,
        heads // groups, width, size, blocks_p, *state.stride(), *x.stride(), *dt.stride(), A.stride(0),
        *strides(dt_bias, 1), *B.stride(), *C.stride(), *strides(z, 3), *strides(D, 1), SOFTPLUS=dt_softplus,
        ACC=accumulator(x), BLOCK_P=block_p, BLOCK_N=block_n,
    )  # fmt: skip
    return y, new_state


def _fake_step(state: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like(x), torch.empty(state.shape, dtype=wide(x), device=x.device)


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.dt_softplus = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _step_gradient(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    """Take the gradient of a sequence of one token."""
    state, x, dt, A, B, C, D, z, dt_bias = ctx.saved_tensors
    timed = (one_token(x), one_token(dt), A, one_token(B), one_token(C), D, one_token(z), dt_bias, state)
    found = _ssd_backward_operator(one_token(dy), dstate, *timed, ctx.dt_softplus, None)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = map(given, timed, found)
    dx, ddt, dB, dC, dz = (None if one is None else one.squeeze(1) for one in (dx, ddt, dB, dC, dz))
    return dinitial, dx, ddt, dA, dB, dC, dD, dz, dbias, None


_ssd_backward_operator = triton_operator("ssd_backward", _ssd_gradients, fake=_fake_gradients)
_operator = triton_operator("ssd", _ssd, fake=_fake_ssd, setup_context=_save_ssd, backward=_ssd_gradient)
_step_operator = triton_operator(
    "ssd_step", _ssd_step, fake=_fake_step, setup_context=_save_step, backward=_step_gradient
)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Serve `star_kernels.ssd`."""
    y, final_state = _operator(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    return y, final_state


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Serve `star_kernels.ssd_step`."""
    y, new_state = _step_operator(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return y, new_state
