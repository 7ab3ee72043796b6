"""Gated DeltaNet mixers: those of Qwen3-Next and Qwen3.5, dense and mixture of experts."""

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
    lacks,
    or_original,
)
from star_core.acceleration._states import convolve, masked, recurrent_state, unserved_activation
from star_core.layers._state import unit_heads
from star_kernels import gated_delta_rule, gated_delta_rule_step

_CLASSES = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")

_EPSILON = 1e-6
"""Added to the sum of squares of queries and keys; a constant in the originals too."""


@or_original
def forward(
    self: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Run the mixer on (B, T, width)."""
    batch, length, _ = hidden_states.shape
    state = recurrent_state(cache, self.layer_idx)
    mixed, gate, b, a = _project(self, masked(hidden_states, attention_mask))
    mixed = convolve(mixed, self.conv1d, self.activation, cache, self.layer_idx)
    q, k, v = torch.split(mixed, [self.key_dim, self.key_dim, self.value_dim], dim=-1)
    v = v.reshape(batch, length, self.num_v_heads, self.head_v_dim)
    copies = self.num_v_heads // self.num_k_heads
    q, k = (unit_heads(one, self.num_k_heads, copies, _EPSILON) for one in (q, k))
    beta = b.sigmoid()
    log_decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)
    if state is not None and length == 1:
        y, new_state = gated_delta_rule_step(state, q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], beta[:, 0])
    else:
        y, new_state = gated_delta_rule(q, k, v, log_decay, beta, initial_state=state)
    if cache is not None:
        cache.update_recurrent_state(new_state, self.layer_idx)
    y = self.norm(y.reshape(-1, self.head_v_dim), gate.reshape(-1, self.head_v_dim))
    return self.out_proj(y.reshape(batch, length, -1))


def _project(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the convolution's input, the output gate, and what becomes beta and the decay."""
    if hasattr(self, "in_proj_qkv"):
        return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)
    q, k, v, z, b, a = self.fix_query_key_value_ordering(self.in_proj_qkvz(x), self.in_proj_ba(x))
    return torch.cat([one.flatten(2) for one in (q, k, v)], dim=-1), z, b, a


def _applies(module: nn.Module) -> bool:
    return class_name(module) in _CLASSES


def _offers(module: Any) -> list[Offer] | str:
    reason = lacks(module, "conv1d", "A_log", "dt_bias", "norm", "out_proj", "layer_idx") or defines(
        module, "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn"
    )
    return reason or unserved_activation(module) or [Offer(("causal_conv1d", "rms_norm", "gated_delta_rule"), forward)]


def _probe(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    return (normal(2, 5, module.hidden_size),), {}


RULE = Rule(_applies, _offers, _probe)
