"""What the Triton kernels share inside: the type of sums, activations, and the host's side of shapes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._triton import interpreting

# Numpy multiplies float32 exactly; the split products are tested by themselves.
SPLIT = tl.constexpr(not interpreting())


def accumulator(tensor: Tensor) -> Any:
    """Return Triton's name of the type that sums and states are held in: float64 for float64, else float32."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def next_power_of_2(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least both."""
    return max(least, 1 << (max(number, 1) - 1).bit_length())


def rows(x: Tensor) -> Tensor:
    """Return x as (rows, D): a view where its strides allow one, else a copy."""
    return x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.numel(), 0)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without an overflow at either end."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    """The derivative of silu."""
    s = sigmoid(x)
    return s + x * s * (1.0 - s)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact at both ends."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1: the rounding of 1 + x is taken back by its slope (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0: by Kahan's quotient, which keeps the digits near 0."""
    u = tl.exp(x)
    near = (u - 1.0) * (x / tl.where(u == 1.0, 1.0, tl.log(u)))
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, near))


@triton.jit
def sequence_of(slot, ends, ends_step, count, CHUNK: tl.constexpr):
    """Return the packed sequence that a slot belongs to: the last whose first slot, begin // CHUNK + index, it reaches.

    Slots that are laid out so leave room for every chunk, and one for an empty sequence, with no sum over those before.
    """
    low = slot * 0
    high = low + count
    while high - low > 1:
        middle = (low + high) // 2
        reached = tl.load(ends + middle * ends_step).to(tl.int64) // CHUNK + middle <= slot
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def tanh(x):
    """tanh, to 1.5 units in the last place of float32: a polynomial below 0.55, the exponential above."""
    e = tl.exp(-2.0 * tl.abs(x))
    if x.dtype == tl.float64:
        less = expm1(-2.0 * tl.abs(x))
        return tl.where(x < 0, less, -less) / (1.0 + e)
    else:
        y = x * x
        # A fit of (tanh(x) / x - 1) / x^2 in x^2, which leaves a relative error of 6e-9.
        near = y * (0.02131238952279091 - 0.006615082733333111 * y) - 0.05391000956296921
        near = y * (y * near + 0.13333117961883545) - 0.3333333134651184
        far = (1.0 - e) / (1.0 + e)
        return tl.where(tl.abs(x) < 0.55, x + x * (y * near), tl.where(x < 0, -far, far))


@triton.jit
def product(a, b, acc, A_TURNED: tl.constexpr = False, B_TURNED: tl.constexpr = False):
    """acc + a b, exact to float32 whatever the factors' dtype; of the transposes of those that are to be turned.

    A float32 factor is split into three bfloat16 parts, 24 bits in all: three tensor-core products with a bfloat16
    factor, six with another float32 one. On an H100 six run at 165 TFLOP/s where its float32 units do 67, and they are
    the same on every card; TF32 has 11 bits a part and no counterpart on AMD's. Parts are turned, not what they are
    parts of: shared memory does that, where a float32 tile would be loaded number by number for it.
    """
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(_turned(a, A_TURNED), _turned(b, B_TURNED), acc, out_dtype=acc.dtype)
    elif not SPLIT:
        a, b = _turned(a, A_TURNED).to(acc.dtype), _turned(b, B_TURNED).to(acc.dtype)
        return tl.dot(a, b, acc, out_dtype=acc.dtype)
    else:
        return split_product(a, b, acc, A_TURNED, B_TURNED)


@triton.jit
def split_product(a, b, acc, A_TURNED: tl.constexpr = False, B_TURNED: tl.constexpr = False):
    """acc + a b in bfloat16 parts, the smallest first. Infinite factors may give NaN."""
    if a.dtype == tl.bfloat16:
        a = _turned(a, A_TURNED)
        first, second, third = _parts(b, B_TURNED)
        acc = tl.dot(a, third, acc)
        acc = tl.dot(a, second, acc)
        return tl.dot(a, first, acc)
    elif b.dtype == tl.bfloat16:
        b = _turned(b, B_TURNED)
        first, second, third = _parts(a, A_TURNED)
        acc = tl.dot(third, b, acc)
        acc = tl.dot(second, b, acc)
        return tl.dot(first, b, acc)
    else:
        a_first, a_second, a_third = _parts(a, A_TURNED)
        b_first, b_second, b_third = _parts(b, B_TURNED)
        # float16 has two parts.
        if b.dtype == tl.float32:
            acc = tl.dot(a_first, b_third, acc)
        if a.dtype == tl.float32:
            acc = tl.dot(a_third, b_first, acc)
        acc = tl.dot(a_second, b_second, acc)
        acc = tl.dot(a_first, b_second, acc)
        acc = tl.dot(a_second, b_first, acc)
        return tl.dot(a_first, b_first, acc)


@triton.jit
def _parts(x, TURNED: tl.constexpr):
    """Split x into bfloat16 numbers whose sum it is."""
    wide = x.to(tl.float32)
    first = wide.to(tl.bfloat16)
    rest = _finite_or_zero(wide - first.to(tl.float32))
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    return _turned(first, TURNED), _turned(second, TURNED), _turned(third, TURNED)


@triton.jit
def _turned(x, TURNED: tl.constexpr):
    if TURNED:
        return tl.trans(x)
    else:
        return x


@triton.jit
def _finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def clean(x):
    """Return x with zeros for what is not finite, as a factor that is masked elsewhere: 0 NaN is NaN."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)
