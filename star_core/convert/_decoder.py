"""Llama and LFM2: layers of an attention or a gated short convolution, and a SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from star_core.config import ModelConfig
from star_core.convert._weights import Names, Rows
from star_core.genome import POOL, Genome, LIVGenes, TokenMixing

_SHORT_CONV, _MEMORYLESS = 7, 9
_ATTENTIONS = {
    cls.featurizer["k"].repeat: number
    for number, cls in POOL.items()
    if cls.family == "attention" and not cls.differential and cls.featurizer["q"].token_mixing is TokenMixing.DIAGONAL
}
"""LIV classes of attention by how many query heads read one key head."""


@dataclass(frozen=True)
class Layout:
    """How an architecture calls its weights: those of the model, then those of a layer.

    Attributes:
        final_norm: The norm behind the last layer.
        mixer_norm: The norm before the mixer.
        ffn_norm: The norm before the feed-forward network.
        attention_out: The output projection of attention.
        ffn: Gate, value and output projection of the feed-forward network.
    """

    final_norm: str
    mixer_norm: str
    ffn_norm: str
    attention_out: str
    ffn: tuple[str, str, str]


LLAMA = Layout(
    final_norm="norm",
    mixer_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    attention_out="self_attn.o_proj",
    ffn=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
LFM2 = Layout(
    final_norm="embedding_norm",
    mixer_norm="operator_norm",
    ffn_norm="ffn_norm",
    attention_out="self_attn.out_proj",
    ffn=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
)


def llama_genome(config: Any) -> Genome:
    """Return the genome of a LlamaConfig.

    Raises:
        ValueError: See `from_transformers`.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act: is {config.hidden_act!r}, and GMemless has SiLU alone; needs 'silu'")
    if config.attention_dropout:
        raise ValueError(f"attention_dropout: is {config.attention_dropout}, and attention here has none; needs 0")
    return _genome([_attention(config)] * config.num_hidden_layers)


def lfm2_genome(config: Any) -> Genome:
    """Return the genome of an Lfm2Config.

    Raises:
        ValueError: See `from_transformers`.
    """
    taps = POOL[_SHORT_CONV].featurizer["K"].expansion
    if "conv" in config.layer_types and config.conv_L_cache != taps:
        raise ValueError(f"conv_L_cache: is {config.conv_L_cache}, and GConv-1 has a filter of {taps}; needs {taps}")
    return _genome([_SHORT_CONV if kind == "conv" else _attention(config) for kind in config.layer_types])


def llama_sizes(model: PreTrainedModel) -> ModelConfig:
    """Return the sizes of a LlamaForCausalLM.

    Raises:
        ValueError: See `from_transformers`.
    """
    return _sizes(model, model.config.rms_norm_eps, model.model.layers[0].mlp.gate_proj, qk_norm=False)


def lfm2_sizes(model: PreTrainedModel) -> ModelConfig:
    """Return the sizes of an Lfm2ForCausalLM.

    Raises:
        ValueError: See `from_transformers`.
    """
    qk_norm = "full_attention" in model.config.layer_types
    return _sizes(model, model.config.norm_eps, model.model.layers[0].feed_forward.w1, qk_norm=qk_norm)


def llama_options(genome: Genome, config: ModelConfig) -> dict[str, Any]:
    """Return what a LlamaConfig takes for this genome of attention and GMemless."""
    return _options(genome, config) | {
        "rms_norm_eps": config.norm_eps,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def lfm2_options(genome: Genome, config: ModelConfig) -> dict[str, Any]:
    """Return what an Lfm2Config takes for this genome of GConv-1, attention and GMemless."""
    kinds = ["conv" if genes.liv_class == _SHORT_CONV else "full_attention" for genes in genome.livs[::2]]
    return _options(genome, config) | {
        "norm_eps": config.norm_eps,
        "layer_types": kinds,
        "conv_L_cache": POOL[_SHORT_CONV].featurizer["K"].expansion,
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,
    }


def decoder_names(genome: Genome, config: ModelConfig, layout: Layout) -> Names:
    """Return which of their weights make up ours, with "output" for an output layer of its own."""
    names = {
        "embedding": Rows(("model.embed_tokens.weight",)),
        "output": Rows(("lm_head.weight",)),
        f"backbone.norms.{len(genome)}": Rows((f"model.{layout.final_norm}.weight",)),
    }
    for layer in range(len(genome) // 2):
        theirs, mixer, ffn = f"model.layers.{layer}", f"backbone.livs.{2 * layer}", f"backbone.livs.{2 * layer + 1}"
        names[f"backbone.norms.{2 * layer}"] = Rows((f"{theirs}.{layout.mixer_norm}.weight",))
        names[f"backbone.norms.{2 * layer + 1}"] = Rows((f"{theirs}.{layout.ffn_norm}.weight",))
        if genome.livs[2 * layer].liv_class == _SHORT_CONV:
            # Theirs are B, C and the value; ours are the value, B and C.
            names[f"{mixer}.featurizer.project.weight"] = Rows((f"{theirs}.conv.in_proj.weight",), config.width)
            names[f"{mixer}.featurizer.filter.weight"] = Rows((f"{theirs}.conv.conv.weight",))
            names[f"{mixer}.out.weight"] = Rows((f"{theirs}.conv.out_proj.weight",))
        else:
            projections = tuple(f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv")
            names[f"{mixer}.featurizer.project.weight"] = Rows(projections)
            names[f"{mixer}.out.weight"] = Rows((f"{theirs}.{layout.attention_out}.weight",))
            for name in "qk" if config.qk_norm else "":
                norm = Rows((f"{theirs}.self_attn.{name}_layernorm.weight",))
                names[f"{mixer}.featurizer.norms.{name}.weight"] = norm
        gate, value, out = (f"{theirs}.{name}.weight" for name in layout.ffn)
        names[f"{ffn}.featurizer.weight"] = Rows((gate, value))
        names[f"{ffn}.out.weight"] = Rows((out,))
    return names


def _genome(mixers: list[int]) -> Genome:
    return Genome(tuple(LIVGenes(number) for mixer in mixers for number in (mixer, _MEMORYLESS)))


def _attention(config: Any) -> int:
    """Return the LIV class of a checkpoint's attention."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    repeat, remainder = divmod(heads, kv_heads)
    if remainder or repeat not in _ATTENTIONS:
        known = " or ".join(f"{heads}/{number}" for number in sorted(_ATTENTIONS))
        raise ValueError(
            f"num_key_value_heads: is {kv_heads} for {heads} query heads, which no class of the pool has; needs {known}"
        )
    return _ATTENTIONS[repeat]


def _head_dim(config: Any) -> int:
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = int(getattr(config, "head_dim", None) or width // heads)
    if head_dim * heads != width:
        raise ValueError(
            f"head_dim: is {head_dim}, which with {heads} heads is not hidden_size = {width}; needs heads that make up "
            "the width"
        )
    return head_dim


def _sizes(model: PreTrainedModel, norm_eps: float, gate: Any, *, qk_norm: bool) -> ModelConfig:
    config = model.config
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(
            f"rope_type: is {rope['rope_type']!r}, and attention here turns by its base alone; needs 'default'"
        )
    return ModelConfig(
        width=config.hidden_size,
        head_dim=_head_dim(config),
        vocab_size=model.get_input_embeddings().weight.shape[0],
        time_scale=config.max_position_embeddings,
        rope_base=float(rope["rope_theta"]),
        norm_eps=norm_eps,
        ffn_width=gate.weight.shape[0],
        qk_norm=qk_norm,
        tie_embeddings=model.lm_head.weight is model.get_input_embeddings().weight,
        scale_embeddings=False,
    )


def _options(genome: Genome, config: ModelConfig) -> dict[str, Any]:
    heads = config.width // config.head_dim
    repeats = {number: repeat for repeat, number in _ATTENTIONS.items()}
    used = {repeats[genes.liv_class] for genes in genome.livs[::2] if genes.liv_class in repeats}
    ffn_width = config.ffn_width or POOL[_MEMORYLESS].featurizer["gate"].expansion * config.width
    return {
        "intermediate_size": ffn_width,
        "num_hidden_layers": len(genome) // 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // (used.pop() if used else 1),
        "max_position_embeddings": config.time_scale,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    }
