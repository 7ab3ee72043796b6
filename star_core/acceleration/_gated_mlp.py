"""Gated feed-forward layers: one activation, one product, three projections under whichever names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from star_core.acceleration._rules import Arguments, Forward, Offer, Rule, class_name
from star_kernels import geglu, reglu, swiglu

Gated = Callable[[Tensor, Tensor], Tensor]

_OPERATORS: dict[str, Gated] = {"swiglu": swiglu, "geglu": geglu, "reglu": reglu}

_ACTIVATIONS = {
    "SiLU": "swiglu",
    "SiLUActivation": "swiglu",
    "GELUActivation": "geglu",
    "ReLU": "reglu",
}
"""The operator for each class of activation; GELU's approximation by tanh has none."""


def _gate_up_down(operator: Gated) -> Forward:
    def forward(self: Any, x: Tensor) -> Any:
        return self.down_proj(operator(self.gate_proj(x), self.up_proj(x)))

    return forward


def _scaled_gate_up_down(operator: Gated) -> Forward:
    """Return FalconH1's: multipliers on the gate and on the output."""

    def forward(self: Any, x: Tensor) -> Any:
        gate = self.gate_proj(x) * self.gate_multiplier
        return self.down_proj(operator(gate, self.up_proj(x))) * self.down_multiplier

    return forward


def _one_three_two(operator: Gated) -> Forward:
    def forward(self: Any, x: Tensor) -> Any:
        return self.w2(operator(self.w1(x), self.w3(x)))

    return forward


def _fused_input(operator: Gated) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        gate, up = self.input_linear(hidden_states).chunk(2, dim=-1)
        return self.output_linear(operator(gate, up))

    return forward


def _adapted(operator: Gated) -> Forward:
    """Return Zamba2's: one layer for gate and up, with an adapter for each place where it is shared."""

    def forward(self: Any, hidden_state: Tensor, layer_idx: int | None = None) -> Any:
        adapter = self.gate_up_proj_adapter_list[self.layer_dic[layer_idx]]
        gate, up = (self.gate_up_proj(hidden_state) + adapter(hidden_state)).chunk(2, dim=-1)
        return self.down_proj(operator(gate, up))

    return forward


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Gated], Forward]], ...] = (
    (("gate_proj", "up_proj", "down_proj", "gate_multiplier", "down_multiplier"), _scaled_gate_up_down),
    (("gate_proj", "up_proj", "down_proj"), _gate_up_down),
    (("gate_up_proj", "gate_up_proj_adapter_list", "layer_dic", "down_proj"), _adapted),
    (("w1", "w2", "w3"), _one_three_two),
    (("input_linear", "output_linear"), _fused_input),
)
"""Names that a layer has, and the forward for layers that have them; the first that fits."""


def _form(module: nn.Module) -> Callable[[Gated], Forward] | None:
    return next((make for names, make in _FORMS if all(hasattr(module, name) for name in names)), None)


def _applies(module: nn.Module) -> bool:
    return class_name(module).upper().endswith("MLP") and _form(module) is not None


def _activation(module: nn.Module) -> str:
    """Return the class's name of the layer's activation; LFM2 writes SiLU out."""
    found = getattr(module, "act_fn", getattr(module, "activation", None))
    if found is None:
        return "SiLU"
    name = type(found).__name__
    return "tanh-approximated GELU" if getattr(found, "approximate", "none") != "none" else name


def _offers(module: Any) -> list[Offer] | str:
    activation, make = _activation(module), _form(module)
    if activation not in _ACTIVATIONS or make is None:
        return f"no operator gates with {activation}"
    operator = _ACTIVATIONS[activation]
    return [Offer((operator,), make(_OPERATORS[operator]))]


def _probe(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    name = next(one for one in ("gate_proj", "w1", "input_linear", "gate_up_proj") if hasattr(module, one))
    x = normal(1, 2, getattr(module, name).in_features)
    return (x, next(iter(module.layer_dic))) if hasattr(module, "layer_dic") else (x,), {}


RULE = Rule(_applies, _offers, _probe)
