"""Long causal convolutions with a filter as long as the sequence, and their one-token step."""

from __future__ import annotations

from torch import Tensor

from star_kernels._validation import check_first, check_same_dtype, check_sequences, check_shape
from star_kernels.dispatch import Operator
from star_kernels.long_conv import reference

__all__ = ["long_conv", "long_conv_step"]

_long_conv = Operator("long_conv", reference.long_conv)


def long_conv(
    x: Tensor,
    filter: Tensor,
    *,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    skip: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel with its own long causal filter, between two gates.

    With u = gate_in * x:  y_t = gate_out_t * (skip * u_t + sum_{j = 0}^{min(t, L - 1)} filter[:, j] * u_{t - j}).

    Source: Poli et al., "Hyena Hierarchy", 2023, arXiv 2302.10866, section 3 (order 2), with the skip term of its code.

    Args:
        x: (B, T, D), any floating dtype.
        filter: Taps from the present token backwards, (D, L), any floating dtype; L may be shorter or longer than T,
            and taps beyond T are not read.
        gate_in: As x, or None for 1.
        gate_out: As x, or None for 1.
        skip: (D,), or None for 0.
        cu_seqlens: Boundaries of packed sequences, (S + 1,), int32 or int64, with B == 1.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, T, D) in x.dtype. The state from which `long_conv_step` goes on is the last L - 1 tokens of u.

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a dtype is unfit or differs from x.dtype.

    Numerics: float32 inside (float64 for float64), rounded once; through a Fourier transform of length 2 T, whose error
        is relative to the channel's largest value, not to each element.
    """
    check_first("x", x, 3, "(B, T, D)")
    _check_arguments(x, filter, gate_in, gate_out, skip, "(B, T, D)")
    check_sequences("cu_seqlens", cu_seqlens, x.shape[0], x.shape[1], x)
    y: Tensor = _long_conv.serve(x, backend)(x, filter, gate_in, gate_out, skip, cu_seqlens)
    return y


def long_conv_step(
    state: Tensor,
    x: Tensor,
    filter: Tensor,
    *,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `long_conv` on one token.

    The state is the history of gated inputs u = gate_in * x, oldest first, without the present token: it starts empty,
    (B, 0, D), grows by one token a step, and stays at the L - 1 tokens that the filter reaches.

    Args:
        state: (B, P, D) with 0 <= P <= L - 1; not modified. It must hold the whole history or its last L - 1 tokens.
        x: (B, D), any floating dtype.
        filter: (D, L).
        gate_in: As x, or None for 1.
        gate_out: As x, or None for 1.
        skip: (D,), or None for 0.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, D) in x.dtype.
        new_state: (B, min(P + 1, L - 1), D), float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or `backend` does not fit; TypeError: a dtype is unfit or differs from x.dtype.
    """
    y, new_state = _long_conv_step.run(x, backend, state, x, filter, gate_in, gate_out, skip)
    return y, new_state


def _check_step(
    state: Tensor, x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None
) -> None:
    check_first("x", x, 2, "(B, D)")
    _check_arguments(x, filter, gate_in, gate_out, skip, "(B, D)")
    check_first("state", state, 3, "(B, P, D)")
    held, reach = state.shape[1], filter.shape[1] - 1
    if held > reach:
        raise ValueError(f"state holds P == {held} tokens, needs at most L - 1 == {reach}")
    check_shape("state", state, (x.shape[0], held, x.shape[1]), "(B, P, D)", x)


def _check_arguments(
    x: Tensor, filter: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, skip: Tensor | None, layout: str
) -> None:
    if not isinstance(filter, Tensor) or filter.ndim != 2 or filter.shape[1] < 1:
        check_first("filter", filter, 2, "(D, L)")
        raise ValueError(f"filter has shape {tuple(filter.shape)}, needs (D, L) with L >= 1")
    check_shape("filter", filter, (x.shape[-1], filter.shape[1]), "(D, L)", x)
    for name, gate in (("gate_in", gate_in), ("gate_out", gate_out)):
        if gate is not None:
            check_shape(name, gate, x.shape, layout, x)
            check_same_dtype(name, gate, "x", x)
    if skip is not None:
        check_shape("skip", skip, x.shape[-1:], "(D,)", x)


_long_conv_step = Operator("long_conv_step", reference.long_conv_step, _check_step)
