"""First values that the recurrent layers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def step_bias(
    count: int,
    least: float,
    most: float,
    floor: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw biases whose softplus is log-uniform in least .. most, and not below `floor`: (count,).

    Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, section 3.6.
    """
    if not 0 < least <= most:
        raise ValueError(f"dt_min and dt_max are {least} and {most}, need 0 < dt_min <= dt_max")
    low, high = math.log(least), math.log(most)
    steps = torch.exp(torch.rand(count, device=device, dtype=dtype) * (high - low) + low).clamp(min=floor)
    # softplus^-1(s) = log(e^s - 1) = s + log(1 - e^-s), which keeps its digits at small s.
    return steps + torch.log(-torch.expm1(-steps))


def undecayed(values: Tensor) -> nn.Parameter:
    """Make a parameter that carries the peers' mark `_no_weight_decay` for optimisers."""
    parameter = nn.Parameter(values)
    mark(parameter, "_no_weight_decay")
    return parameter


def mark(parameter: Tensor, name: str, value: object = True) -> None:
    """Set an attribute on a parameter, as the peers' training code looks for them."""
    setattr(parameter, name, value)
