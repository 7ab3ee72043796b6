"""Where new genomes come from: random ones, mutation, crossover."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from star_core.genome._text import one_of, whole_number
from star_core.genome.backbone import Genome
from star_core.genome.genes import GENES, LIVGenes
from star_core.genome.pool import POOL
from star_core.genome.validity import gene_values

# Chances in `random_genome`. With 17 classes few LIVs of a shallow genome would find one of their own class to share
# weights with, so some copy the class of an earlier one; that leaves every class equally likely at every position.
# Nearly 4 of 5 genomes of depth 8 then share featurizer weights, and as many feature groups.
_COPY_CLASS = 0.4
_SHARE_FEATURIZER = 0.6
_SHARE_FEATURES = 0.7


def random_genome(rng: np.random.Generator, depth: int, classes: Sequence[int] | None = None) -> Genome:
    """Return a valid genome with plenty of sharing of both kinds.

    Args:
        rng: Source of chance.
        depth: LIVs, from 1.
        classes: Keys of `POOL` to choose from, each equally likely. Default: all 17.
    Raises:
        TypeError: `depth` or a class is not an integer.
        ValueError: `depth` is below 1, `classes` is empty, or there is no such class.
    """
    depth = whole_number(depth, "depth")
    allowed = [one_of(number, POOL.keys(), "classes") for number in (POOL if classes is None else classes)]
    if not allowed:
        raise ValueError("classes: is empty, needs at least one key of POOL")
    chosen: list[int] = []
    for _ in range(depth):
        copy = chosen and rng.random() < _COPY_CLASS
        chosen.append(chosen[rng.integers(len(chosen))] if copy else int(rng.choice(allowed)))
    # At first every LIV has labels of its own, so that nothing is shared whatever the strategies are.
    featurizer_groups = rng.permutation(depth) + 1
    feature_groups = rng.permutation(depth) + 1
    livs = []
    for liv_class, featurizer_group, feature_group in zip(chosen, featurizer_groups, feature_groups, strict=True):
        strategies = len(POOL[liv_class].strategies)
        featurizer_strategy = 2 if rng.random() < _SHARE_FEATURIZER else 1
        shares = strategies > 1 and rng.random() < _SHARE_FEATURES
        feature_strategy = int(rng.integers(2, strategies + 1)) if shares else 1
        livs.append(LIVGenes(liv_class, featurizer_group, featurizer_strategy, feature_group, feature_strategy))
    genome = Genome(tuple(livs))
    for position in range(1, depth):
        genome = _join(genome, position, "featurizer_group", "featurizer_strategy", rng)
        genome = _join(genome, position, "feature_group", "feature_strategy", rng)
    return genome


def _join(genome: Genome, position: int, label: str, strategy: str, rng: np.random.Generator) -> Genome:
    """Move a LIV that shares to a label of earlier LIVs that share, if there is one where it goes together with all."""
    if getattr(genome.livs[position], strategy) == 1:
        return genome
    earlier = {getattr(liv, label) for liv in genome.livs[:position] if getattr(liv, strategy) > 1}
    hosts = sorted(earlier.intersection(gene_values(genome, position, label)))
    return genome.with_gene(position, label, int(rng.choice(hosts))) if hosts else genome


def mutate(genome: Genome, rng: np.random.Generator, rate: float = 0.1) -> Genome:
    """Return a copy in which each gene has another valid value with probability `rate`, and at least one gene has.

    Genes are changed one after the other, each to one of the other `gene_values` that it has by then: a valid genome
    stays valid. Give it genomes as they were bred and not their canonical forms: labels and strategies of LIVs that
    share nothing yet are what new sharing grows from, and the canonical form clears them.

    Args:
        genome: Valid or not.
        rng: Source of chance.
        rate: Probability, 0 to 1.
    Raises:
        ValueError: `rate` is out of its range.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate: is {rate}, needs a probability from 0 to 1")
    loci = [(position, gene) for position in range(len(genome)) for gene in GENES]
    mutant = genome
    for hit, (position, gene) in zip(rng.random(len(loci)) < rate, loci, strict=True):
        if hit:
            mutant = _change(mutant, position, gene, rng)
    # Some gene has another valid value: a LIV that shares featurizer weights may stop, and one that does not may take
    # any label, or begin to share where there is no other LIV.
    for locus in rng.permutation(len(loci)):
        if mutant is not genome:
            break
        position, gene = loci[locus]
        mutant = _change(genome, position, gene, rng)
    return mutant


def _change(genome: Genome, position: int, gene: str, rng: np.random.Generator) -> Genome:
    """Return `genome` with another valid value of one gene, or itself if there is none."""
    present = getattr(genome.livs[position], gene)
    values = [value for value in gene_values(genome, position, gene) if value != present]
    return genome.with_gene(position, gene, int(rng.choice(values))) if values else genome


def crossover(a: Genome, b: Genome, rng: np.random.Generator) -> tuple[Genome, Genome]:
    """Exchange the LIVs between two random cuts, the same in both parents.

    Where the parents differ in depth the cuts lie within the shorter one, and each child has the depth of one parent.
    The children may be invalid, as labels of both parents meet in them: see `repair`.

    Args:
        a: One parent.
        b: The other.
        rng: Source of chance.
    Returns:
        `a` with a part of `b`, and `b` with that part of `a`.
    """
    depth = min(len(a), len(b))
    cuts = [(start, stop) for start in range(depth) for stop in range(start + 1, depth + 1) if stop - start < depth]
    # Exchanging every LIV would hand back the parents; with a single one there is nothing else to exchange.
    start, stop = cuts[rng.integers(len(cuts))] if cuts else (0, depth)
    return (
        Genome(a.livs[:start] + b.livs[start:stop] + a.livs[stop:]),
        Genome(b.livs[:start] + a.livs[start:stop] + b.livs[stop:]),
    )
