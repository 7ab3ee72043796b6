"""The NSGA-II core: fronts, crowding, survival, tournament; free of nevergrad and of what is being evolved.

Source: Deb, Pratap, Agarwal and Meyarivan, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE
Transactions on Evolutionary Computation 6(2), 2002: non-dominated sorting (section III-A), crowding distance (III-B),
the crowded comparison and the survival of parents and children together (III-C). Differs from it in: fronts and
hypervolume come from moocore; points with equal losses are counted once in the crowding distance, so that copies of an
extreme point do not all become immortal; the front that does not fit is thinned one point at a time, the distances
being recomputed after each removal, since one cut with stale distances throws away whole neighbourhoods (Kukkonen and
Deb, "Improved pruning of non-dominated solutions based on crowding distance for bi-objective optimization problems",
IEEE CEC 2006). Constraints enter as violations, by constraint domination (Deb et al. 2002, section VI): see
`constrained_ranks`.

Losses are an array [points, objectives], fp64, finite, every objective minimised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import moocore
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
_ONE_BY_ONE = 64  # up to so many points an archive compares each with all at once: 30 us for each of 1,000 it holds
Item = TypeVar("Item")
Rng = np.random.RandomState | np.random.Generator


@dataclass(frozen=True)
class Survivors:
    """Who is kept of a set of points, and where each stands among the kept.

    Attributes:
        indices: Rows of the given losses that survive, ascending, [kept], int64.
        ranks: Front of each survivor, 0 the best, [kept], int64.
        crowding: Crowding distance of each survivor inside its front, [kept], fp64, infinite at the front's ends.
    """

    indices: IntArray
    ranks: IntArray
    crowding: FloatArray


def check_losses(losses: npt.ArrayLike) -> FloatArray:
    """Return losses as an array [points, objectives], fp64.

    Raises:
        ValueError: not two-dimensional, no objective, or a value that is not finite.
    """
    array = np.asarray(losses, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"losses: need shape [points, objectives] with one objective or more, got {array.shape}")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise ValueError(f"losses: need finite numbers, got {array[row].tolist()} in row {row}")
    return array


def dominate(a: FloatArray, b: FloatArray) -> npt.NDArray[np.bool_]:
    """Say row by row whether `a` dominates `b`, both [points, objectives] or one row: never worse, once better."""
    return np.asarray((a <= b).all(axis=1) & (a < b).any(axis=1))


def pareto_ranks(losses: npt.ArrayLike) -> IntArray:
    """Number the fronts: 0 is dominated by no point, k only by points of the fronts below k.

    Args:
        losses: [points, objectives], minimised.

    Returns:
        The front of each point, [points], int64. Points with equal losses are in the same front.

    Raises:
        ValueError: as `check_losses`.
    """
    array = check_losses(losses)
    if len(array) == 0:
        return np.zeros(0, dtype=np.int64)
    return np.asarray(moocore.pareto_rank(array), dtype=np.int64)


def constrained_ranks(losses: npt.ArrayLike, violations: npt.ArrayLike) -> IntArray:
    """Number the fronts where some points break constraints.

    Source: constraint domination, Deb et al. 2002, section VI: a point without violation dominates every one with, and
    of two with violation the one with the smaller dominates, whatever their losses.

    Args:
        losses: [points, objectives], minimised; of points with a violation any number will do.
        violations: By how much each point breaks the constraints, [points], 0 for not at all.

    Returns:
        The front of each point, [points], int64: the fronts of those without violation, and then one front for each
        violation that occurs, ascending.

    Raises:
        ValueError: as `check_losses`.
    """
    array, broken = check_losses(losses), np.asarray(violations, dtype=np.float64)
    ranks = np.zeros(len(array), dtype=np.int64)
    feasible = broken == 0
    ranks[feasible] = pareto_ranks(array[feasible])
    behind = int(ranks[feasible].max()) + 1 if feasible.any() else 0
    ranks[~feasible] = behind + np.unique(broken[~feasible], return_inverse=True)[1]
    return ranks


def tiered_ranks(losses: npt.ArrayLike, violations: npt.ArrayLike, tiers: npt.ArrayLike) -> IntArray:
    """Number the fronts where some points are not comparable: those of a lower tier all come before a higher one's.

    Args:
        losses: As `constrained_ranks`.
        violations: As `constrained_ranks`.
        tiers: [points], integers, 0 the best.

    Returns:
        The front of each point, [points], int64: inside each tier as `constrained_ranks` has them.

    Raises:
        ValueError: as `check_losses`.
    """
    array, broken, levels = check_losses(losses), np.asarray(violations), np.asarray(tiers)
    ranks = np.zeros(len(array), dtype=np.int64)
    behind = 0
    for level in np.unique(levels):
        members = np.flatnonzero(levels == level)
        ranks[members] = behind + constrained_ranks(array[members], broken[members])
        behind = int(ranks[members].max()) + 1
    return ranks


def crowding_distances(losses: npt.ArrayLike) -> FloatArray:
    """Measure how alone each point of one front is: the sum over objectives of the gap between its two neighbours.

    Source: Deb et al. 2002, section III-B; gaps are divided by the front's range in that objective.

    Args:
        losses: The points of one front, [points, objectives].

    Returns:
        Distances, [points], fp64. The ends of every objective that varies get infinity. Of points with equal losses the
        first gets the distance that it would have without the others, and the others get 0.

    Raises:
        ValueError: as `check_losses`.
    """
    ends, gaps = _ends_and_gaps(check_losses(losses))
    return np.where(ends > 0, np.inf, gaps)


def _ends_and_gaps(front: FloatArray) -> tuple[IntArray, FloatArray]:
    """Return of how many objectives each point is an end, and its gaps summed over the others, [points] each."""
    ends = np.zeros(len(front), dtype=np.int64)
    gaps = np.zeros(len(front))
    firsts = np.sort(np.unique(front, axis=0, return_index=True)[1])  # one of each set of equal points
    if len(firsts) < 2:  # alone: an end of everything, though nothing varies
        ends[firsts] = front.shape[1]
        return ends, gaps
    for column in front[firsts].T:
        order = np.argsort(column, kind="stable")
        ascending = column[order]
        spread = ascending[-1] - ascending[0]
        if spread > 0.0:  # an objective that does not vary tells nothing about neighbourhood
            gaps[firsts[order[1:-1]]] += (ascending[2:] - ascending[:-2]) / spread
            ends[firsts[order[0]]] += 1
            ends[firsts[order[-1]]] += 1
    return ends, gaps


def crowding_by_front(losses: npt.ArrayLike, ranks: IntArray) -> FloatArray:
    """Return each point's crowding distance inside its own front.

    Args:
        losses: [points, objectives].
        ranks: The front of each point, [points].

    Returns:
        Distances, [points], fp64.
    """
    array = check_losses(losses)
    distances = np.zeros(len(array))
    for rank in np.unique(ranks):
        members = np.flatnonzero(ranks == rank)
        distances[members] = crowding_distances(array[members])
    return distances


def survive(
    losses: npt.ArrayLike,
    size: int,
    violations: npt.ArrayLike | None = None,
    tiers: npt.ArrayLike | None = None,
) -> Survivors:
    """Keep the best `size` points: whole fronts first, and of the front that does not fit the least crowded points.

    Parents and children go in together, which is what makes NSGA-II elitist (Deb et al. 2002, section III-C).

    Args:
        losses: [points, objectives], minimised.
        size: How many to keep; all of them are kept where there are no more.
        violations: By how much each point breaks the constraints, [points], see `constrained_ranks`. Default: none
            does. Points with a violation are told apart by it alone: their losses may be NaN, and crowding is not
            looked at.
        tiers: Which points are comparable, [points], see `tiered_ranks`. Default: all are.

    Returns:
        The survivors, in the order of the rows. The same rows in another order give the same survivors, full ties
        aside: of those the earlier row is kept.

    Raises:
        ValueError: `size` below 1, or as `check_losses`.
    """
    if size < 1:
        raise ValueError(f"size: need 1 or more, got {size}")
    if violations is None and tiers is None:
        array = check_losses(losses)
        ranks = pareto_ranks(array)
    else:
        array = np.asarray(losses, dtype=np.float64)
        broken = np.zeros(len(array)) if violations is None else np.asarray(violations)
        array = np.where(broken[:, None] > 0, 0.0, array)  # all equal where they must not count
        ranks = tiered_ranks(array, broken, np.zeros(len(array), dtype=np.int64) if tiers is None else tiers)
    if len(array) > size:
        counts = np.bincount(ranks)
        before = np.cumsum(counts) - counts
        last = int(np.flatnonzero(before < size)[-1])
        partial = np.flatnonzero(ranks == last)
        kept = _thin(array, partial, size - int(before[last]))
        indices = np.sort(np.concatenate([np.flatnonzero(ranks < last), kept]))
    else:
        indices = np.arange(len(array))
    # Every front below the last is kept whole, so no survivor's rank changes when the rest goes.
    ranks = ranks[indices]
    return Survivors(indices, ranks, crowding_by_front(array[indices], ranks))


def _thin(losses: FloatArray, front: IntArray, size: int) -> IntArray:
    """Take the most crowded point out of `front` (rows of `losses`) until `size` are left.

    Where only ends are left, infinitely far from one another by the crowding distance, those of fewer objectives go
    first, and then those with the smaller gaps in the rest: with few places and many objectives that is the common
    case.
    """
    while len(front) > size:
        ends, gaps = _ends_and_gaps(losses[front])
        worst = np.lexsort((-front, gaps, ends))[0]  # full ties go against the later row
        front = np.delete(front, worst)
    return front


def tournament_pair(ranks: IntArray, crowding: FloatArray, rng: Rng) -> tuple[int, int]:
    """Choose two different parents by binary tournament: the lower front wins, then the less crowded, then chance.

    Source: the crowded comparison of Deb et al. 2002, section III-B.

    Args:
        ranks: The front of each candidate, [candidates].
        crowding: Crowding distance of each candidate, [candidates].
        rng: Drawn from twice, whatever the outcome.

    Returns:
        The parents' indices, different from one another.

    Raises:
        ValueError: fewer than two candidates.
    """
    count = len(ranks)
    if count < 2:
        raise ValueError(f"ranks: a pair needs two candidates or more, got {count}")

    def best(entrants: IntArray) -> int:
        return int(min(entrants, key=lambda i: (ranks[i], -crowding[i])))  # a tie goes to the first, drawn at random

    first = best(rng.permutation(count)[:2])
    others = np.delete(np.arange(count), first)
    second = best(others[rng.permutation(count - 1)[:2]])
    return first, second


def non_dominated(losses: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Say which points no other point dominates, [points]; points with equal losses stand or fall together.

    Raises:
        ValueError: as `check_losses`.
    """
    return np.asarray(moocore.is_nondominated(check_losses(losses), keep_weakly=True), dtype=np.bool_)


class Archive(Generic[Item]):
    """The non-dominated of all points so far, with what they stand for; points with equal losses all stay.

    Args:
        num_objectives: Losses of each point.
    """

    def __init__(self, num_objectives: int) -> None:
        self.losses = np.zeros((0, num_objectives))
        self.items: list[Item] = []

    def add(self, losses: npt.ArrayLike, items: Sequence[Item]) -> None:
        """Take in points, [points, objectives], and what they stand for, one each.

        Raises:
            ValueError: as `check_losses`.
        """
        points = check_losses(np.reshape(np.asarray(losses, dtype=np.float64), (-1, self.losses.shape[1])))
        if len(points) > _ONE_BY_ONE:
            everything, everyone = np.concatenate([self.losses, points]), [*self.items, *items]
            kept = non_dominated(everything)
            self.losses = everything[kept]
            self.items = [item for item, keep in zip(everyone, kept, strict=True) if keep]
            return
        for point, item in zip(points, items, strict=True):
            if dominate(self.losses, point).any():
                continue
            beaten = dominate(point, self.losses)
            if beaten.any():
                self.losses = self.losses[~beaten]
                self.items = [item for item, out in zip(self.items, beaten, strict=True) if not out]
            self.losses = np.concatenate([self.losses, point[None]])
            self.items.append(item)


def hypervolume(points: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Measure the volume that points dominate, up to a reference point.

    Args:
        points: [points, objectives], minimised. None at all give 0.
        reference: [objectives]; what lies beyond it in any objective adds nothing.

    Returns:
        The volume, in the product of the objectives' units.

    Raises:
        ValueError: as `check_losses`, or `reference` is not finite or has another number of objectives.
    """
    array = check_losses(points)
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape != (array.shape[1],) or not np.isfinite(corner).all():
        raise ValueError(f"reference: need {array.shape[1]} finite numbers, one an objective, got {corner.tolist()}")
    if len(array) == 0:
        return 0.0
    return float(moocore.hypervolume(array, ref=corner))
