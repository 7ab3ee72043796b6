"""Random float64 inputs, seeded by their name and shape: one call gives one tensor, in any order, on any device."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def normal(name: str, *shape: int) -> Tensor:
    """Return standard normal numbers."""
    made = torch.randn(shape, generator=_generator(name, shape), dtype=torch.float64, device="cpu")
    return made.to(torch.get_default_device())


def uniform(name: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return numbers between `low` and `high`."""
    made = torch.rand(shape, generator=_generator(name, shape), dtype=torch.float64, device="cpu")
    return low + (high - low) * made.to(torch.get_default_device())


def integers(name: str, *shape: int, high: int) -> Tensor:
    """Return int64 numbers in 0 .. high - 1."""
    made = torch.randint(high, shape, generator=_generator(name, shape), device="cpu")
    return made.to(torch.get_default_device())


def _generator(name: str, shape: tuple[int, ...]) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(zlib.crc32(f"{name}{shape}".encode()))
