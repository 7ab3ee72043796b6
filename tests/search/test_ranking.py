"""Budgets and ties: what is read, what is beyond a limit and by how much, and that dominance stays a partial order."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.ranking import Ranking, Term, is_timed
from search.settings import MEASURED, TRAINED

TIMES = ("prefill_ms", "decode_ms_per_token", "train_ms_per_step")


def test_a_term_is_read_and_written() -> None:
    assert Term.parse(" parameters <= 2e6 ") == Term("parameters", "<=", 2e6)
    assert str(Term.parse("parameters<=2e6")) == "parameters<=2000000"
    assert str(Term.parse("decode_ms_per_token>=0.125")) == "decode_ms_per_token>=0.125"
    assert Term.parse(str(Term("cache_bytes", "<=", 64e6))) == Term("cache_bytes", "<=", 64e6)


@pytest.mark.parametrize("text", ["", "parameters", "parameters<2", "parameters==2", "<=2", "a b<=2"])
def test_what_is_no_term_fails_clearly(text: str) -> None:
    with pytest.raises(ValueError, match="budget: needs METRIC<=NUMBER or METRIC>=NUMBER, got"):
        Term.parse(text)


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "many"])
def test_a_limit_that_is_no_number_above_0_fails_clearly(limit: str) -> None:
    with pytest.raises(ValueError, match=f"budget: needs a finite number above 0 as the limit, got '{limit}'"):
        Term.parse(f"parameters<={limit}")


def test_violations_are_relative_and_add_up() -> None:
    budget = (Term("parameters", "<=", 200.0), Term("perplexity", ">=", 4.0), Term("prefill_ms", "<=", 1.0))
    ranking = Ranking(("perplexity", "parameters"), budget)
    assert ranking.violation({"parameters": 200.0, "perplexity": 4.0, "prefill_ms": 1.0}) == 0
    broken = {"parameters": 250.0, "perplexity": 3.0, "prefill_ms": 0.5}
    assert ranking.violation(broken) == 0.25 + 0.25
    assert ranking.broken(broken) == list(budget[:2])
    assert ranking.reason(broken) == "needs parameters<=200: is 250, needs perplexity>=4: is 3"
    assert ranking.violation({"parameters": 250.0}) == 0.25  # nothing else is known


def test_times_and_their_ratios_are_timed_and_nothing_else_is() -> None:
    assert [name for name in MEASURED if is_timed(name)] == list(TIMES)
    assert all(is_timed(f"{name}_ratio") for name in TIMES)
    assert not any(is_timed(name) for name in (*TRAINED, "peak_memory_bytes_ratio"))


def losses(*times: float, epsilon: float = 0.02) -> list[list[float]]:
    ranking = Ranking(("perplexity", "prefill_ms"), epsilon=epsilon)
    return [ranking.losses({"perplexity": 5.0, "prefill_ms": time}) for time in times]


def test_times_in_one_box_are_equal_and_nothing_else_changes() -> None:
    edge = math.exp(7 * math.log1p(0.02))
    low, near, beyond = losses(edge * 1.001, edge * 1.018, edge * 1.022)
    assert low == near
    assert low[1] == pytest.approx(edge)
    assert beyond[1] == pytest.approx(edge * 1.02)
    assert losses(edge * 1.001, edge * 1.018, epsilon=0.0) == [[5.0, edge * 1.001], [5.0, edge * 1.018]]
    exact = Ranking(("perplexity", "cache_bytes"), epsilon=0.5).losses({"perplexity": 5.0, "cache_bytes": 5.1})
    assert exact == [5.0, 5.1]


@given(st.lists(st.floats(1e-3, 1e4), min_size=2, max_size=8), st.floats(0.001, 0.5))
def test_boxes_keep_the_order_and_differ_by_less_than_epsilon_inside(times: list[float], epsilon: float) -> None:
    # A function that never decreases keeps dominance a partial order: equal boxes are an equivalence.
    times = sorted(times)
    boxed = [row[1] for row in losses(*times, epsilon=epsilon)]
    assert boxed == sorted(boxed)
    for time, box in zip(times, boxed, strict=True):
        assert 1 - 1e-9 <= time / box <= (1 + epsilon) * (1 + 1e-9)


def test_the_ranking_of_a_run_is_read_from_its_config() -> None:
    config = {"objectives": ["perplexity", "prefill_ms"], "budget": ["parameters<=2000000"], "epsilon": 0.05}
    assert Ranking.from_config(config) == Ranking(("perplexity", "prefill_ms"), (Term("parameters", "<=", 2e6),), 0.05)
    assert Ranking.from_config({"objectives": ["a", "b"]}) == Ranking(("a", "b"))
