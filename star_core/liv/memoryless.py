"""Gated memoryless unit: LIV class GMemless."""

from __future__ import annotations

import torch
from torch import Tensor

from star_core.cache import State, StateSpec
from star_core.genome import Nonlinearity
from star_core.liv._base import LIV, Features, OutputProjection
from star_core.liv.featurizer import MemorylessFeaturizer
from star_core.liv.groups import GroupFeaturizer
from star_core.ragged import Ragged
from star_kernels import reglu, swiglu


class GatedMemoryless(LIV):
    """y = out(f(gate) * value): each token alone, every channel with every other.

    Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv 2002.05202: SwiGLU, or with genes of its own ReGLU
    and the bilinear unit.

    Args:
        featurizer: Makes gate and value; may be shared with other LIVs.
        width: Width of the residual stream.
        hidden: Channels of gate and value.
        nonlinearity: f: SWISH, RELU or NONE.
    """

    reuse = frozenset[str]()

    def __init__(
        self,
        featurizer: MemorylessFeaturizer | GroupFeaturizer,
        *,
        width: int,
        hidden: int,
        nonlinearity: Nonlinearity = Nonlinearity.SWISH,
    ) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.nonlinearity = nonlinearity
        self.out = OutputProjection(hidden, width)

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`. Shares nothing and keeps nothing."""
        groups = self.featurizer(x, ("gate", "value"))
        gate, value = groups["gate"], groups["value"]
        if self.nonlinearity is Nonlinearity.NONE:
            return self.out(gate * value), {}
        return self.out((swiglu if self.nonlinearity is Nonlinearity.SWISH else reglu)(gate, value)), {}

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """No state."""
        return {}
