"""What the Triton attention kernels share: where a program's tile lies, which keys a query sees, and scores.

Scores are kept in the units that the matrix product gives, and the softmax is 2^(factor (s - top)): the difference is
taken before the multiplication, so scores of 1e4 lose nothing. With a softcap, s = tanh(bend q.k) and the cap is in
`factor`; with a negative scale, s = -q.k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import product, tanh

# Launch arguments whose values 1 and 16 n must not make other binaries: they follow the lengths of sequences.
UNSPECIALISED = ["queries", "keys", "sequences", "blocks", "window", "plane"]

_SEQUENCES = tl.constexpr(128)  # boundaries of packed sequences that are looked through at once


@triton.jit
def locate(
    ends_q, ends_k, lengths, place, batch, sequences, queries, keys,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return a tile's sequence: its first query, its queries, its first key, its keys; and the tile's first token.

    Packed: tiles are counted over all sequences, none of which shares one. Past the last, a sequence without tokens.
    Ragged: only the first `lengths[batch]` keys of a row are held.
    """
    if PACKED:
        ends = ends_k if OF_KEYS else ends_q
        sequence = 0
        skipped = 0
        counted = 0
        for start in range(0, sequences, _SEQUENCES):
            i = start + tl.arange(0, _SEQUENCES)
            inside = i < sequences
            length = tl.load(ends + i + 1, mask=inside, other=0) - tl.load(ends + i, mask=inside, other=0)
            tiles = ((length + BLOCK - 1) // BLOCK).to(tl.int32)
            passed = inside & (counted + tl.cumsum(tiles, 0) <= place)
            sequence += tl.sum(passed.to(tl.int32), 0)
            skipped += tl.sum(tl.where(passed, tiles, 0), 0)
            counted += tl.sum(tiles, 0)
        here = sequence < sequences
        first_q = tl.load(ends_q + sequence, mask=here, other=0)
        first_k = tl.load(ends_k + sequence, mask=here, other=0)
        num_q = (tl.load(ends_q + sequence + 1, mask=here, other=0) - first_q).to(tl.int32)
        num_k = (tl.load(ends_k + sequence + 1, mask=here, other=0) - first_k).to(tl.int32)
        return first_q.to(tl.int64), num_q, first_k.to(tl.int64), num_k, (place - skipped) * BLOCK
    else:
        zero = batch * 0
        held = keys
        if RAGGED:
            held = tl.load(lengths + batch).to(tl.int32)
        return zero, queries, zero, held, place * BLOCK


@triton.jit
def load(pointer, tokens, channels, SOME_TOKENS: tl.constexpr, SOME_CHANNELS: tl.constexpr):
    """Load a tile; a mask that is not asked for is true throughout."""
    if SOME_TOKENS and SOME_CHANNELS:
        return tl.load(pointer, mask=tokens & channels, other=0.0)
    elif SOME_TOKENS:
        return tl.load(pointer, mask=tokens, other=0.0)
    elif SOME_CHANNELS:
        return tl.load(pointer, mask=channels, other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def load_finite(pointer, tokens, channels, EDGE: tl.constexpr, SOME_CHANNELS: tl.constexpr, ACC: tl.constexpr):
    """Load a tile; where the mask crosses it, as `finite` with what that returns."""
    tile = load(pointer, tokens, channels, EDGE, SOME_CHANNELS)
    if EDGE:
        return finite(tile, ACC)
    else:
        return tile, tokens


@triton.jit
def sees(i, j, num_q, num_k, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return which queries i see which keys j; the two broadcast to the wanted shape."""
    visible = (i < num_q) & (j < num_k)
    if CAUSAL:
        visible = visible & (j <= i + (num_k - num_q))
    if WINDOW:
        visible = visible & (j > i + (num_k - num_q) - window)
    return visible


@triton.jit
def key_ranges(
    first, num_q, num_k, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return bounds a, b, c, d of the key tiles of queries from `first`: from b to c, all queries see all keys."""
    shift = num_k - num_q
    last = tl.minimum(first + BLOCK_Q, num_q) - 1
    end = tl.where(last < first, 0, num_k)
    whole = num_k
    if CAUSAL:
        end = tl.minimum(end, last + shift + 1)
        whole = tl.minimum(whole, first + shift + 1)
    begin = 0
    inner = 0
    if WINDOW:
        begin = tl.maximum(first + shift - window + 1, 0) // BLOCK_K * BLOCK_K
        inner = tl.cdiv(tl.maximum(last + shift - window + 1, 0), BLOCK_K) * BLOCK_K
    end = tl.maximum(end, begin)
    inner = tl.minimum(inner, begin + tl.cdiv(end - begin, BLOCK_K) * BLOCK_K)
    whole = tl.maximum(tl.maximum(whole, 0) // BLOCK_K * BLOCK_K, inner)
    return begin, inner, tl.minimum(whole, tl.maximum(end, inner)), end


@triton.jit
def query_ranges(
    first, num_q, num_k, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return bounds a, b, c, d of the query tiles that see the keys from `first`: those from b to c see all of them."""
    shift = num_k - num_q
    last = tl.minimum(first + BLOCK_K, num_k) - 1
    begin = 0
    inner = 0
    if CAUSAL:
        begin = tl.maximum(first - shift, 0) // BLOCK_Q * BLOCK_Q
        inner = tl.cdiv(tl.maximum(first + BLOCK_K - 1 - shift, 0), BLOCK_Q) * BLOCK_Q
    end = tl.where(last < first, 0, num_q)
    whole = num_q
    if WINDOW:
        end = tl.minimum(end, last - shift + window)
        whole = tl.minimum(whole, first - shift + window)
    end = tl.maximum(end, begin)
    ceiling = begin + tl.cdiv(end - begin, BLOCK_Q) * BLOCK_Q
    # A tile that holds fewer keys than it has room for is masked throughout.
    inner = tl.where(first + BLOCK_K > num_k, ceiling, tl.minimum(inner, ceiling))
    whole = tl.maximum(tl.maximum(whole, 0) // BLOCK_Q * BLOCK_Q, inner)
    return begin, inner, tl.minimum(whole, tl.maximum(end, inner)), end


@triton.jit
def num_tiles(a, b, c, d, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many tiles are seen in part, or whole."""
    if EDGE:
        return tl.cdiv(b - a, BLOCK) + tl.cdiv(tl.maximum(d - c, 0), BLOCK)
    else:
        return tl.cdiv(c - b, BLOCK)


@triton.jit
def tile_start(n, a, b, c, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """Return where the n-th of them begins."""
    if EDGE:
        before = tl.cdiv(b - a, BLOCK)
        return tl.where(n < before, a + n * BLOCK, c + (n - before) * BLOCK)
    else:
        return b + n * BLOCK


@triton.jit
def multiply(a, b, acc, NATIVE: tl.constexpr):
    """Return acc + a b. AMD's matrix units take float32 factors as they are; others' take their bfloat16 parts."""
    if NATIVE:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return product(a, b, acc)


@triton.jit
def scores(a, b, bend, CAP: tl.constexpr, FLIP: tl.constexpr, NATIVE: tl.constexpr, ACC: tl.constexpr):
    """Return the scores of a [M, D] against b [D, N]: products, capped, or with the sign of a negative scale."""
    return bent(multiply(a, b, tl.zeros([a.shape[0], b.shape[1]], ACC), NATIVE), bend, CAP, FLIP)


@triton.jit
def bent(s, bend, CAP: tl.constexpr, FLIP: tl.constexpr):
    """Return the scores of products, as `scores` does."""
    if CAP:
        s = tanh(s * bend)
    if FLIP:
        s = -s
    return s


@triton.jit
def sliced_product(
    a, b, rows_a, rows_b, a_step, b_step, SOME_ROWS: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Return the products of the rows that a [M, 1] points at with those of b [N, 1], SLICE channels at a time.

    Both are loaded as they are needed, and are not held: of a float32 factor [16, 128] in three parts every warp holds
    96 registers a thread. Rows of a past `rows_a` are zeros, those of b with SOME_ROWS alone.
    """
    acc = tl.zeros([a.shape[0], b.shape[0]], ACC)
    for at in tl.range(0, WIDTH, SLICE):
        o = (at + tl.arange(0, SLICE))[None, :]
        some: tl.constexpr = WIDTH % SLICE != 0
        b_a = load(a + o * a_step, rows_a[:, None], o < WIDTH, True, some)
        b_b = load(b + o * b_step, rows_b[:, None], o < WIDTH, SOME_ROWS, some)
        acc = product(b_a, b_b, acc, B_TURNED=True)
    return acc


@triton.jit
def add_product(acc, weights, tile, PRECISE: tl.constexpr, NATIVE: tl.constexpr):
    """Return acc + weights tile, with the weights rounded to the tile's dtype, or as two such numbers each."""
    high = weights.to(tile.dtype)
    acc = multiply(high, tile, acc, NATIVE)
    if PRECISE:
        acc = multiply((weights - high.to(weights.dtype)).to(tile.dtype), tile, acc, NATIVE)
    return acc


@triton.jit
def finite(tile, ACC: tl.constexpr):
    """Return a tile [N, D] with zeros for what is not finite, and [N] zeros, NaN where a row had such.

    A masked weight is 0, and 0 times NaN is NaN: what a query does not see must not be in the product. Added to the
    weights of those who see it, the NaN reaches them all the same.
    """
    good = tl.abs(tile.to(ACC)) < float("inf")
    poison = tl.where(tl.min(good.to(tl.int32), 1) > 0, 0.0, float("nan")).to(ACC)
    return tl.where(good, tile, tl.zeros_like(tile)), poison
