"""What a training costs, before it starts: operations from the sizes, and hours from a card's peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from search.train_config import TrainConfig
from star_core import LanguageModel
from star_core.genome import POOL

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
        used: Parameters that a token meets: those of a featurizer as often as there are LIVs that use it, and those of
            the output layer, tied or not; embeddings are looked up.
        dense: 6 N D operations, with `used` for N and the training's tokens for D: two forward and four backward for a
            parameter and a token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
        attention: Operations of scores and weighted values: 6 T width for a token and an attention map, half of what
            the formula of PaLM's appendix B has, since the maps are causal.
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
    used = sum(parameter.numel() for liv in model.backbone.livs for parameter in liv.parameters())
    used += model.backbone.norms[0].numel() * len(model.backbone.norms) + model.output_weight.numel()
    classes = [POOL[genes.liv_class] for genes in model.genome.livs]
    maps = sum(1 + liv.differential for liv in classes if liv.family == "attention")
    return Cost(
        parameters=model.num_parameters(),
        used=used,
        dense=6.0 * used * tokens,
        attention=6.0 * config.seq_len * model.config.width * maps * tokens,
    )
