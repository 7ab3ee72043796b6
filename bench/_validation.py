"""Checks that every instrument makes, and the error all of them raise."""

from __future__ import annotations

import math

import torch


class MeasurementError(RuntimeError):
    """A measurement that could not be made, with its reason."""


def require_integer(name: str, value: int, least: int) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: needs an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: needs at least {least}, got {value}")


def require_seconds(name: str, value: float) -> None:
    """Raise unless `value` is a finite number of seconds, 0 included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: needs a number of seconds, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: needs a finite number, 0 or more, got {value}")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device to measure on; for None the CUDA device that this process has used, or else the CPU."""
    if device is None:
        used_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return torch.device("cuda", torch.cuda.current_device()) if used_cuda else torch.device("cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: needs cpu or cuda, got {device!r}") from error
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device: needs cpu or cuda, got {str(device)!r}")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {str(device)!r} asked for, but this torch sees no CUDA device")
    return target
