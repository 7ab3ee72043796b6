"""The five genes that a backbone genome holds for each LIV."""

from __future__ import annotations

from dataclasses import dataclass

from star_core.genome._text import whole_number
from star_core.genome.extension import Extension

GENES = ("liv_class", "featurizer_group", "featurizer_strategy", "feature_group", "feature_strategy")
"""Names of the genes of a LIV, in the order of the text form."""


@dataclass(frozen=True, slots=True)
class LIVGenes:
    """The genes of one LIV. Any whole numbers from 1 are accepted here; whether they make sense is for `validate` to
    say.

    Attributes:
        liv_class: Key of `POOL`, 1 to 17.
        featurizer_group: A label; LIVs of the same label and strategy 2 use the same featurizer weights.
        featurizer_strategy: 1 shares nothing, 2 shares all featurizer weights.
        feature_group: A label; of the LIVs with the same label whose strategies name a feature group, the first
            computes the group's tensor and the later ones reuse it.
        feature_strategy: 1 shares nothing; 2, 3 and 4 share the first, the second, or both of the groups that the
            class can
            share: attention k, v; recurrence B, C; gated convolution B (inner gate), K (filter).
        extension: What the LIV has of its own in place of its class's; None in the paper's space. An extension that
            says nothing becomes None.
    Raises:
        TypeError: A gene is not an integer, or `extension` is no Extension.
        ValueError: A gene is below 1.
    """

    liv_class: int
    featurizer_group: int = 1
    featurizer_strategy: int = 1
    feature_group: int = 1
    feature_strategy: int = 1
    extension: Extension | None = None

    def __post_init__(self) -> None:
        if self.extension is not None:
            if not isinstance(self.extension, Extension):
                raise TypeError(f"extension: needs an Extension, got {type(self.extension).__name__}")
            if self.extension.is_empty:
                object.__setattr__(self, "extension", None)
        for name in GENES:
            gene = getattr(self, name)
            if type(gene) is not int or gene < 1:
                object.__setattr__(self, name, whole_number(gene, name))

    def as_tuple(self) -> tuple[int, int, int, int, int]:
        """The five genes in the order of the text form."""
        return (
            self.liv_class,
            self.featurizer_group,
            self.featurizer_strategy,
            self.feature_group,
            self.feature_strategy,
        )
