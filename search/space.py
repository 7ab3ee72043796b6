"""Backbone genomes as a nevergrad parameter: sampled, recombined, mutated, repaired and hashed."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import nevergrad as ng
import numpy as np

from search.choice import MutationChoice
from star_core.genome import (
    MUTATIONS,
    POOL,
    Bounds,
    Genome,
    Level,
    LIVGenes,
    SizeGenes,
    crossover,
    gene_values,
    mutate,
    random_genome,
    repair,
    validate,
    vary,
)
from star_core.genome.mutations import level_of


def bounds_of(depth: int, width: int, head_dim: int, seq_len: int) -> Bounds:
    """Return the bounds of a search above backbone level, at most as deep and as wide as its settings say.

    Depth goes down to half, width to a half and three quarters, heads to half and twice their channels, and windows
    from 8 tokens to those of a training sequence.
    """
    widths = (width // 2, 3 * width // 4)
    heads = (head_dim // 2, 2 * head_dim)
    return Bounds(
        depths=(max(2, (depth + 1) // 2), depth),
        widths=tuple(value for value in widths if value % head_dim == 0),
        head_dims=tuple(value for value in heads if value % 2 == 0 and width % value == 0),
        windows=tuple(2**power for power in range(3, 14) if 2**power < seq_len) or (8,),
        sizes=SizeGenes(width=width, head_dim=head_dim),
    )


class GenomeParameter(ng.p.Parameter):  # type: ignore[misc]  # nevergrad ships no types
    """A `Genome`, valid at all times: of fixed depth in the paper's space, between two depths above it.

    The value keeps the genome as it was bred, since labels of LIVs that share nothing yet are what new sharing grows
    from; the hash is of the canonical form, so that two ways to write one network count as one. Chance comes from
    `random_state` alone, which every child shares with its parent.

    Source: Thomas et al., STAR, 2024, arXiv 2411.17800: two-point crossover between LIVs, mutation gene by gene,
    repair. Differs from it in: mutation first makes some LIVs copies of others, and then changes fewer genes than the
    paper's 0.1. To move a LIV into a sharing group of another class by single genes takes four changes, of which the
    first three gain nothing; by a copy it takes one. On the losses of `tests/search/test_evolution_on_genomes.py`
    (three of them, 500 evaluations, 10 seeds) hypervolume is 0.50 for random search, 0.49 for rate 0.1 without copies,
    0.54 with them, and 0.58 for the defaults here. Crossover's children are repaired before mutation, which keeps valid
    what is valid.

    Args:
        depth: LIVs in the genome, 1 or more.
        classes: LIV classes that may occur, keys of `POOL`. Default: all 17.
        mutation_rate: Probability of a change, for each gene, 0 to 1. One gene at least changes, whatever the rate.
        copy_rate: Probability of becoming a copy of a LIV chosen at random, for each LIV, 0 to 1; at backbone level
            alone.
        level: "backbone" is the paper's space. Above it, "operator" or "featurizer", genomes hold more than the
            paper's genes, and mutation applies named changes, `star_core.genome.MUTATIONS`; which of them is drawn
            depends on what came of each, see `learn_outcome`.
        bounds: Depths, sizes and windows above backbone level. Default: those of `Bounds()`, at the given depth.

    Attributes:
        depth: As given.
        classes: As given, ascending.
        mutation_rate: As given.
        copy_rate: As given.
        parent_hashes: Hashes of the genomes that this one was bred from; empty for one sampled or set.
        repaired: Whether crossover left it invalid, so that genes were drawn anew.
        level: As given.
        bounds: As given, less the sizes that the model has anyway.
        mutations: Names of the changes that were applied to what it was bred from, in order; empty at backbone level.
        choice: Who draws the changes; all children share it with their parent. None at backbone level.

    Raises:
        TypeError: `depth` or a class is not an integer, a rate is not a number.
        ValueError: `depth` below 1 or outside `bounds`, `classes` empty, repeated or not in `POOL`, a rate outside 0 to
            1, or no such level.
    """

    def __init__(
        self,
        depth: int,
        classes: Sequence[int] | None = None,
        *,
        mutation_rate: float = 0.03,
        copy_rate: float = 0.2,
        level: Level = "backbone",
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__()
        self.depth = _integer(depth, "depth")
        if self.depth < 1:
            raise ValueError(f"depth: need 1 or more, got {depth}")
        self.classes = tuple(sorted(_integer(number, "classes") for number in (POOL if classes is None else classes)))
        if not self.classes or len(set(self.classes)) < len(self.classes) or not POOL.keys() >= set(self.classes):
            raise ValueError(f"classes: need different numbers from {min(POOL)} to {max(POOL)}, got {classes}")
        self.mutation_rate = _probability(mutation_rate, "mutation_rate")
        self.copy_rate = _probability(copy_rate, "copy_rate")
        self.level = level_of(level)
        self.bounds = _without_own(bounds or Bounds())
        least, most = self._depths()
        if not least <= self.depth <= most:
            raise ValueError(f"depth: need {least} to {most}, as bounds.depths says, got {self.depth}")
        self.choice = None if self.level == "backbone" else MutationChoice(tuple(MUTATIONS[self.level]))
        self.mutations: tuple[str, ...] = ()
        self.parent_hashes: tuple[str, ...] = ()
        self.repaired = False
        # A parameter always has a value: until one is sampled or set, the lowest class all the way, sharing nothing.
        self._genome = Genome((LIVGenes(self.classes[0]),) * self.depth)

    def get_value_hash(self) -> Hashable:
        """Return the hash of the network that the genome decodes to."""
        return self._genome.hash

    def learn_outcome(self, succeeded: bool) -> None:
        """Let `choice` learn what came of this candidate: its losses, once told, or that it failed.

        A candidate that breaks a constraint, or that stopped before its training's end, has failed in this sense: its
        losses are not to be compared with its parents'. At backbone level nothing is learned.

        Raises:
            RuntimeError: `succeeded` of a candidate that has no losses, as it was never told.
        """
        if self.choice is not None:
            losses = tuple(map(float, self.losses)) if succeeded else None
            self.choice.learn(self.value.hash, losses, self.mutations)

    # What nevergrad calls.

    def _layered_get_value(self) -> Genome:
        return self._genome

    def _layered_set_value(self, value: Genome) -> None:
        self._check_frozen()
        if not isinstance(value, Genome):
            raise TypeError(f"value: need a Genome, got {type(value).__name__}")
        least, most = self._depths()
        if not least <= len(value) <= most:
            depths = str(most) if least == most else f"{least} to {most}"
            raise ValueError(f"value: need {depths} LIVs, got {len(value)} in {value}")
        if self.level == "backbone" and (value.sizes != SizeGenes() or any(liv.extension for liv in value.livs)):
            raise ValueError(f"value: need the paper's genes alone at level backbone, got {value}")
        value.canonical()  # raises with every violation where there is one
        if self.level != "backbone":
            value = replace(value, sizes=_differing(value.sizes, self.bounds.sizes))
            if violations := validate(value, self.bounds.sizes):
                raise ValueError(f"value: {value} does not fit: {violations[0].message}")
        if foreign := sorted({liv.liv_class for liv in value.livs}.difference(self.classes)):
            raise ValueError(f"value: need LIV classes from {list(self.classes)}, got {foreign} in {value}")
        self._genome = value
        self._born(())

    def _layered_sample(self) -> "GenomeParameter":
        child: GenomeParameter = self.spawn_child()
        child._genome = random_genome(self._generator(), self.depth, self.classes, level=self.level, bounds=self.bounds)
        return child

    def _layered_recombine(self, *others: "GenomeParameter") -> None:
        rng = self._generator()
        for other in others:
            mixed, _ = crossover(self._genome, other._genome, rng, level=self.level)
            self._genome = repair(mixed, rng, self._sizes())
            self.repaired |= self._genome is not mixed
        # Without repeats, in order: a genome may be recombined with its own sibling.
        hashes = [*self.parent_hashes, *(other._genome.hash for other in others)]
        self.parent_hashes = tuple(dict.fromkeys(hashes))

    def _layered_mutate(self) -> None:
        rng = self._generator()
        if self.choice is not None:
            self._genome, applied = vary(
                self._genome,
                rng,
                self.mutation_rate,
                level=self.level,
                bounds=self.bounds,
                classes=self.classes,
                chances=self.choice.probabilities(),
            )
            self.mutations += applied
            return
        livs = list(self._genome.livs)
        for position in np.flatnonzero(rng.random(self.depth) < self.copy_rate):
            # A copy goes together with every LIV that its model goes together with, so that the genome stays valid.
            livs[position] = livs[rng.integers(self.depth)]
        self._genome = self._allowed(mutate(Genome(tuple(livs)), rng, self.mutation_rate), rng)

    def _internal_get_standardized_data(self, reference: "GenomeParameter") -> np.ndarray:
        """Return one zero: nevergrad refuses a parameter without coordinates, and ours has none that mean anything."""
        return np.zeros(1)

    def _set_parenthood(self, parent: "GenomeParameter | None") -> None:
        super()._set_parenthood(parent)
        self._born(() if parent is None else (parent._genome.hash,))

    # Helpers.

    def _born(self, parents: tuple[str, ...]) -> None:
        self.parent_hashes = parents
        self.repaired = False
        self.mutations = ()

    def _depths(self) -> tuple[int, int]:
        """Return the least and the most LIVs."""
        if self.level == "backbone" or self.bounds.depths is None:
            return self.depth, self.depth
        return self.bounds.depths

    def _sizes(self) -> SizeGenes | None:
        return None if self.level == "backbone" else self.bounds.sizes

    def _generator(self) -> np.random.Generator:
        """Return a generator for one operation; the genome functions do not take numpy's older kind, `random_state`."""
        return np.random.default_rng(self.random_state.randint(0, 2**32, size=4, dtype=np.uint32))

    def _allowed(self, mutant: Genome, rng: np.random.Generator) -> Genome:
        """Exchange the classes that mutation chose from outside `classes` for some from inside.

        Such a class gene is drawn anew from those that go together with the rest, and where there is none any allowed
        class is drawn and the sharing around it repaired.
        """
        for position, liv in enumerate(mutant.livs):
            if liv.liv_class not in self.classes:
                fitting = set(gene_values(mutant, position, "liv_class")).intersection(self.classes)
                number = int(rng.choice(sorted(fitting) or self.classes))
                mutant = mutant.with_gene(position, "liv_class", number)
        return repair(mutant, rng)


def _without_own(bounds: Bounds) -> Bounds:
    """Leave out the sizes that a genome has when it says nothing: there would be two ways to write one network."""
    own = bounds.sizes
    chosen: dict[str, Any] = {
        name: tuple(value for value in getattr(bounds, name) if value != mine)
        for name, mine in (("widths", own.width), ("ffn_ratios", own.ffn or 3), ("head_dims", own.head_dim))
    }
    return replace(bounds, **chosen)


def _differing(sizes: SizeGenes, own: SizeGenes) -> SizeGenes:
    """Leave open what is the model's own size."""
    return SizeGenes(*(None if value == mine else value for value, mine in zip(sizes, own, strict=True)))


def _integer(value: int, name: str) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name}: need an int, got {type(value).__name__}")
    return int(value)


def _probability(value: float, name: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: need a number, got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: need a probability from 0 to 1, got {value}")
    return float(value)
