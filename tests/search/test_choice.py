"""Probability matching over mutations."""

import pytest

from search.choice import LEAST_SHARE, RATE, MutationChoice


def test_all_are_alike_at_first():
    choice = MutationChoice(("a", "b", "c", "d"))
    assert choice.probabilities() == dict.fromkeys("abcd", 0.25)
    assert {tally.applied for tally in choice.tallies().values()} == {0}


def test_rewards_are_counted_by_hand():
    choice = MutationChoice(("a", "b"))
    choice.learn("parent", (1.0, 1.0))
    choice.learn("better", (0.5, 1.0), ["parent"], ["a"])
    quality = 0.5 + RATE * 0.5
    want = LEAST_SHARE / 2 + (1 - LEAST_SHARE) * quality / (quality + 0.5)
    assert choice.probabilities()["a"] == pytest.approx(want)
    choice.learn("worse", (2.0, 1.0), ["parent", "unknown"], ["b", "b"])
    choice.learn("beside", (0.2, 1.1), ["better", "parent"], ["a", "b"])
    choice.learn("failed", None, ["parent"], ["b"])
    tallies = choice.tallies()
    assert (tallies["a"].applied, tallies["a"].reward) == (2, pytest.approx((1 + 0.5) / 2))
    assert (tallies["b"].applied, tallies["b"].reward) == (3, pytest.approx((0 + 0.5 + 0) / 3))
    assert sum(tally.probability for tally in tallies.values()) == pytest.approx(1.0)


def test_order_between_two_draws_is_of_no_consequence():
    results = [("x", (0.0, 1.0), ["a"]), ("y", (3.0, 3.0), ["a", "b"]), ("z", None, ["b"])]

    def learned(order):
        choice = MutationChoice(("a", "b"))
        choice.learn("parent", (1.0, 1.0))
        for key, losses, mutations in order:
            choice.learn(key, losses, ["parent"], mutations)
        return choice.probabilities()

    assert learned(results) == learned(results[::-1])


def test_no_mutation_dies_out():
    choice = MutationChoice(("a", "b"))
    choice.learn("parent", (1.0,))
    for number in range(200):
        choice.learn(f"{number}", None, ["parent"], ["a"])
        assert choice.probabilities()["a"] >= LEAST_SHARE / 2
    for number in range(200, 600):
        choice.learn(f"{number}", None, ["parent"], ["b"])
        choice.probabilities()
    assert sum(choice.probabilities().values()) == pytest.approx(1.0)
