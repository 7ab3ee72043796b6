"""The front of a log that grows, and the winners' repetitions in numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from search.evaluation import Evaluation, Status
from search.nsga2 import Archive
from search.ranking import Ranking


def front_of(evaluations: Iterable[Evaluation], ranking: Ranking) -> list[Evaluation]:
    """Return the candidates of `evaluations` that keep the budget and that no other one that does dominates, sorted by
    the first objective."""
    front = Front(ranking)
    front.update(evaluations)
    return front.members()


class Front:
    """The front of a log that grows, without looking at the whole log each time.

    Args:
        ranking: How candidates are compared.
    """

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        self._archive: Archive[Evaluation] = Archive(len(ranking.objectives))

    def __len__(self) -> int:
        return len(self._archive.items)

    def update(self, fresh: Iterable[Evaluation]) -> None:
        """Take in what was logged since the last time."""
        feasible = [e for e in fresh if is_feasible(e, self.ranking)]
        self._archive.add([self.ranking.losses(e.metrics) for e in feasible], feasible)

    def members(self) -> list[Evaluation]:
        """Return the front of everything, sorted by the first objective."""
        first = self.ranking.objectives[0]
        return sorted(self._archive.items, key=lambda e: (e.metrics[first], e.genome_hash))


def is_feasible(evaluation: Evaluation, ranking: Ranking) -> bool:
    """Tell whether an evaluation is a candidate's that succeeded, trained to the end, and keeps the budget."""
    succeeded = evaluation.kind == "candidate" and evaluation.status is Status.OK
    return succeeded and not ranking.tier(len(evaluation.rungs)) and ranking.violation(evaluation.metrics) == 0


def summary_of(repeated: Sequence[Evaluation]) -> dict[str, Any]:
    """Sum up a winner's repetitions.

    Returns:
        `seeds`: how many succeeded; `failed`: how many did not; `mean` and, from two on, `deviation` of each metric:
        the sample standard deviation, with n - 1.
    """
    done = [e.metrics for e in repeated if e.status is Status.OK]
    values = {name: [metrics[name] for metrics in done] for name in (done[0] if done else {})}
    return {
        "seeds": len(done),
        "failed": len(repeated) - len(done),
        "mean": {name: statistics.fmean(column) for name, column in values.items()},
        "deviation": {name: statistics.stdev(column) for name, column in values.items() if len(column) > 1},
    }


def sentence_without_front(evaluations: Sequence[Evaluation], ranking: Ranking) -> str:
    """Say in one sentence why there is no front: nothing succeeded, or nothing keeps the budget."""
    scored = [e for e in evaluations if e.kind == "candidate" and e.status in (Status.OK, Status.OVER_BUDGET)]
    if not scored or not ranking.budget:
        return "No candidate has succeeded yet, so there is no front to show."
    nearest = min(scored, key=lambda e: ranking.violation(e.metrics))
    return (
        f"No candidate keeps the budget, so there is no front to show; the nearest, {nearest.genome_hash[:8]}, "
        f"{ranking.reason(nearest.metrics)}."
    )
