"""Which genomes are valid, what is wrong with the others, and how to mend them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from star_core.genome.decode import faults, resolve
from star_core.genome.extension import Extension, SizeGenes
from star_core.genome.genes import GENES, LIVGenes
from star_core.genome.pool import POOL, LIVClass
from star_core.genome.structure import Residual
from star_core.genome.violations import (
    KIND,
    MOST_STRATEGIES,
    Size,
    Violation,
    bad_sizes,
    faulty_class,
    group_size,
    mixed_classes,
    mixed_features,
    no_feature_strategy,
    no_featurizer_strategy,
    unknown_class,
)

if TYPE_CHECKING:
    from star_core.genome.backbone import Genome

_REPAIRS = 6
"""Passes over a genome's violations before what is still not in order gives way to a memoryless unit."""

_Others = Sequence[tuple[LIVGenes, LIVClass | None]]
"""The other LIVs of a genome, each with its class; None where that is unknown."""


@dataclass(frozen=True, slots=True)
class _Membership:
    """What a LIV of a given class and strategy brings to its feature-group label."""

    kind: str
    differential: bool
    sizes: tuple[tuple[str, Size], ...]

    def admits(self, other: _Membership) -> bool:
        """Whether both may be members of one label."""
        if self.kind != other.kind or self.differential != other.differential:
            return False
        sizes = dict(other.sizes)
        return all(sizes.get(name, size) == size for name, size in self.sizes)


@lru_cache(maxsize=65_536)
def _membership(cls: LIVClass, strategy: int) -> _Membership | None:
    """Return what a class brings to a label with this strategy; None where it shares nothing or is not the class's."""
    if not (names := cls.strategies.get(strategy)):
        return None
    return _Membership(KIND[cls.family], cls.differential, tuple((name, group_size(cls, name)) for name in names))


def _class_of(liv: LIVGenes, sizes: SizeGenes) -> LIVClass | None:
    """Return the class of a LIV; None where it is unknown or has genes that no layer can serve."""
    if liv.extension is None and sizes.width is None:
        return POOL.get(liv.liv_class)
    return None if liv.liv_class not in POOL or faults(liv, sizes) else resolve(liv, sizes)


def validate(genome: Genome, sizes: SizeGenes | None = None) -> list[Violation]:
    """Return everything that is wrong with `genome`, by position; nothing if it is valid.

    A genome is valid if classes and strategies exist; LIVs that share featurizer weights are of one class; LIVs that
    share feature groups under one label are all of one kind (attention, recurrence or gated convolution), all
    differential or all not, and the groups they have in common are of one size. Where two LIVs do not go together the
    later one is to blame. Where LIVs have extensions there have to be layers for them, and what is said of classes
    above holds of those that their genes decode to.

    Args:
        genome: What to look at.
        sizes: Of the model, where the genome leaves them open. Default: unknown, and what depends on them is in order.
            What is valid with sizes is valid without them: a canonical form and a hash know of none.
    """
    return next(filter(None, (_violations(genome, known) for known in _sizes_to_fit(genome, sizes))), [])


def _sizes_to_fit(genome: Genome, sizes: SizeGenes | None) -> list[SizeGenes]:
    """Return the sizes with which a genome has to be in order: its own, and where they add to these, with a model's."""
    whole = genome.sizes if sizes is None else genome.sizes.over(sizes)
    return [genome.sizes] if whole == genome.sizes else [genome.sizes, whole]


def _violations(genome: Genome, known: SizeGenes) -> list[Violation]:
    violations: list[Violation] = []
    violations.extend(bad_sizes(known))
    featurizers: dict[int, LIVClass] = {}  # label -> class of the first LIV
    firsts: dict[int, int] = {}  # label -> first LIV
    features: dict[int, dict[_Membership, int]] = {}  # label -> what a member brings -> first LIV
    for position, liv in enumerate(genome.livs):
        if liv.liv_class not in POOL:
            violations.extend(unknown_class(position, liv))
            continue
        cls = _class_of(liv, known)
        if cls is None:
            violations.extend(faulty_class(position, liv, known))
            continue
        if cls.residual is Residual.PARALLEL and position == len(genome) - 1:
            message = f"LIV {position}: residual is 4 (parallel); needs 1 to 3, as there is no next LIV"
            violations.append(Violation(position, "residual", message))
        if liv.featurizer_strategy != 1:
            if liv.featurizer_strategy != 2:
                violations.append(no_featurizer_strategy(position, liv))
            else:
                first = firsts.setdefault(liv.featurizer_group, position)
                if featurizers.setdefault(liv.featurizer_group, cls).weights != cls.weights:
                    violations.append(mixed_classes(position, first, genome.livs, known))
        if liv.feature_strategy != 1:
            own = _membership(cls, liv.feature_strategy)
            if own is None:
                violations.append(no_feature_strategy(position, liv, cls))
                continue
            members = features.setdefault(liv.feature_group, {})
            if all(own.admits(member) for member in members):
                members.setdefault(own, position)
            else:
                first = next(first for member, first in members.items() if not own.admits(member))
                violations.append(mixed_features(position, first, genome.livs, known))
    return violations


def require_valid(genome: Genome) -> None:
    """Raise ValueError with every violation unless `genome` is valid."""
    if violations := validate(genome):
        listed = "; ".join(violation.message for violation in violations)
        raise ValueError(f"genome {genome} is not valid, repair(genome, rng) mends it: {listed}")


def gene_values(genome: Genome, position: int, gene: str, sizes: SizeGenes | None = None) -> tuple[int, ...]:
    """Return the values of one gene with which its LIV is in order and goes together with all others.

    For a valid genome these are the values that keep it valid when this gene alone is changed, its present value among
    them. In an invalid one, what other genes violate is left aside; then there may be no such value for the class.

    Args:
        genome: Valid or not.
        position: Of the LIV, from 0.
        gene: One of `GENES`.
        sizes: As of `validate`.
    Returns:
        Ascending values; for the labels, which may be any number, those from 1 to the genome's depth.
    Raises:
        ValueError: `position` or `gene` does not exist.
    """
    if not 0 <= position < len(genome):
        raise ValueError(f"position: is {position}, needs 0 to {len(genome) - 1}")
    if gene not in GENES:
        raise ValueError(f"gene: is {gene!r}, needs one of {', '.join(GENES)}")
    first, *others = (_gene_values(genome, position, gene, known) for known in _sizes_to_fit(genome, sizes))
    return tuple(value for value in first if all(value in other for other in others))


def _gene_values(genome: Genome, position: int, gene: str, known: SizeGenes) -> tuple[int, ...]:
    """Return the values of one gene as `gene_values` does, for one set of sizes."""
    liv = genome.livs[position]
    cls = _class_of(liv, known)
    others = _others(genome, position, known)
    labels = range(1, len(genome) + 1)
    if gene == "featurizer_group":
        return tuple(_featurizer_labels(cls, liv.featurizer_strategy, others, labels))
    if gene == "featurizer_strategy":
        return (1, 2) if any(_featurizer_labels(cls, 2, others, [liv.featurizer_group])) else (1,)
    if gene == "feature_group":
        return tuple(_feature_labels(cls, liv.feature_strategy, others, labels))
    if gene == "feature_strategy":
        strategies = range(1, MOST_STRATEGIES + 1) if cls is None else cls.strategies
        return tuple(s for s in strategies if any(_feature_labels(cls, s, others, [liv.feature_group])))
    candidates = ((number, _class_of(replace(liv, liv_class=number), known)) for number in POOL)
    return tuple(number for number, other in candidates if other is not None and _goes_together(liv, other, others))


def goes_together(genome: Genome, position: int, liv: LIVGenes, sizes: SizeGenes | None = None) -> bool:
    """Whether `liv` is in order and goes together with all other LIVs of `genome` if it takes the place of one."""
    for known in _sizes_to_fit(genome, sizes):
        cls = _class_of(liv, known)
        if cls is None or (cls.residual is Residual.PARALLEL and position == len(genome) - 1):
            return False
        if not _goes_together(liv, cls, _others(genome, position, known)):
            return False
    return True


def _others(genome: Genome, position: int, known: SizeGenes) -> _Others:
    return [(other, _class_of(other, known)) for index, other in enumerate(genome.livs) if index != position]


def repair(genome: Genome, rng: np.random.Generator, sizes: SizeGenes | None = None) -> Genome:
    """Return a valid genome: `genome` itself if it is valid, or else one with the offending genes drawn anew.

    The genes that `validate` names change and no others, with one exception: where no class would go together with all
    that the LIV of an unknown class shares, its labels are drawn anew as well. Genes of an extension that no layer can
    serve are dropped, so that the LIV has its class's.

    Args:
        genome: What to mend.
        rng: Source of chance.
        sizes: As of `validate`.
    Raises:
        ValueError: `sizes` do not fit one another, so that no genome is valid.
    """
    # One pass mends all paper genes: each is drawn from values with which its LIV goes together with every other one.
    # More are needed where genes of an extension are dropped: first an operator, then groups that went with it, then
    # what the LIV shares with others. Genomes that are not in order by then are rare: there each pass puts another LIV
    # that is never to blame in the place of at least one, after one pass for the sizes.
    for attempt in range(_REPAIRS + len(genome) + 2):
        violations = validate(genome, sizes)
        if not violations:
            return genome
        # Sizes first, as LIVs may be in order with others; and each gene once, whatever is wrong with it.
        of_sizes = [violation for violation in violations if violation.position < 0]
        for violation in {(one.position, one.gene): one for one in of_sizes or violations}.values():
            genome = _reset(genome, violation) if attempt >= _REPAIRS else _mend(genome, violation, rng, sizes)
    raise ValueError(f"sizes: no genome is valid with {sizes}: {violations[0].message}")


def _mend(genome: Genome, violation: Violation, rng: np.random.Generator, sizes: SizeGenes | None) -> Genome:
    """Draw one offending gene anew."""
    position, gene = violation.position, violation.gene
    if position < 0:
        return replace(genome, sizes=replace(genome.sizes, **{gene: None}))
    if gene not in GENES:
        liv = genome.livs[position]
        return genome.with_liv(position, replace(liv, extension=_mended(liv.extension or Extension(), gene, rng)))
    if values := gene_values(genome, position, gene, sizes):
        return genome.with_gene(position, gene, int(rng.choice(values)))
    values = _classes_with(genome.livs[position].feature_strategy)
    genome = genome.with_gene(position, "liv_class", int(rng.choice(values)))
    for label in ("featurizer_group", "feature_group"):
        genome = genome.with_gene(position, label, int(rng.choice(gene_values(genome, position, label, sizes))))
    return genome


def _mended(extension: Extension, gene: str, rng: np.random.Generator) -> Extension:
    """Return an extension without one of its genes, or with the norms elsewhere."""
    if gene == "residual":
        return replace(extension, residual=Residual(int(rng.integers(1, 4))))  # all but parallel, which the last is not
    if gene == "head_dim":
        return replace(extension, head_dim=None)
    if gene != "operator":
        return extension.without_group(gene)
    # Without an operator of its own, a LIV's groups are at odds with its class's operator or sizes.
    return replace(extension, operator=None) if extension.operator else Extension(residual=extension.residual)


def _reset(genome: Genome, violation: Violation) -> Genome:
    """Put a memoryless unit that shares nothing, which fits any sizes, in the place of a LIV that does not go."""
    if violation.position < 0:
        return replace(genome, sizes=SizeGenes())
    return genome.with_liv(violation.position, LIVGenes(9))


def _classes_with(strategy: int) -> tuple[int, ...]:
    """Return the classes that have this feature-group-sharing strategy, or all if none has it."""
    return tuple(number for number, cls in POOL.items() if strategy in cls.strategies or strategy > MOST_STRATEGIES)


def _goes_together(liv: LIVGenes, cls: LIVClass, others: _Others) -> bool:
    """Whether a LIV, taken to be of this class, has its strategies and no other forbids what it shares."""
    strategy = liv.feature_strategy
    return (
        (strategy in cls.strategies or strategy > MOST_STRATEGIES)
        and any(_featurizer_labels(cls, liv.featurizer_strategy, others, [liv.featurizer_group]))
        and any(_feature_labels(cls, strategy, others, [liv.feature_group]))
    )


def _featurizer_labels(cls: LIVClass | None, strategy: int, others: _Others, labels: Iterable[int]) -> Iterator[int]:
    """Yield those of `labels` under which no other LIV forbids the featurizer sharing of one of this class."""
    if strategy != 2 or cls is None:
        yield from labels
        return
    taken = {
        other.featurizer_group
        for other, other_cls in others
        if other.featurizer_strategy == 2 and other_cls is not None and other_cls.weights != cls.weights
    }
    yield from (label for label in labels if label not in taken)


def _feature_labels(cls: LIVClass | None, strategy: int, others: _Others, labels: Iterable[int]) -> Iterator[int]:
    """Yield those of `labels` under which no other LIV forbids the feature groups of this class and strategy."""
    own = None if cls is None else _membership(cls, strategy)
    if own is None:
        yield from labels
        return
    taken = set()
    for other, other_cls in others:
        brought = None if other_cls is None else _membership(other_cls, other.feature_strategy)
        if brought is not None and not own.admits(brought):
            taken.add(other.feature_group)
    yield from (label for label in labels if label not in taken)
