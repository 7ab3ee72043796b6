"""Short causal depthwise convolutions, plain and gated, with their one-token steps."""

from __future__ import annotations

from torch import Tensor

from star_kernels._validation import check_choice, check_first, check_same_dtype, check_sequences, check_shape
from star_kernels.dispatch import Operator
from star_kernels.short_conv import reference

__all__ = ["causal_conv1d", "causal_conv1d_step", "gated_short_conv", "gated_short_conv_step"]

ACTIVATIONS = (None, "silu", "swish")

_causal_conv1d = Operator("causal_conv1d", reference.causal_conv1d)
_gated_short_conv = Operator("gated_short_conv", reference.gated_short_conv)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own short filter over the present and the W - 1 tokens before it.

    y_t = act(bias + sum_w weight[:, w] * x_{t - (W - 1) + w}); tokens before the first come from the state or are 0.

    Source: the short convolution of Gu and Dao, "Mamba", 2023, arXiv 2312.00752, section 3.4.

    Args:
        x: (B, T, D), any floating dtype.
        weight: (D, W), W >= 1, the last tap meets the present token; any floating dtype.
        bias: (D,).
        activation: None, or "silu" (also written "swish").
        initial_state: The W - 1 tokens before the first, oldest first, (S, D, W - 1).
        cu_seqlens: Boundaries of packed sequences, (S + 1,), int32 or int64, with B == 1.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, T, D) in x.dtype.
        final_state: The last W - 1 inputs of each sequence, (S, D, W - 1), float32 (float64 for float64). A sequence
            shorter than W - 1 shifts the initial state, and gradients pass through.

    Raises:
        ValueError: a shape, device, choice or `backend` does not fit; TypeError: a tensor has an unfit dtype.

    Numerics: float32 inside (float64 for float64), rounded once.
    """
    check_first("x", x, 3, "(B, T, D)")
    _check_filter(x, weight, bias)
    _check_state("initial_state", initial_state, x, weight, cu_seqlens)
    check_choice("activation", activation, ACTIVATIONS)
    y, final_state = _causal_conv1d.serve(x, backend)(x, weight, bias, activation, initial_state, cu_seqlens)
    return y, final_state


def gated_short_conv(
    x: Tensor,
    gate_in: Tensor,
    gate_out: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve gated inputs with a short filter and gate the result: y = gate_out * (bias + conv(gate_in * x)).

    Source: the gated short convolution of LFM2 (Liquid AI, 2025, arXiv 2511.23404); the same structure as H3's and
    Hyena's with an explicit filter (Poli et al., 2023, arXiv 2302.10866, equation 4).

    Args:
        x: (B, T, D), any floating dtype.
        gate_in: As x; multiplies the input.
        gate_out: As x; multiplies the output.
        weight: (D, W), W >= 1, the last tap meets the present token; any floating dtype.
        bias: (D,), added before the outer gate.
        initial_state: The W - 1 gated inputs before the first token, oldest first, (S, D, W - 1).
        cu_seqlens: Boundaries of packed sequences, (S + 1,), int32 or int64, with B == 1.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, T, D) in x.dtype.
        final_state: The last W - 1 values of gate_in * x of each sequence, (S, D, W - 1), float32 (float64 for
            float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a dtype is unfit or differs from x.dtype.

    Numerics: float32 inside (float64 for float64), the gated input included, rounded once.
    """
    check_first("x", x, 3, "(B, T, D)")
    _check_gates(x, gate_in, gate_out, "(B, T, D)")
    _check_filter(x, weight, bias)
    _check_state("initial_state", initial_state, x, weight, cu_seqlens)
    serve = _gated_short_conv.serve(x, backend)
    y, final_state = serve(x, gate_in, gate_out, weight, bias, initial_state, cu_seqlens)
    return y, final_state


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `causal_conv1d` on one token.

    Args:
        state: The W - 1 inputs before this one, oldest first, (B, D, W - 1); not modified.
        x: (B, D), any floating dtype.
        weight: (D, W).
        bias: (D,).
        activation: None, or "silu" (also written "swish").
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, D) in x.dtype.
        new_state: (B, D, W - 1), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device, choice or `backend` does not fit; TypeError: a tensor is not floating.
    """
    y, new_state = _causal_conv1d_step.run(x, backend, state, x, weight, bias, activation)
    return y, new_state


def gated_short_conv_step(
    state: Tensor,
    x: Tensor,
    gate_in: Tensor,
    gate_out: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `gated_short_conv` on one token.

    Args:
        state: The W - 1 gated inputs before this one, oldest first, (B, D, W - 1); not modified.
        x: (B, D), any floating dtype.
        gate_in: As x.
        gate_out: As x.
        weight: (D, W).
        bias: (D,).
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, D) in x.dtype.
        new_state: (B, D, W - 1), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a dtype is unfit or differs from x.dtype.
    """
    y, new_state = _gated_short_conv_step.run(x, backend, state, x, gate_in, gate_out, weight, bias)
    return y, new_state


def _check_conv_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_first("x", x, 2, "(B, D)")
    _check_filter(x, weight, bias)
    check_shape("state", state, (*x.shape, weight.shape[1] - 1), "(B, D, W - 1)", x)
    check_choice("activation", activation, ACTIVATIONS)


def _check_gated_step(
    state: Tensor, x: Tensor, gate_in: Tensor, gate_out: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    check_first("x", x, 2, "(B, D)")
    _check_gates(x, gate_in, gate_out, "(B, D)")
    _check_filter(x, weight, bias)
    check_shape("state", state, (*x.shape, weight.shape[1] - 1), "(B, D, W - 1)", x)


def _check_gates(x: Tensor, gate_in: Tensor, gate_out: Tensor, layout: str) -> None:
    check_shape("gate_in", gate_in, x.shape, layout, x)
    check_shape("gate_out", gate_out, x.shape, layout, x)
    check_same_dtype("gate_in", gate_in, "x", x)
    check_same_dtype("gate_out", gate_out, "x", x)


def _check_filter(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    width = x.shape[-1]
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] < 1:
        check_first("weight", weight, 2, "(D, W)")
        raise ValueError(f"weight has shape {tuple(weight.shape)}, needs (D, W) with W >= 1")
    check_shape("weight", weight, (width, weight.shape[1]), "(D, W)", x)
    if bias is not None:
        check_shape("bias", bias, (width,), "(D,)", x)


def _check_state(name: str, state: Tensor | None, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> None:
    sequences = check_sequences("cu_seqlens", cu_seqlens, x.shape[0], x.shape[1], x)
    if state is not None:
        check_shape(name, state, (sequences, x.shape[2], weight.shape[1] - 1), "(S, D, W - 1)", x)


_causal_conv1d_step = Operator("causal_conv1d_step", reference.causal_conv1d_step, _check_conv_step)
_gated_short_conv_step = Operator("gated_short_conv_step", reference.gated_short_conv_step, _check_gated_step)
