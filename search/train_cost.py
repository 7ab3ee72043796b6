"""What a training costs, before it starts: operations from the sizes, and hours from a card's peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from search.operations import mixing_flops
from search.train_config import TrainConfig
from star_core import LanguageModel
from star_core.liv.differential import Differential
from star_core.liv.featurizer import GroupLinear

CARDS: Mapping[str, float] = {
    "a100": 312e12,
    "h100": 989e12,
    "h200": 989e12,
    "b200": 2250e12,
    "l40s": 362e12,
    "mi300x": 1307e12,
}
"""Peak of dense bfloat16 products, FLOP/s, as the makers' data sheets say: A100 SXM, H100 SXM, H200 SXM, B200 (HGX),
L40S, MI300X."""

UTILISATION = 0.4
"""Part of the peak assumed where nothing is measured. Chowdhery et al., PaLM, 2022, arXiv 2204.02311, table 3, lists
21 to 46 % for large transformers."""


@dataclass(frozen=True)
class Cost:
    """Operations of a training.

    Attributes:
        parameters: Of the model, each counted once.
        used: Parameters that a token meets: those of a featurizer as often as there are LIVs that use it, without what
            makes the groups that a LIV reuses, and those of the output layer, tied or not; embeddings are looked up.
        dense: 6 N D operations, with `used` for N and the training's tokens for D: two forward and four backward for a
            parameter and a token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
        attention: Operations of scores and weighted values: 6 T width for a token and an attention map with heads of
            the usual sizes, half of what the formula of PaLM's appendix B has, since the maps are causal; less in a
            band. The mixing of tokens in all other LIVs is a small part and left out.
    """

    parameters: int
    used: int
    dense: float
    attention: float

    @property
    def total(self) -> float:
        """All operations, those of recomputed activations not among them."""
        return self.dense + self.attention

    def hours(self, card: str, cards: int, utilisation: float) -> float:
        """Return hours on so many cards at a part of their peak."""
        return self.total / (CARDS[card] * cards * utilisation) / 3600

    def utilisation(self, card: str, cards: int, seconds: float) -> float:
        """Return the part of the peak that a training of so many seconds would have reached."""
        return self.total / (CARDS[card] * cards * seconds)


def cost_of(model: LanguageModel, config: TrainConfig) -> Cost:
    """Return what training a model costs; it may lie on the device "meta"."""
    tokens = config.steps * config.batch_size * config.seq_len
    backbone = model.backbone
    used = sum(_met(liv) for liv in backbone.livs) + model.output_weight.numel()
    used += sum(norm.numel() for norm in (*backbone.norms, *backbone.out_norms.values()))
    maps = [cls for cls in model.genome.classes if cls.family == "attention"]
    seen = sum(mixing_flops(cls, model.config, 1) * _keys_seen(config.seq_len, cls.window) for cls in maps)
    return Cost(parameters=model.num_parameters(), used=used, dense=6.0 * used * tokens, attention=3.0 * seen * tokens)


def _keys_seen(seq_len: int, window: int | None) -> float:
    """Return how many keys a query of a sequence sees on average: half of them, or fewer in a band."""
    band = seq_len if window is None else min(window, seq_len)
    return band - band**2 / (2 * seq_len)


def _met(liv: nn.Module) -> int:
    """Count the parameters of a LIV that a token meets."""
    if isinstance(liv, Differential):
        return _met(liv.positive) + _met(liv.negative) + liv.lam.numel()
    met, reuse = _numel(liv), liv.reuse
    assert isinstance(reuse, frozenset)
    featurizer = liv.featurizer
    assert isinstance(featurizer, nn.Module)
    for module in featurizer.modules():
        if isinstance(module, GroupLinear):
            met -= sum(size for name, size in module.sizes.items() if name in reuse) * module.weight.shape[1]
        elif isinstance(module, nn.ModuleDict):
            met -= sum(_numel(part) for name, part in module.items() if name in reuse)
    if "K" in reuse and isinstance(filter := featurizer.filter, nn.Module):
        met -= _numel(filter)
    return met


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
