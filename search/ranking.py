"""What is better in a run: its objectives, the budget that winners have to keep, and ties between noisy times.

A budget term that holds is no better for holding by more; one that is broken counts by how far it is broken. Candidates
are compared as in constraint domination (Deb, Pratap, Agarwal and Meyarivan, "A fast and elitist multiobjective genetic
algorithm: NSGA-II", IEEE Transactions on Evolutionary Computation 6(2), 2002, section VI): one that keeps the budget
beats every one that breaks it, and of two that break it the one with the smaller summed relative violation is better,
whatever their objectives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

COUNTED_BEFORE = ("parameters", "cache_bytes")
"""Metrics that a genome's sizes decide: known before anything is trained."""

_TERM = re.compile(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*")
_TIMED = re.compile(r"_ms(_per_\w+?)?(_ratio)?$")


@dataclass(frozen=True)
class Term:
    """One condition of a budget, such as `parameters<=2000000`.

    Attributes:
        metric: Name of a metric; it carries the unit.
        relation: "<=" or ">=".
        limit: Above 0.
    """

    metric: str
    relation: Literal["<=", ">="]
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{self.limit:.12g}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a term.

        Raises:
            ValueError: `text` is no term, or its limit no finite number above 0.
        """
        match = _TERM.fullmatch(text)
        if match is None:
            raise ValueError(f"budget: needs METRIC<=NUMBER or METRIC>=NUMBER, got {text!r}")
        try:
            limit = float(match[3])
        except ValueError:
            limit = math.nan
        if not 0 < limit < math.inf:
            raise ValueError(f"budget: needs a finite number above 0 as the limit, got {match[3]!r} in {text!r}")
        return cls(match[1], cast(Literal["<=", ">="], match[2]), limit)

    def violation(self, value: float) -> float:
        """Return by what fraction of the limit `value` is beyond it; 0 where the term holds."""
        excess = value - self.limit if self.relation == "<=" else self.limit - value
        return max(0.0, excess / self.limit)


@dataclass(frozen=True)
class Ranking:
    """How the candidates of a run are compared, by their metrics alone.

    Attributes:
        objectives: Metrics to minimise.
        budget: Terms that every winner keeps.
        epsilon: Two values of a timed objective less than this fraction apart can count as equal; 0 for never.
        rungs: Rungs of successive halving; a candidate that stopped below the last one is compared with those that
            stopped there alone, and is on no front. 1 for whole trainings.
    """

    objectives: tuple[str, ...]
    budget: tuple[Term, ...] = ()
    epsilon: float = 0.0
    rungs: int = 1

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Self:
        """Read the ranking of a run from its config.json; a run from before there were budgets has none."""
        budget = tuple(Term.parse(text) for text in values.get("budget", ()))
        return cls(tuple(values["objectives"]), budget, values.get("epsilon", 0.0), values.get("rungs", 1))

    def losses(self, metrics: Mapping[str, float]) -> list[float]:
        """Return what dominance is decided on, one number an objective: times as the lower edge of their box.

        Boxes are `1 + epsilon` wide on a logarithmic scale and lie where they lie for every run, so that what is equal
        is an equivalence and dominance stays a partial order, which "differs by less than epsilon" would not be: three
        values can each be near the next. The price is that two values on either side of an edge still differ.

        Source: Laumanns, Thiele, Deb and Zitzler, "Combining convergence and diversity in evolutionary multiobjective
        optimization", Evolutionary Computation 10(3), 2002: epsilon-dominance on boxes. Differs from it in: only timed
        objectives have boxes, and all candidates of a box are kept, not one.
        """
        return [self._boxed(name, metrics[name]) for name in self.objectives]

    def _boxed(self, name: str, value: float) -> float:
        if not self.epsilon or not is_timed(name) or value <= 0:
            return value
        width = math.log1p(self.epsilon)
        return math.exp(width * math.floor(math.log(value) / width))

    def tier(self, reached: int) -> int:
        """Return how many rungs short of the last a training stopped that reached so many; 0 for one without rungs."""
        return self.rungs - reached if reached else 0

    def violation(self, metrics: Mapping[str, float]) -> float:
        """Return by how much the metrics break the budget: the terms' relative violations, summed; 0 if they keep it.

        Terms on metrics that are not there are left out.
        """
        return math.fsum(term.violation(metrics[term.metric]) for term in self.budget if term.metric in metrics)

    def broken(self, metrics: Mapping[str, float]) -> list[Term]:
        """Return the terms that the metrics break."""
        return [term for term in self.budget if term.metric in metrics and term.violation(metrics[term.metric]) > 0]

    def reason(self, metrics: Mapping[str, float]) -> str:
        """Say which terms the metrics break, and with what values."""
        return ", ".join(f"needs {term}: is {metrics[term.metric]:.12g}" for term in self.broken(metrics))


def is_timed(name: str) -> bool:
    """Tell whether a metric is a time, or the ratio of two: what differs from one measurement to the next."""
    return _TIMED.search(name) is not None


def contradiction(terms: Sequence[Term]) -> tuple[Term, Term] | None:
    """Return two terms that no value keeps together, if there are any."""
    for low in terms:
        for high in terms:
            if (low.metric, low.relation, high.relation) == (high.metric, ">=", "<=") and low.limit > high.limit:
                return low, high
    return None
