"""The real-gated linear recurrent unit, a diagonal recurrence without a state expansion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from star_core.cache import State, StateSpec, read, write
from star_core.genome import Nonlinearity
from star_core.liv._base import LIV, Features, OutputProjection, cu_seqlens_of, is_step, state_dtype
from star_core.liv.groups import BlockLinear, GroupFeaturizer, GroupSpec, activated
from star_core.ragged import Ragged
from star_kernels import rg_lru, rg_lru_step


class LRUFeaturizer(GroupFeaturizer):
    """Gate and value of the unit, and its two gates, which are block-diagonal functions of the value.

    Source: De et al., Griffin, 2024, arXiv 2402.19427, section 2.4 and appendix A: the decay at an open gate starts
    uniform in 0.9 .. 0.999.

    Args:
        width: Width of the residual stream.
        groups: Of "gate" and "value".
        blocks: Blocks of the gates' maps.
    """

    def __init__(self, width: int, groups: Mapping[str, GroupSpec], blocks: int) -> None:
        super().__init__(width, groups)
        inner = self.groups["value"].size
        self.recurrence_gate = BlockLinear(inner, inner, blocks)
        self.input_gate = BlockLinear(inner, inner, blocks)
        self.log_odds = nn.Parameter(torch.empty(inner))
        self.log_odds._no_weight_decay = True  # type: ignore[attr-defined]  # decay would pull every decay to 1/2
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the decays."""
        with torch.no_grad():
            # sigmoid(log_odds)^8 is uniform: 8 is the operator's constant.
            self.log_odds.uniform_(0.9, 0.999).pow_(1 / 8).logit_()


class GatedLRU(LIV):
    """y = out(f(gate) * h), with h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t value_t), where the decays a_t and the input
    gates i_t are functions of the value.

    Source: De et al., Griffin, 2024, arXiv 2402.19427, equations 1 to 4 and figure 2. Differs from it in: f is swish,
    ReLU or nothing, for its GeLU.

    Args:
        featurizer: Makes gate, value and the unit's gates; may be shared with other LIVs.
        width: Width of the residual stream.
        inner: Channels of the recurrence.
        nonlinearity: f.
    """

    reuse = frozenset[str]()

    def __init__(self, featurizer: LRUFeaturizer, *, width: int, inner: int, nonlinearity: Nonlinearity) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.inner = inner
        self.nonlinearity = nonlinearity
        self.out = OutputProjection(inner, width)

    def forward(
        self,
        x: Tensor,
        *,
        reused: Features | None = None,
        state: State | None = None,
        offset: int = 0,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Features]:
        """See `LIV`. Shares nothing."""
        groups = self.featurizer(x, ("gate", "value"), state, ragged)
        value = groups["value"]
        gates = (self.featurizer.recurrence_gate(value), self.featurizer.input_gate(value))
        log_lambda = F.logsigmoid(self.featurizer.log_odds)
        held = None if state is None else read(state, "h")
        if held is not None and is_step(x, state, ragged):
            h, final = rg_lru_step(held, value[:, 0], gates[0][:, 0], gates[1][:, 0], log_lambda)
            h = h[:, None]
        else:
            h, final = rg_lru(value, *gates, log_lambda, initial_state=held, cu_seqlens=cu_seqlens_of(ragged))
        if state is not None:
            write(state, "h", final)
        return self.out(activated(groups["gate"], self.nonlinearity) * h), {}

    def state_spec(self, batch_size: int, max_length: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """The recurrent state and the short convolution's last inputs: the same for any `max_length`."""
        spec = self.featurizer.state_spec(("gate", "value"), batch_size)
        return spec | {"h": StateSpec((batch_size, self.inner), state_dtype(dtype))}
