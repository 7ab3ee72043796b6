"""Checks that the public functions share: host-visible facts only, one line for what holds, words for what does not."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
INTEGER = frozenset({torch.int32, torch.int64})


def check_first(name: str, value: Tensor, ndim: int, layout: str) -> None:
    """Check the tensor that fixes the sizes: floating, with as many axes as `layout` names."""
    if isinstance(value, Tensor) and value.ndim == ndim and value.dtype in FLOATING:
        return
    _check_floating_tensor(name, value)
    raise ValueError(f"{name} has shape {tuple(value.shape)}, needs {ndim} axes {layout}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], layout: str, first: Tensor) -> None:
    """Check a floating tensor's shape, and that it lies on the same device as `first`."""
    if isinstance(value, Tensor) and value.shape == shape and value.dtype in FLOATING and value.device == first.device:
        return
    _refuse_shape(name, value, shape, layout, first)


def check_same_dtype(name: str, value: Tensor, first_name: str, first: Tensor) -> None:
    """Check that two activations have one dtype."""
    if value.dtype != first.dtype:
        raise TypeError(f"{name} is {value.dtype}, needs {first.dtype}, the dtype of {first_name}")


def check_indices(name: str, value: Tensor, first: Tensor) -> None:
    """Check that a tensor holds int32 or int64 and lies on the same device as `first`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {_type(value)}, needs a torch.Tensor")
    if value.dtype not in INTEGER:
        raise TypeError(f"{name} is {value.dtype}, needs torch.int32 or torch.int64")
    if value.device != first.device:
        raise ValueError(f"{name} is on {value.device}, needs {first.device}")


def check_sequences(name: str, cu_seqlens: Tensor | None, batch: int, length: int, first: Tensor) -> int:
    """Check the boundaries of packed sequences and return how many sequences there are (the batch when not packed).

    The values are read when they are on the CPU; on another device they are the caller's promise.
    """
    if cu_seqlens is None:
        return batch
    check_indices(name, cu_seqlens, first)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} has shape {tuple(cu_seqlens.shape)}, needs (N + 1,)")
    if batch != 1:
        raise ValueError(f"{name} needs packed sequences with B == 1, got B == {batch}")
    if cu_seqlens.device.type == "cpu":
        ends: list[int] = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
            raise ValueError(f"{name} is {ends}, needs boundaries that rise from 0 to T == {length}")
    return cu_seqlens.shape[0] - 1


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Check that an argument is one of the known choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, needs one of {', '.join(repr(one) for one in choices)}")


def check_positive(name: str, value: float | None, *, zero: bool = False) -> None:
    """Check an optional number's sign."""
    if value is not None and not (value >= 0 if zero else value > 0):
        raise ValueError(f"{name} is {value!r}, needs a number {'>= 0' if zero else '> 0'}")


def check_groups(name: str, groups: int, of_name: str, of: int) -> None:
    """Check that `groups` divides the axis that it shares out."""
    if groups < 1 or of % groups:
        raise ValueError(f"{name} has {groups} heads or groups, needs a divisor of {of}, those of {of_name}")


def _check_floating_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {_type(value)}, needs a torch.Tensor")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} is {value.dtype}, needs float16, bfloat16, float32 or float64")


def _refuse_shape(name: str, value: Any, shape: tuple[int, ...], layout: str, first: Tensor) -> NoReturn:
    _check_floating_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, needs {layout} = {tuple(shape)}")
    raise ValueError(f"{name} is on {value.device}, needs {first.device}")


def _type(value: Any) -> str:
    return type(value).__name__
