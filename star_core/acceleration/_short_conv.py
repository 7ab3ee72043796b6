"""LFM2's gated short convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from star_core.acceleration._states import earlier_inputs, masked
from star_kernels import gated_short_conv, gated_short_conv_step

_CLASSES = ("Lfm2ShortConv", "Lfm2MoeShortConv")


@or_original
def forward(
    self: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Run the mixer on (B, T, width)."""
    gate_in, gate_out, x = self.in_proj(masked(hidden_states, attention_mask)).chunk(3, dim=-1)
    return self.out_proj(convolve_gated(self, x, gate_in, gate_out, cache))


def convolve_gated(self: Any, x: Tensor, gate_in: Tensor, gate_out: Tensor, cache: Any) -> Tensor:
    """Run `gated_short_conv` from and into a cache of transformers, if there is one, for a module with a `conv`."""
    weight, bias = self.conv.weight.squeeze(1), self.conv.bias
    if cache is None:
        return gated_short_conv(x, gate_in, gate_out, weight, bias)[0]
    length, width = x.shape[1], weight.shape[1]
    begun = cache.get_conv_state(self.layer_idx) is not None
    # The cache holds gated inputs, of which it keeps the last `width`, or all while it records the past.
    tail = length if cache.is_recording_past(self.layer_idx) else min(length, width)
    inputs = (gate_in[:, length - tail :] * x[:, length - tail :]).transpose(1, 2)
    held = cache.update_conv_state(inputs, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
    if not begun:
        return gated_short_conv(x, gate_in, gate_out, weight, bias)[0]
    state = earlier_inputs(held, tail, width)
    if length == 1:
        y, _ = gated_short_conv_step(state, x[:, 0], gate_in[:, 0], gate_out[:, 0], weight, bias)
        return y.unsqueeze(1)
    return gated_short_conv(x, gate_in, gate_out, weight, bias, initial_state=state)[0]


def _applies(module: nn.Module) -> bool:
    return class_name(module) in _CLASSES


def _offers(module: Any) -> list[Offer] | str:
    reason = lacks(module, "in_proj", "conv", "out_proj", "layer_idx", "conv_kernel_size")
    reason = reason or defines(module, "causal_conv1d_fn")
    return reason or [Offer(("gated_short_conv",), forward)]


def _probe(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    return (normal(2, 5, module.in_proj.in_features),), {}


RULE = Rule(_applies, _offers, _probe)
