"""What the mixers share: padding, and a short convolution that continues a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from star_kernels import causal_conv1d, causal_conv1d_step

_ACTIVATIONS = ("silu", "swish")


def unserved_activation(module: Any) -> str | None:
    """Say that a mixer's short convolution ends in another activation than `causal_conv1d` has; None if it does not."""
    if module.activation in _ACTIVATIONS:
        return None
    return f"no short convolution with the activation {module.activation!r}"


def masked(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Zero the tokens that a mask (B, T) leaves out."""
    return x if attention_mask is None else (x * attention_mask[:, :, None]).to(x.dtype)


def recurrent_state(cache: Any, layer: int) -> Tensor | None:
    """Return a layer's recurrent state; None without a cache or before its first tokens.

    To be asked before `convolve`, which marks the layer as begun.
    """
    state: Tensor | None = None if cache is None else cache.get_recurrent_state(layer)
    return state


def earlier_inputs(held: Tensor, length: int, width: int) -> Tensor:
    """Return the width - 1 inputs before the last `length` of those held, (B, D, width - 1)."""
    end = held.shape[-1] - length
    return held[..., end - (width - 1) : end]


def convolve(x: Tensor, conv: Any, activation: str | None, cache: Any, layer: int) -> Tensor:
    """Run a depthwise torch.nn.Conv1d causally on x (B, T, D), continuing and extending the cache where there is one.

    transformers keeps the last `width` inputs, one more than a convolution reads; `update_conv_state` gives them
    followed by the new ones, in a tensor of its own.
    """
    weight = conv.weight.squeeze(1)
    if cache is None:
        return causal_conv1d(x, weight, conv.bias, activation=activation)[0]
    begun = cache.get_conv_state(layer) is not None
    length, width = x.shape[1], weight.shape[1]
    held = cache.update_conv_state(x.transpose(1, 2), layer, conv_kernel_size=width)
    if not begun:
        return causal_conv1d(x, weight, conv.bias, activation=activation)[0]
    state = earlier_inputs(held, length, width)
    if length == 1:
        return causal_conv1d_step(state, x[:, 0], weight, conv.bias, activation=activation)[0].unsqueeze(1)
    return causal_conv1d(x, weight, conv.bias, activation=activation, initial_state=state)[0]
