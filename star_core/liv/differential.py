"""The difference of two LIVs of one class: LIV classes Diff-*."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from star_core.cache import State, StateSpec
from star_core.liv._base import LIV, Features
from star_core.ragged import Ragged


class Differential(LIV):
    """y = positive(x) - lambda * negative(x), two LIVs of one class with parameters of their own.

    Source: Ye et al., Differential Transformer, 2024, arXiv 2410.05258, carried over to every LIV class by Thomas et
    al., STAR, 2024, arXiv 2411.17800, where lambda is 1. Differs from it in: lambda starts at 1 and is learned.

    Names of features and states are those of the two LIVs behind "positive." and "negative.".
    """

    def __init__(self, positive: LIV, negative: LIV) -> None:
        super().__init__()
        self.positive = positive
        self.negative = negative
        self.reuse = positive.reuse
        self.lam = nn.Parameter(torch.ones(()))

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`."""
        outputs, features = [], {}
        for prefix, liv in (("positive.", self.positive), ("negative.", self.negative)):
            y, shared = liv(
                x,
                reused=_below(reused, prefix),
                state=_below(state, prefix),
                offset=offset,
                ragged=ragged,
            )
            outputs.append(y)
            features.update({prefix + name: tensor for name, tensor in shared.items()})
        return outputs[0] - self.lam * outputs[1], features

    def refill(self, state: State) -> None:
        """See `LIV`."""
        for prefix, liv in (("positive.", self.positive), ("negative.", self.negative)):
            liv.refill(_below(state, prefix) or {})

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The states of both LIVs."""
        return {
            prefix + name: spec
            for prefix, liv in (("positive.", self.positive), ("negative.", self.negative))
            for name, spec in liv.state_spec(batch_size, max_length, dtype).items()
        }


def _below(tensors: dict[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    """Return the entries whose names begin with `prefix`, without it."""
    if tensors is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
