"""Pairs of equal models, one of them accelerated, and what is compared between them."""

import copy
from typing import Any

import torch
from torch import Tensor

from bench.accelerate_models import TINY, build
from star_core import AccelerationReport, accelerate

LOGITS = 1e-4
"""Largest difference of logits, whose largest are 3 to 20."""

GRADIENTS = 1e-3
"""Largest difference of a gradient, relative to its largest element."""


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Draw tokens that are none of the special ones."""
    return torch.randint(3, TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def pair(name: str, **settings: Any) -> tuple[Any, Any, AccelerationReport]:
    """Return an accelerated model, an equal untouched one, and the report."""
    untouched = build(name, TINY, **settings).eval()
    accelerated = copy.deepcopy(untouched)
    return accelerated, untouched, accelerate(accelerated)


def left_padding(ids: Tensor) -> Tensor:
    """Return a mask that leaves out a third of the first row's tokens and none of the last's."""
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    return mask


def in_chunks(model: Any, ids: Tensor, lengths: list[int]) -> Tensor:
    """Return the logits of tokens given a few at a time, each call with the cache of the one before."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    # RecurrentGemma clears what it keeps in itself only when it makes the cache.
    if hasattr(model, "_setup_cache"):
        model._setup_cache(model.config, ids.shape[0], ids.device, torch.float32)
    parts, start = [], 0
    with torch.no_grad():
        for length in lengths:
            parts.append(model(ids[:, start : start + length], cache=cache, use_cache=True).logits)
            start += length
    return torch.cat(parts, dim=1)


def largest_difference(got: Tensor, want: Tensor) -> float:
    """Return the largest difference of any two elements."""
    return float((got - want).detach().abs().max())


def assert_same_gradients(got: Any, want: Any) -> None:
    """Compare the gradients of two equal models, weight by weight, each relative to its size."""
    largest = max(float(one.grad.abs().max()) for one in want.parameters() if one.grad is not None)
    for (name, one), other in zip(got.named_parameters(), want.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            # What is zero but for rounding has no size of its own: a millionth of the largest gradient stands for it.
            size = max(float(other.grad.abs().max()), 1e-6 * largest)
            assert largest_difference(one.grad, other.grad) <= GRADIENTS * size, name
