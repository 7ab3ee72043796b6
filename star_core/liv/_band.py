"""Which keys a query sees, and the memory of a band: the last tokens of each row, in slots that are used again.

A band of `window` tokens keeps the token at position p in slot p mod S, where S is the window, or the room of the cache
where that is smaller: its size does not grow with the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from star_core.cache import State
from star_core.liv._base import is_step
from star_core.ragged import Ragged


@dataclass(frozen=True)
class View:
    """Where queries and the keys beside them lie.

    Attributes:
        q_positions: Of the queries in their rows, (T,) or, in a step of unequal rows, (B, 1).
        k_positions: Of the keys, (S,) or (B, S); below 0 where a slot of the memory holds no token yet.
        q_rows: Row of each query, (T,), where rows are packed.
        k_rows: Row of each key, (S,), where rows are packed.
        q_ends: Boundaries between packed rows, (B + 1,), int32.
        k_ends: The same of the keys.
        lengths: In a step of unequal rows, how many of the keys, from the first, are tokens of the row, (B,).
    """

    q_positions: Tensor
    k_positions: Tensor
    q_rows: Tensor | None = None
    k_rows: Tensor | None = None
    q_ends: Tensor | None = None
    k_ends: Tensor | None = None
    lengths: Tensor | None = None


def view_of(x: Tensor, keys: int | None, offset: int, ragged: Ragged | None, window: int | None) -> View:
    """Return the view of the tokens of one call.

    Args:
        x: The LIV's input, [B, T, width], or [1, N, width] where packed.
        keys: In a step of unequal rows, the keys beside each query.
        offset: Tokens that the longest row of the state held before.
        ragged: Where the tokens lie if rows are not equally long.
        window: Of the band; None for all tokens.
    """
    device = x.device
    if ragged is None:
        q_positions = torch.arange(offset, offset + x.shape[1], device=device)
        first = 0 if window is None else max(0, offset - window + 1)
        return View(q_positions, torch.arange(first, offset + x.shape[1], device=device))
    if ragged.cu_seqlens is None:
        assert keys is not None
        newest, slots = ragged.positions[:, None], torch.arange(keys, device=device)
        k_positions = slots[None] if window is None else newest - (newest - slots) % keys
        return View(newest, k_positions, lengths=(ragged.positions + 1).clamp(max=keys))
    assert ragged.all_cu_seqlens is not None
    assert ragged.all_rows is not None
    assert ragged.all_positions is not None
    packed = {"q_rows": ragged.rows, "q_ends": ragged.cu_seqlens}
    if window is None:
        k_rows, k_ends = ragged.all_rows, ragged.all_cu_seqlens
        return View(ragged.positions, ragged.all_positions, k_rows=k_rows, k_ends=k_ends, **packed)
    held, counts = held_before(ragged)
    kept = held.clamp(max=window - 1)
    sizes = kept + counts
    k_ends = F.pad(sizes.cumsum(0), (1, 0))
    k_rows = torch.repeat_interleave(torch.arange(sizes.shape[0], device=device), sizes)
    k_positions = torch.arange(k_rows.shape[0], device=device) - (k_ends[:-1] - held + kept)[k_rows]
    return View(ragged.positions, k_positions, k_rows=k_rows, k_ends=k_ends.to(torch.int32), **packed)


def held_before(ragged: Ragged) -> tuple[Tensor, Tensor]:
    """Return how many tokens each packed row held before this call, and how many are new, (B,) int64 each."""
    assert ragged.cu_seqlens is not None
    assert ragged.all_cu_seqlens is not None
    counts = ragged.cu_seqlens.diff().long()
    return ragged.all_cu_seqlens.diff().long() - counts, counts


def append_to_band(state: State, name: str, new: Tensor, offset: int, ragged: Ragged | None) -> Tensor:
    """Write the `new` tokens to the slots of `state[name]` [B, S, ...], and return the keys that they see.

    Args:
        state: The state of one LIV.
        name: Which of its tensors.
        new: [B, T, ...], or [1, N, ...] where packed.
        offset: Tokens that the longest row held before.
        ragged: Where the tokens lie if rows are not equally long.

    Returns:
        [B, S', ...]: the last tokens held and the new ones, in order; in a step of unequal rows the slots themselves.
        Packed, [1, M, ...]. Gradients reach `new`; what was held is constant.
    """
    memory = state[name]
    slots = memory.shape[1]
    constant = new.detach().to(memory.dtype)
    if ragged is None:
        past = torch.arange(offset - min(offset, slots - 1), offset, device=new.device) % slots
        seen = torch.cat((memory[:, past], new), 1)
        last = min(new.shape[1], slots)
        places = torch.arange(offset + new.shape[1] - last, offset + new.shape[1], device=new.device) % slots
        memory[:, places] = constant[:, new.shape[1] - last :]
        return seen
    if is_step(new, state, ragged):
        slot = (ragged.rows, ragged.positions % slots)
        memory[slot] = constant[:, 0]
        grad = torch.is_grad_enabled() and new.requires_grad
        return memory.index_put(slot, new[:, 0]) if grad else memory
    view = view_of(new, None, offset, ragged, slots)
    assert view.k_rows is not None
    assert ragged.cu_seqlens is not None
    held, counts = held_before(ragged)
    rows = view.k_rows
    old = rows * slots + view.k_positions % slots
    fresh = memory.shape[0] * slots + ragged.cu_seqlens[:-1].long()[rows] + view.k_positions - held[rows]
    both = torch.cat((memory.flatten(0, 1), new[0]))
    seen = both[torch.where(view.k_positions < held[rows], old, fresh)][None]
    kept = ragged.positions >= (held + counts - slots)[ragged.rows]
    memory[ragged.rows[kept], ragged.positions[kept] % slots] = constant[0, kept]
    return seen
