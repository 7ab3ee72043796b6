"""Weights from parents: a child begins with what its parents learnt where it is built alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from star_core import LanguageModel


@torch.no_grad()
def inherit_weights(model: LanguageModel, parents: Sequence[Path]) -> int:
    """Copy the weights of every LIV whose genes are those of a parent's LIV at the same place; the first parent's where
    both fit, and that one's embedding, output layer and last norm.

    Biased: a child is compared after its parents' steps and its own, a genome without parents after its own alone, and
    a LIV that changed trains less than those beside it. Real et al., "Large-scale evolution of image classifiers",
    2017, arXiv:1703.01041, inherit so.

    Args:
        model: Of the child, with fresh weights; changed in place.
        parents: Files of `LanguageModel.save`; those that are not there, and models of another width, are left out.
    Returns:
        How many LIVs have a parent's weights.
    """
    models = [LanguageModel.load(path) for path in parents if path.exists()]
    models = [parent for parent in models if parent.config.width == model.config.width]
    if not models:
        return 0
    _copy(models[0].embedding, model.embedding)
    if model.output is not None and models[0].output is not None:
        _copy(models[0].output, model.output)
    _copy(models[0].backbone.norms[-1], model.backbone.norms[-1])
    inherited = 0
    for place, genes in enumerate(model.genome.livs):
        for parent in models:
            there = place < len(parent.genome) and parent.genome.livs[place] == genes
            if there and _alike(parent.backbone.livs[place], model.backbone.livs[place]):
                model.backbone.livs[place].load_state_dict(parent.backbone.livs[place].state_dict())
                _copy(parent.backbone.norms[place], model.backbone.norms[place])
                if str(place) in model.backbone.out_norms:
                    _copy(parent.backbone.out_norms[str(place)], model.backbone.out_norms[str(place)])
                inherited += 1
                break
    return inherited


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


def _alike(first: nn.Module, second: nn.Module) -> bool:
    """Tell whether two LIVs of the same genes have the same tensors: what they share with others may differ."""
    shapes = [{name: value.shape for name, value in liv.state_dict().items()} for liv in (first, second)]
    return shapes[0] == shapes[1]
