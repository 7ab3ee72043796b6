"""What NSGA-II is held against: random search, a plain genetic algorithm, and nevergrad's own optimizers.

All are asked and told in the same way, never propose a value twice, and take the same budget.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from contextlib import suppress
from typing import Any

import nevergrad as ng
import numpy as np
from nevergrad.optimization.base import Optimizer

from search import nsga2
from search.ask_tell import SAMPLE_TRIES, AskTell
from search.evolution import NSGA2
from search.settings import OPTIMIZERS, Settings, SettingsError, nearest
from search.space import GenomeParameter, bounds_of
from search.told import Told, stack

PROBE_ASKS = 100
"""Candidates that nevergrad's optimizers are tried with: past the sampling that most of them begin with, 40 at most."""


class RandomSearch(AskTell):
    """Sample afresh each time, without repeats; what was told changes nothing."""

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        return self._sample_new()


class GeneticAlgorithm(AskTell):
    """A plain generational genetic algorithm on one fitness, without elitism.

    The first `population_size` candidates are sampled. After so many asks the candidates told since become the parents
    of the next as many: two of them by binary tournament, recombined, mutated. Fitness is the average rank of a
    candidate among the parents over the losses, so that no unit of a loss weighs more than another; what breaks
    constraints stands behind what breaks none, by how much it breaks them (Deb, "An efficient constraint handling
    method for genetic algorithms", Computer Methods in Applied Mechanics and Engineering 186, 2000).

    Source: average ranking, Bentley and Wakefield, "Finding acceptable solutions in the Pareto-optimal range using
    multiobjective genetic algorithms", in Soft Computing in Engineering Design and Manufacturing, Springer, 1998.
    Arguments and errors are those of `search.ask_tell.AskTell`.
    """

    def __init__(
        self, parametrization: ng.p.Parameter, budget: int | None = None, num_workers: int = 1, **options: Any
    ) -> None:
        super().__init__(parametrization, budget, num_workers, **options)
        self._parents: list[Told] = []
        self._standing = np.zeros(0, dtype=np.int64)  # of _parents, 0 the fittest
        self._children: list[Told] = []
        self._asked_since = 0

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        if self._asked_since >= self.population_size and len(self._children) >= 2:
            self._parents = sorted(self._children, key=lambda told: told.order)
            self._standing = _by_average_rank(self._parents, self.num_objectives)
            self._children = []
            self._asked_since = 0
        self._asked_since += 1
        if len(self._parents) < 2:
            return self._sample_new()
        first, second = nsga2.tournament_pair(self._standing, np.zeros(len(self._standing)), self._rng)
        return self._breed_new(self._parents[first].candidate, self._parents[second].candidate)

    def _take_in(self, told: Told) -> None:
        self._children.append(told)

    def _take_out(self, candidate: ng.p.Parameter) -> None:
        self._children = [told for told in self._children if told.candidate.uid != candidate.uid]


def _by_average_rank(told: list[Told], num_objectives: int) -> nsga2.IntArray:
    """Return how many candidates are fitter than each, [candidates]; equal ones are equally placed."""
    tiers, violations = np.array([one.tier for one in told]), np.array([one.violation for one in told])
    losses, average = stack(told, num_objectives), np.zeros(len(told))
    for tier in np.unique(tiers):
        members = np.flatnonzero((tiers == tier) & (violations == 0))
        fewer = [np.searchsorted(np.sort(column), column) for column in losses[members].T]
        average[members] = np.sum(fewer, axis=0)
    keys = np.stack([tiers, violations, average], axis=1)
    _, place, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - counts)[place.ravel()], dtype=np.int64)


class Nevergrad(AskTell):
    """One of nevergrad's optimizers, which takes a single loss.

    It is told the mean logarithm of the losses, the weighted product of multi-criteria decisions with equal weights
    (Miller and Starr, "Executive Decisions and Operations Research", 1969), in which no unit of a loss matters. What
    breaks constraints is told as worse than all that breaks none, and a failure as worse than both, since many of these
    optimizers wait for every answer: those that take genomes only compare. What it proposes a second time is answered
    from memory and never given out. Of a candidate that is told again, after more training, they hear the first time
    alone.

    Args:
        name: Its name in nevergrad's registry.
    Further arguments and errors are those of `search.ask_tell.AskTell`.
    """

    _BROKEN = 1e5  # beyond every mean logarithm
    _TIER = 1e8  # beyond every violation that is worth telling apart
    _FAILED = 1e12

    def __init__(
        self,
        parametrization: ng.p.Parameter,
        budget: int | None = None,
        num_workers: int = 1,
        *,
        name: str,
        **options: Any,
    ) -> None:
        super().__init__(parametrization, budget, num_workers, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ng.errors.InefficientSettingsWarning)  # the budget is the user's
            self._inner: Optimizer = ng.optimizers.registry[name](parametrization, budget, num_workers)
        self._name = name
        self._answers: dict[Hashable, float] = {}

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        for _ in range(SAMPLE_TRIES):
            candidate = self._inner.ask()
            if self._take_if_new(candidate):
                return candidate
            self._inner.tell(candidate, self._answers.get(candidate.get_value_hash(), self._FAILED))
        raise ng.errors.NevergradEarlyStopping(
            f"ask: {self._name} proposed nothing new {SAMPLE_TRIES} times in a row; it is stuck"
        )

    def discard(self, candidate: ng.p.Parameter) -> None:
        """See `AskTell.discard`."""
        super().discard(candidate)
        self._answer(candidate, self._FAILED)

    def _take_in(self, told: Told) -> None:
        if told.violation:
            answer = self._BROKEN + min(told.violation, self._BROKEN)
        else:
            answer = float(np.log(np.maximum(told.losses, 1e-300)).mean())
        self._answer(told.candidate, answer + self._TIER * told.tier)

    def _answer(self, candidate: ng.p.Parameter, loss: float) -> None:
        key = candidate.get_value_hash()
        answered = key in self._answers
        self._answers[key] = loss
        if answered:
            return
        # Some can't take what they did not ask for, a suggestion: the front holds it all the same.
        with suppress(ng.errors.TellNotAskedNotSupportedError):
            self._inner.tell(candidate, loss)


def make_optimizer(settings: Settings) -> AskTell:
    """Return the optimizer of `Settings.optimizer` on genomes, seeded.

    Raises:
        SettingsError: There is none of that name, or it does not take genomes.
    """
    name = settings.optimizer
    if name not in OPTIMIZERS:
        if name not in ng.optimizers.registry:
            known = (*OPTIMIZERS, *sorted(ng.optimizers.registry))
            hint = nearest(name, known)
            few = f"; needs one of {', '.join(OPTIMIZERS)} or a name of nevergrad's such as RecMixES"
            raise SettingsError(f"optimizer: unknown {name!r}{hint if 'did you mean' in hint else few}")
        _try_out(name, settings)
    return _make(settings)


def _make(settings: Settings) -> AskTell:
    bounds = bounds_of(settings.depth, settings.width, settings.head_dim, settings.seq_len)
    parameter = GenomeParameter(settings.depth, level=settings.level, bounds=bounds)
    parameter.random_state = np.random.RandomState(settings.seed % 2**32)
    made = {"nsga2": NSGA2, "random": RandomSearch, "ga": GeneticAlgorithm}.get(settings.optimizer)
    arguments: dict[str, Any] = {"num_objectives": len(settings.objectives), "population_size": settings.population}
    budget, workers = settings.population * settings.generations, settings.population
    if made is not None:
        return made(parameter, budget, workers, **arguments)
    return Nevergrad(parameter, budget, workers, name=settings.optimizer, **arguments)


def _try_out(name: str, settings: Settings) -> None:
    """Ask an optimizer for some genomes and tell it made-up losses."""
    message = f"optimizer: nevergrad's {name} can't search over genomes"
    needs = f"needs one of {', '.join(OPTIMIZERS)}, or one that mutates and recombines, such as RecMixES"
    try:
        optimizer = _make(settings)
        for number in range(PROBE_ASKS):
            candidate = optimizer.ask()
            optimizer.tell(candidate, [1.0 + number % 7] * optimizer.num_objectives)
    except ng.errors.NevergradEarlyStopping:
        return  # a small space, used up
    except Exception as error:
        # Whatever it trips over: these are 500 optimizers made for numbers.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SettingsError(f"{message} ({reason}); {needs}") from error
