"""The baselines: what they are made of, at every depth."""

import pytest

from star_core.genome import BASELINES, POOL, gqa_transformer_pp, lfm2, striped_mamba, transformer_pp, validate


def names(genome):
    return [POOL[liv.liv_class].name for liv in genome.livs]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("depth", [2, 3, 4, 8, 24, 25, 48])
def test_baseline_is_mixers_and_swiglu_in_turn(name, depth):
    genome = BASELINES[name](depth)
    assert len(genome) == depth
    assert validate(genome) == []
    assert genome.canonical() is genome
    assert set(names(genome)[1::2]) == {"GMemless"}
    assert "GMemless" not in names(genome)[::2]


def test_baselines_are_named_as_in_tables_and_differ():
    assert list(BASELINES) == ["Transformer++", "GQA Transformer++", "StripedMamba", "LFM2-like"]
    assert len({baseline(8).hash for baseline in BASELINES.values()}) == 4


def test_transformers_have_one_kind_of_attention():
    assert str(transformer_pp(4)) == "11111-91111-11111-91111"
    assert str(gqa_transformer_pp(5)) == "31111-91111-31111-91111-31111"


@pytest.mark.parametrize(
    ("depth", "attentions"), [(2, []), (4, [1]), (6, [1]), (8, [2]), (12, [3]), (24, [3, 9]), (48, [3, 9, 15, 21])]
)
def test_striped_mamba_has_attention_in_one_of_six_mixers(depth, attentions):
    mixers = names(striped_mamba(depth))[::2]
    assert [index for index, name in enumerate(mixers) if name == "SA-1"] == attentions
    assert set(mixers) <= {"SA-1", "Rec-1"}


@pytest.mark.parametrize(
    ("depth", "attentions"), [(2, []), (4, [1]), (6, [2]), (8, [3]), (12, [2, 4]), (32, [2, 5, 8, 10, 12, 14])]
)
def test_lfm2_has_attention_where_the_published_model_has(depth, attentions):
    mixers = names(lfm2(depth))[::2]
    assert [index for index, name in enumerate(mixers) if name == "SA-3"] == attentions
    assert set(mixers) <= {"SA-3", "GConv-1"}


@pytest.mark.parametrize("baseline", BASELINES.values())
def test_baseline_refuses_a_depth_without_room_for_both(baseline):
    with pytest.raises(ValueError, match="depth: is 1, needs at least 2 LIVs, a mixer and a SwiGLU"):
        baseline(1)
    with pytest.raises(TypeError, match="depth: needs an int, got float"):
        baseline(4.0)
