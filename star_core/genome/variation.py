"""Where new genomes come from: random ones, mutation, crossover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np

from star_core.genome._text import one_of, whole_number
from star_core.genome.backbone import Genome
from star_core.genome.decode import faults, resolve
from star_core.genome.extension import NO_SIZES, Extension, SizeGenes
from star_core.genome.genes import GENES, LIVGenes
from star_core.genome.mutations import LOCAL, MUTATIONS, Bounds, Level, apply, level_of
from star_core.genome.pool import POOL
from star_core.genome.structure import Residual
from star_core.genome.validity import gene_values

# Chances in `random_genome`. With 17 classes few LIVs of a shallow genome would find one of their own class to share
# weights with, so some copy the class of an earlier one; that leaves every class equally likely at every position.
# Nearly 4 of 5 genomes of depth 8 then share featurizer weights, and as many feature groups.
_COPY_CLASS = 0.4
_SHARE_FEATURIZER = 0.6
_SHARE_FEATURES = 0.7

# Above backbone level: how often a LIV has genes of its own, how often its norms move, and how often a size is drawn.
_EXTEND = 0.6
_MOVE_NORMS = 0.3
_RESIZE = 0.5

# Draws of a change for each one wanted: most of the 14 find something to change, so that ten in a row rarely fail.
_TRIES = 10

# Above backbone level: how often crossover mixes the extensions of two LIVs that stay where they are.
_MIX_EXTENSIONS = 0.2


def random_genome(
    rng: np.random.Generator,
    depth: int,
    classes: Sequence[int] | None = None,
    *,
    level: Level = "backbone",
    bounds: Bounds | None = None,
) -> Genome:
    """Return a valid genome with plenty of sharing of both kinds.

    Args:
        rng: Source of chance.
        depth: LIVs, from 1; the depths of `bounds` come before it.
        classes: Keys of `POOL` to choose from, each equally likely. Default: all 17.
        level: "backbone" draws the paper's genes alone; above it, LIVs have operators, featurizers and norms of their
            own, and models sizes and a depth.
        bounds: Read above backbone level. Default: those of `Bounds()`.
    Raises:
        TypeError: `depth` or a class is not an integer.
        ValueError: `depth` is below 1, `classes` is empty, or there is no such class or level.
    """
    depth = whole_number(depth, "depth")
    allowed = [one_of(number, POOL.keys(), "classes") for number in (POOL if classes is None else classes)]
    if not allowed:
        raise ValueError("classes: is empty, needs at least one key of POOL")
    if level_of(level) == "backbone":
        return _random(rng, depth, allowed, level, Bounds(), NO_SIZES)
    bounds = bounds or Bounds()
    if bounds.depths is not None:
        depth = int(rng.integers(bounds.depths[0], bounds.depths[1] + 1))
    sizes = _random_sizes(rng, bounds)
    genome = _random(rng, depth, allowed, level, bounds, sizes)
    return replace(genome, sizes=sizes)


def _random_sizes(rng: np.random.Generator, bounds: Bounds) -> SizeGenes:
    """Draw the sizes that every genome has a use for."""
    drawn: dict[str, int] = {}
    for name, values in (("width", bounds.widths), ("ffn", bounds.ffn_ratios)):
        if values and rng.random() < _RESIZE:
            drawn[name] = values[int(rng.integers(len(values)))]
    return SizeGenes(**drawn)


def _random(
    rng: np.random.Generator, depth: int, allowed: Sequence[int], level: Level, bounds: Bounds, sizes: SizeGenes
) -> Genome:
    """Draw classes, extensions above backbone level, and then what LIVs share."""
    known = sizes.over(bounds.sizes)
    chosen: list[LIVGenes] = []
    for _ in range(depth):
        copy = chosen and rng.random() < _COPY_CLASS
        if copy:
            chosen.append(chosen[rng.integers(len(chosen))])
            continue
        liv = LIVGenes(int(rng.choice(allowed)))
        if level != "backbone":
            liv = _extended(liv, rng, level, bounds, known)
        chosen.append(liv)
    # At first every LIV has labels of its own, so that nothing is shared whatever the strategies are.
    featurizer_groups = rng.permutation(depth) + 1
    feature_groups = rng.permutation(depth) + 1
    livs = []
    for liv, featurizer_group, feature_group in zip(chosen, featurizer_groups, feature_groups, strict=True):
        strategies = len(resolve(liv, known).strategies)
        featurizer_strategy = 2 if rng.random() < _SHARE_FEATURIZER else 1
        shares = strategies > 1 and rng.random() < _SHARE_FEATURES
        feature_strategy = int(rng.integers(2, strategies + 1)) if shares else 1
        labels = (featurizer_group, featurizer_strategy, feature_group, feature_strategy)
        livs.append(LIVGenes(liv.liv_class, *labels, liv.extension))
    if level != "backbone":
        livs = _with_norms(livs, rng)
    genome = Genome(tuple(livs))
    for position in range(1, depth):
        genome = _join(genome, position, "featurizer_group", "featurizer_strategy", rng, known)
        genome = _join(genome, position, "feature_group", "feature_strategy", rng, known)
    return genome


def _extended(liv: LIVGenes, rng: np.random.Generator, level: Level, bounds: Bounds, known: SizeGenes) -> LIVGenes:
    """Give a LIV genes of its own with some probability; one that does not fit the sizes is replaced."""
    alone = Genome((liv,), known)
    if faults(liv, known):
        alone = apply("class", alone, rng, level=level, bounds=bounds)
    if rng.random() < _EXTEND:
        names = LOCAL[level]
        # Of nine families the pool has five: half of the LIVs draw their operator first.
        if rng.random() < 0.5:
            alone = apply("operator", alone, rng, level=level, bounds=bounds)
        for _ in range(int(rng.integers(1, 4))):
            alone = apply(names[int(rng.integers(len(names)))], alone, rng, level=level, bounds=bounds)
        alone = apply("window", alone, rng, level=level, bounds=bounds)  # no band has to begin with the usual one
    return alone.livs[0]


def _with_norms(livs: list[LIVGenes], rng: np.random.Generator) -> list[LIVGenes]:
    """Move the norms of some LIVs; the last is never parallel to a next one."""
    moved = []
    for position, liv in enumerate(livs):
        if rng.random() < _MOVE_NORMS:
            most = Residual.SANDWICH if position == len(livs) - 1 else Residual.PARALLEL
            residual = Residual(int(rng.integers(Residual.POST_NORM, most + 1)))
            liv = replace(liv, extension=replace(liv.extension or Extension(), residual=residual))
        moved.append(liv)
    return moved


def _join(
    genome: Genome, position: int, label: str, strategy: str, rng: np.random.Generator, known: SizeGenes
) -> Genome:
    """Move a LIV that shares to a label of earlier LIVs that share, if there is one where it goes together with all."""
    if getattr(genome.livs[position], strategy) == 1:
        return genome
    earlier = {getattr(liv, label) for liv in genome.livs[:position] if getattr(liv, strategy) > 1}
    hosts = sorted(earlier.intersection(gene_values(genome, position, label, known)))
    return genome.with_gene(position, label, int(rng.choice(hosts))) if hosts else genome


def mutate(
    genome: Genome,
    rng: np.random.Generator,
    rate: float = 0.1,
    *,
    level: Level = "backbone",
    bounds: Bounds | None = None,
) -> Genome:
    """Return a copy in which each gene has another valid value with probability `rate`, and at least one gene has.

    Genes are changed one after the other, each to one of the other `gene_values` that it has by then: a valid genome
    stays valid. Give it genomes as they were bred and not their canonical forms: labels and strategies of LIVs that
    share nothing yet are what new sharing grows from, and the canonical form clears them.

    Args:
        genome: Valid or not; valid above backbone level.
        rng: Source of chance.
        rate: Probability, 0 to 1.
        level: "backbone" changes the paper's genes alone; above it, see `vary`.
        bounds: As of `vary`.
    Raises:
        ValueError: `rate` is out of its range, or there is no such level.
    """
    if level_of(level) != "backbone":
        return vary(genome, rng, rate, level=level, bounds=bounds)[0]
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


def vary(
    genome: Genome,
    rng: np.random.Generator,
    rate: float = 0.1,
    *,
    level: Level,
    bounds: Bounds | None = None,
    classes: Sequence[int] = tuple(POOL),
    chances: Mapping[str, float] | None = None,
) -> tuple[Genome, tuple[str, ...]]:
    """Return a copy with one or more of the named changes of a level above the backbone's, and their names.

    There are as many as `mutate` would change genes of a paper genome: one, and for each of the five genes of a LIV one
    more with probability `rate`; more where they undo one another. A change that finds nothing to change is drawn
    again.

    Args:
        genome: Valid with the sizes of `bounds`; the copy is so too.
        rng: Source of chance.
        rate: Probability, 0 to 1.
        level: "operator" or "featurizer".
        bounds: Between which sizes, depths and windows. Default: those of `Bounds()`.
        classes: Keys of `POOL` that a LIV may become.
        chances: Probability of each change by name. Default: each equally likely.
    Raises:
        ValueError: `rate` is out of its range, or `level` has no named changes.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate: is {rate}, needs a probability from 0 to 1")
    names = tuple(MUTATIONS[level_of(level)])
    if not names:
        raise ValueError(f"level: is {level!r}, needs one with named changes: operator or featurizer")
    bounds = bounds or Bounds()
    weights = None if chances is None else np.array([chances[name] for name in names])
    mutant, applied = genome, []
    wanted = 1 + int(rng.binomial(len(GENES) * len(genome), rate))
    for _ in range(_TRIES * wanted):
        name = names[int(rng.choice(len(names), p=weights))]
        changed = apply(name, mutant, rng, level=level, bounds=bounds, classes=classes)
        if changed != mutant:
            mutant = changed
            applied.append(name)
        if len(applied) >= wanted and mutant != genome:  # two changes may undo one another
            break
    return mutant, tuple(applied)


def crossover(a: Genome, b: Genome, rng: np.random.Generator, *, level: Level = "backbone") -> tuple[Genome, Genome]:
    """Exchange the LIVs between two random cuts, the same in both parents.

    Where the parents differ in depth the cuts lie within the shorter one, and each child has the depth of one parent.
    The children may be invalid, as labels of both parents meet in them: see `repair`.

    Args:
        a: One parent.
        b: The other.
        rng: Source of chance.
        level: Above "backbone" the children also exchange sizes, each with probability 1/2, and some of the LIVs
            outside the stretch exchange parts of their extensions.
    Returns:
        `a` with a part of `b`, and `b` with that part of `a`.
    """
    depth = min(len(a), len(b))
    cuts = [(start, stop) for start in range(depth) for stop in range(start + 1, depth + 1) if stop - start < depth]
    # Exchanging every LIV would hand back the parents; with a single one there is nothing else to exchange.
    start, stop = cuts[rng.integers(len(cuts))] if cuts else (0, depth)
    first = replace(a, livs=a.livs[:start] + b.livs[start:stop] + a.livs[stop:])
    second = replace(b, livs=b.livs[:start] + a.livs[start:stop] + b.livs[stop:])
    return (first, second) if level_of(level) == "backbone" else _exchange(first, second, (start, stop), rng)


def _exchange(a: Genome, b: Genome, done: tuple[int, int], rng: np.random.Generator) -> tuple[Genome, Genome]:
    """Exchange sizes, and parts of the extensions of LIVs at the same place that were not exchanged whole."""
    sizes = [list(a.sizes), list(b.sizes)]
    for index in np.flatnonzero(rng.random(len(sizes[0])) < 0.5):
        sizes[0][index], sizes[1][index] = sizes[1][index], sizes[0][index]
    livs = [list(a.livs), list(b.livs)]
    names = [field.name for field in fields(Extension)]
    for position in range(min(len(a), len(b))):
        if done[0] <= position < done[1] or rng.random() >= _MIX_EXTENSIONS:
            continue
        pair = [row[position] for row in livs]
        parts = [{name: getattr(liv.extension or Extension(), name) for name in names} for liv in pair]
        for index in np.flatnonzero(rng.random(len(names)) < 0.5):
            name = names[index]
            parts[0][name], parts[1][name] = parts[1][name], parts[0][name]
        for row, liv, mixed in zip(livs, pair, parts, strict=True):
            changed = replace(liv, extension=Extension(**mixed))
            # Parts of two layers rarely make a third; where they do not, the LIV keeps its own.
            row[position] = liv if faults(changed, NO_SIZES) else changed
    return Genome(tuple(livs[0]), SizeGenes(*sizes[0])), Genome(tuple(livs[1]), SizeGenes(*sizes[1]))
