"""The compiled gated units: fakes and gradients for the operators of cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels._native import Function, native_operator, serve


def _fake_unit(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _fake_unit_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_unit(gate, up), _fake_unit(gate, up)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gated_unit(name: str) -> Function:
    gradient = native_operator(f"{name}_backward", fake=_fake_unit_backward)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = gradient(dy, *ctx.saved_tensors)
        return gradients

    return native_operator(name, fake=_fake_unit, setup_context=_save_inputs, backward=backward)


for _name in ("swiglu", "geglu", "reglu"):
    serve(_name, _gated_unit(_name))
