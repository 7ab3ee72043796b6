"""Dense layers in float32 on a CPU, by oneDNN in place of the BLAS that torch calls for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.acceleration._rules import is_plain_linear

OPERATORS = ("oneDNN's product",)

_LEAST = 1 << 19
"""Weights below which it is not worth its 13 us a call: one token through 256 x 256 takes 21 us against 9."""

_MOST_ROWS = math.inf if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64
"""Rows above which the BLAS is as fast or faster: on a Zen 3, whose vectors are AVX2's, it takes 0.87 times as long for
1,024 rows through 768 x 3352 where oneDNN takes 0.94 times as long for 64 and 0.64 for one. On a Zen 4 oneDNN wins for
any number."""

# torch calls it for compiled graphs; its name has been the same since torch 2.0. On a Zen 4, MKL in torch 2.13 takes
# 12.4 ms for 1024 rows through 768 x 1536 and this 11.4; for one row 88 us and 54.
_product: Callable[..., Tensor] | None = getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)


_PLAIN = (Tensor, nn.Parameter)
"""Quantised and distributed weights are of other classes, beside a dtype and a shape as these have."""


class _Linear(torch.autograd.Function):
    """y = x W^T + b by oneDNN; the gradients are torch's products, which are as fast as its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, weight.shape[0])
        dx = (rows @ weight).reshape(x.shape) if ctx.needs_input_grad[0] else None
        dweight = rows.t() @ x.reshape(-1, weight.shape[1]) if ctx.needs_input_grad[1] else None
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert _product is not None
    return _product(x, weight, bias, "none", [], None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b as torch.nn.functional.linear does, by oneDNN where that is faster."""
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or type(weight) not in _PLAIN
        or not (x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.numel())
        or weight.numel() < _LEAST
        or x.numel() > _MOST_ROWS * weight.shape[1]
        or _product is None
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, weight, bias)


def forward(self: Any, input: Tensor) -> Tensor:
    """Run a torch.nn.Linear."""
    return linear(input, self.weight, self.bias)


def inside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the dense layers that a module of transformers holds and that this one serves, by name."""
    if _product is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for name, child in module.named_children():
        if is_plain_linear(child) and "forward" not in child.__dict__:
            weight: Any = child.weight
            plain = type(weight) in _PLAIN and weight.is_cpu and weight.dtype == torch.float32
            if plain and weight.numel() >= _LEAST:
                yield name, child
