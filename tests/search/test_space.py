"""Genomes as a parameter: always valid, deterministic, hashed by the network they stand for."""

import hashlib
import pickle
from dataclasses import replace
from itertools import pairwise

import nevergrad as ng
import numpy as np
import pytest

from search.evolution import NSGA2
from search.space import GenomeParameter, bounds_of
from star_core.genome import MUTATIONS, POOL, Genome, LIVGenes, SizeGenes, transformer_pp, validate


def make(depth: int = 8, classes=None, seed: int = 0, **rates) -> GenomeParameter:
    parameter = GenomeParameter(depth, classes, **rates)
    parameter.random_state = np.random.RandomState(seed)
    return parameter


def breed(first: GenomeParameter, second: GenomeParameter) -> GenomeParameter:
    child = first.spawn_child()
    child.recombine(second)
    child.mutate()
    return child


@pytest.mark.parametrize(
    ("depth", "classes"),
    [(1, None), (2, None), (8, None), (24, None), (8, (1, 9)), (8, (4, 12, 9, 7)), (6, (9,)), (6, (5,))],
    ids=str,
)
def test_whatever_is_bred_is_valid_and_keeps_to_the_classes(depth, classes):
    parameter = make(depth, classes, mutation_rate=0.1)
    family = [parameter.sample() for _ in range(10)]
    for i in range(150):
        child = breed(family[i % 10], family[(i * 7 + 1) % 10])
        for genome in (family[i % 10].value, child.value):
            assert validate(genome) == []
            assert len(genome) == depth
            assert {liv.liv_class for liv in genome.livs} <= set(classes or POOL)
        family[i % 10] = child


def test_every_class_and_some_sharing_turn_up_in_what_is_sampled_and_in_what_is_bred():
    parameter = make(10)
    bred = family = [parameter.sample() for _ in range(60)]
    for _ in range(5):
        bred = [breed(bred[i], bred[i - 1]) for i in range(60)]
    for genomes in ([p.value for p in family], [p.value for p in bred]):
        assert {liv.liv_class for genome in genomes for liv in genome.livs} == set(POOL)
        sharing = [genome.sharing() for genome in genomes]
        assert any(source != i for plan in sharing for i, source in enumerate(plan.featurizer_source))
        assert any(sources for plan in sharing for sources in plan.tensor_source)


def test_sampling_leaves_the_template_alone():
    parameter = make(3, (2, 5))
    assert str(parameter.value) == "21111-21111-21111"
    parameter.freeze()
    assert parameter.sample().value != parameter.sample().value
    assert str(parameter.value) == "21111-21111-21111"


def test_child_mixes_its_parents():
    parameter = make(12, mutation_rate=0.0, copy_rate=0.0)
    first = parameter.spawn_child(new_value=Genome((LIVGenes(1),) * 12))
    second = parameter.spawn_child(new_value=Genome((LIVGenes(9),) * 12))
    for _ in range(30):
        child = first.spawn_child()
        child.recombine(second)
        classes = [liv.liv_class for liv in child.value.livs]
        assert set(classes) == {1, 9}
        assert sum(a != b for a, b in pairwise(classes)) <= 2  # two cuts
        child.mutate()  # at rate 0 one gene changes all the same
        assert sum(a != LIVGenes(b) for a, b in zip(child.value.livs, classes, strict=True)) == 1


def test_copying_spreads_livs_over_the_genome():
    parameter = make(12, mutation_rate=0.0, copy_rate=1.0)
    child = parameter.spawn_child(new_value=Genome.parse("-".join(f"{c}.{c}.2.{c}.1" for c in range(1, 13))))
    before = set(child.value.livs)
    child.mutate()
    assert len(set(child.value.livs)) <= 10
    assert len(set(child.value.livs) - before) <= 1  # the one gene that always changes
    assert validate(child.value) == []
    assert any(source != i for i, source in enumerate(child.value.sharing().featurizer_source))


def test_same_seed_breeds_the_same_genomes_and_another_seed_others():
    def lineage(seed: int) -> list[str]:
        parameter = make(seed=seed)
        a, b = parameter.sample(), parameter.sample()
        return [str(breed(a, b).value) for _ in range(5)]

    assert lineage(1) == lineage(1)
    assert lineage(1) != lineage(2)
    assert len(set(lineage(1))) > 1


def test_hash_is_that_of_the_network():
    parameter = make(4)
    written = parameter.spawn_child(new_value=Genome.parse("21211-31112-21221-32112"))
    canonical = parameter.spawn_child(new_value=written.value.canonical())
    assert written.get_value_hash() == canonical.get_value_hash() == written.value.hash
    assert parameter.sample().get_value_hash() != written.get_value_hash()
    assert str(written.value) == "21211-31112-21221-32112"  # kept as it was bred


def test_parents_are_remembered():
    parameter = make()
    first, second = parameter.sample(), parameter.sample()
    assert first.parent_hashes == ()
    child = breed(first, second)
    assert child.parent_hashes == (first.value.hash, second.value.hash)
    assert first.parent_hashes == ()
    assert breed(child, child).parent_hashes == (child.value.hash,)
    assert parameter.spawn_child(new_value=first.value).parent_hashes == ()
    assert child.spawn_child().parent_hashes == (child.value.hash,)


def test_repair_is_remembered_by_the_child_alone():
    parameter = make(2)
    # Label 1 means attention in one parent and a recurrence in the other: any exchange of one LIV mixes the classes.
    first = parameter.spawn_child(new_value=Genome.parse("11211-11211"))
    second = parameter.spawn_child(new_value=Genome.parse("51211-51211"))
    child = breed(first, second)
    assert child.repaired is True
    assert validate(child.value) == []
    assert (first.repaired, second.repaired) == (False, False)
    assert child.spawn_child().repaired is False
    alike = breed(first, first)
    assert alike.repaired is False


def test_told_candidates_are_frozen_and_their_children_are_not():
    parameter = make()
    parent = parameter.sample()
    parent.freeze()
    for change in (parent.mutate, lambda: parent.recombine(parameter.sample())):
        with pytest.raises(RuntimeError, match="Cannot modify frozen Parameter"):
            change()
    with pytest.raises(RuntimeError, match="Cannot modify frozen Parameter"):
        parent.value = parameter.value
    before = parent.value
    assert breed(parent, parameter.sample()).value != before
    assert parent.value == before


def test_a_pickled_candidate_keeps_what_it_knows():
    parameter = make()
    child = breed(parameter.sample(), parameter.sample())
    copy = pickle.loads(pickle.dumps(child))
    assert (copy.value, copy.uid, copy.parent_hashes, copy.repaired) == (
        child.value,
        child.uid,
        child.parent_hashes,
        child.repaired,
    )


def test_search_from_suggested_baselines_never_asks_a_network_twice():
    parameter = make(6, (1, 3, 7, 9))
    optimizer = NSGA2(parameter, num_objectives=2, population_size=8)
    optimizer.suggest(transformer_pp(6))
    asked = [optimizer.ask()]
    assert asked[0].value == transformer_pp(6)
    for _ in range(200):
        genome = asked[-1].value
        shared = sum(source != i for i, source in enumerate(genome.sharing().featurizer_source))
        optimizer.tell(asked[-1], [sum(liv.liv_class for liv in genome.livs) - shared, float(shared)])
        asked.append(optimizer.ask())
    assert len({candidate.value.hash for candidate in asked}) == 201
    assert optimizer.counters.repaired_share > 0
    known = {candidate.value.hash for candidate in asked}
    assert all(
        len(candidate.parent_hashes) == 2 and known.issuperset(candidate.parent_hashes) for candidate in asked[40:]
    )


def test_a_space_of_a_few_networks_is_searched_to_the_end():
    optimizer = NSGA2(make(1, (1, 5, 9)), num_objectives=1, population_size=4)
    asked = []
    for _ in range(3):
        asked.append(optimizer.ask())
        optimizer.tell(asked[-1], 1.0)
    with pytest.raises(ng.errors.NevergradEarlyStopping, match="the space is used up"):
        optimizer.ask()
    assert sorted(str(candidate.value.canonical()) for candidate in asked) == ["11111", "51111", "91111"]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("11111-11111", TypeError, "value: need a Genome, got str"),
        (Genome.parse("11111"), ValueError, "value: need 2 LIVs, got 1 in 11111"),
        (Genome.parse("11111-61111"), ValueError, r"value: need LIV classes from \[1, 5, 9\], got \[6\]"),
        (Genome.parse("11211-51211"), ValueError, "LIV 1: Rec-1 cannot share featurizer weights with LIV 0"),
    ],
)
def test_a_value_outside_the_space_fails_clearly(value, error, message):
    parameter = make(2, (5, 1, 9))
    child = parameter.spawn_child()
    before = child.value
    with pytest.raises(error, match=message):
        child.value = value
    assert child.value == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": 0}, ValueError, "depth: need 1 or more, got 0"),
        ({"depth": 2.0}, TypeError, "depth: need an int, got float"),
        ({"depth": True}, TypeError, "depth: need an int, got bool"),
        ({"depth": 2, "classes": ()}, ValueError, r"classes: need different numbers from 1 to 17, got \(\)"),
        ({"depth": 2, "classes": (1, 18)}, ValueError, r"classes: need different numbers from 1 to 17, got \(1, 18\)"),
        ({"depth": 2, "classes": (1, 1)}, ValueError, r"classes: need different numbers from 1 to 17, got \(1, 1\)"),
        ({"depth": 2, "classes": ("1",)}, TypeError, "classes: need an int, got str"),
        ({"depth": 2, "mutation_rate": 1.5}, ValueError, "mutation_rate: need a probability from 0 to 1, got 1.5"),
        (
            {"depth": 2, "mutation_rate": float("nan")},
            ValueError,
            "mutation_rate: need a probability from 0 to 1, got nan",
        ),
        ({"depth": 2, "mutation_rate": "high"}, TypeError, "mutation_rate: need a number, got str"),
        ({"depth": 2, "copy_rate": -0.1}, ValueError, "copy_rate: need a probability from 0 to 1, got -0.1"),
    ],
)
def test_bad_construction_fails_clearly(arguments, error, message):
    with pytest.raises(error, match=message):
        GenomeParameter(**arguments)


def asked_texts() -> list[str]:
    parameter = make(8, seed=5)
    optimizer = NSGA2(parameter, num_objectives=2, population_size=8)
    texts = []
    for index in range(60):
        candidate = optimizer.ask()
        texts.append(f"{candidate.value} {candidate.value.hash} {candidate.parent_hashes} {candidate.repaired}")
        if index % 7:
            shared = sum(source != i for i, source in enumerate(candidate.value.sharing().featurizer_source))
            optimizer.tell(candidate, [sum(liv.liv_class for liv in candidate.value.livs) - shared, float(shared)])
        else:
            optimizer.discard(candidate)
    return texts


def test_the_papers_space_is_searched_as_of_old():
    """Recorded before there were other levels: a run folder of that time goes on as it would have."""
    digest = hashlib.sha256("\n".join(asked_texts()).encode()).hexdigest()
    assert digest[:32] == "e45771e5a84477b32c404ae3680d41fe"


# Above backbone level

SIZES = SizeGenes(width=64, head_dim=16)
BOUNDS = bounds_of(8, 64, 16, 128)


def deep(level: str = "featurizer", seed: int = 0, **options) -> GenomeParameter:
    return make(8, seed=seed, level=level, bounds=BOUNDS, **options)


def test_bounds_follow_the_settings():
    assert BOUNDS.depths == (4, 8)
    assert BOUNDS.widths == (32, 48)
    assert BOUNDS.head_dims == (8, 32)
    assert BOUNDS.windows == (8, 16, 32, 64)
    assert BOUNDS.sizes == SIZES
    assert bounds_of(2, 8, 2, 8) == replace(
        BOUNDS, depths=(2, 2), widths=(4, 6), head_dims=(4,), windows=(8,), sizes=SizeGenes(width=8, head_dim=2)
    )


@pytest.mark.parametrize("level", ["operator", "featurizer"])
def test_whatever_is_bred_above_backbone_level_is_valid_and_keeps_to_the_bounds(level):
    parameter = deep(level, mutation_rate=0.1)
    family = [parameter.sample() for _ in range(10)]
    extended = resized = 0
    for i in range(150):
        child = breed(family[i % 10], family[(i * 7 + 1) % 10])
        genome = child.value
        assert validate(genome, SIZES) == []
        assert 4 <= len(genome) <= 8
        assert genome.sizes.width in (None, 32, 48)
        assert child.mutations
        assert set(child.mutations) <= set(MUTATIONS[level])
        extended += any(liv.extension for liv in genome.livs)
        resized += genome.sizes != SizeGenes()
        assert level == "featurizer" or not any(liv.extension.groups for liv in genome.livs if liv.extension)
        family[i % 10] = child
    assert extended > 75
    assert resized > 30


def test_classes_are_kept_to_above_backbone_level():
    parameter = deep("operator", classes=(1, 9))
    drawn = parameter.sample()
    for _ in range(60):
        drawn = breed(drawn, parameter.sample())
        assert {liv.liv_class for liv in drawn.value.livs} <= {1, 9}


def test_same_seed_and_results_breed_the_same_genomes():
    def history(seed: int, order: int) -> list[str]:
        parameter = deep(seed=seed)
        optimizer = NSGA2(parameter, num_objectives=2, population_size=8)
        texts = []
        for _ in range(6):
            asked = [optimizer.ask() for _ in range(8)]
            texts += [f"{candidate.value} {candidate.mutations}" for candidate in asked]
            for candidate in asked[::order]:
                if candidate.value.hash[0] == "0":
                    optimizer.discard(candidate)
                    candidate.learn_outcome(False)
                else:
                    depth = len(candidate.value)
                    optimizer.tell(candidate, [float(int(candidate.value.hash[:6], 16)), float(depth)])
                    candidate.learn_outcome(True)
        assert parameter.choice is not None
        texts.append(str(parameter.choice.tallies()))
        return texts

    assert history(1, 1) == history(1, 1) == history(1, -1)
    assert history(1, 1) != history(2, 1)


def test_mutations_that_pay_are_drawn_more_often():
    parameter = deep(seed=3)
    optimizer = NSGA2(parameter, num_objectives=1, population_size=8)
    losses: dict[str, float] = {}
    for _ in range(250):
        candidate = optimizer.ask()
        before = min((losses[parent] for parent in candidate.parent_hashes), default=0.0)
        losses[candidate.value.hash] = before - 1.0 if "residual" in candidate.mutations else before + 1.0
        optimizer.tell(candidate, losses[candidate.value.hash])
        candidate.learn_outcome(True)
    tallies = parameter.choice.tallies()
    assert sum(tally.probability for tally in tallies.values()) == pytest.approx(1.0)
    assert tallies["residual"].reward > 0.8
    others = [tally for name, tally in tallies.items() if name != "residual"]
    assert tallies["residual"].probability > 1.3 * max(tally.probability for tally in others)


def test_nothing_is_learned_at_backbone_level():
    parameter = make(4)
    child = breed(parameter.sample(), parameter.sample())
    assert child.mutations == ()
    assert parameter.choice is None
    child.learn_outcome(True)


def test_only_what_was_told_has_succeeded():
    child = breed(deep().sample(), deep().sample())
    with pytest.raises(RuntimeError, match="No loss"):
        child.learn_outcome(True)


def test_sizes_that_the_model_has_anyway_are_not_written():
    parameter = deep()
    child = parameter.spawn_child(new_value=Genome.parse("width=64,head_dim=16;" + str(transformer_pp(8))))
    assert child.value == transformer_pp(8)
    same = GenomeParameter(8, level="operator", bounds=replace(BOUNDS, widths=(32, 64), head_dims=(16, 8)))
    assert same.bounds.widths == (32,)
    assert same.bounds.head_dims == (8,)


@pytest.mark.parametrize(
    ("make_one", "value", "message"),
    [
        (lambda: make(2), Genome.parse("11111-11111[window=3]"), "need the paper's genes alone at level backbone"),
        (lambda: make(2), Genome.parse("width=32;11111-11111"), "need the paper's genes alone at level backbone"),
        (deep, Genome.parse("11111-91111"), "value: need 4 to 8 LIVs, got 2"),
        (deep, Genome.parse("-".join(["11111[head_dim=6]"] * 4)), "does not fit: LIV 0: width is 64; needs a multiple"),
        (lambda: make(2, level="genes"), None, "level: is 'genes', needs one of backbone, operator, featurizer"),
        (lambda: make(3, level="operator", bounds=BOUNDS), None, "depth: need 4 to 8, as bounds.depths says, got 3"),
    ],
)
def test_what_is_outside_the_space_of_a_level_fails_clearly(make_one, value, message):
    with pytest.raises(ValueError, match=message):
        make_one().spawn_child(new_value=value)
