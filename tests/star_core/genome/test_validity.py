"""Validity, the values that keep it, and repair: held against rules written out by hand."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_core.genome import GENES, Genome, LIVGenes, gene_values, repair, validate
from tests.star_core.genome import naive
from tests.star_core.strategies import genomes, raw_genomes

seeds = st.integers(0, 2**32 - 1)


def rows(genome):
    return [liv.as_tuple() for liv in genome.livs]


def differences(a, b):
    return {
        (position, gene)
        for position, (one, other) in enumerate(zip(a.livs, b.livs, strict=True))
        for gene in GENES
        if getattr(one, gene) != getattr(other, gene)
    }


@pytest.mark.parametrize(
    ("text", "position", "gene", "message"),
    [
        ("91111-18.1.1.1.1", 1, "liv_class", "LIV 1: there is no class 18; needs 1 to 17"),
        (
            "11311",
            0,
            "featurizer_strategy",
            "LIV 0: there is no featurizer-sharing strategy 3; needs 1 (none) or 2 (all weights)",
        ),
        (
            "11115",
            0,
            "feature_strategy",
            "LIV 0: there is no feature-group-sharing strategy 5 for SA-1; needs 1 (none), 2 (k), 3 (v) or 4 (k and v)",
        ),
        (
            "16.1.1.1.5",
            0,
            "feature_strategy",
            "LIV 0: there is no feature-group-sharing strategy 5 for Diff-GConv-1; "
            "needs 1 (none), 2 (B), 3 (K) or 4 (B and K)",
        ),
        ("91112", 0, "feature_strategy", "there is no feature-group-sharing strategy 2 for GMemless; needs 1 (none)"),
        (
            "11211-91111-31211",
            2,
            "featurizer_group",
            "LIV 2: SA-3 cannot share featurizer weights with LIV 0, SA-1, under label 1; needs the same class",
        ),
        (
            "11132-91111-51132",
            2,
            "feature_group",
            "LIV 2: Rec-1 cannot share feature groups with LIV 0, SA-1, under label 3; needs another recurrence",
        ),
        (
            "5.1.1.1.2-14.1.1.1.3",
            1,
            "feature_group",
            "LIV 1: Diff-Rec-1 cannot share feature groups with LIV 0, Rec-1, "
            "under label 1; needs a differential class",
        ),
        ("14.1.1.1.2-5.1.1.1.3", 1, "feature_group", "needs a class that is not differential"),
        ("11114-31113", 1, "feature_group", "needs v of one size, and has expansion 1 and repeat 4 against 1 and 1"),
        ("51113-61114", 1, "feature_group", "needs C of one size, and has expansion 2 and repeat 1 against 16 and 1"),
        ("71114-81114", 1, "feature_group", "needs K of one size, and has expansion 1 and repeat 1 against 3 and 1"),
    ],
)
def test_violation_says_where_and_why(text, position, gene, message):
    (violation,) = validate(Genome.parse(text))
    assert (violation.position, violation.gene) == (position, gene)
    assert message in violation.message


def test_unknown_class_with_strategies_that_no_class_has():
    violations = validate(Genome.parse("19.1.4.1.6"))
    assert [violation.gene for violation in violations] == ["liv_class", "featurizer_strategy", "feature_strategy"]
    assert violations[2].message == "LIV 0: there is no feature-group-sharing strategy 6; needs 1 to 4"


def test_every_violation_is_returned():
    violations = validate(Genome.parse("11212-31313-91214-5.1.1.1.2"))
    assert [(violation.position, violation.gene) for violation in violations] == [
        (1, "featurizer_strategy"),
        (2, "featurizer_group"),
        (2, "feature_strategy"),
        (3, "feature_group"),
    ]


def test_who_goes_with_no_one_is_no_measure_for_others():
    # LIV 1 does not go together with LIV 0; LIV 2 does, and so is in order although it is unlike LIV 1.
    violations = validate(Genome.parse("11112-51112-11112"))
    assert [violation.position for violation in violations] == [1]


@pytest.mark.parametrize(
    "text",
    [
        "11112-31113",  # no group in common, so sizes do not matter
        "11112-21112",  # keys through a short convolution are keys
        "71113-81112-81112",
        "71112-81114-81113",
        "1.1.2.1.1-10.2.2.1.1",
        "91211-91211",
        "1.99.2.99.4-1.99.2.99.4",  # labels are names, of any size
    ],
)
def test_valid(text):
    assert validate(Genome.parse(text)) == []


def test_all_pairs_of_livs_are_judged_as_by_hand():
    livs = [LIVGenes(*genes) for genes in itertools.product(range(1, 19), (1,), (1, 2, 3), (1,), range(1, 6))]
    for pair in itertools.product(livs, repeat=2):
        genome = Genome(pair)
        assert (not validate(genome)) == naive.valid(rows(genome)), str(genome)


@settings(max_examples=200)
@given(
    raw_genomes(3, 6) | raw_genomes(3, 6, classes=(1, 3, 4), most_strategies=(2, 4)) | raw_genomes(3, 6, classes=(7, 8))
)
def test_genomes_are_judged_as_by_hand(genome):
    assert (not validate(genome)) == naive.valid(rows(genome))


@settings(max_examples=60, deadline=None)
@given(genomes(1, 5), st.data())
def test_gene_values_are_those_that_keep_a_genome_valid(genome, data):
    position = data.draw(st.integers(0, len(genome) - 1))
    for gene in GENES:
        most = len(genome) if gene.endswith("group") else 20
        want = [value for value in range(1, most + 1) if not validate(genome.with_gene(position, gene, value))]
        assert list(gene_values(genome, position, gene)) == want
        assert gene.endswith("group") or getattr(genome.livs[position], gene) in want


@settings(max_examples=150, deadline=None)
@given(raw_genomes(1, 5), st.data())
def test_gene_values_of_an_invalid_genome_free_the_gene_from_blame(genome, data):
    position = data.draw(st.integers(0, len(genome) - 1))
    gene = data.draw(st.sampled_from(GENES))
    for value in gene_values(genome, position, gene):
        blamed = {(v.position, v.gene) for v in validate(genome.with_gene(position, gene, value))}
        assert (position, gene) not in blamed


def test_unknown_gene_or_position_is_refused():
    genome = Genome.parse("11111-91111")
    with pytest.raises(ValueError, match="position: is 2, needs 0 to 1"):
        gene_values(genome, 2, "liv_class")
    with pytest.raises(ValueError, match="position: is -1, needs 0 to 1"):
        gene_values(genome, -1, "liv_class")
    with pytest.raises(ValueError, match="gene: is 'klass', needs one of liv_class, featurizer_group"):
        gene_values(genome, 0, "klass")


@settings(max_examples=200, deadline=None)
@given(raw_genomes(1, 8), seeds)
def test_repair_mends_and_is_idempotent(genome, seed):
    mended = repair(genome, np.random.default_rng(seed))
    assert validate(mended) == []
    assert naive.valid(rows(mended))
    assert repair(mended, np.random.default_rng(seed + 1)) == mended
    assert repair(genome, np.random.default_rng(seed)) == mended


@settings(max_examples=200, deadline=None)
@given(raw_genomes(1, 8, classes=range(1, 18)), seeds)
def test_repair_changes_offending_genes_alone(genome, seed):
    offending = {(violation.position, violation.gene) for violation in validate(genome)}
    assert differences(genome, repair(genome, np.random.default_rng(seed))) <= offending


@settings(max_examples=150, deadline=None)
@given(raw_genomes(1, 8, classes=(1, 3, 5, 7, 9, 18, 30)), seeds)
def test_repair_of_unknown_classes_leaves_other_livs_alone(genome, seed):
    offending = {(violation.position, violation.gene) for violation in validate(genome)}
    unknown = {position for position, gene in offending if gene == "liv_class"}
    changed = differences(genome, repair(genome, np.random.default_rng(seed)))
    assert {where for where in changed if where[0] not in unknown} <= offending


@given(genomes(1, 6), seeds)
def test_repair_leaves_valid_genomes_and_the_generator_alone(genome, seed):
    rng = np.random.default_rng(seed)
    assert repair(genome, rng) is genome
    assert rng.random() == np.random.default_rng(seed).random()


def test_repair_reaches_every_valid_value():
    genome = Genome.parse("11211-31211-91111")  # label 1 is of SA-1 now
    labels = {repair(genome, np.random.default_rng(seed)).livs[1].featurizer_group for seed in range(40)}
    assert labels == {2, 3}


def test_message_of_an_invalid_genome_names_the_cure_and_every_violation():
    message = "genome 11311-91112 is not valid, repair(genome, rng) mends it: LIV 0: there is no featurizer-sharing"
    with pytest.raises(
        ValueError, match=re.escape(message) + ".*; LIV 1: there is no feature-group-sharing strategy 2"
    ):
        Genome.parse("11311-91112").canonical()
