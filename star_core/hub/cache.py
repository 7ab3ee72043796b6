"""Our decoding state under the names by which transformers' `generate` calls it."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from star_core.cache import Cache


class StarCache(Cache):
    """`star_core.Cache` as `generate` wants it: it counts columns, padding included, beside every row's own tokens.

    Attributes:
        columns: Columns of the padded batch seen so far.
        is_compileable: No: `generate` must not try to compile around it.
        is_croppable: No: a recurrence's state cannot go back.
        _is_user_defined: Whether `generate` was given it, and must leave it as a step-by-step loop would.
    """

    columns: int = 0
    is_compileable: bool = False
    is_croppable: bool = False
    _is_user_defined: bool = False

    @property
    def is_linear(self) -> list[bool]:
        """For each LIV, False: `get_seq_length` counts for all of them."""
        return [False] * len(self.states)

    @property
    def max_batch_size(self) -> int:
        """Sequences held."""
        return self.batch_size

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen so far, the same for every LIV."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row `beam_idx[i]` was."""
        self.reorder(beam_idx)

    def reset(self) -> None:
        """Forget every token, keeping the memory."""
        super().reset()
        self.columns = 0

    def crop(self, max_length: int) -> NoReturn:
        """Refuse: recurrences and convolutions keep no past to go back to.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"crop: the state of a STAR model cannot go back to {max_length} tokens")

    def activate_past_recording(self) -> NoReturn:
        """Refuse: see `crop`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("activate_past_recording: the state of a STAR model cannot go back")
