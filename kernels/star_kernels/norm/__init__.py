"""RMS normalisation, alone and with the residual add, and rotary positions."""

from __future__ import annotations

from torch import Tensor

from star_kernels._validation import check_first, check_positive, check_shape
from star_kernels.dispatch import Operator
from star_kernels.norm import reference

__all__ = ["add_rms_norm", "rms_norm", "rotary"]

_rms_norm = Operator("rms_norm", reference.rms_norm)
_add_rms_norm = Operator("add_rms_norm", reference.add_rms_norm)
_rotary = Operator("rotary", reference.rotary)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """Divide each row by its root mean square and scale it: y = x / sqrt(mean(x^2) + eps) * weight.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv 1910.07467, equation 4; eps is
    inside the root.

    Args:
        x: (..., D), any floating dtype.
        weight: (D,), any floating dtype.
        eps: Added to the mean square.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (..., D) in x.dtype.

    Raises:
        ValueError: a shape, device, `eps` or `backend` does not fit; TypeError: a tensor is not floating.

    Numerics: sums and products in float32 (float64 for float64), rounded once. An all-zero row gives zeros.
    """
    if not isinstance(x, Tensor) or x.ndim < 1:
        check_first("x", x, 1, "(..., D)")
    check_first("x", x, x.ndim, "(..., D)")
    check_shape("weight", weight, x.shape[-1:], "(D,)", x)
    check_positive("eps", eps, zero=True)
    y: Tensor = _rms_norm.serve(x, backend)(x, weight, eps)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum.

    Source: as `rms_norm`; the fused form is common to the pre-norm transformer implementations.

    Args:
        x: The branch's output, (..., D), any floating dtype.
        residual: The stream, (..., D), any floating dtype; it may be wider than x's.
        weight: (D,), any floating dtype.
        eps: Added to the mean square.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: rms_norm(residual_sum), (..., D) in x.dtype.
        residual_sum: x + residual, (..., D) in residual.dtype.

    Raises:
        ValueError: a shape, device, `eps` or `backend` does not fit; TypeError: a tensor is not floating.

    Numerics: as `rms_norm`, of the sum after it was rounded to residual.dtype.
    """
    if not isinstance(x, Tensor) or x.ndim < 1:
        check_first("x", x, 1, "(..., D)")
    check_first("x", x, x.ndim, "(..., D)")
    check_shape("residual", residual, x.shape, "(..., D), the shape of x", x)
    check_shape("weight", weight, x.shape[-1:], "(D,)", x)
    check_positive("eps", eps, zero=True)
    y, residual_sum = _add_rms_norm.serve(x, backend)(x, residual, weight, eps)
    return y, residual_sum


def rotary(
    x: Tensor, positions: Tensor, *, base: float = 10000.0, interleaved: bool = False, backend: str | None = None
) -> Tensor:
    """Rotate pairs of channels by an angle that grows with the token's position.

    Pair i turns by positions * base^(-2 i / D). A pair is (x_i, x_{i + D/2}), or (x_{2i}, x_{2i + 1}) when interleaved.

    Source: Su et al., "RoFormer", 2021, arXiv 2104.09864, equation 34 (the interleaved pairing); the half-split pairing
    is that of GPT-NeoX and LLaMA.

    Args:
        x: Queries or keys, (B, T, H, D), D even, any floating dtype.
        positions: (T,) or (B, T), integers or floating numbers; not differentiated.
        base: The wavelengths' base, > 0.
        interleaved: Which pairing.
        backend: Who must serve the call; None takes the best available.

    Returns:
        y: (B, T, H, D) in x.dtype.

    Raises:
        ValueError: a shape, device, `base` or `backend` does not fit; TypeError: a tensor has an unfit dtype.

    Numerics: angles, sines and products in float32 whatever x.dtype (float64 for float64), rounded once.
    """
    check_first("x", x, 4, "(B, T, H, D)")
    batch, length, _, width = x.shape
    if width % 2:
        raise ValueError(f"x has D == {width}, needs an even D")
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions is {type(positions).__name__}, needs a torch.Tensor")
    if positions.is_complex():
        raise TypeError(f"positions is {positions.dtype}, needs integers or floating numbers")
    if positions.shape != (length,) and positions.shape != (batch, length):
        raise ValueError(
            f"positions has shape {tuple(positions.shape)}, needs (T,) = {(length,)} or (B, T) = {(batch, length)}"
        )
    if positions.device != x.device:
        raise ValueError(f"positions is on {positions.device}, needs {x.device}")
    check_positive("base", base)
    y: Tensor = _rotary.serve(x, backend)(x, positions, base, interleaved)
    return y
