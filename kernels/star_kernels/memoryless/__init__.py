"""Gated memoryless units (SwiGLU, GEGLU, ReGLU) and channel mixing."""

from __future__ import annotations

from torch import Tensor

from star_kernels._validation import check_first, check_same_dtype, check_shape
from star_kernels.dispatch import Operator
from star_kernels.memoryless import reference

__all__ = ["channel_mix", "geglu", "reglu", "swiglu"]

_swiglu = Operator("swiglu", reference.swiglu)
_geglu = Operator("geglu", reference.geglu)
_reglu = Operator("reglu", reference.reglu)
_channel_mix = Operator("channel_mix", reference.channel_mix)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """Gate a projection with SiLU: y = gate * sigmoid(gate) * up.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv 2002.05202, equation 6 (without the projections).

    Args:
        gate: Any shape, any floating dtype.
        up: As gate.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: As gate.

    Raises:
        ValueError: the shapes or devices differ, or `backend` cannot serve; TypeError: a dtype is unfit or differs.

    Numerics: float32 inside (float64 for float64), rounded once; backward recomputes the activation.
    """
    _check_pair(gate, up)
    y: Tensor = _swiglu.serve(gate, backend)(gate, up)
    return y


def geglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """Gate a projection with GELU: y = gelu(gate) * up, where gelu(x) = x Phi(x) with the exact normal integral.

    Source: Shazeer, 2020, arXiv 2002.05202, equation 6. Args, returns, errors and numerics: as `swiglu`.
    """
    _check_pair(gate, up)
    y: Tensor = _geglu.serve(gate, backend)(gate, up)
    return y


def reglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """Gate a projection with ReLU: y = max(gate, 0) * up; the gradient at 0 is 0.

    Source: Shazeer, 2020, arXiv 2002.05202, equation 6. Args, returns, errors and numerics: as `swiglu`.
    """
    _check_pair(gate, up)
    y: Tensor = _reglu.serve(gate, backend)(gate, up)
    return y


def channel_mix(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Mix channels with a diagonal, block-diagonal or dense matrix: y_a = sum_b weight_ab x_b.

    Source: the channel-mixing structures of Thomas et al., "STAR", 2025, arXiv 2411.17800, section 2. A matrix is
    (out, in), as in torch.nn.Linear; group g of the grouped form maps channels g D/G .. (g + 1) D/G to themselves.

    Args:
        x: (..., D), any floating dtype.
        weight: (D,) diagonal, (G, D/G, D/G) grouped, or (D, D) dense; any floating dtype.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (..., D) in x.dtype.

    Raises:
        ValueError: the weight's shape does not fit x, devices differ, or `backend` cannot serve; TypeError: a tensor is
            not floating.

    Numerics: float32 inside (float64 for float64), rounded once.
    """
    if not isinstance(x, Tensor) or x.ndim < 1:
        check_first("x", x, 1, "(..., D)")
    check_first("x", x, x.ndim, "(..., D)")
    width = x.shape[-1]
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is {type(weight).__name__}, needs a torch.Tensor")
    if weight.ndim == 3 and weight.shape[0] > 0 and width % weight.shape[0] == 0:
        groups = weight.shape[0]
        check_shape("weight", weight, (groups, width // groups, width // groups), "(G, D/G, D/G)", x)
    elif weight.ndim in (1, 2):
        check_shape("weight", weight, (width,) * weight.ndim, "(D,)" if weight.ndim == 1 else "(D, D)", x)
    else:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, needs (D,), (G, D/G, D/G) or (D, D) with D == {width}"
        )
    y: Tensor = _channel_mix.serve(x, backend)(x, weight)
    return y


def _check_pair(gate: Tensor, up: Tensor) -> None:
    if not isinstance(gate, Tensor):
        check_first("gate", gate, 0, "(...)")
    check_first("gate", gate, gate.ndim, "(...)")
    check_shape("up", up, gate.shape, "(...), the shape of gate", gate)
    check_same_dtype("up", up, "gate", gate)
