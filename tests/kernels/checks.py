"""What the kernel tests compare with: cases, calls, gradients, and how close is close enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels

Outputs = tuple[Tensor, ...]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call: float64 tensors that are differentiated, by argument name, and the arguments that are not."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors as fresh leaves, rounded to `dtype`; states stay at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        return {
            name: one.to(wide if "state" in name else dtype).clone().requires_grad_()
            for name, one in self.tensors.items()
        }


def call(operator: str, backend: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> Outputs:
    """Call a public operator and return its outputs as a tuple; skip where the backend does not serve it."""
    try:
        result = getattr(star_kernels, operator)(**tensors, **options, backend=backend)
    except ValueError as error:
        if str(error).startswith(f"backend={backend!r} does not"):
            pytest.skip(str(error))
        raise
    return result if isinstance(result, tuple) else (result,)


def upstream(outputs: Outputs, seed: int = 7) -> Outputs:
    """Return random gradients for the outputs, the same for each dtype up to rounding."""
    generator = torch.Generator("cpu").manual_seed(seed)
    made = (torch.randn(one.shape, generator=generator, dtype=torch.float64, device="cpu") for one in outputs)
    return tuple(grad.to(one) for grad, one in zip(made, outputs, strict=True))


def gradients(outputs: Outputs, leaves: dict[str, Tensor], dy: Outputs | None = None) -> dict[str, Tensor]:
    """Return the gradient of every leaf (zeros where nothing depends on it)."""
    names = list(leaves)
    chosen = dy or upstream(outputs)
    live = [(one, grad) for one, grad in zip(outputs, chosen, strict=True) if one.requires_grad]
    if not live:
        return {name: torch.zeros_like(leaves[name]) for name in names}
    found = torch.autograd.grad(
        [one for one, _ in live],
        [leaves[name] for name in names],
        [grad for _, grad in live],
        retain_graph=True,
        allow_unused=True,
    )
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(names, found, strict=True)}


def assert_close(got: Tensor, want: Tensor, label: str, tolerance: float = 1e-10) -> None:
    """Assert shapes equal and errors within `tolerance` of the wanted tensor's largest value."""
    assert got.shape == want.shape, f"{label}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if want.numel():
        bound = tolerance * max(1.0, want.double().abs().max().item())
        error = (got.double() - want.double()).abs().max().item()
        assert error <= bound, f"{label}: error {error:.3e}, bound {bound:.3e}"


def assert_rule(got: Tensor, exact: Tensor, plain: Tensor, label: str, factor: float, roundings: float) -> None:
    """Assert the kernel contract's rule, for the whole tensor and row by row.

    The largest error is at most `factor` times that of the plain formula at the same dtype, plus a floor: one rounding
    of the row's largest value, one step between subnormal numbers, and some `roundings` of the largest value of all in
    float32.
    """
    assert got.shape == exact.shape, f"{label}: shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    if not exact.numel():
        return
    epsilon = torch.finfo(got.dtype).eps
    error, plain_error = ((one.double() - exact).abs() for one in (got, plain))
    step = epsilon * torch.finfo(got.dtype).smallest_normal
    step += roundings * torch.finfo(torch.float32).eps * exact.abs().max()
    whole = factor * plain_error.max() + epsilon * exact.abs().max() / 2 + step
    assert error.max() <= whole, f"{label}: error {error.max():.3e}, bound {whole:.3e}"
    if exact.ndim:
        floor = epsilon * exact.abs().amax(-1) + step
        bound = factor * plain_error.amax(-1) + floor
        worst = (error.amax(-1) - bound).max()
        assert worst <= 0, f"{label}: a row's error is {worst:.3e} above its bound"


def same(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors are bit-identical."""
    return torch.equal(got, want)


def reversed_axes(x: Tensor) -> Tensor:
    """Return x's values laid out with the axes in reverse order."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def offset_slices(x: Tensor) -> Tensor:
    """Return x's values cut out of a larger buffer at storage offset 1, with NaN all around."""
    if x.ndim == 0:
        return torch.stack([torch.full_like(x, float("nan")), x])[1]
    buffer = torch.full((*(size + 2 for size in x.shape[:-1]), 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    view = buffer[(*(slice(1, size + 1) for size in x.shape[:-1]), slice(1, 2 * x.shape[-1] + 1, 2))]
    view.copy_(x)
    return view
