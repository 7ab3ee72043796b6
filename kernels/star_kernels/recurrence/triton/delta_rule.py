"""The gated delta rule in Triton, in chunks of 64 tokens.

With L_ij the decay from token j to i of a chunk and g_i that from its start, what token i writes is
u = T beta (v - g K S), T = (I + A)^{-1}, A_ij = beta_i L_ij (k_i . k_j) for i > j. T does not depend on the state S,
nor do T beta V and W = T beta g K (the WY form of Yang et al., 2024, arXiv:2406.06484): one kernel takes them for all
chunks at once, T block by block (a block of 2 m tokens has the inverses of its halves on the diagonal, and below it
their product with A between them). Then a walk over the chunks, u = T beta V - W S and the next state; then all
outputs.

Backward is four kernels: the first again, and beside it what a chunk's own outputs ask of u; the walk, and beside it
the one of the states' gradients; pairs of tokens; the rest.
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
from star_kernels.recurrence.triton.delta_rule_gradient_kernels import delta_gradients, delta_pairs
from star_kernels.recurrence.triton.delta_rule_kernels import delta_outputs, delta_prepare, delta_states, delta_step
from star_kernels.recurrence.triton.memory import memory_operators

_STEP_TILE = 2048  # elements of a state that one program of a step holds

# What a kernel's program holds at once and how it runs, in 16 bits and in float32, by the GPU's matrix instruction:
# channels of keys, channels of values, warps, stages. For the walk over chunks, which holds all keys, the first is the
# state's elements. More, and registers go to memory; mma.sync has its factors in registers too, and so the least.
_Run = tuple[int, int, int, int]
_RUNS: dict[Any, dict[str, tuple[_Run, _Run]]] = {
    delta_prepare: {
        "mma.sync": ((32, 32, 4, 1), (16, 16, 8, 2)), "wgmma": ((64, 64, 4, 2), (32, 32, 4, 1)),
        "tcgen05": ((64, 64, 8, 2), (64, 64, 8, 2)), "mfma": ((64, 64, 4, 2), (64, 64, 4, 2)),
    },
    delta_states: {
        "mma.sync": ((2048, 64, 4, 2), (1024, 64, 8, 1)), "wgmma": ((2048, 64, 4, 2), (1024, 64, 4, 2)),
        "tcgen05": ((2048, 64, 8, 2), (2048, 64, 8, 2)), "mfma": ((2048, 64, 4, 2), (2048, 64, 4, 2)),
    },
    delta_outputs: {
        "mma.sync": ((32, 32, 4, 2), (32, 32, 4, 2)), "wgmma": ((32, 64, 4, 2), (32, 32, 4, 2)),
        "tcgen05": ((32, 64, 4, 2), (32, 64, 4, 2)), "mfma": ((32, 64, 4, 2), (32, 64, 4, 2)),
    },
    delta_pairs: {
        "mma.sync": ((32, 16, 8, 2), (16, 16, 8, 3)), "wgmma": ((32, 32, 4, 2), (32, 16, 8, 2)),
        "tcgen05": ((32, 32, 4, 2), (32, 32, 8, 2)), "mfma": ((32, 32, 4, 2), (32, 32, 4, 2)),
    },
    delta_gradients: {
        "mma.sync": ((32, 32, 8, 2), (16, 32, 8, 2)), "wgmma": ((64, 32, 8, 2), (32, 32, 8, 2)),
        "tcgen05": ((64, 32, 8, 2), (64, 32, 8, 2)), "mfma": ((64, 32, 8, 2), (32, 32, 4, 2)),
    },
}  # fmt: skip


def _options(kernel: Any, q: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """Return a kernel's constants, warps and stages."""
    matrix = gpu_of(q).matrix
    block_k, block_v, warps, stages = _RUNS[kernel][matrix][q.dtype.itemsize > 2]
    all_keys = next_power_of_2(q.shape[3], 16)
    if kernel is delta_states:
        block_k, block_v = all_keys, min(block_v, max(16, block_k // all_keys))
        if all_keys > 64 and matrix != "wgmma":
            # Two stages of 128 keys take 66 to 104 KB of shared memory on gfx942, which has 64, and up to 184 bytes of
            # spills elsewhere; one takes 32 KB and none. On sm_90 one spills more than two: 376 bytes for 184.
            stages = 1
    return {
        "VARLEN": cu_seqlens is not None, "SCALE": scale, "ACC": accumulator(q), "CHUNK": CHUNK,
        "BLOCK_K": min(block_k, all_keys), "BLOCK_V": min(block_v, next_power_of_2(v.shape[3], 16)),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _walks(
    q: Tensor, k: Tensor, v: Tensor, logs: Tensor, beta: Tensor, scale: float, first: Tensor | None,
    ends: Tensor | None, final: Tensor | None, do: Tensor | None = None, dlast: Tensor | None = None,
    dfirst: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the states at the chunks' starts and what each token writes; given do, also T, and their gradients."""
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, ends)
    kind: dict[str, Any] = {"dtype": wide(q), "device": q.device}
    starts, written = torch.empty(slots, heads, keys, values, **kind), torch.empty(v.shape, **kind)
    weights, own = torch.empty(k.shape, **kind), torch.empty_like(written)
    inverses, turned, dends, pulled, dwritten = None, None, None, None, None
    if do is not None:
        inverses, turned = (torch.empty(slots, heads, size, CHUNK, **kind) for size in (CHUNK, keys))
        dends, pulled, dwritten = (torch.empty_like(one) for one in (starts, own, own))
    grid_rows = 1 if do is None else 2
    launch(
        delta_prepare, (slots * heads, grid_rows), q, k, v, logs, beta, do, ends, inverses, turned, weights, own,
        pulled, length, chunks, count, heads, keys, values, *q.stride(), *k.stride(), *v.stride(), *logs.stride(),
        *beta.stride(), *strides(do, 4), **_options(delta_prepare, q, v, scale, ends),
    )  # fmt: skip
    options = _options(delta_states, q, v, scale, ends)
    blocks_v = triton.cdiv(values, options["BLOCK_V"])
    launch(
        delta_states, (count * heads * blocks_v, grid_rows), q, k, logs, do, ends, weights, turned, first, dlast,
        starts, dends, own, written, pulled, dwritten, final, dfirst, length, chunks, heads, keys, values, blocks_v,
        *q.stride(), *k.stride(), *logs.stride(), *strides(do, 4), *strides(first, 4), *strides(dlast, 4), **options,
    )  # fmt: skip
    return {
        "inverses": inverses, "starts": starts, "written": written, "dends": dends, "dwritten": dwritten,
        "free": pulled,
    }  # fmt: skip


def _delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, cu_seqlens)
    out = like(v)
    final = torch.empty(count, heads, keys, values, dtype=wide(q), device=q.device)
    walked = _walks(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens, final)
    options = _options(delta_outputs, q, v, scale, cu_seqlens)
    blocks_v = triton.cdiv(values, options["BLOCK_V"])
    launch(
        delta_outputs, (slots * heads * blocks_v,), q, k, log_decay, cu_seqlens, walked["starts"], walked["written"],
        out, length, chunks, count, heads, keys, values, blocks_v, *q.stride(), *k.stride(), *log_decay.stride(),
        **options,
    )  # fmt: skip
    return out, final


def _delta_gradients(
    do: Tensor | None, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
    initial_state: Tensor | None, scale: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, log_decay, beta and the initial state."""
    if do is None:
        do = torch.zeros(1, dtype=v.dtype, device=v.device).expand(v.shape)
    (length, heads, keys), values = q.shape[1:], v.shape[3]
    count, chunks, slots = chunked.layout(q, cu_seqlens)
    dinitial = like_or_none(initial_state, q)
    walked = _walks(
        q, k, v, log_decay, beta, scale, initial_state, cu_seqlens, None, do, dfinal,
        None if initial_state is None else dinitial,
    )  # fmt: skip
    inverses, starts, written, dends, dwritten, dwanted = walked.values()
    dq, dk, dv, dlogs, dbeta = (like(one) for one in (q, k, v, log_decay, beta))
    squares = starts.new_empty(slots, heads, 3, CHUNK, CHUNK)
    pair_dlogs, pair_dbeta = starts.new_empty(log_decay.shape), starts.new_empty(beta.shape)
    launch(
        delta_pairs, (slots * heads,), do, q, k, v, log_decay, beta, cu_seqlens, inverses, written, dwritten, dwanted,
        squares, pair_dlogs, pair_dbeta, dv, length, chunks, count, heads, keys, values, *do.stride(), *q.stride(),
        *k.stride(), *v.stride(), *log_decay.stride(), *beta.stride(), **_options(delta_pairs, q, v, scale, cu_seqlens),
    )  # fmt: skip
    options = _options(delta_gradients, q, v, scale, cu_seqlens)
    blocks_k = max(1, triton.cdiv(keys, options["BLOCK_K"]))
    gates = [dlogs, dbeta]
    if blocks_k > 1:
        gates = [starts.new_empty(blocks_k, *one.shape) for one in gates]
    launch(
        delta_gradients, (slots * heads * blocks_k,), do, q, k, log_decay, beta, cu_seqlens, starts, dends, written,
        dwanted, squares, pair_dlogs, pair_dbeta, dq, dk, *gates, q.shape[0] * length, length, chunks, count, heads,
        keys, values, blocks_k, *do.stride(), *q.stride(), *k.stride(), *log_decay.stride(), *beta.stride(),
        **options,
    )  # fmt: skip
    if blocks_k > 1:
        dlogs, dbeta = (parts.sum(0).to(one.dtype) for parts, one in zip(gates, (dlogs, dbeta), strict=True))
    return dq, dk, dv, dlogs, dbeta, dinitial


def _delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (batch, heads, keys), values = q.shape, v.shape[2]
    out, new_state = like(v), torch.empty(state.shape, dtype=wide(q), device=q.device)
    block_k = next_power_of_2(keys, 16)
    block_v = min(64, next_power_of_2(values, 16), max(16, _STEP_TILE // block_k))
    blocks_v = triton.cdiv(values, block_v)
    launch(
        delta_step, (batch * heads * blocks_v,), state, q, k, v, log_decay, beta, out, new_state, heads, keys, values,
        blocks_v, *state.stride(), *q.stride(), *k.stride(), *v.stride(), *log_decay.stride(), *beta.stride(),
        SCALE=scale, ACC=accumulator(q), BLOCK_K=block_k, BLOCK_V=block_v,
    )  # fmt: skip
    return out, new_state


_operator, _step_operator = memory_operators("gated_delta_rule", _delta, _delta_gradients, _delta_step)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Serve `star_kernels.gated_delta_rule`."""
    o, final_state = _operator(q, k, v, log_decay, beta, score_factor(scale, q.shape[-1]), initial_state, cu_seqlens)
    return o, final_state


def gated_delta_rule_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Serve `star_kernels.gated_delta_rule_step`."""
    o, new_state = _step_operator(state, q, k, v, log_decay, beta, score_factor(scale, q.shape[-1]))
    return o, new_state
