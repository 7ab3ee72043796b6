"""Rows of unequal length: where the tokens of one call lie, with every padded token left out.

A batch with padding is packed: its real tokens are laid end to end in one row, [1, N, ...], with `cu_seqlens` between
the sequences, which every operator takes. Nothing is computed for padding, and nothing can leak from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Ragged:
    """Where the new tokens of rows of unequal length lie.

    Attributes:
        rows: Row of each new token, (N,), int64, rising.
        positions: Its place in the row, padding not counted, (N,), int64.
        longest: Tokens of the longest row, those of the cache and the new ones.
        cu_seqlens: Boundaries of the new tokens laid end to end, (B + 1,), int32. None: a step of one new token for
            each row, laid out [B, 1, ...].
        columns: Column of each new token in the padded batch, (N,), int64. None for a step.
        all_rows: As `rows`, of the tokens held and the new ones together, (M,). None for a step.
        all_positions: As `positions`, (M,). None for a step.
        all_cu_seqlens: As `cu_seqlens`, of all M tokens. None for a step.
        new: Which of the M tokens are new, (N,), int64; None: all of them, or a step.
    """

    rows: Tensor
    positions: Tensor
    longest: int
    cu_seqlens: Tensor | None = None
    columns: Tensor | None = None
    all_rows: Tensor | None = None
    all_positions: Tensor | None = None
    all_cu_seqlens: Tensor | None = None
    new: Tensor | None = None

    @classmethod
    def step(cls, lengths: Tensor, longest: int) -> Ragged:
        """One new token for each row.

        Args:
            lengths: Tokens that each row of the cache holds, (B,), int64.
            longest: The largest of them.
        """
        return cls(torch.arange(lengths.shape[0], device=lengths.device), lengths, longest + 1)

    @classmethod
    def pack(cls, mask: Tensor, held: Tensor | None, starts: Tensor | None = None) -> Ragged:
        """The new tokens that `mask` [B, T] bool keeps, behind the `held` (B,) int64 ones of each row.

        Where `starts` [B, T] is True, a row's next sequence begins: `cu_seqlens` has a boundary. None are held then.
        """
        batch = mask.shape[0]
        rows, columns = mask.nonzero(as_tuple=True)
        if starts is not None:
            ends, positions = _sequences(rows, starts[rows, columns])
            longest = int(ends.diff().max()) if rows.numel() else 0
            return cls(rows, positions, longest, ends, columns, rows, positions, ends)
        counts = mask.sum(1)
        positions = (mask.cumsum(1) - 1)[rows, columns]
        ends = _boundaries(counts)
        if held is None:
            longest = int(counts.max()) if batch else 0
            return cls(rows, positions, longest, ends, columns, rows, positions, ends)
        positions = positions + held[rows]
        totals = held + counts
        all_ends = _boundaries(totals)
        all_rows = torch.repeat_interleave(torch.arange(batch, device=mask.device), totals)
        starts = all_ends[:-1].long()
        all_positions = torch.arange(all_rows.shape[0], device=mask.device) - starts[all_rows]
        new = starts[rows] + positions
        longest = int(totals.max()) if batch else 0
        return cls(rows, positions, longest, ends, columns, all_rows, all_positions, all_ends, new)

    def rotary_positions(self) -> Tensor:
        """Return `positions` beside tensors of this call: (N,), or [B, 1] in a step."""
        return self.positions[:, None] if self.cu_seqlens is None else self.positions

    def gather(self, x: Tensor) -> Tensor:
        """Pack a padded batch, [B, T, ...] to [1, N, ...]."""
        return x[self.rows, self.columns][None]

    def scatter(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Undo `gather`: [1, N, ...] to [B, T, ...] = `shape`, with zeros where there is padding."""
        assert self.columns is not None
        padded = x.new_zeros((*shape, *x.shape[2:]))
        return padded.index_put((self.rows, self.columns), x[0])


def attention_mask_of(mask: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return `mask` as booleans.

    Raises:
        ValueError: It is not [B, T] = `shape`; TypeError: it is no tensor of booleans or integers.
    """
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attention_mask: needs a tensor of booleans or integers, 0 for padding, got {got}")
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask: needs [B, T] = {list(shape)}, one entry for each token, got {list(mask.shape)}"
        )
    return mask.to(device=device, dtype=torch.bool)


def _sequences(rows: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return boundaries and positions of tokens (N,), of which those where `starts` or a row does begin a sequence."""
    begins = starts.clone()
    begins[:1] = True
    begins[1:] |= rows.diff() != 0
    first = begins.nonzero().squeeze(1)
    positions = torch.arange(rows.shape[0], device=rows.device) - first[begins.cumsum(0) - 1]
    return F.pad(first, (0, 1), value=rows.shape[0]).to(torch.int32), positions


def _boundaries(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
