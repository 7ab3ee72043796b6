"""Backbone genomes: the LIVs of a model from first to last, each with its five genes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from star_core.genome._text import format_genes, parse_genes, require_text
from star_core.genome.decode import canonical_sizes, plain_liv, resolve
from star_core.genome.extension import NO_SIZES, Extension, SizeGenes
from star_core.genome.genes import GENES, LIVGenes
from star_core.genome.pool import LIVClass
from star_core.genome.sharing import Sharing, canonical_livs, sharing_plan
from star_core.genome.validity import require_valid


@dataclass(frozen=True)
class Genome:
    """A backbone, written as numbers.

    Two genomes compare equal if they are written alike; `canonical` and `hash` tell whether they decode to one
    network.

    Source: Thomas et al., STAR, 2024, arXiv 2411.17800. Beyond it: LIVs with an extension, and sizes.

    Attributes:
        livs: Genes of each LIV, first to last; at least one.
        sizes: Sizes of the model that the genome decides; in the paper's space none.
    Raises:
        TypeError: Something other than LIVGenes in `livs`, or than SizeGenes for `sizes`.
        ValueError: No LIV.
    """

    livs: tuple[LIVGenes, ...]
    sizes: SizeGenes = NO_SIZES

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, SizeGenes):
            raise TypeError(f"sizes: needs SizeGenes, got {type(self.sizes).__name__}")
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

        A LIV may be written with or without dots whatever the others are. The genome need not be valid. Beyond the
        paper's genes, see `Extension` and `SizeGenes`: "width=128;21211[operator=12113,window=64]-91111".

        Raises:
            TypeError: `text` is not a str.
            ValueError: A LIV without five whole numbers from 1, or with an extension that cannot be read; the message
                says which.
        """
        text = require_text(text, "genome")
        if not text:
            raise ValueError("genome is empty: needs five genes for each LIV, joined by '-', such as '21211-31112'")
        sizes, semicolon, rest = text.partition(";")
        livs = tuple(
            _parse_liv(part, f"LIV {position} (from 0) of the genome")
            for position, part in enumerate((rest if semicolon else text).split("-"))
        )
        return cls(livs, SizeGenes.parse(sizes)) if semicolon else cls(livs)

    def __str__(self) -> str:
        texts = format_genes([liv.as_tuple() for liv in self.livs])
        sizes = f"{self.sizes};" if self.sizes != NO_SIZES else ""
        return sizes + "-".join(
            text if liv.extension is None else f"{text}[{liv.extension}]"
            for text, liv in zip(texts, self.livs, strict=True)
        )

    def __len__(self) -> int:
        """Depth: the number of LIVs."""
        return len(self.livs)

    def with_gene(self, position: int, gene: str, value: int) -> Genome:
        """Return a copy in which one gene, one of `GENES`, of the LIV at `position` has another value."""
        changes: dict[str, Any] = {gene: value}
        return self.with_liv(position, replace(self.livs[position], **changes))

    def with_liv(self, position: int, liv: LIVGenes) -> Genome:
        """Return a copy with another LIV at `position`."""
        return replace(self, livs=(*self.livs[:position], liv, *self.livs[position + 1 :]))

    @property
    def classes(self) -> tuple[LIVClass, ...]:
        """The class of each LIV: the pool's, or, where it has an extension, its own.

        Raises:
            ValueError: The genome is not valid.
        """
        require_valid(self)
        return self._classes

    @property
    def _classes(self) -> tuple[LIVClass, ...]:
        return tuple(resolve(liv, self.sizes) for liv in self.livs)

    def canonical(self) -> Genome:
        """Return the one way to write the network that this genome decodes to.

        Strategies name only what is really shared with another LIV, labels count the sharing groups from 1 by first
        use, and what shares nothing has label 1 and strategy 1. Extensions hold only what differs from the class that
        is nearest, and sizes only what some LIV uses.

        Raises:
            ValueError: The genome is not valid.
        """
        require_valid(self)
        plain = tuple(plain_liv(liv, self.sizes) for liv in self.livs)
        livs, sizes = canonical_livs(plain, self._classes), canonical_sizes(self.sizes, self._classes)
        return self if livs == self.livs and sizes == self.sizes else Genome(livs, sizes)

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
        return sharing_plan(self.livs, self._classes)


def _parse_liv(text: str, where: str) -> LIVGenes:
    """Read five genes, and the extension in brackets behind them where there is one."""
    genes, bracket, rest = text.partition("[")
    liv = LIVGenes(*cast("tuple[Any, ...]", parse_genes(genes, len(GENES), where)))
    if not bracket:
        return liv
    if not rest.endswith("]"):
        raise ValueError(f"{where} is {text!r}: needs ']' after its extension")
    return replace(liv, extension=Extension.parse(rest[:-1], f"the extension of {where}"))
