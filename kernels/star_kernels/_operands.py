"""What the operators' host sides share, whoever serves them: empty results, absent arguments, a step's one token."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels._numerics import accumulator


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype that sums and states are held in beside x."""
    return accumulator(x.dtype)


def like(x: Tensor) -> Tensor:
    """Return an empty tensor of x's shape and dtype, without gaps."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def like_or_none(x: Tensor | None, first: Tensor) -> Tensor:
    """Stand for the gradient of an optional argument: no elements where there is none."""
    return torch.empty(0, dtype=wide(first), device=first.device) if x is None else like(x)


def given(argument: Tensor | None, gradient: Tensor) -> Tensor | None:
    """Return None in place of the gradient of what was not given."""
    return None if argument is None else gradient


def either(one: Tensor | None, other: Tensor) -> Tensor:
    """Return the second where there is no first: a kernel's pointer that it does not read."""
    return other if one is None else one


def strides(x: Tensor | None, axes: int) -> tuple[int, ...]:
    """Return the strides of an optional tensor."""
    return (0,) * axes if x is None else x.stride()


def one_token(x: Tensor | None) -> Tensor | None:
    """Give a step's tensor (B, ...) the time axis of one token."""
    return None if x is None else x.unsqueeze(1)


def sequences_of(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return how many sequences x (B, T, ...) holds."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def will_differentiate(*arguments: Tensor | None) -> bool:
    """Return whether a call's gradient may be asked for, and what its backward reads has to be kept."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in arguments)


def score_factor(scale: float | None, width: int) -> float:
    """Return the factor of scores: `scale`, or width^(-1/2). Without channels the scores are 0 whatever it is."""
    return float(max(width, 1) ** -0.5) if scale is None else float(scale)
