"""One network has one canonical form and one hash: held against a decoder written by hand."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_core.genome import POOL, Genome, LIVGenes, validate
from tests.star_core.genome import naive
from tests.star_core.strategies import genomes, raw_genomes


def rows(genome):
    return [liv.as_tuple() for liv in genome.livs]


def canonical(text):
    return str(Genome.parse(text).canonical())


def test_paper_example():
    genome = Genome.parse("21211-31112-21221-32112")
    assert str(genome.canonical()) == "21211-31112-21211-31112"
    sharing = genome.sharing()
    assert sharing.featurizer_source == (0, 1, 0, 3)
    assert sharing.tensor_source == ({}, {}, {}, {"k": 1})


@pytest.mark.parametrize(
    ("text", "want"),
    [
        pytest.param("13121-14131", "11111-11111", id="labels-without-sharing"),
        pytest.param("12244-13253", "11111-11111", id="alone-under-each-label"),
        pytest.param("12221-11211-12221-11211", "11211-12211-11211-12211", id="renumbered-by-first-use"),
        pytest.param("11132-11133-11133-11132", "11112-11123-11123-11112", id="unlinked-groups-part"),
        pytest.param("11132-11134-11133", "11112-11114-11113", id="linked-groups-stay"),
        pytest.param("11134-11132", "11112-11112", id="strategy-reduced-to-what-is-shared"),
        pytest.param("11114-11113-11113-11112-11112", "11114-11113-11113-11112-11112", id="one-in-two-groups"),
        pytest.param("71213-71213", "71211-71211", id="filter-comes-with-the-weights"),
        pytest.param("71214-71114-71214", "71212-71112-71212", id="filter-of-weights-wins-over-tensor"),
        pytest.param("71113-71113", "71113-71113", id="filter-alone"),
        pytest.param("71114-81112", "71112-81112", id="inner-gate-of-short-and-long"),
        pytest.param("91211-92211-91211", "91211-91111-91211", id="memoryless-weights"),
    ],
)
def test_canonical_form(text, want):
    assert canonical(text) == want
    assert canonical(want) == want


def check_exhaustively(classes, depth):
    """Hold every valid genome of the classes against the naive decoder; return the numbers of genomes and networks."""
    livs = [LIVGenes(*genes) for genes in itertools.product(classes, (1, 2), (1, 2), (1, 2), (1, 2, 3, 4))]
    form_of, count = {}, 0
    for chosen in itertools.product(livs, repeat=depth):
        genome = Genome(chosen)
        if not validate(genome):
            count += 1
            network, form = naive.network(rows(genome)), genome.canonical()
            assert form_of.setdefault(network, form) == form, "two forms of one network"
    assert all(naive.network(rows(form)) == network for network, form in form_of.items()), "form of another network"
    assert len({form.hash for form in form_of.values()}) == len(form_of), "one hash for two networks"
    return count, len(form_of)


# Weights and each of the two groups of tensors can be shared by none, one of 3 pairs, or all of 3 LIVs. Convolutions
# share the filter as a tensor only where no weights are shared.
@pytest.mark.parametrize(("liv_class", "expected"), [(1, 5 * 5 * 5), (7, 5 * 5 + 4 * 5)])
def test_every_genome_of_one_class_and_depth_3(liv_class, expected):
    assert check_exhaustively([liv_class], 3) == (32**3, expected)


def test_every_genome_of_mixed_classes_and_depth_2():
    count, networks = check_exhaustively([1, 3, 7, 8, 9, 16], 2)
    assert count > 10 * networks
    # Of 36 pairs of classes: SA-1 or SA-3 twice, weights x k x v; a convolution twice, weights and B, or K and B;
    # GMemless twice, weights; GConv-1 and GConv-2 share B; all others nothing.
    assert networks == 2 * 2 * 2 * 2 + 3 * (2 + 4) + 2 + 2 * 2 + (36 - 8)


@settings(max_examples=200, deadline=None)
@given(genomes(3, 6, classes=(2, 7)) | genomes(3, 6, classes=(8, 7, 5)) | genomes(3, 6))
def test_canonical_form_decodes_to_the_same_network(genome):
    form = genome.canonical()
    assert naive.network(rows(form)) == naive.network(rows(genome))
    assert validate(form) == []
    assert form.canonical() is form
    assert form.sharing() == genome.sharing()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_same_hash_if_and_only_if_same_network(data):
    """Pairs that differ by little: labels exchanged, or one gene changed, so that equal networks are frequent."""
    a = data.draw(genomes(3, 6, classes=data.draw(st.sampled_from([(1,), (7,), (7, 8), (5, 14), tuple(POOL)]))))
    names = data.draw(st.permutations(range(1, len(a) + 1)))
    b = Genome(
        tuple(
            LIVGenes(c, names[f % len(a)], fs, names[t % len(a)], ts)
            for c, f, fs, t, ts in (liv.as_tuple() for liv in a.livs)
        )
    )
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(a) - 1))
        gene = data.draw(
            st.sampled_from(["featurizer_group", "featurizer_strategy", "feature_group", "feature_strategy"])
        )
        b = b.with_gene(position, gene, data.draw(st.integers(1, 2)))
    if naive.valid(rows(b)):
        assert (a.hash == b.hash) == (naive.network(rows(a)) == naive.network(rows(b)))


@settings(deadline=None)
@given(genomes(1, 6))
def test_sharing_is_what_the_naive_decoder_says(genome):
    sharing = genome.sharing()
    for position, (_, groups) in enumerate(naive.network(rows(genome))):
        for name, expression in groups:
            if name in ("q", "x", "v", "gate") and not (
                name == "v" and genome.livs[position].liv_class in naive.ATTENTION
            ):
                assert expression[0] == sharing.featurizer_source[position]
            source = sharing.tensor_source[position].get(name, position)
            assert expression[-1] == source
            assert source <= position
    assert all(
        name in dict(groups)
        for (_, groups), plan in zip(naive.network(rows(genome)), sharing.tensor_source, strict=True)
        for name in plan
    )


def test_shared_weights_mean_one_filter():
    sharing = Genome.parse("81211-71111-81211-81113").sharing()
    assert sharing.featurizer_source == (0, 1, 0, 3)
    assert sharing.tensor_source == ({}, {}, {"K": 0}, {})


def test_hash_is_stable():
    """Results on disk are found by it: a change here orphans them."""
    assert Genome.parse("21211-31112-21221-32112").hash == "c9d54e6f0bc350f2"
    assert re.fullmatch("[0-9a-f]{16}", Genome.parse("10.1.1.2.1-9.1.1.1.1").hash)


@given(raw_genomes(1, 4))
def test_invalid_genome_has_no_network(genome):
    if not validate(genome):
        return
    with pytest.raises(ValueError, match=re.escape(f"genome {genome} is not valid")):
        genome.canonical()
    with pytest.raises(ValueError, match="is not valid"):
        _ = genome.hash
    with pytest.raises(ValueError, match="is not valid"):
        genome.sharing()
