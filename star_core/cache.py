"""The decoding state of a model: what each LIV keeps between tokens, with shared tensors held once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
"""What one LIV keeps between calls, by name. Its tensors are written in place."""


@dataclass(frozen=True)
class StateSpec:
    """Shape and dtype of one tensor of a LIV's state, known before anything is allocated."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that a tensor of this shape and dtype takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Cache:
    """State of every LIV of a model for one batch of sequences, allocated in full when made.

    Attributes:
        states: One mapping from name to tensor for each LIV, first to last. A LIV that reuses another's keys, values or
            filter has no entry for them: they are read from the LIV that computed them.
        batch_size: Sequences held.
        max_length: Tokens for which there is room.
        length: Tokens seen so far.
    """

    def __init__(
        self,
        specs: Sequence[Mapping[str, StateSpec]],
        *,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.states: list[State] = [
            {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in spec_of.items()}
            for spec_of in specs
        ]
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that the states hold, each storage counted once."""
        storages = {}
        for state in self.states:
            for tensor in state.values():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr() or id(storage)] = storage.nbytes()
        return sum(storages.values())

    def reset(self) -> None:
        """Forget every token, keeping the memory."""
        for state in self.states:
            for tensor in state.values():
                tensor.zero_()
        self.length = 0

    def require_room(self, batch_size: int, tokens: int) -> None:
        """Raise ValueError unless `tokens` more tokens of `batch_size` sequences fit.

        Raises:
            ValueError: The batch is of another size than the cache's, or the cache would overflow.
        """
        if batch_size != self.batch_size:
            raise ValueError(
                f"tokens: a batch of {batch_size} does not fit a cache made for a batch of {self.batch_size}"
            )
        if self.length + tokens > self.max_length:
            raise ValueError(
                f"cache: {self.length} tokens held and {tokens} new ones exceed its max_length of {self.max_length}; "
                "make a longer one with new_cache(batch_size, max_length)"
            )
