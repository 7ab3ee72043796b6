"""What every LIV module has in common: its call, the tensors it shares, and the state it keeps."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from star_core.cache import State, StateSpec
from star_core.ragged import Ragged

Features = dict[str, Tensor]
"""Tensors of feature groups by name, such as {"k": ..., "v": ...}."""


class LIV(nn.Module):
    """A linear input-varying layer: y = T(x) x, with T built from feature groups.

    A subclass is called as `y, features = liv(x, reused=..., state=..., offset=..., ragged=...)`.

    Attributes:
        reuse: Names of the feature groups whose tensors come from an earlier LIV; this LIV has no weights for them.
    """

    reuse: frozenset[str]

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """Mix `x` along time and channels.

        Args:
            x: Normed residual stream, [B, T, width]; [1, N, width] where `ragged` packs it.
            reused: Tensors of the groups in `reuse`, as the source LIV returned them in this same forward pass.
            state: This LIV's part of the cache, updated in place. None: a full pass with nothing before it.
            offset: Tokens that the longest row of the state has already seen.
            ragged: Where the tokens lie if rows are not equally long. None: they are.
        Returns:
            Output, shaped as `x`, and the tensors that a later LIV may reuse.
        """
        raise NotImplementedError

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Shapes and dtypes of the state for `max_length` tokens of `batch_size` sequences; `dtype` is the weights'."""
        raise NotImplementedError

    def refill(self, state: State) -> None:
        """Compute anew what `state` holds of the weights alone, after its memory was moved. Most LIVs hold nothing."""


def is_step(x: Tensor, state: State | None, ragged: Ragged | None) -> bool:
    """Whether `x` is one new token for each row of a state."""
    return state is not None and x.shape[1] == 1 and (ragged is None or ragged.cu_seqlens is None)


def cu_seqlens_of(ragged: Ragged | None) -> Tensor | None:
    """Return the boundaries between packed sequences; None where nothing is packed."""
    return None if ragged is None else ragged.cu_seqlens


def with_reused(groups: Features, reused: Features | None, names: Collection[str]) -> Features:
    """Return the named groups: those that a LIV has made, and the others as an earlier LIV returned them."""
    return {name: groups[name] if name in groups else (reused or {})[name] for name in names}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states beside weights of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def init_linear_(weight: Tensor, scale: float = 1.0) -> None:
    """Fill a [out, in] weight with normal values of standard deviation `scale / sqrt(in)`: outputs keep the
    inputs' size."""
    nn.init.normal_(weight, std=scale * weight.shape[-1] ** -0.5)


class OutputProjection(nn.Linear):
    """The dense channel mixing that ends a LIV and writes to the residual stream."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__(in_features, width, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weights; `LanguageModel` scales them down by the depth afterwards."""
        init_linear_(self.weight)
