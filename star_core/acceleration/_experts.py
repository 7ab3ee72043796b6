"""Routed experts: the tokens of one expert at a time, as those of Qwen3-Next and other mixtures keep their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from star_core.acceleration._linear import linear
from star_core.acceleration._rules import Arguments, Offer, Rule, class_name, original
from star_kernels import swiglu

_NAMES = ("gate_up_proj", "down_proj", "num_experts", "act_fn")
_ACTIVATIONS = ("SiLU", "SiLUActivation")


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Mix (N, D) by each token's experts (N, K), with weights (N, K); `num_experts` as an index is no expert."""
    if torch.compiler.is_compiling():  # How many tokens an expert gets decides the shapes.
        mixed_as_before: Tensor = original(self, hidden_states, top_k_index, top_k_weights)
        return mixed_as_before
    choices = top_k_index.flatten()
    counts = torch.bincount(choices, minlength=self.num_experts + 1)[: self.num_experts].tolist()
    order = choices.argsort(stable=True)[: sum(counts)]
    rows = order // top_k_index.shape[1]
    # Unbound, whose gradient is one stack: that of each expert's slice is a tensor of zeros for all.
    weights = zip(self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
    mixed = []
    for chunk, (gate_up, down) in zip(torch.split(hidden_states[rows], counts), weights, strict=True):
        if chunk.shape[0]:
            gate, up = linear(chunk, gate_up).chunk(2, dim=-1)
            mixed.append(linear(swiglu(gate, up), down))
    scaled = torch.cat(mixed) * top_k_weights.flatten()[order, None] if mixed else hidden_states[:0]
    return torch.zeros_like(hidden_states).index_add(0, rows, scaled.to(hidden_states.dtype))


def _applies(module: nn.Module) -> bool:
    return class_name(module).endswith("Experts") and all(hasattr(module, name) for name in _NAMES)


def _offers(module: Any) -> list[Offer] | str:
    weight = module.gate_up_proj
    if not (isinstance(weight, Tensor) and weight.is_cpu and weight.dtype == torch.float32):
        return "torch's grouped product serves its device and dtype"
    name = type(module.act_fn).__name__
    return [Offer(("swiglu",), forward)] if name in _ACTIVATIONS else f"no operator gates with {name}"


def _probe(module: Any, normal: Callable[..., Tensor]) -> Arguments:
    count = int(module.num_experts)
    index = torch.tensor([[0, count - 1], [count // 2, 0], [0, count // 2]])
    return (normal(3, module.gate_up_proj.shape[2]), index, normal(3, 2).abs()), {}


RULE = Rule(_applies, _offers, _probe)
