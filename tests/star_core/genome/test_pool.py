"""Featurizer and operator genomes, the table of classes, and what the package may import."""

import ast
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import star_core.genome
from star_core.genome import (
    FEATURIZERS,
    POOL,
    ChannelMixing,
    FeatureGroup,
    FeaturizerGenome,
    Nonlinearity,
    OperatorGenome,
    Sparsity,
    TokenMixing,
)

SPECIFICATION = """
1 SA-1 12123 attention
2 SA-2 22123 attention
3 SA-3 32123 attention
4 SA-4 42123 attention
5 Rec-1 54111 recurrence
6 Rec-2 64111 recurrence
7 GConv-1 73111 short_conv
8 GConv-2 83111 long_conv
9 GMemless 91142 memoryless
"""


def test_pool_is_as_specified():
    rows = [line.split() for line in SPECIFICATION.split("\n") if line]
    rows += [[str(9 + int(number)), f"Diff-{name}", text, family] for number, name, text, family in rows[:8]]
    assert [[str(cls.id), cls.name, str(cls.operator), cls.family] for cls in POOL.values()] == rows
    assert list(POOL) == [cls.id for cls in POOL.values()] == list(range(1, 18))
    assert [cls.id for cls in POOL.values() if cls.differential] == list(range(10, 18))
    assert all(cls.featurizer is FEATURIZERS[cls.operator.featurizer_class] for cls in POOL.values())


@pytest.mark.parametrize(("liv_class", "names"), [(1, ("k", "v")), (14, ("B", "C")), (7, ("B", "K")), (17, ("B", "K"))])
def test_strategies_of_a_class(liv_class, names):
    assert POOL[liv_class].strategies == {1: (), 2: names[:1], 3: names[1:], 4: names}


def test_memoryless_class_shares_no_features():
    assert POOL[9].strategies == {1: ()}


def test_featurizers_have_the_sizes_of_their_classes():
    groups = {
        "q k v": range(1, 5),
        "x z dt B C": (5, 6),
        "v B C K": (7, 8),
        "gate value": (9,),
    }
    for names, numbers in groups.items():
        assert all(FEATURIZERS[number].names == tuple(names.split()) for number in numbers)
    assert [FEATURIZERS[number]["k"].repeat for number in range(1, 5)] == [1, 1, 4, 2]
    assert [FEATURIZERS[number]["v"].repeat for number in range(1, 5)] == [1, 1, 4, 2]
    assert [FEATURIZERS[number]["q"].repeat for number in range(1, 5)] == [1, 1, 1, 1]
    assert [FEATURIZERS[number]["B"].expansion for number in (5, 6)] == [16, 2]
    assert [FEATURIZERS[number]["C"].expansion for number in (5, 6)] == [16, 2]
    assert [FEATURIZERS[number]["x"].expansion for number in (5, 6)] == [2, 2]
    assert (FEATURIZERS[7]["K"].expansion, FEATURIZERS[7]["K"].sparsity) == (3, Sparsity.BANDED)
    assert (FEATURIZERS[8]["K"].expansion, FEATURIZERS[8]["K"].sparsity) == (1, Sparsity.NONE)
    assert FEATURIZERS[7]["K"].channel_mixing is FEATURIZERS[8]["K"].channel_mixing is ChannelMixing.DIAGONAL
    assert [FEATURIZERS[9][name].expansion for name in ("gate", "value")] == [3, 3]
    toeplitz = [
        number for number in range(1, 5) if FEATURIZERS[number]["q"].token_mixing is TokenMixing.SCALED_TOEPLITZ
    ]
    assert toeplitz == [2]


def test_operator_genome_reads_and_writes():
    operator = OperatorGenome.parse("12123")
    assert operator == OperatorGenome(
        1, TokenMixing.LOW_RANK, Sparsity.NONE, Nonlinearity.SOFTMAX, ChannelMixing.GROUPED
    )
    assert operator.token_mixing is TokenMixing.LOW_RANK
    assert str(operator) == "12123"
    assert OperatorGenome.parse("1.2.1.2.3") == operator


@given(st.tuples(*(st.integers(1, most) for most in (9, 4, 2, 4, 3))))
def test_every_operator_genome_reads_back(genes):
    text = "".join(map(str, genes))
    assert str(OperatorGenome.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1212", "operator genome is '1212': needs 5 genes"),
        ("10.2.1.2.3", "featurizer_class: is 10, needs 1 to 9"),
        ("15123", "token_mixing: is 5, needs 1 to 4"),
        ("12323", "sparsity: is 3, needs 1 to 2"),
        ("12153", "nonlinearity: is 5, needs 1 to 4"),
        ("12124", "channel_mixing: is 4, needs 1 to 3"),
    ],
)
def test_bad_operator_genome_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        OperatorGenome.parse(text)


def test_operator_genome_refuses_what_is_no_number():
    with pytest.raises(TypeError, match="operator genome: needs a str, got int"):
        OperatorGenome.parse(12123)
    with pytest.raises(TypeError, match="sparsity: needs an int, got str"):
        OperatorGenome(1, 2, "1", 2, 3)


group_genes = st.tuples(*(st.integers(1, most) for most in (4, 2, 4, 3, 20, 20)))


@given(st.dictionaries(st.sampled_from(["q", "k", "gate", "B"]), group_genes, min_size=1))
def test_every_featurizer_genome_reads_back(groups):
    genome = FeaturizerGenome(tuple(FeatureGroup(name, *genes) for name, genes in groups.items()))
    assert FeaturizerGenome.parse(str(genome)) == genome
    assert {name: genome[name].genes for name in genome.names} == groups


def test_featurizer_genome_text():
    assert str(FEATURIZERS[3]) == "q:111211-k:111214-v:111214"
    assert str(FEATURIZERS[5]).endswith("-B:3.2.1.2.16.1-C:3.2.1.2.16.1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "group 0 (from 0) of the featurizer genome is '': needs a name, ':' and six genes, such as 'q:111211'"),
        ("q:111211-111211", "group 1 (from 0) of the featurizer genome is '111211': needs a name"),
        ("q:11121", "group 0 (from 0) of the featurizer genome, 'q', is '11121': needs 6 genes, each a whole number"),
        ("q2:111211", "feature group name: is 'q2', needs letters alone"),
        ("q:111211-q:111211", "featurizer genome: feature group names are ('q', 'q'), need to differ"),
        ("k:511211", "feature group 'k', token_mixing: is 5, needs 1 to 4"),
        ("k:131211", "feature group 'k', sparsity: is 3, needs 1 to 2"),
        ("k:115211", "feature group 'k', nonlinearity: is 5, needs 1 to 4"),
        ("k:111411", "feature group 'k', channel_mixing: is 4, needs 1 to 3"),
    ],
)
def test_bad_featurizer_genome_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FeaturizerGenome.parse(text)


def test_feature_group_refuses_factors_below_one():
    with pytest.raises(ValueError, match="feature group 'k', expansion: is 0, needs a whole number from 1"):
        FeatureGroup("k", 1, 1, 1, 2, 0, 1)
    with pytest.raises(ValueError, match="feature group 'k', repeat: is -4, needs a whole number from 1"):
        FeatureGroup("k", 1, 1, 1, 2, 1, -4)
    with pytest.raises(TypeError, match="feature group name: needs a str, got int"):
        FeatureGroup(1, 1, 1, 1, 2, 1, 1)


def test_featurizer_genome_needs_groups_that_exist():
    with pytest.raises(ValueError, match="has no feature group, needs at least one"):
        FeaturizerGenome(())
    with pytest.raises(TypeError, match="featurizer genome: needs a str, got NoneType"):
        FeaturizerGenome.parse(None)
    with pytest.raises(KeyError, match="no feature group 'K'; there are q, k, v"):
        FEATURIZERS[1]["K"]


def test_genome_package_imports_the_standard_library_and_numpy_alone():
    files = list(Path(star_core.genome.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                allowed = name.split(".")[0] in sys.stdlib_module_names | {"numpy"}
                assert allowed or name.startswith("star_core.genome"), f"{file.name} imports {name}"
