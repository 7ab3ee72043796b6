"""Packed batches as causal-conv1d and mamba-ssm write them: the index of its sequence beside each token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from star_kernels._validation import check_indices


class Sequences(NamedTuple):
    """The sequences of a batch (B, T) whose rows are laid end to end.

    Attributes:
        cu_seqlens: Their boundaries, (S + 1,), int64.
        first: The first sequence of each row, (B,), int64.
        last: The last one.
    """

    cu_seqlens: Tensor
    first: Tensor
    last: Tensor

    def spread(self, states: Tensor | None) -> Tensor | None:
        """Give the states of the rows (B, ...) to their first sequences, and zeros to the others: (S, ...)."""
        if states is None:
            return None
        zeros = states.new_zeros(self.cu_seqlens.shape[0] - 1, *states.shape[1:])
        return zeros.index_copy(0, self.first, states)


def find_sequences(seq_idx: Tensor, first: Tensor, shape: tuple[int, int]) -> Sequences:
    """Find the runs of adjacent tokens with one index.

    Args:
        seq_idx: (B, T) with B and T above 0, int32 or int64.
        first: The call's first tensor, on whose device it must lie.
        shape: (B, T).
    """
    check_indices("seq_idx", seq_idx, first)
    if seq_idx.shape != shape:
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, needs (B, T) = {shape}")
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    begins = starts.flatten().nonzero().squeeze(1)
    counts = starts.sum(1)
    ends = counts.cumsum(0)
    return Sequences(torch.cat([begins, begins.new_tensor([seq_idx.numel()])]), ends - counts, ends - 1)
