"""NSGA-II on genomes against random search at the same budget, on losses made up from classes and sharing."""

import numpy as np
import pytest

from search import nsga2
from search.evolution import NSGA2
from search.space import GenomeParameter
from star_core.genome import POOL, Genome, random_genome

DEPTH = 12
EVALUATIONS = 500
# By family: quality, weights, cache a token, time, memory. No family is best at two of the first four.
FAMILIES = {
    "attention": (1.0, 1.0, 1.0, 0.6, 1.0),
    "recurrence": (0.8, 0.8, 0.2, 1.0, 1.5),
    "short_conv": (0.45, 0.5, 0.05, 0.2, 0.5),
    "long_conv": (0.5, 0.6, 0.6, 0.9, 1.0),
    "memoryless": (0.7, 0.7, 0.0, 0.4, 2.0),
}


def genome_losses(genome: Genome) -> list[float]:
    """Five losses between 0 and 1 that disagree, with interactions between neighbours and between LIVs that share.

    Quality wants attention and recurrence, no sharing, and a memoryless unit after each mixer; weights want featurizers
    shared; cache and time want short convolutions and reused tensors; memory wants what is reused to be near.
    """
    plan = genome.sharing()
    classes = [POOL[liv.liv_class] for liv in genome.livs]
    gain = weights = cache = time = 0.0
    alive = np.zeros(len(classes))
    for i, cls in enumerate(classes):
        quality, weight, kept, cost, held = FAMILIES[cls.family]
        copies = 2 if cls.differential else 1
        owner = plan.featurizer_source[i] == i
        sources = plan.tensor_source[i]
        before = classes[i - 1].family if i else None
        quality *= 0.5 if before == cls.family else 1.5 if before and cls.family == "memoryless" else 1.0
        gain += quality * (1.2 if cls.differential else 1.0) * (1.0 if owner else 0.85) * (1 - 0.1 * len(sources))
        weights += weight * copies * owner
        repeats = cls.featurizer["k"].repeat if cls.family == "attention" else 1
        cache += kept * copies * (1 - len(sources) / 2) / repeats
        time += cost * (1.8 if cls.differential else 1.0) * (1 - 0.3 * len(sources)) / 1.8
        alive[i] += held * copies
        for source in sources.values():
            alive[source:i] += 0.5
    n = len(classes)
    return [float(np.exp(-1.2 * gain / n)), weights / n / 2, cache / n / 2, time / n, float(alive.max()) / 6]


def search(seed: int, objectives: int) -> NSGA2:
    """Run 500 evaluations, 8 in flight, told out of order; one in twenty fails and one in twenty is lost."""
    parameter = GenomeParameter(DEPTH)
    parameter.random_state = np.random.RandomState(seed)
    optimizer = NSGA2(parameter, num_objectives=objectives, population_size=32)
    chance = np.random.default_rng(seed)
    running, hashes = [], set()
    for _ in range(EVALUATIONS):
        while len(running) < 8:
            running.append(optimizer.ask())
            hashes.add(running[-1].value.hash)
        candidate = running.pop(int(chance.integers(8)))
        fate = chance.random()
        if fate < 0.05:
            optimizer.discard(candidate)
        elif fate >= 0.1:
            optimizer.tell(candidate, genome_losses(candidate.value)[:objectives])
    assert len(hashes) == optimizer.counters.asked == EVALUATIONS + 7
    return optimizer


def random_search(seed: int, objectives: int) -> np.ndarray:
    """Return the losses of 500 random genomes, all different, none of which fails."""
    rng = np.random.default_rng(seed)
    genomes: dict[str, Genome] = {}
    while len(genomes) < EVALUATIONS:
        genome = random_genome(rng, DEPTH)
        genomes.setdefault(genome.hash, genome)
    return np.array([genome_losses(genome)[:objectives] for genome in genomes.values()])


def check_population(optimizer: NSGA2) -> None:
    members = optimizer.population
    assert len(members) == optimizer.population_size
    left, rank = list(members), 0
    while left:  # brute force
        front = [
            one
            for one in left
            if not any((o.losses <= one.losses).all() and (o.losses < one.losses).any() for o in left)
        ]
        assert all(one.rank == rank for one in front)
        left, rank = [one for one in left if not any(one is other for other in front)], rank + 1


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
@pytest.mark.parametrize("seeds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_evolution_beats_random_search(objectives, seeds):
    reference = np.ones(objectives)
    wins = 0
    for seed in range(seeds):
        optimizer = search(seed, objectives)
        check_population(optimizer)
        found = nsga2.hypervolume([member.losses for member in optimizer.front()], reference)
        wins += found > nsga2.hypervolume(random_search(1000 + seed, objectives), reference)
    assert wins >= 0.9 * seeds
