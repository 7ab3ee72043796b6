"""Backbone genomes: the LIVs of a model from first to last, each with its five genes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

from star_core.genome._text import format_genes, parse_genes, require_text
from star_core.genome.genes import GENES, LIVGenes
from star_core.genome.sharing import Sharing, canonical_livs, sharing_plan
from star_core.genome.validity import require_valid


@dataclass(frozen=True)
class Genome:
    """A backbone, written as numbers.

    Two genomes compare equal if they are written alike; `canonical` and `hash` tell whether they decode to one
    network.

    Source: Thomas et al., STAR, 2024, arXiv 2411.17800.

    Attributes:
        livs: Genes of each LIV, first to last; at least one.
    Raises:
        TypeError: Something other than LIVGenes in `livs`.
        ValueError: No LIV.
    """

    livs: tuple[LIVGenes, ...]

    def __post_init__(self) -> None:
        livs = tuple(self.livs)
        for position, liv in enumerate(livs):
            if not isinstance(liv, LIVGenes):
                raise TypeError(f"livs: item {position} (from 0) is a {type(liv).__name__}, needs LIVGenes")
        if not livs:
            raise ValueError("livs: is empty, needs at least one LIV")
        object.__setattr__(self, "livs", livs)

    @classmethod
    def parse(cls, text: str) -> Genome:
        """Read the text form: five genes for each LIV, LIVs joined by "-", such as "21211-31112" or
        "10.1.1.2.1-9.1.1.1.1".

        A LIV may be written with or without dots whatever the others are. The genome need not be valid.

        Raises:
            TypeError: `text` is not a str.
            ValueError: A LIV without five whole numbers from 1; the message says which.
        """
        text = require_text(text, "genome")
        if not text:
            raise ValueError("genome is empty: needs five genes for each LIV, joined by '-', such as '21211-31112'")
        return cls(
            tuple(
                LIVGenes(*parse_genes(part, len(GENES), f"LIV {position} (from 0) of the genome"))
                for position, part in enumerate(text.split("-"))
            )
        )

    def __str__(self) -> str:
        return "-".join(format_genes([liv.as_tuple() for liv in self.livs]))

    def __len__(self) -> int:
        """Depth: the number of LIVs."""
        return len(self.livs)

    def with_gene(self, position: int, gene: str, value: int) -> Genome:
        """Return a copy in which one gene, one of `GENES`, of the LIV at `position` has another value."""
        liv = replace(self.livs[position], **{gene: value})
        return Genome((*self.livs[:position], liv, *self.livs[position + 1 :]))

    def canonical(self) -> Genome:
        """Return the one way to write the network that this genome decodes to.

        Strategies name only what is really shared with another LIV, labels count the sharing groups from 1 by first
        use, and what shares nothing has label 1 and strategy 1.

        Raises:
            ValueError: The genome is not valid.
        """
        require_valid(self)
        livs = canonical_livs(self.livs)
        return self if livs == self.livs else Genome(livs)

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits, the same for genomes that decode to one network: of the SHA-256 of the canonical
        text.

        Raises:
            ValueError: The genome is not valid.
        """
        return hashlib.sha256(str(self.canonical()).encode()).hexdigest()[:16]

    def sharing(self) -> Sharing:
        """Return where each LIV gets its featurizer weights and its feature groups from; the same for the canonical
        form.

        Raises:
            ValueError: The genome is not valid.
        """
        require_valid(self)
        return sharing_plan(self.livs)
