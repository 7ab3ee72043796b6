"""The NSGA-II core against brute force."""

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from search import nsga2


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


def brute_force_ranks(losses: np.ndarray) -> np.ndarray:
    ranks = np.full(len(losses), -1)
    left = list(range(len(losses)))
    front = 0
    while left:
        best = [i for i in left if not any(dominates(losses[j], losses[i]) for j in left)]
        ranks[best] = front
        left = [i for i in left if i not in best]
        front += 1
    return ranks


# Small integers, so that ties in one objective, equal points and long chains all come up.
tied_losses = st.tuples(st.integers(1, 30), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-3, 3).map(float))
)


@settings(max_examples=200, deadline=None)
@given(tied_losses)
def test_ranks_are_those_of_brute_force(losses):
    assert nsga2.pareto_ranks(losses).tolist() == brute_force_ranks(losses).tolist()


@settings(max_examples=100, deadline=None)
@given(tied_losses)
def test_domination_row_by_row_is_that_of_brute_force(losses):
    point = losses[:1]
    assert nsga2.dominate(point, losses).tolist() == [dominates(point[0], row) for row in losses]
    assert nsga2.dominate(losses, point).tolist() == [dominates(row, point[0]) for row in losses]


@settings(max_examples=100, deadline=None)
@given(tied_losses)
def test_non_dominated_points_are_the_first_front(losses):
    assert nsga2.non_dominated(losses).tolist() == (brute_force_ranks(losses) == 0).tolist()


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_ranks_of_continuous_losses_are_those_of_brute_force(objectives):
    losses = np.random.default_rng(objectives).random((80, objectives))
    assert nsga2.pareto_ranks(losses).tolist() == brute_force_ranks(losses).tolist()


def constrained_dominates(a: np.ndarray, b: np.ndarray, va: float, vb: float) -> bool:
    return va < vb if va or vb else dominates(a, b)


def brute_force_constrained_ranks(losses: np.ndarray, violations: np.ndarray) -> np.ndarray:
    ranks = np.full(len(losses), -1)
    left = list(range(len(losses)))
    front = 0
    while left:
        best = [
            i
            for i in left
            if not any(constrained_dominates(losses[j], losses[i], violations[j], violations[i]) for j in left)
        ]
        ranks[best] = front
        left = [i for i in left if i not in best]
        front += 1
    return ranks


@st.composite
def losses_and_violations(draw):
    losses = draw(tied_losses)
    violations = draw(arrays(np.float64, len(losses), elements=st.integers(0, 3).map(float)))
    return losses, violations


@settings(max_examples=200, deadline=None)
@given(losses_and_violations())
def test_ranks_under_constraints_are_those_of_brute_force(drawn):
    losses, violations = drawn
    expected = brute_force_constrained_ranks(losses, violations)
    assert nsga2.constrained_ranks(losses, violations).tolist() == expected.tolist()


@settings(max_examples=100, deadline=None)
@given(losses_and_violations(), st.integers(1, 30))
def test_survivors_under_constraints_are_the_lowest_fronts(drawn, size):
    losses, violations = drawn
    survivors = nsga2.survive(losses, size, violations)
    ranks = brute_force_constrained_ranks(losses, violations)
    assert sorted(ranks[survivors.indices]) == sorted(ranks)[: len(survivors.indices)]
    assert survivors.ranks.tolist() == ranks[survivors.indices].tolist()
    unknown = np.where(violations[:, None] > 0, np.nan, losses)
    assert nsga2.survive(unknown, size, violations).indices.tolist() == survivors.indices.tolist()


@settings(max_examples=100, deadline=None)
@given(losses_and_violations(), st.data())
def test_a_lower_tier_comes_before_a_higher_one(drawn, data):
    losses, violations = drawn
    tiers = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(losses), max_size=len(losses))))
    ranks = nsga2.tiered_ranks(losses, violations, tiers)
    behind = 0
    for tier in sorted(set(tiers)):
        members = np.flatnonzero(tiers == tier)
        expected = behind + brute_force_constrained_ranks(losses[members], violations[members])
        assert ranks[members].tolist() == expected.tolist()
        behind = ranks[members].max() + 1
    size = data.draw(st.integers(1, 30))
    survivors = nsga2.survive(losses, size, violations, tiers)
    assert sorted(ranks[survivors.indices]) == sorted(ranks)[: len(survivors.indices)]
    assert survivors.ranks.tolist() == ranks[survivors.indices].tolist()


def test_without_a_violation_constraints_change_nothing():
    losses = np.random.default_rng(0).random((60, 3))
    plain, constrained = nsga2.survive(losses, 20), nsga2.survive(losses, 20, np.zeros(60))
    assert plain.indices.tolist() == constrained.indices.tolist()
    assert plain.crowding.tolist() == constrained.crowding.tolist()


@settings(max_examples=100, deadline=None)
@given(tied_losses, st.lists(st.integers(0, 40), max_size=3))
def test_an_archive_holds_the_non_dominated_however_points_come(losses, cuts):
    archive = nsga2.Archive(losses.shape[1])
    for part in np.split(np.arange(len(losses)), sorted(min(cut, len(losses)) for cut in cuts)):
        archive.add(losses[part], part.tolist())
    assert archive.items == np.flatnonzero(nsga2.non_dominated(losses)).tolist()
    assert archive.losses.tolist() == losses[archive.items].tolist()


def test_an_archive_takes_many_points_at_once():
    losses = np.random.default_rng(0).random((500, 3))
    archive = nsga2.Archive(3)
    archive.add(losses[:100], list(range(100)))
    archive.add(losses[100:], list(range(100, 500)))
    archive.add([], [])
    assert archive.items == np.flatnonzero(nsga2.non_dominated(losses)).tolist()
    with pytest.raises(ValueError, match="losses: need finite numbers"):
        archive.add([[0.0, np.nan, 0.0]], [1])


def test_no_points_have_no_ranks():
    assert nsga2.pareto_ranks(np.zeros((0, 3))).shape == (0,)
    assert nsga2.non_dominated(np.zeros((0, 3))).shape == (0,)
    assert nsga2.crowding_distances(np.zeros((0, 3))).shape == (0,)


def test_crowding_is_the_scaled_gap_between_neighbours():
    # Sorted by the first objective; ranges 10 and 8. Second point: (4 - 0) / 10 + (8 - 3) / 8; third: 9 / 10 + (7 - 0)
    # / 8.
    losses = np.array([[4.0, 3.0], [0.0, 8.0], [10.0, 0.0], [1.0, 7.0]])
    distances = nsga2.crowding_distances(losses)
    assert distances[[1, 2]].tolist() == [np.inf, np.inf]
    assert distances[3] == pytest.approx(4 / 10 + 5 / 8)
    assert distances[0] == pytest.approx(9 / 10 + 7 / 8)


def test_copies_of_a_point_get_no_crowding_distance():
    losses = np.array([[0.0, 4.0], [0.0, 4.0], [1.0, 1.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    distances = nsga2.crowding_distances(losses)
    assert distances.tolist() == [np.inf, 0.0, 2.0, np.inf, 0.0, 0.0]


def test_an_objective_that_does_not_vary_adds_nothing_to_crowding():
    losses = np.array([[0.0, 3.0], [1.0, 2.0], [3.0, 0.0]])
    flat = np.column_stack([losses, np.full(3, 7.0)])
    assert nsga2.crowding_distances(flat).tolist() == nsga2.crowding_distances(losses).tolist()


def test_crowding_is_measured_inside_each_front():
    front = np.array([[0.0, 4.0], [1.0, 1.0], [4.0, 0.0]])
    losses = np.concatenate([front, front + 10.0])
    ranks = nsga2.pareto_ranks(losses)
    assert ranks.tolist() == [0, 0, 0, 1, 1, 1]
    assert nsga2.crowding_by_front(losses, ranks).tolist() == [np.inf, 2.0, np.inf] * 2


@settings(max_examples=100, deadline=None)
@given(tied_losses, st.integers(1, 30))
def test_survivors_are_the_lowest_fronts(losses, size):
    survivors = nsga2.survive(losses, size)
    ranks = brute_force_ranks(losses)
    assert len(survivors.indices) == min(size, len(losses))
    assert sorted(ranks[survivors.indices]) == sorted(ranks)[: len(survivors.indices)]
    assert survivors.ranks.tolist() == brute_force_ranks(losses[survivors.indices]).tolist()
    assert survivors.ranks.tolist() == ranks[survivors.indices].tolist()
    assert survivors.indices.tolist() == sorted(set(survivors.indices.tolist()))


def test_survival_thins_the_front_that_does_not_fit_where_it_is_crowded():
    # A cluster of three near (1, 8); one cut with the first distances would keep the lone points and drop the whole
    # cluster.
    losses = np.array([[0.0, 10.0], [1.0, 8.0], [1.1, 7.9], [1.2, 7.8], [5.0, 5.0], [5.6, 4.6], [10.0, 0.0]])
    kept = nsga2.survive(losses, 5).indices.tolist()
    assert {0, 4, 6} <= set(kept)
    assert len({1, 2, 3} & set(kept)) == 1


def test_survival_keeps_the_ends_of_the_front():
    rng = np.random.default_rng(0)
    angles = np.sort(rng.random(60)) * np.pi / 2
    losses = np.column_stack([1 - np.cos(angles), 1 - np.sin(angles)])
    assert {0, 59} <= set(nsga2.survive(losses, 5).indices.tolist())


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_survival_does_not_depend_on_the_order_of_the_rows(objectives):
    rng = np.random.default_rng(objectives)
    losses = rng.random((60, objectives))
    order = rng.permutation(60)
    straight = losses[nsga2.survive(losses, 20).indices]
    shuffled = losses[order][nsga2.survive(losses[order], 20).indices]
    assert sorted(straight.tolist()) == sorted(shuffled.tolist())


def test_tournament_prefers_the_lower_front_then_the_less_crowded():
    ranks = np.array([0, 0, 1, 1])
    crowding = np.array([np.inf, 0.5, np.inf, 0.5])
    rng = np.random.default_rng(0)
    wins = np.zeros(4)
    for _ in range(6000):
        first, second = nsga2.tournament_pair(ranks, crowding, rng)
        assert first != second
        wins[first] += 1
    # Of the six pairs of entrants 0 wins three, 1 wins two, 2 wins one and 3 wins none; 4 sigma of 6000 draws is 0.026.
    assert wins / 6000 == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0], abs=0.026)


def test_tournament_breaks_ties_by_chance():
    rng = np.random.RandomState(0)
    firsts = [nsga2.tournament_pair(np.zeros(3), np.zeros(3), rng)[0] for _ in range(3000)]
    assert np.bincount(firsts) / 3000 == pytest.approx([1 / 3] * 3, abs=0.035)


def test_tournament_of_two_pairs_both():
    rng = np.random.default_rng(0)
    assert sorted(nsga2.tournament_pair(np.array([0, 1]), np.array([np.inf, np.inf]), rng)) == [0, 1]


def test_hypervolume_of_boxes():
    # Two boxes of 2 x 1 and 1 x 2 that overlap in 1 x 1; the third point lies beyond the reference.
    assert nsga2.hypervolume([[1.0, 2.0], [2.0, 1.0], [9.0, 0.0]], [3.0, 3.0]) == pytest.approx(3.0)
    assert nsga2.hypervolume(np.zeros((0, 2)), [3.0, 3.0]) == 0.0


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_hypervolume_is_that_of_sampling(objectives):
    rng = np.random.default_rng(objectives)
    points = rng.random((12, objectives))
    samples = rng.random((40_000, objectives))
    hit = np.zeros(len(samples), dtype=bool)
    for point in points:
        hit |= (samples >= point).all(axis=1)
    # 4 sigma of a share of 40,000 samples is at most 0.01.
    assert nsga2.hypervolume(points, np.ones(objectives)) == pytest.approx(hit.mean(), abs=0.01)


def test_moocore_takes_what_it_is_given_by_row_and_leaves_it_alone():
    losses = np.asfortranarray(np.random.default_rng(1).random((20, 3)))
    before = losses.copy()
    assert nsga2.pareto_ranks(losses).tolist() == moocore.pareto_rank(before).tolist()
    nsga2.hypervolume(losses, np.ones(3))
    assert (losses == before).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_fail_clearly(bad):
    losses = [[0.0, 1.0], [1.0, bad]]
    for call in (nsga2.pareto_ranks, nsga2.crowding_distances, nsga2.non_dominated, lambda x: nsga2.survive(x, 1)):
        with pytest.raises(ValueError, match=r"losses: need finite numbers, got .* in row 1"):
            call(losses)


@pytest.mark.parametrize("losses", [[1.0, 2.0], np.zeros((3, 0)), np.zeros((2, 2, 2))])
def test_losses_of_the_wrong_shape_fail_clearly(losses):
    with pytest.raises(ValueError, match=r"losses: need shape \[points, objectives\]"):
        nsga2.pareto_ranks(losses)


def test_other_bad_input_fails_clearly():
    with pytest.raises(ValueError, match="size: need 1 or more, got 0"):
        nsga2.survive([[0.0, 1.0]], 0)
    with pytest.raises(ValueError, match="ranks: a pair needs two candidates or more, got 1"):
        nsga2.tournament_pair(np.array([0]), np.array([np.inf]), np.random.default_rng(0))
    for reference in ([1.0], [1.0, np.nan], [[1.0, 1.0]]):
        with pytest.raises(ValueError, match="reference: need 2 finite numbers, one an objective"):
            nsga2.hypervolume([[0.0, 0.0]], reference)
