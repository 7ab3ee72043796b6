"""NSGA-II as a nevergrad optimizer; `search.nsga2` gives fronts, crowding and survival.

What is asked depends on the random state and on which results were in at each ask, and on nothing else: not on the
clock, not on the order in which the results came in between two asks. A tell draws no random number. So in generational
use (ask P, then tell or discard all of them) the order of the tells is of no consequence, and in asynchronous use the
same interleaving of asks and results gives the same search.
"""

from typing import Any

import nevergrad as ng
import numpy as np

from search import nsga2
from search.ask_tell import AskTell
from search.told import Member, Told, members_of, stack


class NSGA2(AskTell):
    """Search for the trade-offs between several losses with NSGA-II.

    The first `population_size` candidates are sampled (or suggested). After them each one is bred: two parents by
    tournament, recombined, mutated. At each ask the parents and everything told since the ask before go through
    survival together, so that asking P and telling P is the generational NSGA-II, and telling one at a time is its
    steady-state form (Durillo et al., "On the effect of the steady-state selection scheme in multi-objective genetic
    algorithms", EMO 2009).

    Source: Deb et al. 2002; see `search.nsga2` for what differs. Arguments and errors are those of
    `search.ask_tell.AskTell`.
    """

    def __init__(
        self, parametrization: ng.p.Parameter, budget: int | None = None, num_workers: int = 1, **options: Any
    ) -> None:
        super().__init__(parametrization, budget, num_workers, **options)
        self._alive: list[Told] = []
        self._standing: nsga2.Survivors | None = None  # of _alive; None once something was told

    @property
    def population(self) -> list[Member]:
        """The told candidates that are alive, oldest ask first; at most `population_size`. Looking changes nothing."""
        return members_of(*self._survivors())

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        self._alive, self._standing = self._survivors()
        told = len(self._alive)
        # Lost candidates count as in flight for ever; with half a population told, breeding starts all the same.
        if told + len(self._in_flight) < self.population_size or 2 * told < self.population_size:
            return self._sample_new()
        first, second = nsga2.tournament_pair(self._standing.ranks, self._standing.crowding, self._rng)
        return self._breed_new(self._alive[first].candidate, self._alive[second].candidate)

    def _take_in(self, told: Told) -> None:
        self._alive.append(told)
        self._standing = None

    def _take_out(self, candidate: ng.p.Parameter) -> None:
        self._alive = [told for told in self._alive if told.candidate.uid != candidate.uid]
        self._standing = None

    def _survivors(self) -> tuple[list[Told], nsga2.Survivors]:
        """Return who of parents and children lives on, oldest ask first, and where each stands; change nothing."""
        if self._standing is not None:
            return self._alive, self._standing
        everyone = sorted(self._alive, key=lambda told: told.order)
        violations = np.array([told.violation for told in everyone])
        tiers = np.array([told.tier for told in everyone])
        standing = nsga2.survive(stack(everyone, self.num_objectives), self.population_size, violations, tiers)
        return [everyone[i] for i in standing.indices], standing
