"""What every optimizer of the search shares: ask for a candidate, tell its losses or discard it, in any order.

nevergrad gives the parameter, ask and tell, suggestions, callbacks, dump and load. Its own multi-objective ranking is
never used: `FastNonDominatedRanking` in 1.0.12 counts objectives won, which is not dominance, and its hypervolume on
every tell takes 80 to 671 ms at three to five objectives.

What is asked depends on the random state and on which results were in at each ask, and on nothing else: not on the
clock, not on the order in which the results came in between two asks. A tell draws no random number. So in generational
use (ask P, then tell or discard all of them) the order of the tells is of no consequence, and in asynchronous use the
same interleaving of asks and results gives the same search.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import nevergrad as ng
import numpy as np
from nevergrad.optimization.base import Optimizer

from search import nsga2
from search.told import Counters, Member, Told, members_of, stack

# Asking for something new: so many rounds of mutation on one child, then so many fresh samples, then the space is taken
# to be used up. A space of which 1 % is still unseen is given up wrongly once in 20 times (0.99 ** 300 = 0.05).
MUTATION_TRIES = 20
SAMPLE_TRIES = 300


class AskTell(Optimizer):  # type: ignore[misc]  # nevergrad ships no types
    """Keeps the books of a search with several losses; subclasses choose what to ask next.

    No value is asked twice, whether told, discarded or in flight. Works with any `ng.p.Parameter` that can sample,
    mutate, recombine and hash its value; one that repairs itself says so in an attribute `repaired`, which is counted.
    A subclass has `_internal_ask_candidate`, and `_take_in` for what it wants to know of a candidate that was told.

    Args:
        parametrization: What is searched over. Seed its `random_state` to make the search deterministic.
        budget: Evaluations; only `minimize` reads it.
        num_workers: Candidates in flight at once; only `minimize` reads it. ask itself bounds nothing.
        num_objectives: Losses of each candidate, 1 or more, all minimised. Past three nearly everything is
            non-dominated.
        population_size: Candidates that survive, 4 or more.

    Raises:
        TypeError: `parametrization` is no `ng.p.Parameter`.
        ValueError: `num_objectives` below 1, `population_size` below 4.
    """

    def __init__(
        self,
        parametrization: ng.p.Parameter,
        budget: int | None = None,
        num_workers: int = 1,
        *,
        num_objectives: int,
        population_size: int = 16,
    ) -> None:
        if not isinstance(parametrization, ng.p.Parameter):
            raise TypeError(f"parametrization: need an ng.p.Parameter, got {type(parametrization).__name__}")
        if num_objectives < 1:
            raise ValueError(f"num_objectives: need 1 or more, got {num_objectives}")
        if population_size < 4:
            raise ValueError(f"population_size: need 4 or more, got {population_size}")
        super().__init__(parametrization, budget=budget, num_workers=num_workers)
        self._no_hypervolume = True
        self.pruning = None
        self.num_objectives = num_objectives
        self.population_size = population_size
        self._seen: set[Hashable] = set()
        self._in_flight: dict[str, tuple[int, ng.p.Parameter]] = {}
        self._telling = (np.zeros(0), 0.0, 0)  # losses, violation and tier of the candidate that is being told
        self._orders: dict[str, int] = {}  # of the candidates told in a tier above 0, by uid: they may be told again
        self._next_order = 0
        self._archive: nsga2.Archive[Told] = nsga2.Archive(num_objectives)
        self._discarded = 0
        self._bred = 0
        self._repaired = 0
        self._duplicates_avoided = 0

    def front(self) -> list[Member]:
        """Return the non-dominated of all candidates told in tier 0 that break no constraint, oldest ask first.

        Not all of them are in the population: it has `population_size` places, and with four or five objectives a
        search finds more.
        """
        front = self._sorted_front()
        losses = stack(front, self.num_objectives)
        ranks = np.zeros(len(front), dtype=np.int64)
        everyone = nsga2.Survivors(np.arange(len(ranks)), ranks, nsga2.crowding_by_front(losses, ranks))
        return members_of(front, everyone)

    def pareto_front(self, size: int | None = None) -> list[ng.p.Parameter]:
        """Return the candidates of `front`, or the `size` of them that are spread most evenly.

        Raises:
            ValueError: `size` below 1.
        """
        front = self._sorted_front()
        if size is None or not front:
            return [told.candidate for told in front]
        kept = nsga2.survive(stack(front, self.num_objectives), size).indices
        return [front[i].candidate for i in kept]

    def _sorted_front(self) -> list[Told]:
        return sorted(self._archive.items, key=lambda told: told.order)

    @property
    def in_flight(self) -> list[ng.p.Parameter]:
        """Candidates asked and neither told nor discarded, oldest first: what is still owed after a dump is loaded."""
        return [candidate for _, candidate in self._in_flight.values()]

    @property
    def counters(self) -> Counters:
        """What was done so far, counted."""
        return Counters(
            asked=self.num_ask,
            told=self.num_tell,
            discarded=self._discarded,
            in_flight=len(self._in_flight),
            bred=self._bred,
            repaired=self._repaired,
            duplicates_avoided=self._duplicates_avoided,
        )

    def exclude(self, values: Iterable[Any]) -> None:
        """Never ask for these values: what was evaluated elsewhere, such as the baselines.

        Args:
            values: What the parametrization's candidates could have as `value`.

        Raises:
            TypeError, ValueError: the parametrization refuses a value.
        """
        for value in values:
            candidate = self.parametrization.spawn_child(new_value=value)
            self._seen.add(candidate.get_value_hash())

    def suggest(self, *args: Any, **kwargs: Any) -> None:
        """Put a value in line: the next ask gives it out, the last suggested first.

        Raises:
            ValueError: the value was asked, told, suggested or excluded before, breaks a registered constraint, or is
                refused by the parametrization.
        """
        super().suggest(*args, **kwargs)
        suggestion = self._suggestions[-1]
        key = suggestion.get_value_hash()
        if key in self._seen or not suggestion.satisfies_constraints():
            self._suggestions.pop()
            known = "was asked, told, suggested or excluded before"
            raise ValueError(f"suggest: {suggestion.value} {known if key in self._seen else 'breaks a constraint'}")
        self._seen.add(key)

    def ask(self) -> ng.p.Parameter:
        """Give out a candidate whose value was never given out before.

        Returns:
            The candidate, frozen. Evaluate its value, then `tell` its losses or `discard` it; one that never comes back
            holds up nothing.

        Raises:
            ng.errors.NevergradEarlyStopping: nothing new was found; the space is used up, or nearly.
        """
        candidate = super().ask()
        self._in_flight[candidate.uid] = (self._take_order(), candidate)
        return candidate

    def tell(
        self,
        candidate: ng.p.Parameter,
        loss: float | Sequence[float] | nsga2.FloatArray | None,
        constraint_violation: float | Sequence[float] | nsga2.FloatArray | None = None,
        penalty_style: None = None,
        *,
        tier: int = 0,
    ) -> None:
        """Take in the losses of a candidate.

        Args:
            candidate: One that `ask` gave out (or a pickled copy of it), or a new one spawned from the parametrization,
                whose value was never asked.
            loss: One finite number an objective. None where they are not known, which takes a violation.
            constraint_violation: By how much the candidate breaks each constraint, or all of them together, in units
                that add up; 0 or less for a constraint that holds. What breaks none is better than all that break one,
                and of those the smaller sum is better (constraint domination, Deb et al. 2002, section VI).
            penalty_style: Not supported: nothing is added to a loss.
            tier: Candidates are comparable inside a tier alone; all of a lower one are better than all of a higher one.
                The front is that of tier 0.

        Raises:
            TypeError: `candidate` is not of the parametrization's class.
            ValueError: a loss or violation is not finite, there are too few losses or too many, or none and no
                violation, the candidate was told or discarded before, or an argument that is not supported is given.
                Nothing is changed then.
        """
        if penalty_style is not None:
            raise ValueError("penalty_style: not supported; constraints are compared, no penalty is added to a loss")
        violation = _check_violation(constraint_violation)
        if loss is None and not violation:
            raise ValueError("loss: need one number an objective of a candidate that breaks no constraint, got None")
        losses = np.full(self.num_objectives, np.nan) if loss is None else self._check_told(loss)
        self._check_unsettled(candidate)
        if candidate.uid not in self._in_flight:
            self._seen.add(candidate.get_value_hash())
        self._telling = (losses, violation, tier)
        # A violation keeps nevergrad from recommending the candidate; the penalty that it adds is not looked at.
        super().tell(candidate, losses if len(losses) > 1 else [float(losses[0])], violation or float(tier) or None)

    def revise(
        self,
        candidate: ng.p.Parameter,
        loss: Sequence[float] | nsga2.FloatArray | None,
        constraint_violation: float = 0.0,
        *,
        tier: int = 0,
    ) -> None:
        """Replace what was told of a candidate in a tier above 0: its training went on.

        Args:
            candidate: One that was told in a higher tier.
            loss: One finite number an objective; None for a candidate that has failed since, and leaves the population.
            constraint_violation: As in `tell`.
            tier: As in `tell`.

        Raises:
            ValueError: a loss or violation is not finite, there are too few losses or too many, or the candidate was
                not told in a tier above 0. Nothing is changed then.
        """
        violation = _check_violation(constraint_violation)
        losses = None if loss is None else self._check_told(loss)
        if candidate.uid not in self._orders:
            raise ValueError(f"candidate: need one told in a tier above 0, got {candidate.value}")
        order = self._orders[candidate.uid]
        self._take_out(candidate)
        if losses is None or not tier:
            del self._orders[candidate.uid]
        if losses is not None:
            self._enter(Told(order, candidate, losses, violation, tier))

    def discard(self, candidate: ng.p.Parameter) -> None:
        """Free a candidate that failed or was lost. It never enters the population, and its value is not asked again.

        Raises:
            TypeError: `candidate` is not of the parametrization's class.
            ValueError: the candidate is not in flight.
        """
        self._check_unsettled(candidate)
        if candidate.uid not in self._in_flight:
            raise ValueError("candidate: need one in flight, got one that was never asked")
        del self._in_flight[candidate.uid]
        self._asked.discard(candidate.uid)
        self._discarded += 1

    # What nevergrad calls.

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        order = self._in_flight.pop(candidate.uid)[0] if candidate.uid in self._in_flight else self._take_order()
        told = Told(order, candidate, *self._telling)
        if told.tier:
            self._orders[candidate.uid] = order
        self._enter(told)

    def _preprocess_multiobjective(self, candidate: ng.p.Parameter) -> float:
        """Keep nevergrad from building its own front: it would hold every candidate ever told, unfiltered."""
        return 0.0

    def _enter(self, told: Told) -> None:
        self._take_in(told)
        if not told.violation and not told.tier:
            self._archive.add(told.losses, [told])

    # For subclasses.

    def _take_in(self, told: Told) -> None:
        """Take note of a candidate that was told. No random number may be drawn here."""

    def _take_out(self, candidate: ng.p.Parameter) -> None:
        """Forget what was told of a candidate; what it is worth now is taken in next, unless it failed."""

    def _take_order(self) -> int:
        self._next_order += 1
        return self._next_order - 1

    def _check_told(self, loss: float | Sequence[float] | nsga2.FloatArray) -> nsga2.FloatArray:
        """Return the losses of one candidate as [objectives], fp64."""
        losses = np.atleast_1d(np.asarray(loss, dtype=np.float64))
        if losses.shape != (self.num_objectives,):
            raise ValueError(f"loss: need {self.num_objectives} numbers, one an objective, got shape {losses.shape}")
        if not np.isfinite(losses).all():
            raise ValueError(f"loss: need finite numbers, got {losses.tolist()}; a failed candidate is to be discarded")
        return losses

    def _check_unsettled(self, candidate: ng.p.Parameter) -> None:
        """Refuse what is no candidate of this search, or one that was told or discarded before."""
        if not isinstance(candidate, type(self.parametrization)):
            expected = type(self.parametrization).__name__
            raise TypeError(f"candidate: need a {expected} as given out by ask, got {type(candidate).__name__}")
        if candidate.uid not in self._in_flight and candidate.get_value_hash() in self._seen:
            settled = "told, discarded, suggested or excluded before"
            raise ValueError(f"candidate: {candidate.value} is not in flight: {settled}")

    def _take_if_new(self, candidate: ng.p.Parameter) -> bool:
        key = candidate.get_value_hash()
        if key in self._seen:
            self._duplicates_avoided += 1
            return False
        if not candidate.satisfies_constraints():
            return False
        self._seen.add(key)
        return True

    def _sample_new(self) -> ng.p.Parameter:
        for _ in range(SAMPLE_TRIES):
            candidate = self.parametrization.sample()
            if self._take_if_new(candidate):
                return candidate
        raise ng.errors.NevergradEarlyStopping(
            f"ask: {SAMPLE_TRIES} samples in a row were all asked before or break a constraint; the space is used up"
        )

    def _breed_new(self, first: ng.p.Parameter, second: ng.p.Parameter) -> ng.p.Parameter:
        child = first.spawn_child()
        # A parent told as a pickled copy, back from a worker, has a copy of the random state too: its children would
        # repeat each other's draws.
        child.random_state = self._rng
        child.recombine(second)
        child.parents_uids = [first.uid, second.uid]
        for _ in range(MUTATION_TRIES):
            child.mutate()
            if self._take_if_new(child):
                self._bred += 1
                self._repaired += bool(getattr(child, "repaired", False))
                return child
        return self._sample_new()


def _check_violation(violation: float | Sequence[float] | nsga2.FloatArray | None) -> float:
    """Return the sum of what is above 0."""
    if violation is None:
        return 0.0
    terms = np.atleast_1d(np.asarray(violation, dtype=np.float64))
    if not np.isfinite(terms).all():
        raise ValueError(f"constraint_violation: need finite numbers, got {terms.tolist()}")
    return float(np.maximum(terms, 0.0).sum())
