"""Sizes of a language model: what a genome leaves open."""

from __future__ import annotations

from dataclasses import dataclass, replace

from star_core.genome.extension import SizeGenes


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a language model; with a genome they say all there is to build.

    Attributes:
        width: Width of the residual stream; a multiple of `head_dim`, and of 4 (2) times it for SA-3 (SA-4).
        head_dim: Channels of an attention head; even.
        vocab_size: Tokens known; 256 for bytes.
        time_scale: Tokens that the implicit filters of long convolutions call 1, usually the training length.
            Longer inputs work.
        rope_base: Base of the rotary frequencies.
        norm_eps: Added to the mean square in RMSNorm.
        ffn_width: Channels of gate and value in GMemless. Default: 3 times `width`, as its featurizer genome says.
        qk_norm: Whether attention norms each head of queries and keys before their rotation.
        tie_embeddings: Whether the output layer is the embedding.
        scale_embeddings: Whether embeddings are multiplied by sqrt(width) on their way in.

    Raises:
        ValueError: A size is no positive integer, or `head_dim` does not divide `width`.
        TypeError: A switch is not a bool.
    """

    width: int = 128
    head_dim: int = 32
    vocab_size: int = 256
    time_scale: int = 1024
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    ffn_width: int | None = None
    qk_norm: bool = False
    tie_embeddings: bool = True
    scale_embeddings: bool = True

    def __post_init__(self) -> None:
        sizes = ["width", "head_dim", "vocab_size", "time_scale"]
        for name in sizes if self.ffn_width is None else [*sizes, "ffn_width"]:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: needs a positive integer, got {value!r}")
        if self.head_dim % 2 or self.width % self.head_dim:
            raise ValueError(f"head_dim: needs an even divisor of width = {self.width}, got {self.head_dim}")
        for name in ("qk_norm", "tie_embeddings", "scale_embeddings"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: needs a bool, got {value!r}")

    def with_sizes(self, sizes: SizeGenes) -> ModelConfig:
        """Return these sizes with a genome's in their place where it decides them.

        Raises:
            ValueError: The two do not fit together.
        """
        width = self.width if sizes.width is None else sizes.width
        head_dim = self.head_dim if sizes.head_dim is None else sizes.head_dim
        ffn_width = self.ffn_width if sizes.ffn is None else sizes.ffn * width
        return replace(self, width=width, head_dim=head_dim, ffn_width=ffn_width)
