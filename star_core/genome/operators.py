"""Operator genomes: five integers that name the featurizer of a LIV class and the structure of its T."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

from star_core.genome._text import format_genes, member, one_of, parse_genes, require_text
from star_core.genome.featurizers import FEATURIZERS
from star_core.genome.structure import ChannelMixing, Nonlinearity, Sparsity, TokenMixing


@dataclass(frozen=True, slots=True)
class OperatorGenome:
    """The structure of y = T(x) x, as five integers.

    Source: Thomas et al., STAR, 2024, arXiv 2411.17800.

    Attributes:
        featurizer_class: 1 to 9, a key of `FEATURIZERS`.
        token_mixing: Structure of T over tokens.
        sparsity: Which entries of T are kept.
        nonlinearity: What is applied to T.
        channel_mixing: Structure of T over channels.
    Raises:
        TypeError: A gene is not an integer.
        ValueError: A gene is out of its range.
    """

    featurizer_class: int
    token_mixing: TokenMixing
    sparsity: Sparsity
    nonlinearity: Nonlinearity
    channel_mixing: ChannelMixing

    def __post_init__(self) -> None:
        number = one_of(self.featurizer_class, FEATURIZERS.keys(), "featurizer_class")
        object.__setattr__(self, "featurizer_class", number)
        object.__setattr__(self, "token_mixing", member(TokenMixing, self.token_mixing, "token_mixing"))
        object.__setattr__(self, "sparsity", member(Sparsity, self.sparsity, "sparsity"))
        object.__setattr__(self, "nonlinearity", member(Nonlinearity, self.nonlinearity, "nonlinearity"))
        object.__setattr__(self, "channel_mixing", member(ChannelMixing, self.channel_mixing, "channel_mixing"))

    @classmethod
    def parse(cls, text: str) -> OperatorGenome:
        """Read the text form, such as "12123" or "1.2.1.2.3".

        Raises:
            TypeError: `text` is not a str.
            ValueError: Not five whole numbers, or one of them out of its range.
        """
        genes = parse_genes(require_text(text, "operator genome"), len(fields(cls)), "operator genome")
        return cls(*cast("tuple[Any, ...]", genes))  # plain ints become the enums in __post_init__

    def __str__(self) -> str:
        return format_genes([[getattr(self, field.name) for field in fields(self)]])[0]
