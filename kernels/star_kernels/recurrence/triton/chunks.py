"""What the chunked recurrences share: decays between tokens, and where chunks lie.

A chunk's states lie at its slot; `sequence_of` says how the slots of packed sequences are laid out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from star_kernels._operands import sequences_of
from star_kernels._triton_math import SPLIT, sequence_of

CHUNK = 64

_NEVER = tl.constexpr(-746.0)  # exp of less is 0 in float64 too


@triton.jit
def poison_after(y, x):
    """Return y (tokens, columns) with NaN from the first token on where x's column is not finite."""
    return tl.where(_token(y) >= tl.min(_where_bad(x, x.shape[0]), 0)[None, :], float("nan"), y)


@triton.jit
def poison_before(y, x):
    """Return y (tokens, columns) with NaN up to the last token where x's column is not finite."""
    return tl.where(_token(y) <= tl.max(_where_bad(x, -1), 0)[None, :], float("nan"), y)


@triton.jit
def _token(x):
    return tl.arange(0, x.shape[0])[:, None]


@triton.jit
def _where_bad(x, otherwise):
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), otherwise, _token(x))


@triton.jit
def running(log):
    """Return the running sums of log decays along axis 0: two parts, and the number of resets.

    Sums are float64 and differences of them float32: behind a token of -3e4 an ulp of a float32 sum is 0.002. A decay
    of 0 counts as a reset, and is left out.
    """
    reset = log < _NEVER
    total = tl.cumsum(tl.where(reset, 0.0, log).to(tl.float64), 0)
    high = total.to(log.dtype)
    return high, (total - high.to(tl.float64)).to(log.dtype), tl.cumsum(reset.to(tl.int32), 0)


@triton.jit
def last(x):
    """Return the last token's entry of a vector of tokens."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == x.shape[0] - 1, x, 0), 0)


@triton.jit
def since_start(high, resets):
    """Return the decay from before the chunk to each token."""
    return tl.where(resets == 0, tl.exp(high), 0.0)


@triton.jit
def until_end(high, low, resets):
    """Return the decay from each token to the chunk's end, for one vector of tokens."""
    log = (last(high) - high) + (last(low) - low)
    return tl.where(resets == last(resets), tl.exp(log), 0.0)


@triton.jit
def between(high, low, resets):
    """Return the decay from token j (axis 1) to token i (axis 0), 0 for i < j."""
    log = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    token = tl.arange(0, high.shape[0])
    seen = (token[:, None] >= token[None, :]) & (resets[:, None] == resets[None, :])
    return tl.exp(tl.where(seen, log, float("-inf")))


@triton.jit
def causal():
    """Return where i >= j in a chunk."""
    token = tl.arange(0, 64)
    return token[:, None] >= token[None, :]


@triton.jit
def halves(level):
    """Return where i lies in the second and j in the first half of one block of 2 m tokens, m = 2^level.

    Over m = 1, 2, 4 .. 32 these are all pairs i > j of a chunk.
    """
    half = tl.arange(0, 64) >> level
    # One comparison an element, of what a loop over levels cannot keep in registers for all of them.
    return half[None, :] == tl.where((half & 1) == 1, half - 1, -1)[:, None]


@triton.jit
def levels(tokens):
    """Return how many levels `halves` needs for a chunk that holds so many tokens."""
    most = tl.minimum(tokens, 64).to(tl.int32)
    few = (most > 1).to(tl.int32) + (most > 2).to(tl.int32) + (most > 4).to(tl.int32)
    return few + (most > 8).to(tl.int32) + (most > 16).to(tl.int32) + (most > 32).to(tl.int32)


@triton.jit
def ones(mask):
    """Return 1 where the mask holds, else 0, as the factor of a product."""
    if SPLIT:
        return tl.where(mask, 1.0, 0.0).to(tl.bfloat16)
    else:
        return tl.where(mask, 1.0, 0.0)


@triton.jit
def within(inner):
    """Return, at each token t, sum_{i >= t > j} inner_ij.

    With `passing` these are the gradients at log decays. Sums of those terms alone, as a difference of running sums
    would leave a rounding error that a step size of 3e4 then multiplies.
    """
    token = tl.arange(0, inner.shape[0])
    later = tl.cumsum(tl.where(token[None, :] < token[:, None], inner, 0.0), 0, reverse=True)
    return tl.sum(tl.where(token[None, :] < token[:, None], later, 0.0), 1)


@triton.jit
def passing(start, end):
    """Return, at each token t, sum_{i >= t} start_i + sum_{j < t} end_j."""
    token = tl.arange(0, start.shape[0])
    return tl.sum(tl.where(token[None, :] < token[:, None], end[None, :], 0.0), 1) + tl.cumsum(start, 0, reverse=True)


@triton.jit
def sequence(index, ends, length, chunks, VARLEN: tl.constexpr, CHUNK: tl.constexpr):
    """Return a sequence's batch row, its first token, one past its last, and its first slot."""
    if VARLEN:
        begin = tl.load(ends + index).to(tl.int64)
        return index * 0, begin, tl.load(ends + index + 1).to(tl.int64), begin // CHUNK + index
    else:
        return index, index * 0, index * 0 + length, index * chunks


@triton.jit
def chunk(slot, ends, length, chunks, count, VARLEN: tl.constexpr, CHUNK: tl.constexpr):
    """Return a slot's batch row, its first token, and one past its sequence's last; no token if it is not used."""
    if VARLEN:
        index = sequence_of(slot, ends, 1, count, CHUNK)
        batch, begin, stop, first = sequence(index, ends, length, chunks, VARLEN, CHUNK)
        return batch, begin + (slot - first) * CHUNK, stop
    else:
        return slot // chunks, (slot % chunks) * CHUNK, slot * 0 + length


def layout(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Return how many sequences there are, the chunks of an unpacked one, and the slots of all."""
    batch, length = x.shape[:2]
    chunks = triton.cdiv(length, CHUNK)
    if cu_seqlens is None:
        return batch, chunks, batch * chunks
    sequences = sequences_of(x, cu_seqlens)
    return sequences, chunks, chunks + sequences if sequences else 0
