"""Cross entropy of a linear layer's outputs, without holding them."""

from __future__ import annotations

from torch import Tensor

from star_kernels._validation import check_choice, check_first, check_indices, check_positive, check_shape
from star_kernels.dispatch import Operator
from star_kernels.loss import reference

__all__ = ["linear_cross_entropy"]

_linear_cross_entropy = Operator("linear_cross_entropy", reference.linear_cross_entropy)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute cross_entropy(cap(hidden @ weight.T + bias), targets) a block of rows at a time.

    Source: torch.nn.functional.cross_entropy fixes the meaning of every argument; never holding the logits follows
    Wijmans et al., "Cut Your Losses", 2024, arXiv 2411.09009.

    Args:
        hidden: (..., D), any floating dtype.
        weight: (V, D), any floating dtype.
        targets: (...), int32 or int64, each in 0 .. V - 1 or equal to `ignore_index`.
        bias: (V,).
        ignore_index: Rows with this target count neither in the loss nor in the mean.
        reduction: "mean", "sum" or "none".
        label_smoothing: Share of the target mass spread evenly over V, 0 .. 1.
        softcap: Bound the logits to softcap * tanh(logit / softcap); > 0.
        backend: Who must serve the call; None takes the best available.

    Returns:
        loss: () or, for "none", (...); nats, float32 (float64 for float64). The mean over no row at all (every target
            ignored) is NaN with gradients of zero, as in torch.

    Raises:
        ValueError: a shape, device, range or `backend` does not fit (target values are the caller's promise);
            TypeError: a tensor has an unfit dtype.

    Numerics: logits and sums in float32 (float64 for float64).
    """
    if not isinstance(hidden, Tensor) or hidden.ndim < 1:
        check_first("hidden", hidden, 1, "(..., D)")
    check_first("hidden", hidden, hidden.ndim, "(..., D)")
    check_first("weight", weight, 2, "(V, D)")
    check_shape("weight", weight, (weight.shape[0], hidden.shape[-1]), "(V, D)", hidden)
    check_indices("targets", targets, hidden)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}, needs (...) = {tuple(hidden.shape[:-1])}")
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1], "(V,)", hidden)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing!r}, needs a number in 0 .. 1")
    check_positive("softcap", softcap)
    serve = _linear_cross_entropy.serve(hidden, backend)
    loss: Tensor = serve(hidden, weight, targets, bias, ignore_index, reduction, label_smoothing, softcap)
    return loss
