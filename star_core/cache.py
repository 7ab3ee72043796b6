"""The decoding state of a model: what each LIV keeps between tokens, with shared tensors held once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from star_core.ragged import Ragged

State = dict[str, Tensor]
"""What one LIV keeps between calls, by name. Its tensors are written in place."""


@dataclass(frozen=True)
class StateSpec:
    """Shape and dtype of one tensor of a LIV's state, known before anything is allocated.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        axes: What its leading axes count: ("row", "token") for keys, ("row",) for a recurrent state, () for what all
            rows share.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[str, ...] = ("row",)

    @property
    def nbytes(self) -> int:
        """Bytes that a tensor of this shape and dtype takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Cache:
    """State of every LIV of a model for one batch of sequences, allocated in full when made.

    Rows may be of unequal length: padding is never stored, so that row b holds its own tokens and nothing else.

    Attributes:
        states: One mapping from name to tensor for each LIV, first to last. A LIV that reuses another's keys, values or
            filter has no entry for them: they are read from the LIV that computed them.
        batch_size: Sequences held.
        max_length: Tokens for which there is room.
        length: Tokens that the longest row has seen so far.
        lengths: Tokens that each row has seen, (batch_size,), int64; None where all have seen `length`.
    """

    def __init__(
        self,
        specs: Sequence[Mapping[str, StateSpec]],
        *,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.states: list[State] = []
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0
        self.lengths: Tensor | None = None
        self.device = torch.device(device)
        self._allocate(specs)

    def _allocate(self, specs: Sequence[Mapping[str, StateSpec]]) -> None:
        self._axes = [{name: spec.axes for name, spec in spec_of.items()} for spec_of in specs]
        self.states = [
            {name: torch.zeros(spec.shape, dtype=spec.dtype, device=self.device) for name, spec in spec_of.items()}
            for spec_of in specs
        ]

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
        self.lengths = None

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was, as beam search does after each step.

        Args:
            rows: (R,), int32 or int64, of any length R >= 1: R becomes the batch size. Their values are the caller's
                promise.

        Raises:
            ValueError: `rows` has another shape; TypeError: another dtype.
        """
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64):
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"rows: needs a tensor of int32 or int64, got {got}")
        if rows.ndim != 1 or not rows.shape[0]:
            raise ValueError(f"rows: needs (R,) with R >= 1, got {list(rows.shape)}")
        rows = rows.to(self.device)
        for state, axes in zip(self.states, self._axes, strict=True):
            for name, tensor in state.items():
                if "row" not in axes[name]:
                    continue
                # Of keys and values, only what has been written is moved.
                used = tensor[:, : self.length] if "token" in axes[name] else tensor
                moved = used.index_select(0, rows)
                if rows.shape[0] != tensor.shape[0]:
                    tensor = state[name] = tensor.new_zeros((rows.shape[0], *tensor.shape[1:]))
                    used = tensor[:, : self.length] if "token" in axes[name] else tensor
                used.copy_(moved)
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, rows)
        self.batch_size = rows.shape[0]

    @torch.no_grad()
    def resize(self, specs: Sequence[Mapping[str, StateSpec]], max_length: int) -> None:
        """Move every row to new memory with room for `max_length` tokens; `Backbone.grow` calls this.

        What all rows share is left zero, for the LIV that owns it to fill again.
        """
        old, axes_of = self.states, self._axes
        self._allocate(specs)
        for states, held, axes in zip(self.states, old, axes_of, strict=True):
            for name, tensor in held.items():
                if axes[name] == ("row", "token"):
                    states[name][:, : self.length] = tensor[:, : self.length]
                elif axes[name]:
                    states[name].copy_(tensor)
        self.max_length = max_length

    def advance(self, tokens: int, ragged: Ragged | None) -> None:
        """Count `tokens` more for every row, or what `ragged` says."""
        if ragged is None:
            self.length += tokens
            return
        self.length = ragged.longest
        if ragged.cu_seqlens is None:
            self.lengths = ragged.positions + 1
        else:
            assert ragged.all_cu_seqlens is not None
            self.lengths = ragged.all_cu_seqlens.diff().long()
            if bool((self.lengths == self.length).all()):
                self.lengths = None

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


def read(state: State, name: str) -> Tensor:
    """Return what `state` holds under `name`, as a constant that later writes leave alone.

    With gradients on, autograd may keep the tensor until the backward pass, after it was written again: a copy then.
    """
    return state[name].clone() if torch.is_grad_enabled() else state[name]


def write(state: State, name: str, value: Tensor) -> None:
    """Put `value` in the place of what `state` holds under `name`. Gradients end here."""
    state[name].copy_(_constant(value))


def append(state: State, name: str, new: Tensor, offset: int, ragged: Ragged | None) -> Tensor:
    """Write the `new` tokens behind those that `state[name]` [B, max_length, ...] holds, and return all of them.

    Args:
        state: The state of one LIV.
        name: Which of its tensors.
        new: [B, T, ...], or [1, N, ...] where packed.
        offset: Tokens that the longest row holds.
        ragged: Where the tokens lie if the rows are not equally long.

    Returns:
        [B, offset + T, ...], in a step of unequal rows with room to spare behind the shorter ones, or packed
        [1, M, ...]. Gradients reach `new`; what was held is constant.
    """
    memory = state[name]
    grad = torch.is_grad_enabled() and new.requires_grad
    if ragged is None:
        memory[:, offset : offset + new.shape[1]] = _constant(new)
        if offset == 0:
            return new
        return torch.cat((memory[:, :offset], new), 1) if grad else memory[:, : offset + new.shape[1]]
    places = (ragged.rows, ragged.positions)
    memory[places] = _constant(new).flatten(0, 1).to(memory.dtype)
    if ragged.cu_seqlens is None:
        seen = memory[:, : ragged.longest]
        return seen.index_put(places, new[:, 0]) if grad else seen
    if ragged.new is None:
        return new
    seen = memory[ragged.all_rows, ragged.all_positions]
    return (seen.index_copy(0, ragged.new, new[0]) if grad else seen)[None]


def _constant(x: Tensor) -> Tensor:
    # Asked first: a step writes a few tensors a LIV, and each `detach` takes 1 us.
    return x.detach() if x.requires_grad else x
