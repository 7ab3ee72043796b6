"""Featurizer genomes: six integers for each feature group of a LIV class; the table of the nine classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from star_core.genome._text import format_genes, member, parse_genes, require_text, whole_number
from star_core.genome.structure import ChannelMixing, Nonlinearity, Sparsity, TokenMixing

_NAME = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class FeatureGroup:
    """How one feature group is made from the residual stream: its name and six integers.

    Attributes:
        name: Letters, such as "q" or "B".
        token_mixing: DIAGONAL for a map of each token alone, SCALED_TOEPLITZ where a convolution along time follows
            or, for the filter "K", where the group is a Toeplitz matrix itself.
        sparsity: BANDED for a convolution or filter of a few taps, NONE for one as long as the sequence.
        nonlinearity: What is applied to the group.
        channel_mixing: DENSE for a linear map of all channels, DIAGONAL for a filter of each channel alone.
        expansion: Width of the group / width of the layer's input. For "B" and "C" of a recurrence, the numbers in the
            state of one channel; all channels read the same ones, so that the tensor has this width whatever the
            layer's. For an explicit filter "K", its taps a channel.
        repeat: How many channels, or heads, use one copy: 4 for grouped-query attention with a quarter of the heads in
            k and v.
    Raises:
        TypeError: A gene is not an integer, or the name is not a str.
        ValueError: A gene is out of its range, or the name is not made of letters.
    """

    name: str
    token_mixing: TokenMixing
    sparsity: Sparsity
    nonlinearity: Nonlinearity
    channel_mixing: ChannelMixing
    expansion: int
    repeat: int

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(require_text(self.name, "feature group name")):
            raise ValueError(f"feature group name: is {self.name!r}, needs letters alone")
        group = f"feature group {self.name!r}"
        object.__setattr__(self, "token_mixing", member(TokenMixing, self.token_mixing, f"{group}, token_mixing"))
        object.__setattr__(self, "sparsity", member(Sparsity, self.sparsity, f"{group}, sparsity"))
        object.__setattr__(self, "nonlinearity", member(Nonlinearity, self.nonlinearity, f"{group}, nonlinearity"))
        object.__setattr__(
            self, "channel_mixing", member(ChannelMixing, self.channel_mixing, f"{group}, channel_mixing")
        )
        object.__setattr__(self, "expansion", whole_number(self.expansion, f"{group}, expansion"))
        object.__setattr__(self, "repeat", whole_number(self.repeat, f"{group}, repeat"))

    @property
    def genes(self) -> tuple[int, int, int, int, int, int]:
        """The six integers in the order of the text form."""
        return (
            int(self.token_mixing),
            int(self.sparsity),
            int(self.nonlinearity),
            int(self.channel_mixing),
            self.expansion,
            self.repeat,
        )


@dataclass(frozen=True, slots=True)
class FeaturizerGenome:
    """The feature groups of a LIV class, in order.

    Source: Thomas et al., STAR, 2024, arXiv 2411.17800. Differs from it in: groups carry names, and the text form
    spells them, "q:111211-k:111214-v:111214".

    Attributes:
        groups: At least one, of different names.
    Raises:
        ValueError: No group, or two of one name.
    """

    groups: tuple[FeatureGroup, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not self.groups:
            raise ValueError("featurizer genome: has no feature group, needs at least one")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"featurizer genome: feature group names are {self.names}, need to differ")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, in order."""
        return tuple(group.name for group in self.groups)

    def __getitem__(self, name: str) -> FeatureGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no feature group {name!r}; there are {', '.join(self.names)}")

    @classmethod
    def parse(cls, text: str) -> FeaturizerGenome:
        """Read the text form, such as "gate:111231-value:111231" or "B:3.2.1.2.16.1".

        Raises:
            TypeError: `text` is not a str.
            ValueError: A group without name or without six whole numbers, or a number out of its range.
        """
        groups = []
        for index, part in enumerate(require_text(text, "featurizer genome").split("-")):
            where = f"group {index} (from 0) of the featurizer genome"
            name, colon, numbers = part.partition(":")
            if not colon:
                raise ValueError(f"{where} is {part!r}: needs a name, ':' and six genes, such as 'q:111211'")
            genes = parse_genes(numbers, 6, f"{where}, {name!r},")
            groups.append(FeatureGroup(name, *cast("tuple[Any, ...]", genes)))
        return cls(tuple(groups))

    def __str__(self) -> str:
        numbers = format_genes([group.genes for group in self.groups])
        return "-".join(f"{name}:{text}" for name, text in zip(self.names, numbers, strict=True))


# Order of the genes: token mixing, sparsity, nonlinearity, channel mixing, expansion, repeat. Classes 5 and 6 follow
# Mamba (Gu and Dao, 2023, arXiv 2312.00752, figure 3 and algorithm 2): values of twice the width go through a short
# convolution and SiLU, and dt, B and C are functions of what comes out; z, the output gate, is a map of the token
# alone.
FEATURIZERS: Mapping[int, FeaturizerGenome] = MappingProxyType(
    {
        number: FeaturizerGenome.parse(text)
        for number, text in {
            1: "q:111211-k:111211-v:111211",
            2: "q:321211-k:321211-v:321211",
            3: "q:111211-k:111214-v:111214",
            4: "q:111211-k:111212-v:111212",
            5: "x:3.2.4.2.2.1-z:1.1.1.2.2.1-dt:3.2.1.2.2.1-B:3.2.1.2.16.1-C:3.2.1.2.16.1",
            6: "x:324221-z:111221-dt:321221-B:321221-C:321221",
            7: "v:111211-B:111211-C:111211-K:321131",
            8: "v:111211-B:111211-C:111211-K:311111",
            9: "gate:111231-value:111231",
        }.items()
    }
)
"""Featurizer classes: 1 linear q, k, v; 2 the same through a short convolution; 3 as 1 with k and v repeated 4 times;
4 twice; 5 recurrence of state 16; 6 of state 2; 7 gates and an explicit filter of 3 taps; 8 gates and an implicit
filter as long as the sequence; 9 gate and value of three times the width."""
