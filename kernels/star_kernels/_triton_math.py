"""What the Triton kernels share inside: the type of sums, activations, and the host's side of shapes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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
def tanh(x):
    """tanh, to 1.5 units in the last place of float32: a polynomial below 0.55, the exponential above."""
    e = tl.exp(-2.0 * tl.abs(x))
    if x.dtype == tl.float64:
        y = -2.0 * tl.abs(x)
        less = tl.where(e == 1.0, y, (e - 1.0) * (y / tl.where(e == 1.0, 1.0, tl.log(e))))  # e - 1 (Kahan)
        less = tl.where(e < 0.5, e - 1.0, less)
        return tl.where(x < 0, less, -less) / (1.0 + e)
    else:
        y = x * x
        # A fit of (tanh(x) / x - 1) / x^2 in x^2, which leaves a relative error of 6e-9.
        near = y * (0.02131238952279091 - 0.006615082733333111 * y) - 0.05391000956296921
        near = y * (y * near + 0.13333117961883545) - 0.3333333134651184
        far = (1.0 - e) / (1.0 + e)
        return tl.where(tl.abs(x) < 0.55, x + x * (y * near), tl.where(x < 0, -far, far))
