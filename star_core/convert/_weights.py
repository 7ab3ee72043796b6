"""The copying itself: which rows of which weights of transformers make up one of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the rows of one of our weights come from.

    Attributes:
        sources: Their weights, concatenated in this order.
        roll: Rows that move from the end of the concatenation to its front.
    """

    sources: tuple[str, ...]
    roll: int = 0


Names = Mapping[str, Rows]
"""Our weights by name."""


def one_place(weights: Mapping[str, Tensor]) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype that all `weights` have.

    Raises:
        ValueError: There are several, weights without values, or weights that are not floating.
    """
    devices, dtypes = {weight.device for weight in weights.values()}, {weight.dtype for weight in weights.values()}
    for name, found in (("devices", devices), ("dtypes", dtypes)):
        if len(found) > 1:
            raise ValueError(f"model: has weights of {name} {_listed(found)}; needs one for all")
    (device,), (dtype,) = devices, dtypes
    if device.type == "meta":
        raise ValueError("model: its weights are on the device meta, without values; needs them loaded")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"model: its weights are {dtype}; needs float16, bfloat16, float32 or float64")
    return device, dtype


def gather(
    theirs: Mapping[str, Tensor], names: Names, shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield our weights, by name, with the shapes that ours have.

    Raises:
        ValueError: A weight of theirs has no place among ours, one is missing, or a shape does not fit.
    """
    needed = [source for rows in names.values() for source in rows.sources]
    if extra := sorted(theirs.keys() - set(needed)):
        raise ValueError(f"model: a genome has no place for {_some(extra)}; needs a checkpoint without")
    if missing := sorted(set(needed) - theirs.keys()):
        raise ValueError(f"model: lacks {_some(missing)}; needs a checkpoint with")
    if names.keys() != shapes.keys():
        raise AssertionError(f"names differ: {sorted(names.keys() ^ shapes.keys())}")
    for name, rows in names.items():
        weight = torch.cat([theirs[source].detach() for source in rows.sources]).roll(rows.roll, 0)
        shape = list(shapes[name])
        # Their convolutions have an axis of length 1 for the one input channel of a group.
        if [size for size in weight.shape if size > 1] != [size for size in shape if size > 1]:
            raise ValueError(f"model: {' + '.join(rows.sources)} is {list(weight.shape)}; needs {shape}")
        yield name, weight.reshape(shape)


def scatter(ours: Mapping[str, Tensor], names: Names, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield their weights, by name, with the shapes that `theirs` have: what `gather` undoes."""
    for name, rows in names.items():
        targets = [theirs[source] for source in rows.sources]
        parts = torch.split(ours[name].roll(-rows.roll, 0), [target.shape[0] for target in targets])
        for source, target, part in zip(rows.sources, targets, parts, strict=True):
            yield source, part.reshape(target.shape)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _listed(found: set[torch.device] | set[torch.dtype]) -> str:
    return " and ".join(sorted(map(str, found)))
