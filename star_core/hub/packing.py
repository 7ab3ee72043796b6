"""Several sequences in one row: where each begins, from what transformers' collators say of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_core.ragged import attention_mask_of

PACKING = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What says where sequences begin, by transformers' names."""


def sequence_starts(
    shape: tuple[int, int],
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
) -> Tensor | None:
    """Return which tokens begin a further sequence in their row, [B, T] bool; None where each row is one sequence.

    A token begins one where any of what is given says so: its position is not that of the token before it plus one, its
    index is not that token's, or a boundary lies before it. Padding is passed over.

    Args:
        shape: [B, T].
        attention_mask: [B, T], 0 for padding.
        position_ids: [B, T] or [1, T], integers; only their differences count.
        seq_idx: [B, T] or [1, T], integers: which sequence a token belongs to.
        cu_seq_lens_q: [S + 1], integers: boundaries of the sequences of one row, B = 1.
        cu_seq_lens_k: The same.
        max_length_q: Not needed.
        max_length_k: Not needed.
    Raises:
        ValueError: A shape does not fit, or boundaries are not those of one row.
    """
    if shape[1] == 1:
        return None
    starts = None
    for name, ids, step in (("position_ids", position_ids, 1), ("seq_idx", seq_idx, 0)):
        if ids is not None:
            if ids.shape not in (shape, (1, shape[1])):
                raise ValueError(f"{name}: needs [B, T] = {list(shape)} or [1, {shape[1]}], got {list(ids.shape)}")
            found = _breaks(ids.expand(shape), step, attention_mask)
            starts = found if starts is None else starts | found
    for name, ends in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if ends is not None:
            fits = shape[0] == 1 and ends.ndim == 1 and ends.numel() > 1
            if not fits or (int(ends[0]), int(ends[-1])) != (0, shape[1]):
                raise ValueError(f"{name}: needs boundaries from 0 to T of one row, [B, T] = {list(shape)}, got {ends}")
            found = torch.zeros(shape, dtype=torch.bool, device=ends.device)
            found[0, ends[(ends > 0) & (ends < shape[1])].long()] = True
            starts = found if starts is None else starts | found
    return starts if starts is not None and bool(starts.any()) else None


def _breaks(ids: Tensor, step: int, attention_mask: Tensor | None) -> Tensor:
    """Return where `ids` [B, T] is not `step` more than that of the token before in the row, padding left out."""
    if attention_mask is None:
        return torch.nn.functional.pad(ids.diff(dim=1) != step, (1, 0))
    rows, columns = attention_mask_of(attention_mask, (ids.shape[0], ids.shape[1]), ids.device).nonzero(as_tuple=True)
    starts = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    starts[rows[1:], columns[1:]] = (ids[rows, columns].diff() != step) & (rows.diff() == 0)
    return starts
