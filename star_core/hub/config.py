"""The configuration that transformers saves beside the weights: a genome, and the sizes that it leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedConfig

from star_core.config import ModelConfig
from star_core.genome import Genome, lfm2, validate

# What transformers itself passes to, or writes for, any configuration.
_COMMON = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "tie_last_hidden_states",
        "torch_dtype",
        "transformers_version",
    }
    | PreTrainedConfig().to_dict().keys()
    # Generation's defaults have files of their own now; old ones may still lie in a configuration's.
    | GenerationConfig().to_dict().keys()
)
# Under their own names; `tie_embeddings` is transformers' `tie_word_embeddings`.
_SIZES = tuple(field.name for field in fields(ModelConfig) if field.name != "tie_embeddings")


class StarConfig(PreTrainedConfig):
    """A genome and its sizes: all there is to build a `StarForCausalLM`.

    Args:
        genome: Text of a valid genome, such as "11211-31112-21221-32112". Default: LFM2's layout at 8 LIVs.
        width: As `ModelConfig`, like the next eight.
        head_dim: Channels of an attention head.
        vocab_size: Tokens known.
        time_scale: Tokens that the implicit filters call 1.
        rope_base: Base of the rotary frequencies.
        norm_eps: Added to the mean square in RMSNorm.
        ffn_width: Channels of gate and value in GMemless.
        qk_norm: Whether attention norms queries and keys.
        scale_embeddings: Whether embeddings are multiplied by sqrt(width).
        measured: Numbers that belong to the model, by name with their unit in it, such as
            {"decode_ms_per_token": 1.9}; written to the model card.
        use_cache: Whether a forward pass outside training returns a decoding state.
        tie_word_embeddings: Whether the output layer is the embedding, as in `LanguageModel`.
        pad_token_id: Token that fills a batch's shorter rows.
        bos_token_id: Token that begins a sequence.
        eos_token_id: Token or tokens that end one.
        kwargs: What every configuration of transformers takes.

    Raises:
        ValueError: The genome does not parse or is not valid, sizes do not fit, or an option is unknown.
        TypeError: `measured` is no mapping from names to numbers.
    """

    model_type: ClassVar[str] = "star"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "width"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    def __init__(
        self,
        *,
        genome: str | None = None,
        width: int = 128,
        head_dim: int = 32,
        vocab_size: int = 256,
        time_scale: int = 1024,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
        ffn_width: int | None = None,
        qk_norm: bool = False,
        scale_embeddings: bool = True,
        measured: Mapping[str, float] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        width = kwargs.pop("hidden_size", width)
        if unknown := sorted(kwargs.keys() - _COMMON):
            options = [*_SIZES, "genome", "measured", "use_cache", "tie_word_embeddings"]
            near = get_close_matches(unknown[0], options, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"needs one of {', '.join(options)}"
            raise ValueError(f"StarConfig: unknown option {', '.join(map(repr, unknown))}; {hint}")
        if measured is not None and not (
            isinstance(measured, Mapping)
            and all(isinstance(key, str) and isinstance(value, int | float) for key, value in measured.items())
        ):
            raise TypeError(f"measured: needs a mapping from names to numbers, got {measured!r}")
        self.genome = str(lfm2(8)) if genome is None else str(genome)
        self.width = width
        self.head_dim = head_dim
        self.vocab_size = vocab_size
        self.time_scale = time_scale
        self.rope_base = rope_base
        self.norm_eps = norm_eps
        self.ffn_width = ffn_width
        self.qk_norm = qk_norm
        self.scale_embeddings = scale_embeddings
        self.measured = None if measured is None else dict(measured)
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        if violations := validate(self.parsed_genome()):
            raise ValueError(
                f"genome: {self.genome} is not valid: {'; '.join(violation.message for violation in violations)}"
            )
        config = self.model_config()
        self.width, self.head_dim, self.ffn_width = config.width, config.head_dim, config.ffn_width
        super().__init__(**kwargs)

    def parsed_genome(self) -> Genome:
        """Return the genome as an object."""
        return Genome.parse(self.genome)

    def model_config(self) -> ModelConfig:
        """Return the sizes as `LanguageModel` takes them, with those that the genome decides."""
        sizes = {name: getattr(self, name) for name in _SIZES}
        config = ModelConfig(**sizes, tie_embeddings=bool(self.tie_word_embeddings))
        return config.with_sizes(self.parsed_genome().sizes)

    @property
    def num_hidden_layers(self) -> int:
        """LIVs in the genome."""
        return len(self.parsed_genome())

    @property
    def num_attention_heads(self) -> int:
        """Query heads of an attention LIV."""
        return int(self.width // self.head_dim)
