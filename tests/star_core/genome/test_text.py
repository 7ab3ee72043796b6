"""Text forms: every genome reads back as it was written, and bad text is refused in words."""

import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from star_core.genome import GENES, Genome, LIVGenes, describe
from tests.star_core.strategies import raw_genomes

PAPER = "21211-31112-21221-32112"


def test_paper_example_reads_and_writes():
    genome = Genome.parse(PAPER)
    assert len(genome) == 4
    assert genome.livs[2] == LIVGenes(
        liv_class=2, featurizer_group=1, featurizer_strategy=2, feature_group=2, feature_strategy=1
    )
    assert genome.livs[3].as_tuple() == (3, 2, 1, 1, 2)
    assert str(genome) == PAPER


@given(raw_genomes(1, 8))
def test_text_reads_back(genome):
    text = str(genome)
    assert Genome.parse(text) == genome
    assert Genome.parse(f"  {text}\n") == genome
    assert ("." in text) == any(gene > 9 for liv in genome.livs for gene in liv.as_tuple())


@given(raw_genomes(1, 6, classes=range(1, 10)), st.data())
def test_each_liv_may_be_written_in_either_form(genome, data):
    assert "." not in str(genome)
    parts = [
        ".".join(part) if data.draw(st.booleans(), label=f"dots in LIV {position}") else part
        for position, part in enumerate(str(genome).split("-"))
    ]
    assert Genome.parse("-".join(parts)) == genome


def test_two_digits_anywhere_mean_dots_everywhere():
    genome = Genome((LIVGenes(10, 1, 1, 2, 1), LIVGenes(9)))
    assert str(genome) == "10.1.1.2.1-9.1.1.1.1"
    assert Genome.parse("10.1.1.2.1-91111") == genome


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "genome is empty: needs five genes for each LIV, joined by '-', such as '21211-31112'"),
        ("  ", "genome is empty"),
        (
            "21211-3111",
            "LIV 1 (from 0) of the genome is '3111': needs 5 genes, each a whole number from 1, "
            "as digits ('12345') or joined by dots ('1.2.3.4.5')",
        ),
        ("211112", "LIV 0 (from 0) of the genome is '211112': needs 5 genes"),
        ("21211-", "LIV 1 (from 0) of the genome is ''"),
        ("21211--21211", "LIV 1 (from 0) of the genome is ''"),
        ("20211", "LIV 0 (from 0) of the genome is '20211'"),
        ("2.0.2.1.1", "LIV 0 (from 0) of the genome is '2.0.2.1.1'"),
        ("2.1.2.1", "LIV 0 (from 0) of the genome is '2.1.2.1'"),
        ("2.1.2.1.1.", "LIV 0 (from 0) of the genome is '2.1.2.1.1.'"),
        ("2x211", "LIV 0 (from 0) of the genome is '2x211'"),
        ("2121²", "LIV 0 (from 0) of the genome is '2121²'"),
        ("21211-21 11", "LIV 1 (from 0) of the genome is '21 11'"),
    ],
)
def test_bad_text_is_refused_in_words(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Genome.parse(text)


def test_text_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match="genome: needs a str, got int"):
        Genome.parse(21211)


def test_genome_holds_livs_alone_and_at_least_one():
    with pytest.raises(ValueError, match="livs: is empty, needs at least one LIV"):
        Genome(())
    with pytest.raises(TypeError, match=re.escape("livs: item 1 (from 0) is a tuple, needs LIVGenes")):
        Genome((LIVGenes(1), (1, 1, 1, 1, 1)))
    assert Genome([LIVGenes(1)]) == Genome((LIVGenes(1),))


@pytest.mark.parametrize("gene", GENES)
def test_genes_are_whole_numbers_from_one(gene):
    genes = dict.fromkeys(GENES, 1)
    with pytest.raises(ValueError, match=f"{gene}: is 0, needs a whole number from 1"):
        LIVGenes(**genes | {gene: 0})
    with pytest.raises(TypeError, match=f"{gene}: needs an int, got float"):
        LIVGenes(**genes | {gene: 1.0})
    liv = LIVGenes(**genes | {gene: np.int64(3)})
    assert type(getattr(liv, gene)) is int
    assert getattr(liv, gene) == 3


def test_genome_survives_pickling_with_its_hash():
    genome = Genome.parse(PAPER)
    before = genome.hash
    copy = pickle.loads(pickle.dumps(genome))
    assert copy == genome
    assert copy.hash == before
    assert pickle.loads(pickle.dumps(genome.sharing())) == genome.sharing()


def test_description_names_classes_and_sources():
    genome = Genome.parse("21214-31122-21214-32122-72234-91111-72234-51154-51153")
    assert describe(genome).split("\n") == [
        f"9 LIVs, 21214-31122-21214-31122-72232-91111-72232-51143-51143, hash {genome.hash}",
        "  0  SA-2",
        "  1  SA-3",
        "  2  SA-2         featurizer weights of LIV 0; k and v of LIV 0",
        "  3  SA-3         k of LIV 1",
        "  4  GConv-1",
        "  5  GMemless",
        "  6  GConv-1      featurizer weights of LIV 4; B and K of LIV 4",
        "  7  Rec-1",
        "  8  Rec-1        C of LIV 7",
    ]


def test_invalid_genome_is_not_described():
    with pytest.raises(ValueError, match="LIV 0: there is no class 18"):
        describe(Genome.parse("18.1.1.1.1"))
