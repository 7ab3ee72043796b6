"""Gated linear attention in Triton, in chunks of 64 tokens.

The decay between two tokens of a chunk differs by key channel, so their scores are no single product. Of the 2 m tokens
of a block, those in the second half meet those in the first through the boundary between the halves: the decay is one
factor of the query and one of the key, each a sum of log decays <= 0 from the nearer end of its half. With m = 1, 2 ..
32 that covers every pair of a chunk, in six products. No sum is ever subtracted: -inf, -3e4 and 0 are exact.

Forward is two kernels (states, outputs) and backward three: the states and their gradients; those of q, k and the
decays; those of v, by the kernel of the outputs with the roles turned.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from star_kernels._operands import like, like_or_none, score_factor, strides, wide
from star_kernels._triton import gpu_of, launch
from star_kernels._triton_math import accumulator, next_power_of_2
from star_kernels.recurrence.triton import chunks as chunked
from star_kernels.recurrence.triton.chunks import CHUNK
from star_kernels.recurrence.triton.linear_attention_kernels import gla_key_gradients, gla_mix, gla_states, gla_step
from star_kernels.recurrence.triton.memory import memory_operators

_SPAN = 128  # value channels of a program of `gla_mix`, which share its scores
_STEP_TILE = 2048  # elements of a state that one program of a step holds


def _options(
    q: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, most_keys: int = 64, most_values: int = 64
) -> dict[str, Any]:
    """Return a kernel's constants; it holds at most so many channels at once."""
    return {
        "VARLEN": cu_seqlens is not None, "SCALE": scale, "ACC": accumulator(q), "CHUNK": CHUNK,
        "BLOCK_K": min(most_keys, next_power_of_2(q.shape[3], 16)),
        "BLOCK_V": min(most_values, next_power_of_2(v.shape[3], 16)),
    }  # fmt: skip


def _launch_states(
    q: Tensor, k: Tensor, v: Tensor, logs: Tensor, scale: float, first: Tensor | None, ends: Tensor | None,
    final: Tensor | None, do: Tensor | None = None, dlast: Tensor | None = None, dfirst: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the states that chunks begin with and, given do, the gradients of those that they end with."""
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, ends)
    starts = torch.empty(slots, heads, keys, values, dtype=wide(q), device=q.device)
    dends = None if do is None else torch.empty_like(starts)
    # A float32 factor is three parts, and would spill beside a tile of 64 x 64.
    single = q.element_size() > 2
    most_keys = 32 if single and gpu_of(q).units == "registers" else 64
    options = _options(q, v, scale, ends, most_keys, 32 if single else 64)
    blocks_k, blocks_v = triton.cdiv(keys, options["BLOCK_K"]), triton.cdiv(values, options["BLOCK_V"])
    launch(
        gla_states, (count * heads * blocks_k * blocks_v, 1 if do is None else 2), q, k, v, logs, do, ends, first,
        dlast, starts, dends, final, dfirst, length, chunks, heads, keys, values, blocks_k, blocks_v, *q.stride(),
        *k.stride(), *v.stride(), *logs.stride(), *strides(do, 4), *strides(first, 4),
        *strides(dlast, 4), num_warps=8, **options,
    )  # fmt: skip
    return starts, dends


def _launch_mix(
    q: Tensor, k: Tensor, v: Tensor, logs: Tensor, scale: float, ends: Tensor | None, states: Tensor, turned: bool
) -> Tensor:
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, ends)
    out = like(v)
    # 64 x 16 in half precision are 16 bytes for each of 128 threads, which on AMD's GPUs are 256.
    most_keys = 32 if gpu_of(q).backend == "hip" and q.element_size() == 2 else 16
    options = _options(q, v, scale, ends, most_keys, 32)
    blocks_v = triton.cdiv(values, _SPAN)
    launch(
        gla_mix, (slots * heads * blocks_v,), q, k, v, logs, ends, states, out, length, chunks, count, heads, keys,
        values, blocks_v, *q.stride(), *k.stride(), *v.stride(), *logs.stride(), TURNED=turned, SPAN=_SPAN,
        num_warps=4, **options,
    )  # fmt: skip
    return out


def _gla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count = chunked.layout(q, cu_seqlens)[0]
    final = torch.empty(count, *q.shape[2:], v.shape[3], dtype=wide(q), device=q.device)
    starts, _ = _launch_states(q, k, v, log_decay, scale, initial_state, cu_seqlens, final)
    return _launch_mix(q, k, v, log_decay, scale, cu_seqlens, starts, False), final


def _gla_gradients(
    do: Tensor | None, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor,
    initial_state: Tensor | None, scale: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, log_decay and the initial state."""
    if do is None:
        do = torch.zeros(1, dtype=v.dtype, device=v.device).expand(v.shape)
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, cu_seqlens)
    dinitial = like_or_none(initial_state, q)
    starts, dends = _launch_states(
        q, k, v, log_decay, scale, initial_state, cu_seqlens, None, do, dfinal,
        None if initial_state is None else dinitial,
    )  # fmt: skip
    assert dends is not None
    dq, dk, dlogs = like(q), like(k), like(log_decay)
    options = _options(q, v, scale, cu_seqlens, 16, 16 if q.element_size() > 2 else 32)
    blocks_k = triton.cdiv(keys, options["BLOCK_K"])
    launch(
        gla_key_gradients, (slots * heads * blocks_k,), do, q, k, v, log_decay, cu_seqlens, starts, dends, dq, dk,
        dlogs, length, chunks, count, heads, keys, values, blocks_k, *do.stride(), *q.stride(), *k.stride(),
        *v.stride(), *log_decay.stride(), num_warps=4 if gpu_of(q).backend == "hip" else 8, **options,
    )  # fmt: skip
    return dq, dk, _launch_mix(q, k, do, log_decay, scale, cu_seqlens, dends, True), dlogs, dinitial


def _gla_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (batch, heads, keys), values = q.shape, v.shape[2]
    out, new_state = like(v), torch.empty(state.shape, dtype=wide(q), device=q.device)
    block_v = min(64, next_power_of_2(values, 16))
    block_k = min(next_power_of_2(keys), _STEP_TILE // block_v)
    blocks_v = triton.cdiv(values, block_v)
    launch(
        gla_step, (batch * heads * blocks_v,), state, q, k, v, log_decay, out, new_state, heads, keys, values, blocks_v,
        *state.stride(), *q.stride(), *k.stride(), *v.stride(), *log_decay.stride(), SCALE=scale, ACC=accumulator(q),
        BLOCK_K=block_k, BLOCK_V=block_v,
    )  # fmt: skip
    return out, new_state


_operator, _step_operator = memory_operators("gated_linear_attention", _gla, _gla_gradients, _gla_step)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Serve `star_kernels.gated_linear_attention`."""
    o, final_state = _operator(q, k, v, log_decay, score_factor(scale, q.shape[-1]), initial_state, cu_seqlens)
    return o, final_state


def gated_linear_attention_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.gated_linear_attention_step`."""
    o, new_state = _step_operator(state, q, k, v, log_decay, score_factor(scale, q.shape[-1]))
    return o, new_state
