"""The paper's space stays as it is, number by number, whatever else a genome may hold.

The recorded values are those of the package before genomes could carry more than the paper's genes: a run folder's
genomes, hashes and random numbers are still its own.
"""

import hashlib

import numpy as np

from star_core.genome import GENES, Genome, LIVGenes, crossover, gene_values, mutate, random_genome, repair, validate


def digest(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def sampled(seed=0, count=60):
    rng = np.random.default_rng(seed)
    return [random_genome(rng, 1 + index % 12) for index in range(count)]


def bred():
    rng = np.random.default_rng(1)
    population = sampled(2, 24)
    lines = []
    for index in range(200):
        a, b = population[index % 24], population[(index * 7 + 3) % 24]
        child, other = crossover(a, b, rng)
        lines += [str(child), str(other)]
        mended = repair(child, rng)
        population[index % 24] = mutate(mended, rng, 0.05)
        lines += [str(mended), str(population[index % 24])]
    return lines


def raw():
    rng = np.random.default_rng(3)
    return [
        Genome(tuple(LIVGenes(*map(int, rng.integers(1, (20, 4, 4, 4, 6)))) for _ in range(1 + index % 6)))
        for index in range(200)
    ]


def test_sampled_genomes_are_those_of_old():
    genomes = sampled()
    assert str(genomes[2]) == "5.1.1.1.2-5.3.2.1.2-14.2.2.3.3"
    assert digest(map(str, genomes)) == "77865660f26a740354071c160f6b4b95"


def test_canonical_forms_and_hashes_are_those_of_old():
    genomes = [*sampled(), Genome.parse("21211-31112-21221-32112"), Genome.parse("10.1.1.2.1-9.1.1.1.1")]
    assert digest(str(genome.canonical()) for genome in genomes) == "c75cf88199e49ce2813d8f003a5e28a4"
    assert digest(genome.hash for genome in genomes) == "6b7cce009574f6450bac713263dc2ab0"
    assert [genome.hash for genome in genomes[:3]] == ["e270f85743f37af1", "826f0dcf5079106a", "9784f2d2fb0f1ac2"]


def test_variation_draws_the_same_random_numbers():
    assert digest(bred()) == "e5e3a852769b4843cc28fa3eebbfee36"


def test_violations_values_and_repairs_are_those_of_old():
    rng = np.random.default_rng(4)
    lines = []
    for genome in raw():
        lines += [f"{genome} {violation}" for violation in validate(genome)]
        lines.append(str(repair(genome, rng)))
        lines += [f"{gene} {gene_values(genome, len(genome) - 1, gene)}" for gene in GENES]
    assert digest(lines) == "7b7fac11092a7c0761d74810d2913499"
