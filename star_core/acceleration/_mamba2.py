"""Mamba-2 mixers: those of Mamba-2, Bamba, Zamba2, FalconH1, NemotronH and GraniteMoeHybrid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.acceleration._rules import Arguments, Offer, Rule, class_name, defines, lacks, or_original
from star_core.acceleration._states import convolve, masked, recurrent_state, unserved_activation
from star_kernels import ssd, ssd_step

_CLASSES = (
    "Mamba2Mixer",
    "BambaMixer",
    "Zamba2MambaMixer",
    "FalconH1Mixer",
    "NemotronHMamba2Mixer",
    "GraniteMoeHybridMambaLayer",
)


@or_original
def forward(
    self: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Run the mixer on (B, T, width)."""
    batch, length, _ = hidden_states.shape
    state = recurrent_state(cache, self.layer_idx)
    projected = _project(self, masked(hidden_states, attention_mask))
    gate, mixed, dt = torch.split(projected, [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
    mixed = masked(convolve(mixed, self.conv1d, self.activation, cache, self.layer_idx), attention_mask)
    shared = self.n_groups * self.ssm_state_size
    x, b, c = torch.split(mixed, [self.intermediate_size, shared, shared], dim=-1)
    x = x.reshape(batch, length, self.num_heads, self.head_dim)
    b = b.reshape(batch, length, self.n_groups, self.ssm_state_size)
    c = c.reshape(batch, length, self.n_groups, self.ssm_state_size)
    z = None if _norm_comes_first(self) else gate.reshape(x.shape)
    a = -torch.exp(self.A_log.float())
    if state is not None and length == 1:
        y, new_state = ssd_step(
            state,
            x[:, 0],
            dt[:, 0],
            a,
            b[:, 0],
            c[:, 0],
            D=self.D,
            z=None if z is None else z[:, 0],
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        state.copy_(new_state)
    else:
        dt, bias, through_softplus = _step_sizes(self, dt)
        y, new_state = ssd(
            x,
            dt,
            a,
            b,
            c,
            D=self.D,
            z=z,
            dt_bias=bias,
            dt_softplus=through_softplus,
            initial_state=state,
        )
        if cache is not None:
            cache.update_recurrent_state(new_state, self.layer_idx)
    y = y.reshape(batch, length, -1)
    y = self.norm(y, gate) if z is None else self.norm(y)
    return self.out_proj(y.to(hidden_states.dtype))


def _project(self: Any, x: Tensor) -> Tensor:
    """Run the input projection, between FalconH1's multipliers where the mixer has them."""
    if not hasattr(self, "mup_vector"):
        projected: Tensor = self.in_proj(x)
    else:
        projected = self.in_proj(x * self.ssm_in_multiplier) * self.mup_vector
    return projected


def _step_sizes(self: Any, dt: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """Return what `ssd` takes for dt: as it comes, or beyond the softplus where the mixer bounds it.

    The originals bound the steps of several tokens and not that of a single one.
    """
    low, high = self.time_step_limit
    if low <= 0 and high == math.inf:
        return dt, self.dt_bias, True
    return F.softplus(dt.float() + self.dt_bias.float()).clamp(low, high), None, False


def _norm_comes_first(self: Any) -> bool:
    """Return whether the mixer's norm has the gate after it, so that the scan cannot apply it."""
    return bool(getattr(self.norm, "norm_before_gate", False))


def _applies(module: nn.Module) -> bool:
    return class_name(module) in _CLASSES


def _offers(module: Any) -> list[Offer] | str:
    reason = lacks(
        module, "in_proj", "conv1d", "A_log", "D", "dt_bias", "norm", "out_proj", "layer_idx", "time_step_limit"
    ) or defines(module, "mamba2_chunk_scan", "mamba2_selective_state_update", "causal_conv1d_fn")
    return reason or unserved_activation(module) or [Offer(("causal_conv1d", "ssd"), forward)]


def _probe(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    return (normal(2, 5, module.in_proj.in_features),), {}


RULE = Rule(_applies, _offers, _probe)
