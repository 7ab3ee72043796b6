"""What an optimizer of the search keeps of its candidates: losses, where they stand, and counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import nevergrad as ng
import numpy as np

from search import nsga2


@dataclass(frozen=True)
class Member:
    """A told candidate and where it stands.

    Attributes:
        candidate: The parameter that was asked; its value is what was evaluated.
        losses: What was told, [objectives], fp64; NaN where a candidate that breaks a constraint has none.
        rank: Front inside the population, 0 the best.
        crowding: Crowding distance inside that front.
        violation: By how much it breaks the constraints, 0 for not at all.
    """

    candidate: ng.p.Parameter
    losses: nsga2.FloatArray
    rank: int
    crowding: float
    violation: float = 0.0


@dataclass(frozen=True)
class Counters:
    """What an optimizer has done so far.

    Attributes:
        asked: Candidates given out, suggestions among them.
        told: Candidates whose losses came in.
        discarded: Candidates that failed or were lost.
        in_flight: Candidates given out and neither told nor discarded.
        bred: Candidates given out that have parents; the rest were sampled or suggested.
        repaired: Those of `bred` that needed repair.
        duplicates_avoided: Proposals dropped since the same value had been asked before.
    """

    asked: int
    told: int
    discarded: int
    in_flight: int
    bred: int
    repaired: int
    duplicates_avoided: int

    @property
    def repaired_share(self) -> float:
        """Repaired share of the candidates bred, 0 where none was."""
        return self.repaired / self.bred if self.bred else 0.0


@dataclass(frozen=True)
class Told:
    """A candidate with its losses, [objectives], its place in the order of asking, and its tier, 0 the best."""

    order: int
    candidate: ng.p.Parameter
    losses: nsga2.FloatArray
    violation: float
    tier: int


def stack(told: Sequence[Told], num_objectives: int) -> nsga2.FloatArray:
    """Return the losses, [candidates, objectives], of none or more candidates."""
    return np.array([one.losses for one in told], dtype=np.float64).reshape(len(told), num_objectives)


def members_of(told: Sequence[Told], standing: nsga2.Survivors) -> list[Member]:
    """Return the told candidates with where they stand."""
    rows = zip(told, standing.ranks, standing.crowding, strict=True)
    return [
        Member(one.candidate, one.losses, int(rank), float(distance), one.violation) for one, rank, distance in rows
    ]
