"""NSGA2 as an optimizer: any parameter, any order of results, failures and losses."""

import pickle
import subprocess
import sys
from collections.abc import Callable

import nevergrad as ng
import numpy as np
import pytest

from search import nsga2
from search.evolution import NSGA2


class Word(ng.p.Parameter):
    """A row of letters 0..top: sampled evenly, each letter mutated with probability 0.15, two-point crossover."""

    def __init__(self, length: int = 12, top: int = 9, mutates: bool = True) -> None:
        super().__init__()
        self.length, self.top, self.mutates = length, top, mutates
        self.repaired = False
        self.letters = (0,) * length

    def _layered_get_value(self):
        return self.letters

    def _layered_set_value(self, value):
        self._check_frozen()
        self.letters = tuple(value)

    def _layered_sample(self):
        child = self.spawn_child()
        child.letters = tuple(self.random_state.randint(0, self.top + 1, self.length).tolist())
        return child

    def _layered_mutate(self):
        fresh = self.random_state.randint(0, self.top + 1, self.length).tolist()
        hit = self.random_state.rand(self.length) < 0.15 * self.mutates
        self.letters = tuple(new if h else old for old, new, h in zip(self.letters, fresh, hit, strict=True))
        self.repaired = sum(self.letters) % 3 == 0

    def _layered_recombine(self, *others):
        low, high = sorted(self.random_state.randint(0, self.length + 1, 2))
        self.letters = self.letters[:low] + others[0].letters[low:high] + self.letters[high:]

    def get_value_hash(self):
        return self.letters

    def _internal_get_standardized_data(self, reference):
        return np.zeros(1)


def word_losses(letters: tuple[int, ...], objectives: int = 3) -> list[float]:
    """Distances to a few hidden words that disagree."""
    hidden = np.random.default_rng(0).integers(0, 10, (objectives, len(letters)))
    return np.abs(hidden - np.array(letters)).sum(axis=1).astype(float).tolist()


def make(seed: int = 0, objectives: int = 3, population: int = 16, **word) -> NSGA2:
    parameter = Word(**word)
    parameter.random_state = np.random.RandomState(seed)
    return NSGA2(parameter, num_objectives=objectives, population_size=population)


def run_generation(optimizer: NSGA2, size: int = 16, order: Callable[[list], list] = list) -> list[tuple[int, ...]]:
    asked = [optimizer.ask() for _ in range(size)]
    for candidate in order(asked):
        optimizer.tell(candidate, word_losses(candidate.value, optimizer.num_objectives))
    return [candidate.value for candidate in asked]


def run_asynchronously(optimizer, evaluate, evaluations, seed, in_flight=8):
    """Tell out of order; discard one in twenty, and lose one in twenty. Return the losses told and the values asked."""
    chance = np.random.default_rng(seed)
    running, told, asked = [], [], []
    for _ in range(evaluations):
        while len(running) < in_flight:
            running.append(optimizer.ask())
            asked.append(running[-1].get_value_hash())
        candidate = running.pop(int(chance.integers(len(running))))
        fate = chance.random()
        if fate < 0.05:
            optimizer.discard(candidate)
        elif fate >= 0.1:
            told.append(evaluate(candidate.value))
            optimizer.tell(candidate, told[-1])
    return np.array(told), asked


def check_population(optimizer: NSGA2) -> None:
    members = optimizer.population
    losses = np.array([member.losses for member in members])
    assert len(members) == optimizer.population_size
    left, rank = set(range(len(members))), 0
    while left:  # brute force
        front = {
            i for i in left if not any((losses[j] <= losses[i]).all() and (losses[j] < losses[i]).any() for j in left)
        }
        assert all(members[i].rank == rank for i in front)
        left, rank = left - front, rank + 1


def test_nevergrads_hypervolume_and_pruning_are_off():
    optimizer = make()
    assert optimizer._no_hypervolume is True
    assert optimizer.pruning is None
    run_generation(optimizer)
    assert optimizer._hypervolume_pareto is None
    assert len(optimizer.archive) == 0


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5])
def test_population_is_full_and_ranked_whatever_fails_or_comes_late(objectives):
    optimizer = make(objectives=objectives, population=20)
    told, asked = run_asynchronously(optimizer, lambda word: word_losses(word, objectives), 300, seed=objectives)
    check_population(optimizer)
    assert len(set(asked)) == len(asked)
    counters = optimizer.counters
    assert counters.asked == len(asked)
    assert counters.told == len(told)
    assert counters.asked == counters.told + counters.discarded + counters.in_flight
    assert len(optimizer.in_flight) == counters.in_flight > 8  # the lost ones, and those still running
    front = np.array([member.losses for member in optimizer.front()])
    assert sorted(front.tolist()) == sorted(told[nsga2.non_dominated(told)].tolist())


def test_evolution_gets_closer_than_sampling_does():
    optimizer = make(objectives=2)
    for _ in range(25):
        run_generation(optimizer)
    evolved = [member.losses for member in optimizer.population]
    sampled = [word_losses(Word._layered_sample(optimizer.parametrization).value, 2) for _ in range(400)]
    best = [nsga2.hypervolume(points, [60.0, 60.0]) for points in (evolved, sampled)]
    assert best[0] > 1.2 * best[1]


def test_the_best_of_each_objective_is_never_lost():
    optimizer = make(population=8)
    best = np.full(3, np.inf)
    for _ in range(40):
        candidate = optimizer.ask()
        optimizer.tell(candidate, word_losses(candidate.value))
        best = np.minimum(best, candidate.losses)
        assert np.min([member.losses for member in optimizer.population], axis=0).tolist() == best.tolist()


def test_parents_and_children_survive_together():
    optimizer = make()
    everyone = []
    for _ in range(2):
        everyone += run_generation(optimizer)
    losses = np.array([word_losses(word) for word in everyone])
    expected = [everyone[i] for i in nsga2.survive(losses, 16).indices]
    assert [member.candidate.value for member in optimizer.population] == expected


@pytest.mark.parametrize("order", [lambda a: a[::-1], lambda a: a[1::2] + a[::2]], ids=["backwards", "odd-first"])
def test_order_of_tells_inside_a_generation_changes_nothing(order):
    straight, shuffled = make(population=10), make(population=10)
    for _ in range(6):
        assert run_generation(straight, 12) == run_generation(shuffled, 12, order)
    assert [m.candidate.value for m in straight.population] == [m.candidate.value for m in shuffled.population]


def test_same_seed_gives_the_same_search_and_another_seed_another():
    asked = [[run_generation(make(seed)) for _ in range(4)] for seed in (3, 3, 4)]
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


def test_same_seed_gives_the_same_search_in_another_process():
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_evolution import make, run_generation\n"
        "optimizer = make(5)\n"
        "print([run_generation(optimizer) for _ in range(4)])\n"
    )
    here = __file__.rpartition("/")[0]
    result = subprocess.run(
        [sys.executable, "-c", script, here, *sys.path], capture_output=True, text=True, check=True, timeout=120
    )
    optimizer = make(5)
    assert result.stdout.strip() == str([run_generation(optimizer) for _ in range(4)])


def test_looking_at_the_population_changes_nothing():
    watched, alone = make(), make()
    for _ in range(120):
        words = []
        for optimizer in (watched, alone):
            candidate = optimizer.ask()
            optimizer.tell(candidate, word_losses(candidate.value))
            words.append(candidate.value)
        assert watched.population
        assert watched.front()
        assert words[0] == words[1]


@pytest.mark.parametrize("asked", [5, 40])
def test_a_dump_continues_as_if_nothing_had_happened(tmp_path, asked):
    optimizer = make()
    optimizer.suggest((1,) * 12)
    candidates = [optimizer.ask() for _ in range(asked)]
    for candidate in candidates[: asked // 2]:
        optimizer.tell(candidate, word_losses(candidate.value))
    optimizer.discard(candidates[-1])
    optimizer.suggest((2,) * 12)
    optimizer.dump(tmp_path / "dump")
    loaded = NSGA2.load(tmp_path / "dump")
    assert [c.value for c in loaded.in_flight] == [c.value for c in optimizer.in_flight]
    asked_by = []
    for each in (optimizer, loaded):
        for candidate in each.in_flight[::2]:
            each.tell(candidate, word_losses(candidate.value))
        asked_by.append([run_generation(each) for _ in range(4)])
    assert asked_by[0] == asked_by[1]
    assert loaded.counters == optimizer.counters


def test_copies_that_went_through_a_worker_can_be_told():
    sent, straight = make(), make()
    for _ in range(60):
        copy = pickle.loads(pickle.dumps(sent.ask()))
        sent.tell(copy, word_losses(copy.value))
        candidate = straight.ask()
        assert copy.value == candidate.value
        straight.tell(candidate, word_losses(candidate.value))
    assert sent.counters == straight.counters


def test_a_first_generation_that_fails_is_sampled_again():
    optimizer = make()
    for _ in range(40):
        optimizer.discard(optimizer.ask())
    assert optimizer._asked == set()  # what nevergrad remembers as in flight
    assert optimizer.counters.bred == 0
    assert optimizer.population == []
    assert optimizer.front() == []
    assert optimizer.pareto_front() == []
    run_generation(optimizer)
    run_generation(optimizer)
    assert optimizer.counters.bred == 16
    check_population(optimizer)


def test_candidates_lost_in_the_first_generation_hold_up_nothing():
    optimizer = make()
    lost = [optimizer.ask() for _ in range(12)]
    for _ in range(30):
        candidate = optimizer.ask()
        optimizer.tell(candidate, word_losses(candidate.value))
    check_population(optimizer)
    assert optimizer.counters.bred == 30 - 8  # with 8 of 16 told, breeding starts
    assert optimizer.in_flight == lost
    optimizer.tell(lost[0], [0.0, 0.0, 0.0])  # late, and welcome
    assert [member.candidate for member in optimizer.front()] == [lost[0]]


def test_one_failure_in_the_first_generation_costs_one_sample():
    optimizer = make()
    asked = [optimizer.ask() for _ in range(16)]
    for candidate in asked[1:]:
        optimizer.tell(candidate, word_losses(candidate.value))
    optimizer.discard(asked[0])
    for _ in range(16):
        optimizer.ask()
    assert optimizer.counters.bred == 15


def test_every_value_of_a_small_space_is_asked_once_and_then_the_search_stops():
    optimizer = make(length=5, top=1, population=6)
    asked = []
    for i in range(32):
        asked.append(optimizer.ask())
        if i % 3 == 0:
            optimizer.discard(asked[-1])
        else:
            optimizer.tell(asked[-1], word_losses(asked[-1].value))
    with pytest.raises(ng.errors.NevergradEarlyStopping, match="300 samples in a row were all asked before"):
        optimizer.ask()
    assert len({candidate.value for candidate in asked}) == 32
    assert optimizer.counters.duplicates_avoided >= 300


def test_a_child_that_mutation_cannot_make_new_gives_way_to_a_sample():
    optimizer = make(length=2, top=9, population=4, mutates=False)
    asked = []
    for _ in range(40):
        asked.append(optimizer.ask())
        optimizer.tell(asked[-1], word_losses(asked[-1].value))
    assert len({candidate.value for candidate in asked}) == 40
    assert 0 < optimizer.counters.bred < 36


def test_counters_count_repair_and_parents():
    optimizer = make(population=8)
    repaired = 0
    parents = set()
    for _ in range(80):
        candidate = optimizer.ask()
        if candidate.parents_uids:
            assert len(set(candidate.parents_uids)) == 2
            assert parents.issuperset(candidate.parents_uids)
            repaired += candidate.repaired
        parents.add(candidate.uid)
        optimizer.tell(candidate, word_losses(candidate.value))
    assert optimizer.counters.bred == 72
    assert optimizer.counters.repaired == repaired > 0
    assert optimizer.counters.repaired_share == repaired / 72
    assert make().counters.repaired_share == 0.0


def test_suggestions_are_asked_first_and_take_part():
    optimizer = make()
    words = [(7,) * 12, (8,) * 12]
    for word in words:
        optimizer.suggest(word)
    assert [optimizer.ask().value for _ in range(2)] == words[::-1]
    for candidate in optimizer.in_flight:
        optimizer.tell(candidate, [0.0, 0.0, 0.0])
    run_generation(optimizer)
    assert [member.candidate.value for member in optimizer.front()] == words[::-1]
    assert optimizer.counters.told == 18
    assert optimizer.counters.in_flight == 0


def test_a_value_known_already_cannot_be_suggested():
    optimizer = make()
    asked = optimizer.ask()
    optimizer.suggest((7,) * 12)
    for word in (asked.value, (7,) * 12):
        with pytest.raises(ValueError, match=r"suggest: .* was asked, told, suggested or excluded before"):
            optimizer.suggest(word)
    assert optimizer.ask().value == (7,) * 12
    assert optimizer.ask().value != asked.value


def test_excluded_values_are_never_asked():
    optimizer = make(length=5, top=1, population=6)
    excluded = [(0, 0, 0, 0, bit) for bit in (0, 1)]
    optimizer.exclude(excluded)
    asked = [optimizer.ask().value for _ in range(30)]
    assert not set(asked).intersection(excluded)
    with pytest.raises(ValueError, match=r"suggest: .* was asked, told, suggested or excluded before"):
        optimizer.suggest(excluded[0])
    with pytest.raises(ng.errors.NevergradEarlyStopping):
        optimizer.ask()
    assert optimizer.counters.asked == 30


def starts_low(word: tuple[int, ...]) -> bool:
    return word[0] < 5


def test_registered_constraints_hold_for_all_that_is_asked():
    parameter = Word()
    parameter.register_cheap_constraint(starts_low)
    parameter.random_state = np.random.RandomState(0)
    optimizer = NSGA2(parameter, num_objectives=3)
    assert all(starts_low(word) for _ in range(5) for word in run_generation(optimizer))
    with pytest.raises(ValueError, match=r"suggest: \(9, .* breaks a constraint"):
        optimizer.suggest((9,) * 12)


def never(word: tuple[int, ...]) -> bool:
    return False


def test_a_constraint_that_nothing_meets_stops_the_search():
    parameter = Word()
    parameter.register_cheap_constraint(never)
    with pytest.raises(ng.errors.NevergradEarlyStopping, match="break a constraint"):
        NSGA2(parameter, num_objectives=2).ask()


def test_a_result_from_elsewhere_can_be_told():
    optimizer = make()
    known = optimizer.parametrization.spawn_child(new_value=(3,) * 12)
    optimizer.tell(known, [0.0, 0.0, 0.0])
    assert [member.candidate for member in optimizer.front()] == [known]
    assert (3,) * 12 not in run_generation(optimizer)
    assert optimizer.num_tell_not_asked == 1
    with pytest.raises(ValueError, match="is not in flight"):
        optimizer.tell(optimizer.parametrization.spawn_child(new_value=(3,) * 12), [0.0, 0.0, 0.0])


def test_callbacks_see_every_ask_and_tell():
    optimizer = make()
    seen = []
    optimizer.register_callback("ask", lambda opt: seen.append("ask"))
    optimizer.register_callback("tell", lambda opt, candidate, loss: seen.append(candidate.losses.tolist()))
    candidate = optimizer.ask()
    optimizer.tell(candidate, [3.0, 1.0, 2.0])
    assert seen == ["ask", [3.0, 1.0, 2.0]]


def test_pareto_front_thins_to_the_size_asked_for():
    optimizer = make()
    for i in range(12):
        optimizer.tell(optimizer.ask(), [float(i), 11.0 - i, 0.0])
    assert len(optimizer.pareto_front()) == 12
    thinned = optimizer.pareto_front(3)
    assert sorted([c.losses[0] for c in thinned])[::2] == [0.0, 11.0]
    assert len(thinned) == 3
    with pytest.raises(ValueError, match="size: need 1 or more, got 0"):
        optimizer.pareto_front(0)


def array_losses(x) -> list[float]:
    return [float(np.sum((x - 1) ** 2)), float(np.sum((x + 1) ** 2))]


def test_other_parameters_and_minimize_work():
    array = ng.p.Array(shape=(3,)).set_bounds(-2, 2)
    array.random_state = np.random.RandomState(0)
    optimizer = NSGA2(array, budget=200, num_objectives=2)
    optimizer.minimize(array_losses)
    check_population(optimizer)
    assert optimizer.counters.told == 200
    assert nsga2.hypervolume([m.losses for m in optimizer.front()], [12.0, 12.0]) > 90  # of 144, 118 at the true front

    choice = ng.p.Instrumentation(ng.p.Choice(list(range(9))), b=ng.p.TransitionChoice(list(range(9))))
    choice.random_state = np.random.RandomState(0)
    optimizer = NSGA2(choice, num_objectives=2, population_size=6)
    run_asynchronously(optimizer, lambda v: [float(v[0][0]), float(v[1]["b"] - v[0][0])], 40, seed=0)
    check_population(optimizer)


def test_one_objective_recommends_the_best():
    optimizer = make(objectives=1)
    for _ in range(6):
        run_generation(optimizer)
    best = min(member.losses[0] for member in optimizer.population)
    assert optimizer.recommend().losses.tolist() == [best]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_refused_and_changes_nothing(bad):
    optimizer = make()
    candidate = optimizer.ask()
    with pytest.raises(ValueError, match=r"loss: need finite numbers, got .* a failed candidate is to be discarded"):
        optimizer.tell(candidate, [1.0, bad, 2.0])
    assert optimizer.counters.told == 0
    assert optimizer.in_flight == [candidate]
    optimizer.tell(candidate, [1.0, 1.0, 2.0])
    assert optimizer.counters.in_flight == 0


@pytest.mark.parametrize("loss", [1.0, [1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [[1.0, 2.0, 3.0]]])
def test_the_wrong_number_of_losses_is_refused(loss):
    optimizer = make()
    with pytest.raises(ValueError, match="loss: need 3 numbers, one an objective, got shape"):
        optimizer.tell(optimizer.ask(), loss)
    assert optimizer.counters.told == 0


def test_a_settled_candidate_is_refused():
    optimizer = make()
    told, failed = optimizer.ask(), optimizer.ask()
    optimizer.tell(told, [1.0, 1.0, 1.0])
    optimizer.discard(failed)
    for candidate in (told, failed):
        with pytest.raises(ValueError, match="is not in flight: told, discarded, suggested or excluded before"):
            optimizer.tell(candidate, [1.0, 1.0, 1.0])
        with pytest.raises(ValueError, match="is not in flight: told, discarded, suggested or excluded before"):
            optimizer.discard(candidate)
    with pytest.raises(ValueError, match="need one in flight, got one that was never asked"):
        optimizer.discard(optimizer.parametrization.spawn_child(new_value=(3,) * 12))
    for call in (lambda c: optimizer.tell(c, [1.0, 1.0, 1.0]), optimizer.discard):
        with pytest.raises(TypeError, match="candidate: need a Word as given out by ask, got Array"):
            call(ng.p.Array(shape=(1,)))


def test_penalties_are_refused():
    optimizer = make()
    with pytest.raises(ValueError, match="penalty_style: not supported"):
        optimizer.tell(optimizer.ask(), [1.0, 1.0, 1.0], penalty_style=[1.0])


def excess(letters: tuple[int, ...], limit: float = 30) -> float:
    return max(0.0, sum(letters) / limit - 1)


def test_what_keeps_the_constraints_beats_all_that_breaks_them():
    optimizer = make()
    told = []
    for _ in range(20):
        candidate = optimizer.ask()
        losses, violation = word_losses(candidate.value), excess(candidate.value, 48)
        optimizer.tell(candidate, losses, violation)
        told.append((violation, losses))
    members = optimizer.population
    assert 2 <= sum(violation == 0 for violation, _ in told) < 16
    assert len(members) == 16
    ranked = sorted(members, key=lambda member: member.rank)
    violations = [member.violation for member in ranked]
    assert violations == sorted(violations)
    assert violations == sorted(violation for violation, _ in told)[:16]
    kept = [losses for violation, losses in told if violation == 0]
    assert sorted(m.losses.tolist() for m in optimizer.front()) == sorted(
        losses for losses, best in zip(kept, nsga2.non_dominated(kept), strict=True) if best
    )


def test_evolution_finds_its_way_into_the_constraints():
    optimizer = make()  # the mean of a sum is 54, and 30 lies 2.4 deviations below it: one sample in 100
    generations = [run_constrained(optimizer) for _ in range(12)]
    assert min(generations[0]) > 0
    assert all(member.violation == 0 for member in optimizer.population)


def run_constrained(optimizer: NSGA2) -> list[float]:
    asked = [optimizer.ask() for _ in range(16)]
    for candidate in asked:
        optimizer.tell(candidate, word_losses(candidate.value), excess(candidate.value))
    return [excess(candidate.value) for candidate in asked]


def test_a_candidate_without_losses_is_told_by_its_violation_alone():
    optimizer = make()
    for i in range(16):
        candidate = optimizer.ask()
        if i % 2:
            optimizer.tell(candidate, None, [0.25 * i, -3.0, 0.5])
        else:
            optimizer.tell(candidate, word_losses(candidate.value))
    run_generation(optimizer, 4)
    broken = [member for member in optimizer.population if member.violation]
    assert [member.violation for member in broken] == [0.25 * i + 0.5 for i in (1, 3, 5, 7)]
    assert all(np.isnan(member.losses).all() for member in broken)
    assert all(member.violation == 0 for member in optimizer.front())


def test_a_dump_keeps_violations(tmp_path):
    optimizer = make()
    run_constrained(optimizer)
    optimizer.dump(tmp_path / "dump")
    loaded = NSGA2.load(tmp_path / "dump")
    assert [run_constrained(optimizer) for _ in range(3)] == [run_constrained(loaded) for _ in range(3)]


def test_one_objective_recommends_what_keeps_the_constraints():
    optimizer = make(objectives=1)
    optimizer.tell(optimizer.ask(), [5.0])
    optimizer.tell(optimizer.ask(), [1.0], 0.1)
    assert optimizer.recommend().losses.tolist() == [5.0]


@pytest.mark.parametrize(
    ("loss", "violation", "message"),
    [
        (None, None, "loss: need one number an objective of a candidate that breaks no constraint, got None"),
        (None, 0.0, "loss: need one number an objective"),
        ([1.0, 1.0, 1.0], np.nan, "constraint_violation: need finite numbers"),
        ([1.0, np.nan, 1.0], 1.0, "loss: need finite numbers"),
    ],
)
def test_a_bad_violation_is_refused_and_changes_nothing(loss, violation, message):
    optimizer = make()
    candidate = optimizer.ask()
    with pytest.raises(ValueError, match=message):
        optimizer.tell(candidate, loss, violation)
    assert optimizer.in_flight == [candidate]
    assert optimizer.counters.told == 0


def test_bad_construction_fails_clearly():
    with pytest.raises(TypeError, match=r"parametrization: need an ng.p.Parameter, got int"):
        NSGA2(3, num_objectives=2)
    with pytest.raises(ValueError, match="num_objectives: need 1 or more, got 0"):
        NSGA2(Word(), num_objectives=0)
    with pytest.raises(ValueError, match="population_size: need 4 or more, got 3"):
        NSGA2(Word(), num_objectives=2, population_size=3)
