"""Checkpoints of transformers as genomes with their weights, and back.

A layer of transformers that holds a mixer and a feed-forward network becomes two LIVs. What is converted equals its
original: whatever a genome and its sizes cannot say is refused in one sentence, and nothing is approximated. Differs
from its original in: the residual stream has the weights' dtype, where Mamba's may be float32 beside bfloat16.

Llama, LFM2 and Mamba are known. It needs the extra `hub`; `import star_core` alone never imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from star_core.config import ModelConfig
from star_core.convert._decoder import (
    LFM2,
    LLAMA,
    decoder_names,
    lfm2_genome,
    lfm2_options,
    lfm2_sizes,
    llama_genome,
    llama_options,
    llama_sizes,
)
from star_core.convert._mamba import mamba_genome, mamba_names, mamba_options, mamba_sizes
from star_core.convert._weights import Names, gather, one_place, scatter
from star_core.genome import POOL, Genome
from star_core.model import LanguageModel

__all__ = ["from_transformers", "genome_of", "to_transformers"]


@dataclass(frozen=True)
class _Architecture:
    """How one class of transformers is read and written.

    Attributes:
        config: Its configuration's class.
        genome: From a configuration to the genome.
        sizes: From a model to its sizes.
        options: From a genome and sizes to what the configuration takes.
        names: From a genome and sizes to which of their weights make up ours.
    """

    config: Any
    genome: Callable[[Any], Genome]
    sizes: Callable[[PreTrainedModel], ModelConfig]
    options: Callable[[Genome, ModelConfig], dict[str, Any]]
    names: Callable[[Genome, ModelConfig], Names]


_ARCHITECTURES = {
    LlamaForCausalLM: _Architecture(
        LlamaConfig, llama_genome, llama_sizes, llama_options, partial(decoder_names, layout=LLAMA)
    ),
    Lfm2ForCausalLM: _Architecture(
        Lfm2Config, lfm2_genome, lfm2_sizes, lfm2_options, partial(decoder_names, layout=LFM2)
    ),
    MambaForCausalLM: _Architecture(MambaConfig, mamba_genome, mamba_sizes, mamba_options, mamba_names),
}


def genome_of(config: PreTrainedConfig) -> Genome:
    """Return the genome of the models that a configuration of transformers describes, without their weights.

    Raises:
        TypeError: `config` is no LlamaConfig, Lfm2Config or MambaConfig.
        ValueError: The genome has no place for something in it.
    """
    if type(config) is Mamba2Config:
        raise ValueError(
            "config: Mamba-2 has one decay for each head, and B and C through the short convolution, which no class of "
            "the pool has; needs Mamba"
        )
    for architecture in _ARCHITECTURES.values():
        if type(config) is architecture.config:
            return architecture.genome(config)
    known = ", ".join(architecture.config.__name__ for architecture in _ARCHITECTURES.values())
    raise TypeError(f"config: needs one of {known}, got {type(config).__name__}")


def from_transformers(model: PreTrainedModel) -> LanguageModel:
    """Copy a causal language model of transformers to a genome with its weights.

    Args:
        model: LlamaForCausalLM, Lfm2ForCausalLM or MambaForCausalLM; its dtype, device and training mode are kept.
    Returns:
        A model with the same logits. `config.time_scale` is the longest input that the checkpoint names, where it
        names one.
    Raises:
        TypeError: `model` is none of these classes.
        ValueError: Something in the checkpoint has no place in a genome and its sizes; the message says what is needed.
    """
    if type(model) not in (*_ARCHITECTURES, Mamba2ForCausalLM):
        known = ", ".join(kind.__name__ for kind in _ARCHITECTURES)
        raise TypeError(f"model: needs one of {known}, got {type(model).__name__}")
    genome = genome_of(model.config)
    architecture = _ARCHITECTURES[type(model)]
    theirs = _separate(model)
    device, dtype = one_place(theirs)
    config = architecture.sizes(model)
    copy = LanguageModel(genome, config, seed=0).to(device=device, dtype=dtype)
    ours = copy.state_dict()
    names = _needed(architecture.names(genome, config), untied=not config.tie_embeddings)
    for name, weight in gather(theirs, names, {name: weight.shape for name, weight in ours.items()}):
        ours[name].copy_(weight)
    return copy.train(model.training)


def to_transformers(model: LanguageModel, **options: Any) -> PreTrainedModel:
    """Copy a model to the class of transformers that has its layers.

    That is Llama for attention (SA-1, SA-3 or SA-4) and GMemless in turn, LFM2 if there are GConv-1 among the
    attentions or queries and keys are normed, and Mamba for Rec-1 or Rec-2 alone. Where the model scales its embedding
    (`ModelConfig.scale_embeddings`), which these classes do not, the scaled one and the output layer are two weights.

    Args:
        model: Without sharing of any kind; its dtype, device and training mode are kept.
        options: What the class's configuration takes and the conversion leaves open, such as `eos_token_id`; token ids
            are None unless given.
    Returns:
        A model with the same logits.
    Raises:
        ValueError: No class has these layers, or one of `options` is what the conversion sets.
    """
    kind = _kind(model.genome, model.config)
    architecture = _ARCHITECTURES[kind]
    tied = model.output is None and not model.config.scale_embeddings
    decided = architecture.options(model.genome, model.config) | {
        "vocab_size": model.config.vocab_size,
        "hidden_size": model.config.width,
        "tie_word_embeddings": tied,
    }
    if clash := sorted(decided.keys() & options.keys()):
        raise ValueError(f"options: {', '.join(clash)} follows from the model; needs options that it leaves open")
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config: PreTrainedConfig = architecture.config(**(tokens | options | decided))
    with torch.random.fork_rng(devices=[]):
        copy = kind(config).to(device=model.embedding.device, dtype=model.embedding.dtype)
    ours = {name: weight.detach() for name, weight in model.state_dict().items()}
    if model.output is None and not tied:
        ours["output"] = ours["embedding"]
    if model.config.scale_embeddings:
        ours["embedding"] = ours["embedding"] * model.config.width**0.5
    theirs = _separate(copy)
    names = _needed(architecture.names(model.genome, model.config), untied=not tied)
    for name, weight in scatter(ours, names, theirs):
        theirs[name].copy_(weight)
    return copy.train(model.training)


def _needed(names: Names, *, untied: bool) -> Names:
    """Leave out the output layer where it is the embedding."""
    return names if untied else {name: rows for name, rows in names.items() if name != "output"}


def _separate(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights by name, without the output layer where it is the embedding."""
    weights: dict[str, Tensor] = model.state_dict()
    if model.lm_head.weight is model.get_input_embeddings().weight:
        del weights["lm_head.weight"]
    return weights


def _kind(genome: Genome, config: ModelConfig) -> Any:
    """Return the class of transformers that has these layers."""
    sharing = genome.sharing()
    for index in range(len(genome)):
        if sharing.featurizer_source[index] != index or sharing.tensor_source[index]:
            raise ValueError(f"genome: LIV {index} shares with an earlier one, as no class of transformers does")
    if any(genes.extension is not None for genes in genome.canonical().livs):
        raise ValueError(f"genome: no class of transformers has the layers of {genome}; needs the paper's genes alone")
    classes = [POOL[genes.liv_class] for genes in genome.livs]
    names = {cls.name for cls in classes}
    mixers = {cls.name for cls in classes[::2]}
    attentions = mixers & {"SA-1", "SA-3", "SA-4"}
    if names in ({"Rec-1"}, {"Rec-2"}):
        return MambaForCausalLM
    alternates = len(genome) % 2 == 0 and {cls.name for cls in classes[1::2]} == {"GMemless"}
    if not alternates or len(attentions) > 1 or not mixers <= attentions | {"GConv-1"}:
        raise ValueError(
            f"genome: no class of transformers has the layers of {genome}; needs one of SA-1, SA-3 and SA-4 in turn "
            "with GMemless, GConv-1 beside the attention, or Rec-1 or Rec-2 alone"
        )
    if "GConv-1" not in mixers and not config.qk_norm:
        return LlamaForCausalLM
    if attentions and not config.qk_norm:
        raise ValueError("config: Lfm2ForCausalLM norms queries and keys; needs qk_norm=True, got False")
    return Lfm2ForCausalLM
