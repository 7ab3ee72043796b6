"""Mamba-1 mixers: those of Mamba, FalconMamba and Jamba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.acceleration._rules import (
    Arguments,
    Offer,
    Rule,
    class_name,
    defines,
    is_plain_linear,
    lacks,
    or_original,
)
from star_core.acceleration._states import convolve, masked, recurrent_state, unserved_activation
from star_kernels import selective_scan, selective_scan_step

_CLASSES = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")


@or_original
def forward(
    self: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Run the mixer on (B, T, width).

    Several tokens after a cache's first ones continue the convolution but start the scan from zeros, as the original
    does.
    """
    dtype, length = hidden_states.dtype, hidden_states.shape[1]
    state = recurrent_state(cache, self.layer_idx)
    x, gate = self.in_proj(masked(hidden_states, attention_mask)).chunk(2, dim=-1)
    x = masked(convolve(x, self.conv1d, self.activation, cache, self.layer_idx), attention_mask)
    sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
    steps, b, c = torch.split(self.x_proj(x), sizes, dim=-1)
    if hasattr(self, "dt_layernorm"):
        steps, b, c = self.dt_layernorm(steps), self.b_layernorm(b), self.c_layernorm(c)
    dt = F.linear(steps, self.dt_proj.weight)
    a = -torch.exp(self.A_log.float())
    options: dict[str, Any] = {"D": self.D, "dt_bias": self.dt_proj.bias, "dt_softplus": True}
    if state is not None and length == 1:
        # b and c, (B, 1, N), are those of one token and of one group.
        y, new_state = selective_scan_step(state, x[:, 0], dt[:, 0], a, b, c, z=gate[:, 0], **options)
        state.copy_(new_state)
        y = y.unsqueeze(1)
    else:
        y, new_state = selective_scan(x, dt, a, b.unsqueeze(2), c.unsqueeze(2), z=gate, **options)
        if cache is not None:
            cache.update_recurrent_state(new_state, self.layer_idx)
    return self.out_proj(y.to(dtype))


def _applies(module: nn.Module) -> bool:
    return class_name(module) in _CLASSES


def _offers(module: Any) -> list[Offer] | str:
    reason = lacks(module, "in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj", "layer_idx") or defines(
        module, "mamba_selective_scan", "mamba_selective_state_update", "causal_conv1d_fn"
    )
    reason = reason or unserved_activation(module)
    if reason is not None:
        return reason
    if not is_plain_linear(module.dt_proj):
        return "its dt_proj is not a plain linear layer, so its weight cannot be read"
    return [Offer(("causal_conv1d", "selective_scan"), forward)]


def _probe(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    return (normal(2, 5, module.in_proj.in_features),), {}


RULE = Rule(_applies, _offers, _probe)
