"""Mamba: layers of a selective recurrence each, without feed-forward networks."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel

from star_core.config import ModelConfig
from star_core.convert._weights import Names, Rows
from star_core.genome import POOL, Genome, LIVGenes
from star_core.liv.build import FEATURIZER_TAPS
from star_core.liv.featurizer import step_rank

_RECURRENCES = {
    cls.featurizer["B"].expansion: number
    for number, cls in POOL.items()
    if cls.family == "recurrence" and not cls.differential
}
"""LIV classes of recurrences by their state size."""
_LAYER = {
    "featurizer.project.weight": "in_proj.weight",
    "featurizer.conv.weight": "conv1d.weight",
    "featurizer.conv.bias": "conv1d.bias",
    "featurizer.select.weight": "x_proj.weight",
    "featurizer.dt_weight": "dt_proj.weight",
    "featurizer.dt_bias": "dt_proj.bias",
    "featurizer.A_log": "A_log",
    "D": "D",
    "out.weight": "out_proj.weight",
}
"""Weights of a recurrence here by those of transformers' mixer; all have their rows in the same order."""


def mamba_genome(config: Any) -> Genome:
    """Return the genome of a MambaConfig.

    Raises:
        ValueError: See `from_transformers`.
    """
    width = config.hidden_size
    if config.state_size not in _RECURRENCES:
        known = " or ".join(str(size) for size in sorted(_RECURRENCES))
        raise ValueError(f"state_size: is {config.state_size}, which no class of the pool has; needs {known}")
    number = _RECURRENCES[config.state_size]
    needs = {
        "hidden_act": "silu",
        "conv_kernel": FEATURIZER_TAPS,
        "intermediate_size": POOL[number].featurizer["x"].expansion * width,
        "time_step_rank": step_rank(width),
    }
    for name, value in needs.items():
        if (found := getattr(config, name)) != value:
            where = f"{POOL[number].name} at width {width}"
            raise ValueError(f"{name}: is {found!r}, which {where} has no place for; needs {value!r}")
    return Genome((LIVGenes(number),) * config.num_hidden_layers)


def mamba_sizes(model: PreTrainedModel) -> ModelConfig:
    """Return the sizes of a MambaForCausalLM."""
    width = model.config.hidden_size
    return ModelConfig(
        width=width,
        # No layer has heads; this only has to divide the width.
        head_dim=math.gcd(width, 64),
        vocab_size=model.get_input_embeddings().weight.shape[0],
        norm_eps=model.config.layer_norm_epsilon,
        tie_embeddings=model.lm_head.weight is model.get_input_embeddings().weight,
        scale_embeddings=False,
    )


def mamba_options(genome: Genome, config: ModelConfig) -> dict[str, Any]:
    """Return what a MambaConfig takes for this genome of recurrences."""
    cls = POOL[genome.livs[0].liv_class]
    return {
        "num_hidden_layers": len(genome),
        "state_size": cls.featurizer["B"].expansion,
        "expand": cls.featurizer["x"].expansion,
        "conv_kernel": FEATURIZER_TAPS,
        "time_step_rank": step_rank(config.width),
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
    }


def mamba_names(genome: Genome, config: ModelConfig) -> Names:
    """Return which of their weights make up ours, with "output" for an output layer of its own."""
    names = {
        "embedding": Rows(("backbone.embeddings.weight",)),
        "output": Rows(("lm_head.weight",)),
        f"backbone.norms.{len(genome)}": Rows(("backbone.norm_f.weight",)),
    }
    for layer in range(len(genome)):
        names[f"backbone.norms.{layer}"] = Rows((f"backbone.layers.{layer}.norm.weight",))
        for ours, theirs in _LAYER.items():
            names[f"backbone.livs.{layer}.{ours}"] = Rows((f"backbone.layers.{layer}.mixer.{theirs}",))
    return names
