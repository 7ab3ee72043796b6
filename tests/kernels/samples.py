"""Random float64 inputs, seeded by their name and shape: one call gives one tensor, in any order and any process."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def normal(name: str, *shape: int) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=_generator(name, shape), dtype=torch.float64)


def uniform(name: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(shape, generator=_generator(name, shape), dtype=torch.float64)


def integers(name: str, *shape: int, high: int) -> Tensor:
    """Return int64 numbers in 0 .. high - 1."""
    return torch.randint(high, shape, generator=_generator(name, shape))


def _generator(name: str, shape: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{name}{shape}".encode()))
