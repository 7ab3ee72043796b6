"""Random genomes, mutation and crossover."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_core.genome import GENES, POOL, Genome, crossover, gene_values, mutate, random_genome, validate
from tests.star_core.strategies import genomes, raw_genomes

seeds = st.integers(0, 2**32 - 1)


def changed(a, b):
    pairs = zip(a.livs, b.livs, strict=True)
    return sum(x != y for one, other in pairs for x, y in zip(one.as_tuple(), other.as_tuple(), strict=True))


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 12))
def test_random_genomes_are_valid_and_repeat_with_their_seed(seed, depth):
    genome = random_genome(np.random.default_rng(seed), depth)
    assert len(genome) == depth
    assert validate(genome) == []
    assert random_genome(np.random.default_rng(seed), depth) == genome


def test_random_genomes_hold_every_class_alike_and_share_plenty():
    rng = np.random.default_rng(0)
    drawn = [random_genome(rng, 8) for _ in range(500)]
    classes = Counter(liv.liv_class for genome in drawn for liv in genome.livs)
    assert set(classes) == set(POOL)
    # 4000 LIVs: 235 of each class on average. Copied classes make clusters: a count's standard deviation is about 24.
    assert min(classes.values()) > 140
    assert max(classes.values()) < 330
    plans = [genome.sharing() for genome in drawn]
    weights = [position != source for plan in plans for position, source in enumerate(plan.featurizer_source)]
    tensors = Counter(name for plan in plans for source in plan.tensor_source for name in source)
    assert 0.1 < np.mean(weights) < 0.5
    assert set(tensors) == {"k", "v", "B", "C", "K"}
    assert min(tensors.values()) > 40
    both = [plan for plan in plans if plan.featurizer_source != tuple(range(8)) and any(plan.tensor_source)]
    assert len(both) > 250


def test_random_genomes_keep_to_the_classes_asked_for():
    rng = np.random.default_rng(1)
    for _ in range(20):
        assert {liv.liv_class for liv in random_genome(rng, 6, classes=[7, 9]).livs} <= {7, 9}


@pytest.mark.parametrize(
    ("depth", "classes", "error", "message"),
    [
        (0, None, ValueError, "depth: is 0, needs a whole number from 1"),
        (2.0, None, TypeError, "depth: needs an int, got float"),
        (2, [], ValueError, "classes: is empty, needs at least one key of POOL"),
        (2, [9, 18], ValueError, "classes: is 18, needs 1 to 17"),
    ],
)
def test_random_genome_refuses(depth, classes, error, message):
    with pytest.raises(error, match=message):
        random_genome(np.random.default_rng(0), depth, classes)


@settings(max_examples=150, deadline=None)
@given(genomes(1, 6), seeds, st.sampled_from([0.0, 0.1, 1.0]))
def test_mutants_of_valid_genomes_are_valid_and_differ(genome, seed, rate):
    mutant = mutate(genome, np.random.default_rng(seed), rate)
    assert validate(mutant) == []
    assert mutant != genome
    assert rate > 0 or changed(genome, mutant) == 1
    assert mutate(genome, np.random.default_rng(seed), rate) == mutant


@settings(max_examples=100, deadline=None)
@given(raw_genomes(1, 5), seeds)
def test_mutation_takes_invalid_genomes_and_adds_no_violation(genome, seed):
    mutant = mutate(genome, np.random.default_rng(seed), 0.0)
    assert mutant != genome
    ((position, gene),) = (
        (position, gene)
        for position, (old, new) in enumerate(zip(genome.livs, mutant.livs, strict=True))
        for gene in GENES
        if getattr(old, gene) != getattr(new, gene)
    )
    assert getattr(mutant.livs[position], gene) in gene_values(genome, position, gene)


def test_each_gene_mutates_at_the_rate():
    genome = Genome.parse("-".join(["71111"] * 6))  # each of its 30 genes has another valid value
    rng = np.random.default_rng(2)
    counts = np.array([changed(genome, mutate(genome, rng, 0.05)) for _ in range(1500)])
    # 30 * 0.05 and, where that hits no gene, one: 1.5 + 0.95**30 = 1.71, with a standard error of 0.03.
    assert 1.6 < counts.mean() < 1.82


def test_every_gene_can_mutate():
    genome = Genome.parse("11111-71111-31111")
    rng = np.random.default_rng(3)
    seen = Counter()
    for _ in range(400):
        mutant = mutate(genome, rng, 0.0)
        seen.update(
            (position, gene)
            for position in range(3)
            for gene in GENES
            if getattr(mutant.livs[position], gene) != getattr(genome.livs[position], gene)
        )
    assert len(seen) == 15


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_mutation_refuses_a_rate_that_is_no_probability(rate):
    with pytest.raises(ValueError, match=f"rate: is {rate}, needs a probability from 0 to 1"):
        mutate(Genome.parse("11111"), np.random.default_rng(0), rate)


@settings(max_examples=150, deadline=None)
@given(genomes(1, 8), genomes(1, 8), seeds)
def test_children_are_their_parents_with_one_stretch_exchanged(a, b, seed):
    child, other = crossover(a, b, np.random.default_rng(seed))
    assert len(child) == len(a)
    assert len(other) == len(b)
    depth = min(len(a), len(b))
    stretches = [
        (start, stop)
        for start in range(depth)
        for stop in range(start + 1, depth + 1)
        if child.livs == a.livs[:start] + b.livs[start:stop] + a.livs[stop:]
        and other.livs == b.livs[:start] + a.livs[start:stop] + b.livs[stop:]
        and (depth == 1 or stop - start < depth)
    ]
    assert stretches


def test_every_pair_of_cuts_is_drawn():
    a, b = Genome.parse("11111-11111-11111-11111"), Genome.parse("91111-91111-91111-91111")
    rng = np.random.default_rng(4)
    drawn = Counter(tuple(liv.liv_class for liv in crossover(a, b, rng)[0].livs) for _ in range(900))
    # Stretches of 1, 2 and 3 of 4 LIVs: 4 + 3 + 2, 100 times each on average.
    assert len(drawn) == 9
    assert min(drawn.values()) > 60
    assert max(drawn.values()) < 145
