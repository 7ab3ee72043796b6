"""RecurrentGemma's recurrent block and its RG-LRU, which keep their states in themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.acceleration._rules import Arguments, Offer, Rule, class_name, lacks
from star_kernels import causal_conv1d, causal_conv1d_step, diagonal_scan, rg_lru, rg_lru_step


def block_forward(
    self: Any,
    input_states: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run the block on (B, T, width).

    Several tokens start the convolution afresh whatever came before, as in the original; the RG-LRU goes on.
    """
    batch = input_states.shape[0]
    y_branch = self.act_fn(self.linear_y(input_states))
    x = self.linear_x(input_states)
    weight, bias = self.conv_1d.weight.squeeze(1), self.conv_1d.bias
    if not use_cache:
        self.conv1d_state = self.rg_lru.recurrent_states = None
        x, _ = causal_conv1d(x, weight, bias)
    else:
        if self.conv1d_state is None or self.conv1d_state.shape[0] != batch:
            self._setup_cache(batch, x.device, x.dtype)
        if position_ids.shape[1] != 1:
            x, state = causal_conv1d(x, weight, bias)
        else:
            y, state = causal_conv1d_step(self.conv1d_state, x[:, 0], weight, bias)
            x = y.unsqueeze(1)
        self.conv1d_state = state.to(input_states.dtype)
    hidden_states = self.rg_lru(x, position_ids) * y_branch
    return self.linear_out(hidden_states), None


def lru_forward(self: Any, activations: Tensor, position_ids: Tensor) -> Tensor:
    """Run the RG-LRU on (B, T, width), starting anew at every position 0."""
    recurrence_gate = _gate(activations, self.recurrent_gate_weight, self.recurrent_gate_bias)
    input_gate = _gate(activations, self.input_gate_weight, self.input_gate_bias)
    log_lambda = -F.softplus(self.recurrent_param)
    state, starts = self.recurrent_states, position_ids == 0
    where = _starts_where(starts)
    if where == "nowhere":
        h, state = _go_on(state, activations, recurrence_gate, input_gate, log_lambda)
    elif where == "first":
        # A token without a past is taken as it is, times its input gate; the rest follows from it.
        first = activations[:, 0] * torch.sigmoid(input_gate[:, 0])
        rest = (activations[:, 1:], recurrence_gate[:, 1:], input_gate[:, 1:])
        h, state = _go_on(first.float(), *rest, log_lambda)
        h = torch.cat([first.unsqueeze(1), h], dim=1)
    else:
        h, state = _start_anew(state, activations, recurrence_gate, input_gate, log_lambda, starts)
    self.recurrent_states = state
    return h


def _starts_where(starts: Tensor) -> str:
    """Return "nowhere", "first" where all start with the first token of several and never again, or "anywhere".

    The numbers are looked at on the CPU alone: on another device that would wait for it at every layer.
    """
    if starts.device.type != "cpu" or torch.compiler.is_compiling():
        return "anywhere"
    count = int(starts.sum())
    if count == 0:
        return "nowhere"
    alone = count == starts.shape[0] and bool(starts[:, 0].all())
    return "first" if alone and starts.shape[1] > 1 else "anywhere"


def _gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mix channels within each head: x (B, T, H * P), weight (H, P, P) from its second axis to its third."""
    heads = x.reshape(-1, *bias.shape).transpose(0, 1)
    return torch.baddbmm(bias[:, None, :], heads, weight).transpose(0, 1).reshape(x.shape)


def _go_on(
    state: Tensor | None, x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, log_lambda: Tensor
) -> tuple[Tensor, Tensor]:
    """Run tokens none of which starts anew."""
    if x.shape[1] == 1 and state is not None:
        h, state = rg_lru_step(state, x[:, 0], recurrence_gate[:, 0], input_gate[:, 0], log_lambda)
        return h.unsqueeze(1), state
    return rg_lru(x, recurrence_gate, input_gate, log_lambda, initial_state=state)


def _start_anew(
    state: Tensor | None,
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    log_lambda: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run tokens of which any may start anew: it forgets the state and takes its input without the root's factor."""
    log_decay = 8.0 * torch.sigmoid(recurrence_gate.float()) * log_lambda.float()
    factor = (-torch.expm1(2.0 * log_decay)).clamp_min(1e-12).sqrt()
    gated = (x * torch.sigmoid(input_gate)).float()
    starts = starts.unsqueeze(-1)
    decay = log_decay.exp().masked_fill(starts, 0.0)
    h, state = diagonal_scan(decay, gated * factor.masked_fill(starts, 1.0), initial_state=state)
    return h.to(x.dtype), state


def _is_block(module: nn.Module) -> bool:
    return class_name(module) == "RecurrentGemmaRecurrentBlock"


def _is_lru(module: nn.Module) -> bool:
    return class_name(module) == "RecurrentGemmaRglru"


def _offer_block(module: Any) -> list[Offer] | str:
    reason = lacks(module, "linear_x", "linear_y", "linear_out", "conv_1d", "rg_lru", "conv1d_state", "_setup_cache")
    return reason or [Offer(("causal_conv1d",), block_forward)]


def _offer_lru(module: Any) -> list[Offer] | str:
    reason = lacks(module, "recurrent_param", "recurrent_gate_weight", "input_gate_weight", "recurrent_states")
    return reason or [Offer(("rg_lru",), lru_forward)]


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(3, 3 + tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)


def _probe_block(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    x = normal(2, 5, module.linear_x.in_features)
    return (x, _positions(x), None), {"use_cache": False}


def _probe_lru(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    x = normal(2, 5, module.recurrent_param.shape[0])
    return (x, _positions(x)), {}


RULES = (Rule(_is_block, _offer_block, _probe_block), Rule(_is_lru, _offer_lru, _probe_lru))
