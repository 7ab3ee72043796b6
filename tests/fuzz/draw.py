"""Random sizes, values, packings and memory layouts, all from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

WIDTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 60, 64, 65, 100, 130)
LENGTHS = (0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 66, 100, 127, 128, 129, 150, 257)
INTEGERS = (torch.int32, torch.int64)


class Draw:
    """A source of random test inputs; the same seed gives the same inputs."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._torch = torch.Generator().manual_seed(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def choose(self, options: Sequence[T]) -> T:
        return self._random.choice(options)

    def count(self, least: int, most: int) -> int:
        return self._random.randint(least, most)

    def width(self, most: int = 130) -> int:
        return self.choose([one for one in WIDTHS if one <= most])

    def length(self) -> int:
        return self.choose(LENGTHS)

    def taps(self) -> int:
        """Return the width of a short convolution."""
        return self.count(1, 7)

    def batch_and_length(self, most_tokens: int = 600) -> tuple[int, int]:
        batch, length = self.choose((0, 1, 1, 1, 2, 3, 5)), self.length()
        return batch, min(length, most_tokens // max(batch, 1))

    def packing(self, length: int) -> Tensor:
        """Return boundaries of 0 to 6 sequences, some of them empty."""
        count = self.count(0 if length == 0 else 1, 6)
        inner = sorted(self.count(0, length) for _ in range(count - 1))
        ends = [0, *inner, length] if count else [0]
        return torch.tensor(ends, dtype=self.choose(INTEGERS))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._torch, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self._torch, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._torch)

    def values(self, *shape: int, size: float = 4.0) -> Tensor:
        """Return numbers of either sign: ordinary, tiny, up to about `size`, with many zeros, or all alike."""
        x = self.normal(*shape)
        kind = self.choose(("plain", "plain", "plain", "tiny", "large", "sparse", "zero", "constant", "mixed"))
        if kind == "tiny":
            return x * 1e-6
        if kind == "large":
            return x.clamp(-3, 3) * (size / 3)
        if kind == "sparse":
            return x * (self.uniform(0, 1, *shape) < 0.3)
        if kind == "zero":
            return torch.zeros_like(x)
        if kind == "constant":
            return torch.full_like(x, self.choose((1.0, -1.0, 0.5, size, -size)))
        return x * 10 ** self.uniform(-6, 0, *shape) if kind == "mixed" else x

    def log_decays(self, *shape: int) -> Tensor:
        """Return logarithms of decays: ordinary, near 0, and with some of -8, -3e4, -inf and 0."""
        x = -self.uniform(0, self.choose((1e-6, 0.1, 2.0)), *shape)
        if self.chance(0.3):
            extremes = torch.tensor([-8.0, -3e4, float("-inf"), 0.0], dtype=torch.float64)
            x = torch.where(self.uniform(0, 1, *shape) < 0.1, extremes[self.integers(4, *shape)], x)
        return x

    def layout(self, x: Tensor) -> Tensor:
        """Return x in some memory layout; where an axis has stride 0, the values along it are the first one's."""
        layouts: tuple[Callable[[Tensor], Tensor], ...] = (
            torch.clone,
            torch.clone,
            self._reordered,
            self._cut_out,
            self._cut_out,
            self._expanded,
        )
        return self.choose(layouts)(x)

    def _reordered(self, x: Tensor) -> Tensor:
        order = self._random.sample(range(x.ndim), x.ndim)
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])

    def _cut_out(self, x: Tensor) -> Tensor:
        """Cut the view out of a larger buffer that is NaN or infinite everywhere else."""
        fill = self.choose((float("nan"), float("inf"), float("-inf"))) if x.is_floating_point() else 7
        if x.ndim == 0:
            return torch.stack([torch.full_like(x, fill), x])[1]
        order = self._random.sample(range(x.ndim), x.ndim) if self.chance(0.5) else list(range(x.ndim))
        shape, index = [], []
        for size in (x.shape[axis] for axis in order):
            before, step, after = self.count(0, 2), self.choose((1, 1, 2, 3)), self.count(0, 2)
            shape.append(before + size * step + after)
            index.append(slice(before, before + size * step, step))
        view = torch.full(shape, fill, dtype=x.dtype)[tuple(index)]
        view = view.permute([order.index(axis) for axis in range(x.ndim)])
        view.copy_(x)
        return view

    def _expanded(self, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.ndim) if x.shape[axis] > 1]
        if not axes:
            return x.clone()
        axis = self.choose(axes)
        return x.narrow(axis, 0, 1).clone().expand(x.shape)
