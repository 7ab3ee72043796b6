"""What the layers keep between calls, and the short convolution that several of them begin with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from star_core.liv._base import state_dtype
from star_kernels import causal_conv1d, causal_conv1d_step, rms_norm

State = dict[str, Tensor]
"""What a layer remembers of earlier tokens, by name; an empty dict before the first.

A call replaces its entries and modifies no tensor, so a shallow copy of the dict is a snapshot. Gradients pass through.
"""


def is_step(x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> bool:
    """Return whether x (B, T, ...) is one more token for each row of a state."""
    return bool(state) and cu_seqlens is None and x.shape[1] == 1


def depthwise(width: int, taps: int, bias: bool, **factory: Any) -> nn.Conv1d:
    """Return the holder of a short convolution's filter, named, shaped and initialised as in the peers."""
    return nn.Conv1d(width, width, taps, groups=width, padding=taps - 1, bias=bias, **factory)


def convolve(
    x: Tensor,
    conv: nn.Conv1d,
    *,
    activation: str | None,
    state: State | None,
    name: str,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Run a depthwise convolution causally on x (B, T, D), from and into `state[name]`, (S, D, W - 1)."""
    weight = conv.weight.squeeze(1)
    held = None if state is None else state.get(name)
    if held is not None and is_step(x, state, cu_seqlens):
        row, new = causal_conv1d_step(held, x[:, 0], weight, conv.bias, activation=activation)
        y = row.unsqueeze(1)
    else:
        y, new = causal_conv1d(x, weight, conv.bias, activation=activation, initial_state=held, cu_seqlens=cu_seqlens)
    if state is not None:
        state[name] = new
    return y


def split_heads(x: Tensor, heads: int) -> Tensor:
    """View (..., heads width) as (..., heads, width)."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads)


def unit_heads(x: Tensor, heads: int, copies: int, eps: float) -> Tensor:
    """Bring each head of (..., H K) to length one, and repeat it `copies` times: (..., H copies, K).

    x / sqrt(sum(x^2) + eps) is an RMS norm with eps / K beside the mean and a weight of K^(-1/2).
    """
    rows = split_heads(x, heads)
    width = rows.shape[-1]
    weight = rows.new_full((width,), width**-0.5, dtype=state_dtype(x.dtype))
    normed = rms_norm(rows, weight, eps=eps / width)
    return normed if copies == 1 else normed.repeat_interleave(copies, dim=-2)


def check_input(name: str, x: Tensor, width: int) -> None:
    """Check that a layer's input is (B, T, width)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, needs a torch.Tensor")
    if x.ndim != 3 or x.shape[2] != width:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, needs (B, T, {width})")


def check_divides(name: str, value: int, of_name: str, of: int) -> None:
    """Check that one size of a layer divides another."""
    if value < 1 or of % value:
        raise ValueError(f"{name} is {value}, needs a divisor of {of_name} == {of}")


def whole(name: str, value: float) -> int:
    """Return a size that was given as a product with a ratio."""
    if abs(value - round(value)) > 1e-5 * max(1.0, abs(value)) or round(value) < 1:
        raise ValueError(f"{name} is {value}, needs a whole number >= 1")
    return round(value)
