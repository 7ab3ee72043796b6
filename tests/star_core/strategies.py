"""Hypothesis strategies that make genomes, for every test that needs some."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from star_core.genome import POOL, Genome, LIVGenes, gene_values, random_genome

MOST_LABELS = 3
"""Labels drawn: few, so that LIVs often meet under one."""


def genomes(min_depth: int, max_depth: int, classes: Sequence[int] = tuple(POOL)) -> st.SearchStrategy[Genome]:
    """Valid genomes of the given classes, most of them with some sharing.

    Half are built gene by gene and shrink to SA-1 alone; half come from `random_genome`, which holds every class alike.
    """
    depths = st.integers(min_depth, max_depth)
    generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)
    return _built_genomes(depths, classes) | st.builds(random_genome, generators, depths, st.just(classes))


@st.composite
def _built_genomes(draw: st.DrawFn, depths: st.SearchStrategy[int], classes: Sequence[int]) -> Genome:
    depth = draw(depths)
    chosen: list[int] = []
    for _ in range(depth):
        # With 17 classes two of a kind are rare unless one copies the other.
        fresh = st.sampled_from(classes)
        chosen.append(draw(fresh | st.sampled_from(chosen) if chosen else fresh))
    genome = Genome(tuple(LIVGenes(liv_class) for liv_class in chosen))
    for position in range(depth):
        for gene in ("featurizer_group", "featurizer_strategy", "feature_group", "feature_strategy"):
            values = gene_values(genome, position, gene)
            # Few labels, so that LIVs often meet, and strategies that share twice as often as the one that does not.
            values = values[:MOST_LABELS] if gene.endswith("group") else values + values[1:]
            genome = genome.with_gene(position, gene, draw(st.sampled_from(values)))
    return genome


def raw_genomes(
    min_depth: int, max_depth: int, classes: Sequence[int] = range(1, 20), most_strategies: tuple[int, int] = (3, 5)
) -> st.SearchStrategy[Genome]:
    """Genomes of any genes, mostly invalid ones.

    `classes` may hold unknown ones, and `most_strategies`, of featurizers and of feature groups, exceed the 2 and 4
    that exist.
    """
    labels = st.integers(1, MOST_LABELS)
    liv = st.builds(
        LIVGenes,
        st.sampled_from(classes),
        labels,
        st.integers(1, most_strategies[0]),
        labels,
        st.integers(1, most_strategies[1]),
    )
    return st.lists(liv, min_size=min_depth, max_size=max_depth).map(lambda livs: Genome(tuple(livs)))
