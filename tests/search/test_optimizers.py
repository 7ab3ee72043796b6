"""Every optimizer is asked and told alike; random search and the genetic algorithm do what they say."""

from __future__ import annotations

from pathlib import Path

import nevergrad as ng
import numpy as np
import pytest

from search import nsga2, run
from search.ask_tell import AskTell
from search.evaluation import Status
from search.evolution import NSGA2
from search.optimizers import GeneticAlgorithm, Nevergrad, RandomSearch, make_optimizer
from search.report_data import follow_progress, read_run
from search.settings import SettingsError
from search.store import Store, write_json
from star_core.genome import transformer_pp
from tests.search.fake_workers import DEPTH, FakeWorkers, fake_search, fake_settings
from tests.search.test_evolution import Word, word_losses
from tests.search.test_run import PLAIN

ALL = ("nsga2", "random", "ga", "RecMixES", "ES", "RecMutDE")


def optimizer_of(name: str, seed: int = 0) -> AskTell:
    return make_optimizer(fake_settings(optimizer=name, seed=seed))


def losses_of(genome_hash: str) -> list[float]:
    return [1 + int(genome_hash[i : i + 4], 16) / 2**16 for i in (0, 4, 8)]


def generation(optimizer: AskTell, size: int = 8) -> list[str]:
    asked = [optimizer.ask() for _ in range(size)]
    for number, candidate in enumerate(asked):
        if number % 7 == 6:
            optimizer.discard(candidate)
        elif number % 5 == 4:
            optimizer.tell(candidate, None, 0.5)
        else:
            optimizer.tell(candidate, losses_of(candidate.value.hash))
    return [candidate.value.hash for candidate in asked]


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_asked_twice_whatever_becomes_of_it(name: str) -> None:
    optimizer = optimizer_of(name)
    start, known = transformer_pp(DEPTH), transformer_pp(DEPTH).with_gene(0, "liv_class", 7)
    optimizer.exclude([known])
    optimizer.suggest(start)
    asked = [genome_hash for _ in range(20) for genome_hash in generation(optimizer)]
    assert asked[0] == start.hash
    assert len(set(asked)) == len(asked) == 160
    assert known.hash not in asked
    counters = optimizer.counters
    assert (counters.asked, counters.told, counters.discarded, counters.in_flight) == (160, 140, 20, 0)
    told = [losses_of(h) for i, h in enumerate(asked) if i % 8 % 7 != 6 and i % 8 % 5 != 4]
    front = sorted(member.losses.tolist() for member in optimizer.front())
    assert front == sorted(np.array(told)[nsga2.non_dominated(told)].tolist())


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_asks_for_the_same(name: str) -> None:
    asked = [[generation(one) for one in [optimizer_of(name, seed)] for _ in range(12)] for seed in (3, 3, 4)]
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize("name", ["random", "ga", "RecMixES"])
def test_a_search_with_any_optimizer_spends_the_same_budget(tmp_path: Path, name: str) -> None:
    settings = fake_settings(optimizer=name, budget=("decode_ms_per_token<=1.5",))
    genomes = fake_search(tmp_path, settings)
    assert len(set(genomes)) == settings.population * settings.generations
    again = FakeWorkers()
    assert fake_search(tmp_path, settings, again) == genomes
    assert again.done == []


def words(optimizer: type[AskTell], seed: int = 0, **options: int) -> AskTell:
    parameter = Word()
    parameter.random_state = np.random.RandomState(seed)
    return optimizer(parameter, **{"num_objectives": 2, "population_size": 16} | options)


def evolve(optimizer: AskTell, generations: int = 25) -> float:
    for _ in range(generations):
        asked = [optimizer.ask() for _ in range(16)]
        for candidate in asked:
            optimizer.tell(candidate, word_losses(candidate.value, 2))
    return nsga2.hypervolume([member.losses for member in optimizer.front()], [60.0, 60.0])


def test_a_genetic_algorithm_gets_closer_than_random_search_does() -> None:
    assert evolve(words(GeneticAlgorithm)) > 1.1 * evolve(words(RandomSearch))
    assert words(RandomSearch).counters.bred == 0


def test_a_generation_is_bred_from_the_one_before_alone() -> None:
    optimizer = words(GeneticAlgorithm)
    before: set[str] = set()
    for number in range(6):
        asked = [optimizer.ask() for _ in range(16)]
        for candidate in asked:
            assert before.issuperset(candidate.parents_uids)
            assert bool(candidate.parents_uids) == (number > 0)
            optimizer.tell(candidate, word_losses(candidate.value, 2))
        before = {candidate.uid for candidate in asked}


def test_a_genetic_algorithm_chooses_the_better_average_rank() -> None:
    optimizer = words(GeneticAlgorithm, num_objectives=3)
    # Average ranks 1, 1, 2 and 2; then what breaks constraints, by how much.
    told = [([1.0, 1.0, 900.0], 0.0), ([2.0, 2.0, 0.0], 0.0), ([9.0, 0.0, 999.0], 0.0), ([3.0, 5.0, 1.0], 0.0)]
    told += [([0.0, 0.0, 0.0], 0.2), (None, 0.1)]
    asked = [optimizer.ask() for _ in range(16)]
    for candidate, (losses, violation) in zip(asked, told, strict=False):
        optimizer.tell(candidate, losses, violation)
    optimizer.ask()
    ranks = [np.searchsorted(sorted(column), column) for column in np.array([losses for losses, v in told if not v]).T]
    sums = np.sum(ranks, axis=0)
    assert optimizer._standing.tolist() == [*(int((sums < one).sum()) for one in sums), 5, 4]
    first = [nsga2.tournament_pair(optimizer._standing, np.zeros(6), optimizer._rng)[0] for _ in range(2000)]
    assert np.bincount(first, minlength=6)[4] == 0  # behind all others: it wins no tournament
    assert np.argsort(np.bincount(first, minlength=6))[-1] in np.flatnonzero(sums == sums.min())


@pytest.mark.parametrize("name", ALL)
def test_a_lower_tier_is_better_than_any_of_a_higher_one(name: str) -> None:
    optimizer = optimizer_of(name)
    asked = [optimizer.ask() for _ in range(8)]
    for number, candidate in enumerate(asked):
        tier = number % 2
        optimizer.tell(candidate, [9.0 - number] * 3, 0.5 if number == 6 else None, tier=tier)
    # Of tier 0, without a violation: 0, 2 and 4, of which the last is best in all.
    assert [member.candidate.uid for member in optimizer.front()] == [asked[4].uid]
    following = optimizer.ask()
    if isinstance(optimizer, GeneticAlgorithm):
        assert np.argsort(optimizer._standing).tolist() == [4, 2, 0, 6, 7, 5, 3, 1]
    if isinstance(optimizer, Nevergrad):
        answers = [optimizer._answers[candidate.get_value_hash()] for candidate in asked]
        assert np.argsort(answers).tolist() == [4, 2, 0, 6, 7, 5, 3, 1]
    if isinstance(optimizer, NSGA2):
        assert [member.rank for member in optimizer.population] == [2, 7, 1, 6, 0, 5, 3, 4]
    assert following.uid not in {candidate.uid for candidate in asked}


def test_a_generation_that_failed_is_sampled_again() -> None:
    optimizer = words(GeneticAlgorithm)
    for _ in range(20):
        optimizer.discard(optimizer.ask())
    assert optimizer.counters.bred == 0


def test_an_optimizer_that_is_stuck_says_so() -> None:
    optimizer = optimizer_of("RecMixES")
    stuck = optimizer.ask()
    optimizer.tell(stuck, [1.0, 1.0, 1.0])
    optimizer._inner.ask = lambda: stuck  # type: ignore[attr-defined]
    optimizer._inner.tell = lambda *_: None  # type: ignore[attr-defined]
    with pytest.raises(ng.errors.NevergradEarlyStopping, match="RecMixES proposed nothing new 300 times in a row"):
        optimizer.ask()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "CMA",
            "optimizer: nevergrad's CMA can't search over genomes \\(.*\\); needs one of nsga2, random, ga, or one",
        ),
        ("RecMixE", "optimizer: unknown 'RecMixE'; did you mean RecMixES\\?"),
        ("annealing", "optimizer: unknown 'annealing'; needs one of nsga2, random, ga or a name of nevergrad's"),
    ],
)
def test_what_can_not_search_over_genomes_gets_one_sentence(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        optimizer_of(name)
    assert "\n" not in str(caught.value)


def test_the_command_line_refuses_it_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*PLAIN, "--optimizer", "PSO", "--out", str(tmp_path / "run")]) == 2
    assert "nevergrad's PSO can't search over genomes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_hypervolume_is_followed_over_evaluations(tmp_path: Path) -> None:
    settings = fake_settings(optimizer="random", generations=20)
    fake_search(tmp_path, settings)
    write_json(tmp_path / "config.json", settings.to_json())
    with Store(tmp_path) as store:
        trained = [e for e in store.evaluations() if e.kind == "candidate"]
        assert any(e.status is not Status.OK for e in trained)
    progress = follow_progress(read_run(tmp_path))
    assert progress is not None
    counts, volumes = zip(*progress.by_evaluation, strict=True)
    assert len(counts) == 100
    assert counts[-1] == len(trained) == 160
    assert list(counts) == sorted(set(counts))
    assert list(volumes) == sorted(volumes)
    # A generation's end is among the counts, and says the same.
    by_count = dict(progress.by_evaluation)
    ends = {8 * (number + 1): volume for number, volume in enumerate(progress.hypervolume)}
    common = ends.keys() & by_count.keys()
    assert len(common) > 3
    assert all(by_count[count] == pytest.approx(ends[count]) for count in common)
