"""Backbone genomes as a nevergrad parameter: sampled, recombined, mutated, repaired and hashed."""

from collections.abc import Hashable, Sequence
from numbers import Real

import nevergrad as ng
import numpy as np

from star_core.genome import POOL, Genome, LIVGenes, crossover, gene_values, mutate, random_genome, repair


class GenomeParameter(ng.p.Parameter):  # type: ignore[misc]  # nevergrad ships no types
    """A `Genome` of fixed depth, valid at all times.

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
        copy_rate: Probability of becoming a copy of a LIV chosen at random, for each LIV, 0 to 1.

    Attributes:
        depth: As given.
        classes: As given, ascending.
        mutation_rate: As given.
        copy_rate: As given.
        parent_hashes: Hashes of the genomes that this one was bred from; empty for one sampled or set.
        repaired: Whether crossover left it invalid, so that genes were drawn anew.

    Raises:
        TypeError: `depth` or a class is not an integer, a rate is not a number.
        ValueError: `depth` below 1, `classes` empty, repeated or not in `POOL`, a rate outside 0 to 1.
    """

    def __init__(
        self,
        depth: int,
        classes: Sequence[int] | None = None,
        *,
        mutation_rate: float = 0.03,
        copy_rate: float = 0.2,
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
        self.parent_hashes: tuple[str, ...] = ()
        self.repaired = False
        # A parameter always has a value: until one is sampled or set, the lowest class all the way, sharing nothing.
        self._genome = Genome((LIVGenes(self.classes[0]),) * self.depth)

    def get_value_hash(self) -> Hashable:
        """Return the hash of the network that the genome decodes to."""
        return self._genome.hash

    # What nevergrad calls.

    def _layered_get_value(self) -> Genome:
        return self._genome

    def _layered_set_value(self, value: Genome) -> None:
        self._check_frozen()
        if not isinstance(value, Genome):
            raise TypeError(f"value: need a Genome, got {type(value).__name__}")
        if len(value) != self.depth:
            raise ValueError(f"value: need {self.depth} LIVs, got {len(value)} in {value}")
        value.canonical()  # raises with every violation where there is one
        if foreign := sorted({liv.liv_class for liv in value.livs}.difference(self.classes)):
            raise ValueError(f"value: need LIV classes from {list(self.classes)}, got {foreign} in {value}")
        self._genome = value
        self.parent_hashes = ()
        self.repaired = False

    def _layered_sample(self) -> "GenomeParameter":
        child: GenomeParameter = self.spawn_child()
        child._genome = random_genome(self._generator(), self.depth, self.classes)
        return child

    def _layered_recombine(self, *others: "GenomeParameter") -> None:
        rng = self._generator()
        for other in others:
            mixed, _ = crossover(self._genome, other._genome, rng)
            self._genome = repair(mixed, rng)
            self.repaired |= self._genome is not mixed
        # Without repeats, in order: a genome may be recombined with its own sibling.
        hashes = [*self.parent_hashes, *(other._genome.hash for other in others)]
        self.parent_hashes = tuple(dict.fromkeys(hashes))

    def _layered_mutate(self) -> None:
        rng = self._generator()
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
        self.parent_hashes = () if parent is None else (parent._genome.hash,)
        self.repaired = False

    # Helpers.

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
