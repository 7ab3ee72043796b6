"""Which genomes are valid, what is wrong with the others, and how to mend them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from star_core.genome.genes import GENES, LIVGenes
from star_core.genome.pool import POOL, LIVClass

if TYPE_CHECKING:
    from star_core.genome.backbone import Genome

_MOST_STRATEGIES = max(len(cls.strategies) for cls in POOL.values())
_KIND = {
    "attention": "attention",
    "recurrence": "recurrence",
    "short_conv": "gated convolution",
    "long_conv": "gated convolution",
    "memoryless": "memoryless unit",
}

_Size = tuple[int, int]
"""Expansion and repeat of a feature group; tensors of the same group name match where these do."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a genome.

    Attributes:
        position: Of the LIV, from 0.
        gene: Name of the gene that `repair` would change, one of `GENES`.
        message: What is wrong and what is needed, in words.
    """

    position: int
    gene: str
    message: str


@dataclass(frozen=True, slots=True)
class _Membership:
    """What a LIV of a given class and strategy brings to its feature-group label."""

    kind: str
    differential: bool
    sizes: tuple[tuple[str, _Size], ...]

    def admits(self, other: _Membership) -> bool:
        """Whether both may be members of one label."""
        if self.kind != other.kind or self.differential != other.differential:
            return False
        sizes = dict(other.sizes)
        return all(sizes.get(name, size) == size for name, size in self.sizes)


def _size(cls: LIVClass, name: str) -> _Size:
    group = cls.featurizer[name]
    return group.expansion, group.repeat


_MEMBERSHIPS = {
    (number, strategy): _Membership(
        _KIND[cls.family], cls.differential, tuple((name, _size(cls, name)) for name in names)
    )
    for number, cls in POOL.items()
    for strategy, names in cls.strategies.items()
    if names
}
_COMPATIBLE = {
    key: frozenset(other for other in _MEMBERSHIPS if membership.admits(_MEMBERSHIPS[other]))
    for key, membership in _MEMBERSHIPS.items()
}
"""For each class and strategy that shares feature groups, the classes and strategies with which it may have a label."""


def validate(genome: Genome) -> list[Violation]:
    """Return everything that is wrong with `genome`, by position; nothing if it is valid.

    A genome is valid if classes and strategies exist; LIVs that share featurizer weights are of one class; LIVs that
    share feature groups under one label are all of one kind (attention, recurrence or gated convolution), all
    differential or all not, and the groups they have in common are of one size. Where two LIVs do not go together the
    later one is to blame.
    """
    violations: list[Violation] = []
    featurizers: dict[int, int] = {}  # label -> first LIV
    features: dict[int, dict[tuple[int, int], int]] = {}  # label -> class and strategy -> first LIV
    for position, liv in enumerate(genome.livs):
        if liv.liv_class not in POOL:
            violations.extend(_unknown_class(position, liv))
            continue
        if liv.featurizer_strategy != 1:
            if liv.featurizer_strategy != 2:
                violations.append(_no_featurizer_strategy(position, liv))
            else:
                first = featurizers.setdefault(liv.featurizer_group, position)
                if genome.livs[first].liv_class != liv.liv_class:
                    violations.append(_mixed_classes(position, first, genome.livs))
        if liv.feature_strategy != 1:
            key = (liv.liv_class, liv.feature_strategy)
            if key not in _COMPATIBLE:
                violations.append(_no_feature_strategy(position, liv))
                continue
            members = features.setdefault(liv.feature_group, {})
            if members.keys() <= _COMPATIBLE[key]:
                members.setdefault(key, position)
            else:
                first = next(first for other, first in members.items() if other not in _COMPATIBLE[key])
                violations.append(_mixed_features(position, first, genome.livs))
    return violations


def require_valid(genome: Genome) -> None:
    """Raise ValueError with every violation unless `genome` is valid."""
    if violations := validate(genome):
        listed = "; ".join(violation.message for violation in violations)
        raise ValueError(f"genome {genome} is not valid, repair(genome, rng) mends it: {listed}")


def gene_values(genome: Genome, position: int, gene: str) -> tuple[int, ...]:
    """Return the values of one gene with which its LIV is in order and goes together with all others.

    For a valid genome these are the values that keep it valid when this gene alone is changed, its present value among
    them. In an invalid one, what other genes violate is left aside; then there may be no such value for the class.

    Args:
        genome: Valid or not.
        position: Of the LIV, from 0.
        gene: One of `GENES`.
    Returns:
        Ascending values; for the labels, which may be any number, those from 1 to the genome's depth.
    Raises:
        ValueError: `position` or `gene` does not exist.
    """
    if not 0 <= position < len(genome):
        raise ValueError(f"position: is {position}, needs 0 to {len(genome) - 1}")
    if gene not in GENES:
        raise ValueError(f"gene: is {gene!r}, needs one of {', '.join(GENES)}")
    liv = genome.livs[position]
    others = [other for index, other in enumerate(genome.livs) if index != position]
    labels = range(1, len(genome) + 1)
    if gene == "featurizer_group":
        return tuple(_featurizer_labels(liv, others, labels))
    if gene == "featurizer_strategy":
        sharing = LIVGenes(liv.liv_class, liv.featurizer_group, 2)
        return (1, 2) if any(_featurizer_labels(sharing, others, [liv.featurizer_group])) else (1,)
    if gene == "feature_group":
        return tuple(_feature_labels(liv.liv_class, liv.feature_strategy, others, labels))
    if gene == "feature_strategy":
        strategies = POOL[liv.liv_class].strategies if liv.liv_class in POOL else range(1, _MOST_STRATEGIES + 1)
        return tuple(s for s in strategies if any(_feature_labels(liv.liv_class, s, others, [liv.feature_group])))
    return tuple(
        number
        for number in _classes_with(liv.feature_strategy)
        if any(_featurizer_labels(LIVGenes(number, *liv.as_tuple()[1:]), others, [liv.featurizer_group]))
        and any(_feature_labels(number, liv.feature_strategy, others, [liv.feature_group]))
    )


def repair(genome: Genome, rng: np.random.Generator) -> Genome:
    """Return a valid genome: `genome` itself if it is valid, or else one with the offending genes drawn anew.

    The genes that `validate` names change and no others, with one exception: where no class would go together with all
    that the LIV of an unknown class shares, its labels are drawn anew as well.
    """
    # One pass mends all: each gene is drawn from values with which its LIV goes together with every other one.
    for violation in validate(genome):
        position, gene = violation.position, violation.gene
        if values := gene_values(genome, position, gene):
            genome = genome.with_gene(position, gene, int(rng.choice(values)))
            continue
        values = _classes_with(genome.livs[position].feature_strategy)
        genome = genome.with_gene(position, "liv_class", int(rng.choice(values)))
        for label in ("featurizer_group", "feature_group"):
            genome = genome.with_gene(position, label, int(rng.choice(gene_values(genome, position, label))))
    return genome


def _classes_with(strategy: int) -> tuple[int, ...]:
    """Return the classes that have this feature-group-sharing strategy, or all if none has it."""
    return tuple(number for number, cls in POOL.items() if strategy in cls.strategies or strategy > _MOST_STRATEGIES)


def _featurizer_labels(liv: LIVGenes, others: Sequence[LIVGenes], labels: Iterable[int]) -> Iterator[int]:
    """Yield those of `labels` under which no other LIV forbids this one's featurizer sharing."""
    if liv.featurizer_strategy != 2 or liv.liv_class not in POOL:
        yield from labels
        return
    taken = {
        other.featurizer_group
        for other in others
        if other.featurizer_strategy == 2 and other.liv_class in POOL and other.liv_class != liv.liv_class
    }
    yield from (label for label in labels if label not in taken)


def _feature_labels(liv_class: int, strategy: int, others: Sequence[LIVGenes], labels: Iterable[int]) -> Iterator[int]:
    """Yield those of `labels` under which no other LIV forbids the feature groups of this class and strategy."""
    key = (liv_class, strategy)
    if key not in _COMPATIBLE:
        yield from labels
        return
    taken = set()
    for other in others:
        other_key = (other.liv_class, other.feature_strategy)
        if other_key in _COMPATIBLE and other_key not in _COMPATIBLE[key]:
            taken.add(other.feature_group)
    yield from (label for label in labels if label not in taken)


def _unknown_class(position: int, liv: LIVGenes) -> Iterator[Violation]:
    """Yield what is wrong with a LIV whose class does not exist."""
    message = f"LIV {position}: there is no class {liv.liv_class}; needs {min(POOL)} to {max(POOL)}"
    yield Violation(position, "liv_class", message)
    if liv.featurizer_strategy > 2:
        yield _no_featurizer_strategy(position, liv)
    if liv.feature_strategy > _MOST_STRATEGIES:
        yield _no_feature_strategy(position, liv)


def _no_featurizer_strategy(position: int, liv: LIVGenes) -> Violation:
    message = (
        f"LIV {position}: there is no featurizer-sharing strategy {liv.featurizer_strategy}; "
        "needs 1 (none) or 2 (all weights)"
    )
    return Violation(position, "featurizer_strategy", message)


def _no_feature_strategy(position: int, liv: LIVGenes) -> Violation:
    cls = POOL.get(liv.liv_class)
    message = f"LIV {position}: there is no feature-group-sharing strategy {liv.feature_strategy}" + (
        f" for {cls.name}; needs {_listed(cls)}" if cls else f"; needs 1 to {_MOST_STRATEGIES}"
    )
    return Violation(position, "feature_strategy", message)


def _listed(cls: LIVClass) -> str:
    """Return the strategies of a class in words, such as "1 (none), 2 (k), 3 (v) or 4 (k and v)"."""
    words = [f"{number} ({' and '.join(names) or 'none'})" for number, names in cls.strategies.items()]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _mixed_classes(position: int, first: int, livs: Sequence[LIVGenes]) -> Violation:
    name, first_name = POOL[livs[position].liv_class].name, POOL[livs[first].liv_class].name
    message = (
        f"LIV {position}: {name} cannot share featurizer weights with LIV {first}, {first_name}, "
        f"under label {livs[position].featurizer_group}; needs the same class"
    )
    return Violation(position, "featurizer_group", message)


def _mixed_features(position: int, first: int, livs: Sequence[LIVGenes]) -> Violation:
    liv, other = livs[position], livs[first]
    cls, other_cls = POOL[liv.liv_class], POOL[other.liv_class]
    if _KIND[cls.family] != _KIND[other_cls.family]:
        needs = f"another {_KIND[cls.family]}"
    elif cls.differential != other_cls.differential:
        needs = "a differential class" if cls.differential else "a class that is not differential"
    else:
        common = (
            name
            for name in cls.strategies[liv.feature_strategy]
            if name in other_cls.strategies[other.feature_strategy]
        )
        name = next(name for name in common if _size(cls, name) != _size(other_cls, name))
        (expansion, repeat), (other_expansion, other_repeat) = _size(cls, name), _size(other_cls, name)
        needs = (
            f"{name} of one size, and has expansion {expansion} and repeat {repeat} against "
            f"{other_expansion} and {other_repeat}"
        )
    message = (
        f"LIV {position}: {cls.name} cannot share feature groups with LIV {first}, {other_cls.name}, "
        f"under label {liv.feature_group}; needs {needs}"
    )
    return Violation(position, "feature_group", message)
