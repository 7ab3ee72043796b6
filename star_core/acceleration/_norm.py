"""RMS norms: plain, with a weight around one, and the gated ones of the mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from star_core.acceleration._rules import Arguments, Offer, Rule, class_name
from star_kernels import rms_norm, swiglu


def _epsilon(self: Any) -> float:
    return float(self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps)


def plain_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Scale by the weight. A float32 weight makes the output of half-precision tokens float32, as the original does."""
    wide = torch.promote_types(hidden_states.dtype, self.weight.dtype)
    return rms_norm(hidden_states.to(wide), self.weight, eps=_epsilon(self))


def centred_norm(self: Any, x: Tensor) -> Tensor:
    """Scale by one more than the weight, in float32."""
    return rms_norm(x, 1.0 + self.weight.float(), eps=_epsilon(self))


def gate_then_norm(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """Norm the gated tokens in groups."""
    if gate is not None:
        wide = torch.promote_types(hidden_states.dtype, gate.dtype)
        hidden_states = swiglu(gate.to(wide), hidden_states.to(wide)).to(hidden_states.dtype)
    return _grouped(self, hidden_states)


def norm_then_gate(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """Gate the tokens normed in groups."""
    y = _grouped(self, hidden_states).to(hidden_states.dtype)
    return y if gate is None else swiglu(gate.to(y.dtype), y)


def _grouped(self: Any, x: Tensor) -> Tensor:
    groups = _groups(self)
    wide = torch.promote_types(x.dtype, self.weight.dtype)
    if groups == 1:
        return rms_norm(x.to(wide), self.weight, eps=_epsilon(self))
    rows = x.to(wide).reshape(*x.shape[:-1], groups, -1)
    normed = rms_norm(rows, rows.new_ones(rows.shape[-1]), eps=_epsilon(self))
    weight: Tensor = self.weight
    return normed.flatten(-2) * weight


def _groups(self: Any) -> int:
    if hasattr(self, "group_size"):
        return int(self.weight.shape[0] // self.group_size)
    return int(getattr(self, "n_groups", 1))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    has_epsilon = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    return "RMSNorm" in class_name(module) and has_epsilon and isinstance(weight, Tensor) and weight.ndim == 1


def _is_plain(module: nn.Module) -> bool:
    return _is_norm(module) and "Gated" not in class_name(module) and "Weightless" not in class_name(module)


def _is_gated(module: nn.Module) -> bool:
    return _is_norm(module) and "Gated" in class_name(module)


def _offer_plain(module: Any) -> list[Offer] | str:
    return [Offer(("rms_norm",), plain_norm), Offer(("rms_norm",), centred_norm)]


def _offer_gated(module: Any) -> list[Offer] | str:
    if getattr(module, "activation", "silu") not in ("silu", "swish"):
        return f"no gate with the activation {module.activation!r}"
    return [Offer(("rms_norm", "swiglu"), gate_then_norm), Offer(("rms_norm", "swiglu"), norm_then_gate)]


def _rows(module: Any, normal: Callable[..., Tensor]) -> Tensor:
    """Return rows of many sizes, so that what stands beside the mean square shows."""
    rows = normal(1, 6, module.weight.shape[0])
    sizes = torch.tensor([1e-4, 1e-3, 1e-2, 1.0, 3.0, 10.0], device=rows.device, dtype=rows.dtype)
    return rows * sizes[:, None]


def _probe_plain(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    return (_rows(module, normal),), {}


def _probe_gated(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    return (_rows(module, normal), normal(1, 6, module.weight.shape[0])), {}


RULES = (Rule(_is_plain, _offer_plain, _probe_plain), Rule(_is_gated, _offer_gated, _probe_gated))
