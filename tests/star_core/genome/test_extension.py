"""Genes beyond the paper's: text, canonical form, validity and repair of extensions and sizes."""

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from star_core.genome import (
    FEATURIZERS,
    POOL,
    Bounds,
    Extension,
    FeatureGroup,
    Genome,
    LIVGenes,
    OperatorGenome,
    Residual,
    SizeGenes,
    describe,
    gene_values,
    random_genome,
    repair,
    validate,
)
from star_core.genome.extension import NO_SIZES

SIZES = SizeGenes(width=32, head_dim=8)
BOUNDS = Bounds(depths=(2, 5), widths=(64,), head_dims=(4, 16), windows=(3, 4, 8), sizes=SIZES)
seeds = st.integers(0, 2**32 - 1)


def drawn(seed, level="featurizer"):
    return random_genome(np.random.default_rng(seed), 4, level=level, bounds=BOUNDS)


@st.composite
def raw_extensions(draw):
    """Extensions of any genes, mostly ones that no layer can serve."""
    maybe = st.none()
    operator = draw(maybe | st.builds(OperatorGenome, *(st.integers(1, most) for most in (9, 4, 2, 4, 3))))
    known = st.sampled_from(["q", "k", "v", "z", "x", "B", "K", "gate", "value"])
    names = draw(st.lists(known, unique=True, max_size=3))
    numbers = [st.integers(1, most) for most in (4, 2, 4, 3, 4, 4)]
    groups = tuple(FeatureGroup(name, *(draw(number) for number in numbers)) for name in names)
    window, taps, head_dim = (draw(maybe | st.integers(1, 9)) for _ in range(3))
    return Extension(operator, groups, window, taps, head_dim, draw(maybe | st.sampled_from(Residual)))


@st.composite
def raw_genomes(draw):
    labels = st.integers(1, 2)
    liv = st.builds(
        LIVGenes,
        st.sampled_from([1, 3, 5, 7, 8, 9, 10, 18]),
        labels,
        st.integers(1, 3),
        labels,
        st.integers(1, 5),
        st.none() | raw_extensions(),
    )
    sizes = st.builds(SizeGenes, *(st.none() | st.sampled_from(values) for values in ((32, 48, 7), (1, 2), (8, 16, 5))))
    return Genome(tuple(draw(st.lists(liv, min_size=1, max_size=5))), draw(sizes))


EXAMPLES = [
    "21211[operator=12113,q=111211,window=64,residual=3]-91111",
    "width=128,ffn=2;21211[operator=12113]-91111",
    "width=64,ffn=4,head_dim=16;91111",
    "51111[B=3.2.1.2.32.1,C=3.2.1.2.32.1,dt=321221,taps=3]",
    "10.1.1.1.1[operator=91142]-9.1.1.1.1[gate=111221,value=111221]",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_text_reads_and_writes(text):
    genome = Genome.parse(text)
    assert str(genome) == text
    assert pickle.loads(pickle.dumps(genome)) == genome


@settings(max_examples=150, deadline=None)
@given(raw_genomes())
def test_any_text_reads_back(genome):
    assert Genome.parse(str(genome)) == genome


def test_parts_are_read_in_any_order_and_an_empty_extension_is_none():
    genome = Genome.parse("11111[residual=1,v=111214,window=9,k=111214,operator=12123]")
    assert str(genome) == "11111[operator=12123,k=111214,v=111214,window=9,residual=1]"
    assert LIVGenes(1, extension=Extension()) == LIVGenes(1)
    assert LIVGenes(1, extension=Extension()).extension is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("11111[window=3", "LIV 0 (from 0) of the genome is '11111[window=3': needs ']' after its extension"),
        ("91111-11111[]", "the extension of LIV 1 (from 0) of the genome, '': needs a name, '=' and numbers"),
        ("11111[window]", "the extension of LIV 0 (from 0) of the genome, 'window': needs a name"),
        ("11111[window=3,window=4]", "'window=4': twice the same name"),
        ("11111[window=0]", "window of the extension of LIV 0 (from 0) of the genome is '0': needs a whole number"),
        ("11111[residual=5]", "residual: is 5, needs 1 to 4"),
        ("11111[q=11121]", "feature group 'q' of the extension of LIV 0 (from 0) of the genome is '11121': needs 6"),
        ("11111[operator=1212]", "operator genome is '1212': needs 5 genes"),
        ("11111[q2=111211]", "feature group name: is 'q2', needs letters alone"),
        ("depth=3;11111", "the genome's sizes: there is no 'depth', needs one of width, ffn, head_dim"),
        ("width=a;11111", "width of the genome's sizes is 'a': needs a whole number from 1"),
        (";11111", "the genome's sizes, '': needs a name, '=' and numbers, such as 'width=128'"),
    ],
)
def test_bad_text_is_refused_in_words(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Genome.parse(text)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Extension(operator="12123"), TypeError, "operator: needs an OperatorGenome, got str"),
        (lambda: Extension(groups=("q",)), TypeError, "groups: needs FeatureGroups, got str"),
        (lambda: Extension(groups=(FEATURIZERS[1]["q"],) * 2), ValueError, "groups: names are .* need to differ"),
        (lambda: Extension(window=0), ValueError, "window: is 0, needs a whole number from 1"),
        (lambda: Extension(taps=2.0), TypeError, "taps: needs an int, got float"),
        (lambda: LIVGenes(1, extension="window=3"), TypeError, "extension: needs an Extension, got str"),
        (lambda: SizeGenes(width=0), ValueError, "width: is 0, needs a whole number from 1"),
        (lambda: Genome((LIVGenes(1),), sizes="width=3"), TypeError, "sizes: needs SizeGenes, got str"),
        (lambda: Bounds(depths=(3, 2)), ValueError, r"depths: are \(3, 2\), need the least and the most"),
        (lambda: Bounds(widths=(0,)), ValueError, "widths: is 0, needs a whole number from 1"),
    ],
)
def test_bad_parts_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        pytest.param("11111[operator=12123]", "11111", id="operator-of-the-class"),
        pytest.param("11111[operator=54111]", "51111", id="operator-of-another-class"),
        pytest.param("10.1.1.1.1[operator=73111]", "16.1.1.1.1", id="differential-stays"),
        pytest.param("11111[k=111214,v=111214]", "31111", id="groups-of-another-class"),
        pytest.param("71111[K=311111]", "81111", id="implicit-filter"),
        pytest.param("31111[operator=12123]", "11111", id="operator-brings-its-featurizer"),
        pytest.param("11111[window=9]", "11111", id="window-without-band"),
        pytest.param("11111[operator=12223,window=64]", "11111[operator=12223]", id="window-as-usual"),
        pytest.param("11111[taps=3]-21111[taps=4]", "11111-21111", id="taps-without-convolution-or-as-usual"),
        pytest.param("21111[taps=3]", "21111[taps=3]", id="taps"),
        pytest.param("71111[head_dim=4]", "71111", id="heads-without-heads"),
        pytest.param("head_dim=4;11111[head_dim=4]", "head_dim=4;11111", id="heads-of-the-model"),
        pytest.param("11111[residual=1]", "11111", id="pre-norm"),
        pytest.param("ffn=2,head_dim=4;71111", "71111", id="sizes-that-nothing-uses"),
        pytest.param("ffn=2;91111[gate=111221,value=111221]", "91111[gate=111221,value=111221]", id="own-ratio"),
        pytest.param(
            "12211[operator=12133]-12221[operator=32133,k=111211,v=111211]",
            "11211[operator=12133]-11211[operator=12133]",
            id="shared-weights-of-one-class-written-twice",
        ),
    ],
)
def test_canonical_form(text, want):
    genome = Genome.parse(text)
    assert str(genome.canonical()) == want
    assert genome.hash == Genome.parse(want).hash


@settings(max_examples=150, deadline=None)
@given(seeds, st.sampled_from(["operator", "featurizer"]))
def test_random_genomes_have_one_valid_canonical_form(seed, level):
    genome = drawn(seed, level)
    assert validate(genome, SIZES) == []
    assert drawn(seed, level) == genome
    form = genome.canonical()
    assert validate(form, SIZES) == []
    assert form.canonical() == form
    assert form.hash == genome.hash
    assert form.sharing() == genome.sharing()
    assert [cls.family for cls in form.classes] == [cls.family for cls in genome.classes]
    assert describe(genome) == describe(form)


def test_every_class_of_the_pool_is_the_class_of_its_operator():
    for cls in POOL.values():
        base = 10 if cls.differential else 1
        genome = Genome((LIVGenes(base, extension=Extension(operator=cls.operator)),))
        assert genome.canonical() == Genome((LIVGenes(cls.id),))
        assert genome.classes == (cls,)


@pytest.mark.parametrize(
    ("text", "position", "gene", "message"),
    [
        (
            "11111[operator=11123]",
            0,
            "operator",
            "there is no layer with the token mixing of 11123 on the groups q, k, v",
        ),
        ("91111-51111[operator=54113]", 1, "operator", "channel_mixing of Rec is 3; needs 1 (diagonal)"),
        ("11111[operator=14123]", 0, "operator", "nonlinearity of GLA is 2; needs 1 (none)"),
        ("71111[operator=73211]", 0, "operator", "sparsity of GConv is 2; needs 1 (none)"),
        ("31111[operator=32122]", 0, "operator", "repeat of k is 4; needs 1, as there is one head"),
        ("11111[K=321131]", 0, "K", "attention has no feature group 'K'; needs one of q, k, v"),
        ("11111[z=111211]", 0, "z", "attention has no feature group 'z'"),
        ("11111[q=121211]", 0, "q", "token mixing and sparsity of q are 12; needs 11 or 32"),
        ("71111[v=112211]", 0, "v", "nonlinearity of v is 2; needs 1 (none), 3 (relu) or 4 (swish)"),
        ("51111[z=111121]", 0, "z", "channel mixing of z is 1; needs 2 (dense)"),
        ("11111[q=111221]", 0, "q", "expansion of q is 2; needs 1, as of k"),
        ("71111[K=321111]", 0, "K", "expansion of K is 1; needs 2 to 64"),
        ("71111[K=311121]", 0, "K", "expansion of K is 2; needs 1"),
        ("11111[k=111214]", 0, "k", "repeat of k is 4; needs 1, as of v"),
        ("11111[q=111212]", 0, "q", "repeat of q is 2; needs 1"),
        ("11111[k=111312,v=111212]", 0, "k", "repeat of k is 2; needs 1, or the dense channel mixing 2"),
        ("11111[operator=12121,q=112211]", 0, "q", "nonlinearity of q is 2 (softmax); needs another one"),
        ("11111[head_dim=7]", 0, "head_dim", "head_dim is 7; needs an even number"),
        ("11111[residual=4]", 0, "residual", "residual is 4 (parallel); needs 1 to 3, as there is no next LIV"),
        ("width=32,head_dim=8;11111[head_dim=12]", 0, "head_dim", "width is 32; needs a multiple of head_dim = 12"),
        ("width=16,head_dim=8;31111", 0, "liv_class", "repeat of k is 4; needs a divisor of 2 heads"),
        ("width=32,head_dim=8;11111[k=111218,v=111218]", 0, "k", "repeat of k is 8; needs a divisor of 4 heads"),
        ("width=32,head_dim=8;71111[K=321133]", 0, "K", "repeat of K is 3; needs a divisor of 32 channels"),
        ("head_dim=7;91111", -1, "head_dim", "head_dim is 7; needs an even number"),
        ("width=30,head_dim=8;91111", -1, "width", "width is 30; needs a multiple of head_dim = 8"),
        (
            "11211-11211[operator=12223]",
            1,
            "featurizer_group",
            "SA[operator=12223] cannot share featurizer weights with LIV 0, SA-1, under label 1",
        ),
        (
            "11114-11114[operator=12233]",
            1,
            "feature_group",
            "needs k of one form, and has a window of 64 tokens against the usual one",
        ),
        ("11114-11114[operator=14113]", 1, "feature_group", "needs another linear attention"),
        ("51114-51113[C=321221]", 1, "feature_group", "expansion of C is 2; needs 16, as of B"),
    ],
)
def test_violation_says_where_and_why(text, position, gene, message):
    violation = validate(Genome.parse(text))[0]
    if message.startswith("expansion of C"):
        gene = "C"  # the LIV's own fault comes before what it shares
    assert (violation.position, violation.gene) == (position, gene)
    assert message in violation.message


@pytest.mark.parametrize(
    "text",
    [
        "11114-11114[operator=12133]-11112[operator=12143,q=321211]",  # keys are keys, whatever is done with them
        "11112[operator=12233,window=8]-11112[operator=12223,window=8]",
        "11112[operator=12113]-21112[operator=24113]",
        "11211[operator=12133]-11211[operator=12143]",  # one featurizer for two nonlinearities
        "71112-71112[K=321151]",
        "11111[residual=4]-91111[residual=4]-91111",
    ],
)
def test_valid(text):
    assert validate(Genome.parse(text), SIZES) == []


def test_sizes_of_the_model_are_no_part_of_the_genome():
    genome = Genome.parse("31111-11111[head_dim=16]")
    assert validate(genome) == []
    assert [v.gene for v in validate(genome, SizeGenes(width=16, head_dim=8))] == ["liv_class"]
    assert validate(genome, SIZES) == []
    assert gene_values(genome, 0, "liv_class", SizeGenes(width=24, head_dim=24)) == (
        1,
        2,
        *range(5, 12),
        *range(14, 18),
    )


@settings(max_examples=200, deadline=None)
@example(Genome.parse("11122-11122[head_dim=8]"), 0, SIZES)  # heads alike by the model's sizes alone
@example(Genome.parse("width=48;11311-31211-31311"), 0, SIZES)  # more LIVs than one fit no width of the genome's own
@given(raw_genomes(), seeds, st.sampled_from([None, SIZES]))
def test_repair_mends_and_is_idempotent(genome, seed, sizes):
    mended = repair(genome, np.random.default_rng(seed), sizes)
    assert validate(mended, sizes) == []
    assert repair(mended, np.random.default_rng(seed + 1), sizes) is mended
    assert repair(genome, np.random.default_rng(seed), sizes) == mended
    mended.canonical()
    blamed = {violation.position for violation in validate(genome, sizes)}
    if genome.sizes == NO_SIZES:
        # What was in order before the others were mended stays, unless the others now stand in its way.
        kept = [p for p, liv in enumerate(genome.livs) if mended.livs[p] == liv]
        assert set(range(len(genome))) - blamed - set(kept) == set() or len(blamed) > 0


def test_repair_redraws_the_gene_alone():
    genome = Genome.parse("11111[operator=12223,window=9]-91111[residual=4]")
    (position,) = {violation.position for violation in validate(genome)}
    mended = repair(genome, np.random.default_rng(0))
    assert position == 1
    assert mended.livs[0] == genome.livs[0]
    assert replace(mended.livs[1], extension=None) == LIVGenes(9)
    drawn_residuals = {str(repair(genome, np.random.default_rng(seed)).livs[1].extension) for seed in range(30)}
    assert drawn_residuals == {"residual=1", "residual=2", "residual=3"}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("11111[operator=12223,q=121211,window=9]", "11111[operator=12223,window=9]"),
        ("11111[operator=11123,q=321211,residual=3]", "11111[q=321211,residual=3]"),
        ("11111[k=111214,q=321211]", "11111[q=321211]"),
        ("11111[head_dim=7,window=3]", "11111[window=3]"),
        ("31111[operator=32122,taps=3]", "31111[taps=3]"),
        ("11111[q=111221,k=111221,operator=54111]", "11111[operator=54111]"),
        ("width=36,head_dim=8;11111[window=3]", "head_dim=8;11111[window=3]"),
    ],
)
def test_repair_drops_what_no_layer_can_serve_and_keeps_the_rest(text, want):
    assert str(repair(Genome.parse(text), np.random.default_rng(0))) == want


def test_repair_refuses_sizes_that_no_genome_fits():
    with pytest.raises(ValueError, match=r"sizes: no genome is valid with .*: width is 30; needs a multiple of"):
        repair(Genome.parse("11111"), np.random.default_rng(0), SizeGenes(width=30, head_dim=8))


def test_description_names_own_classes():
    lines = describe(Genome.parse("11114-11114[operator=12133]-91111[residual=2]")).split("\n")
    assert lines[2] == "  1  ReLU-SA[operator=12133] k and v of LIV 0"
    assert lines[3] == "  2  GMemless"
