"""Probability matching over mutations."""

import pytest

from search.choice import LEAST_SHARE, RATE, MutationChoice


def test_all_are_alike_at_first():
    choice = MutationChoice(("a", "b", "c", "d"))
    assert choice.probabilities() == dict.fromkeys("abcd", 0.25)
    assert {tally.applied for tally in choice.tallies().values()} == {0}


def test_rewards_are_counted_by_hand():
    choice = MutationChoice(("a", "b"))
    choice.learn("sampled", (1.0, 1.0))
    choice.learn("better", (0.5, 1.0), ["a"])
    quality = 0.5 + RATE * 0.5
    want = LEAST_SHARE / 2 + (1 - LEAST_SHARE) * quality / (quality + 0.5)
    assert choice.probabilities()["a"] == pytest.approx(want)
    choice.learn("worse", (2.0, 1.0), ["b", "b"])
    choice.learn("beside", (0.2, 1.1), ["a", "b"])
    choice.learn("the same", (0.2, 1.1), ["b"])
    choice.learn("failed", None, ["b"])
    tallies = choice.tallies()
    assert (tallies["a"].applied, tallies["a"].reward) == (2, 1.0)
    assert (tallies["b"].applied, tallies["b"].reward) == (4, pytest.approx((0 + 1 + 1 + 0) / 4))
    assert sum(tally.probability for tally in tallies.values()) == pytest.approx(1.0)


def test_what_was_told_stays_a_measure():
    choice = MutationChoice(("a", "b"))
    for number in range(5):
        choice.learn(f"{number}", (float(number), 4.0 - number))
    choice.probabilities()
    choice.learn("dominated", (1.5, 3.0), ["a"])
    choice.learn("new", (1.5, 2.5), ["b"])
    tallies = choice.tallies()
    assert (tallies["a"].reward, tallies["b"].reward) == (0.0, 1.0)


def test_order_between_two_draws_is_of_no_consequence():
    results = [("x", (0.0, 1.0), ["a"]), ("y", (3.0, 3.0), ["a", "b"]), ("z", None, ["b"])]

    def learned(order):
        choice = MutationChoice(("a", "b"))
        for key, losses, mutations in order:
            choice.learn(key, losses, mutations)
        return choice.probabilities()

    assert learned(results) == learned(results[::-1])


def test_no_mutation_dies_out():
    choice = MutationChoice(("a", "b"))
    for number in range(200):
        choice.learn(f"{number}", None, ["a"])
        assert choice.probabilities()["a"] >= LEAST_SHARE / 2
    for number in range(200, 600):
        choice.learn(f"{number}", None, ["b"])
        choice.probabilities()
    assert sum(choice.probabilities().values()) == pytest.approx(1.0)
