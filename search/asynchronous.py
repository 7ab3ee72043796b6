"""A search without generations: whenever a place is free, a candidate goes on to its next rung, or a new one begins.

No place waits for the slowest training of a generation. In return, what is asked depends on which training ends first,
and so two runs of the same settings differ. Everything that happens goes into the journal of the run folder before
anything follows from it; a search that goes on after a kill repeats its journal, with the same draws of the same
optimizer, and then does what was begun and not finished. So nothing is lost, and nothing is trained twice.

Times are never taken beside a training: where they are wanted, trainings pause after each `Settings.population` of new
candidates until those are measured.

Source: the asynchronous successive halving of Li et al., "A system for massively parallel hyperparameter tuning"
(ASHA), 2020, arXiv:1810.05934, with front and crowding in the place of one loss as in Schmucker et al.,
"Multi-objective asynchronous successive halving", 2021, arXiv:2106.12639. Differs from both in: candidates are bred by
the optimizer, which hears of every rung; each time that another population's worth of results is in at a rung, those
outside the best `KEPT_THIRDS` thirds are given up, with their checkpoints; and when nothing new is left to begin,
shares of a third are rounded up, so that someone reaches the last rung.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from search.evaluate import Outcome, Task
from search.evaluation import Evaluation, Status
from search.proposals import Proposals
from search.ranking import Ranking
from search.settings import RUNG_FACTOR, Settings
from search.space import GenomeParameter
from search.stages import Climber, Stages, best_of
from search.store import RunFolderError

KEPT_THIRDS = 2
"""A rung's results are kept for a later promotion while they are among so many thirds of them."""


@dataclass(eq=False)
class _Candidate:
    """A candidate on its way: `rung` is the one that it trains for or, where it waits, the last that it has reached."""

    parameter: GenomeParameter
    climber: Climber
    rung: int = 0
    trained: Outcome | None = None  # at `rung`, and not measured yet
    told: bool = False

    @property
    def genome_hash(self) -> str:
        return self.climber.request.genome_hash


@dataclass
class _Rung:
    """What was reached at a rung: by hash, the metrics of all that was not given up."""

    results: int = 0  # all that there were
    reached: dict[str, Mapping[str, float]] = field(default_factory=dict)
    gone_on: set[str] = field(default_factory=set)
    looked_at: int = 0  # how many results there were when nobody was found to go on

    def best(self, places: int, ranking: Ranking) -> set[str]:
        """Return the hashes of so many of the best."""
        hashes = list(self.reached)
        return {hashes[i] for i in best_of(list(self.reached.values()), places, ranking)}


class Asynchronous:
    """One search; `run` returns when everything is in the log.

    Args:
        settings: Of the search.
        stages: Who trains, measures and logs.
        proposals: Who is asked for candidates.
        on_generation: Called after each `Settings.population` of logged candidates.
    """

    def __init__(
        self, settings: Settings, stages: Stages, proposals: Proposals, on_generation: Callable[[], None]
    ) -> None:
        self._settings, self._stages, self._proposals = settings, stages, proposals
        self._optimizer = proposals.optimizer
        self._on_generation = on_generation
        self._rungs = [_Rung() for _ in settings.rung_steps]
        self._training: dict[str, _Candidate] = {}
        self._unmeasured: dict[str, _Candidate] = {}
        self._waiting: dict[str, _Candidate] = {}
        self._asked = 0
        self._logged = 0
        self._replaying = False

    def run(self) -> None:
        """Search until as many candidates are evaluated as `Settings.generations` of `Settings.population` have.

        Raises:
            OSError: The disk is full.
            RunFolderError: The journal was written by a search that asked for other genomes.
        """
        self._replaying = True
        for event in self._stages.store.events():
            self._repeat(event)
        self._replaying = False
        while True:
            for task, outcome in self._stages.do(self._tasks(), self._stages.jobs):
                self._happen("trained", task.genome_hash, outcome)
            if not self._unmeasured:
                break
            for genome_hash, candidate in list(self._unmeasured.items()):
                self._happen("measured", genome_hash, self._stages.measure(candidate.climber.request))
        for candidate in list(self._waiting.values()):
            self._log(candidate, succeeded=False)
        self._on_generation()

    def _tasks(self) -> Iterator[Task | None]:
        """Give the next training each time there is a place; None while the next depends on what still trains."""
        for candidate in list(self._training.values()):  # begun by a driver that was killed
            yield self._task(candidate)
        while len(self._unmeasured) < self._settings.population:
            new = self._promote() or self._begin()
            if new is not None:
                task = self._task(new)
                if (found := self._stages.cached(task)) is None:
                    yield task
                else:
                    self._happen("trained", task.genome_hash, found)
            elif self._training:
                yield None
            else:
                return

    def _task(self, candidate: _Candidate) -> Task:
        steps = self._settings.rung_steps
        last = candidate.rung == len(steps) - 1
        return replace(
            self._stages.task(candidate.climber.request, "train"),
            start=steps[candidate.rung - 1] if candidate.rung else None,
            stop=None if last else steps[candidate.rung],
        )

    @property
    def _asked_all(self) -> bool:
        return self._asked == self._settings.population * self._settings.generations

    def _begin(self) -> _Candidate | None:
        """Ask for a new candidate to train; None where all were asked for, or nothing new is left."""
        while not self._asked_all:
            if (candidate := self._ask(known=None)) is not None:
                return candidate
        return None

    def _ask(self, known: str | None) -> _Candidate | None:
        """Ask for a candidate, `known` is the hash that the journal has for it; None for one that needs no training."""
        generation = self._asked // self._settings.population
        asked = self._proposals.ask(generation, 1)
        requests = [self._proposals.request(parameter, generation) for parameter in asked]
        genome_hash = requests[0].genome_hash if requests else ""
        store = self._stages.store
        if known is None:
            store.record({"event": "asked", "genome_hash": genome_hash})
        elif known != genome_hash:
            raise RunFolderError(
                f"{store.root}: the journal has genome {known[:8] or 'none'} where this version of the search asks for "
                f"{genome_hash[:8] or 'none'}; go on with the version that it began with"
            )
        self._asked += 1
        if not asked:
            return None
        candidate = _Candidate(asked[0], Climber(requests[0]))
        baseline = store.find(genome_hash, "baseline")
        if baseline is not None:  # a genome to start from, which is evaluated and logged
            self._tell(candidate, baseline)
            return None
        self._training[genome_hash] = candidate
        return candidate

    def _promote(self) -> _Candidate | None:
        """Let the best that waits below the highest rung with a free place go on; None if no rung has one."""
        closing = self._asked_all and not self._training and not self._unmeasured
        for rung in reversed(self._rungs[:-1]):
            share = rung.results / RUNG_FACTOR
            places = math.ceil(share) if closing else math.floor(share)
            if len(rung.gone_on) >= places or (rung.looked_at == rung.results and not closing):
                continue
            best = rung.best(places, self._settings.ranking)
            waiting = [genome_hash for genome_hash in rung.reached if genome_hash in best - rung.gone_on]
            if waiting:
                self._happen("promoted", waiting[0], None)
                return self._training[waiting[0]]
            rung.looked_at = rung.results
        return None

    def _happen(self, event: str, genome_hash: str, outcome: Outcome | None) -> None:
        """Write down what happens, and let it happen."""
        written = {"event": event, "genome_hash": genome_hash}
        self._stages.store.record(written | ({} if outcome is None else {"outcome": outcome.to_json()}))
        self._react(event, genome_hash, outcome)

    def _repeat(self, event: dict[str, Any]) -> None:
        if event["event"] == "asked":
            self._ask(known=event["genome_hash"])
        else:
            outcome = Outcome.from_json(event["outcome"]) if "outcome" in event else None
            self._react(event["event"], event["genome_hash"], outcome)

    def _react(self, event: str, genome_hash: str, outcome: Outcome | None) -> None:
        if event == "promoted":
            candidate = self._waiting.pop(genome_hash)
            self._rungs[candidate.rung].gone_on.add(genome_hash)
            candidate.rung += 1
            self._training[genome_hash] = candidate
            return
        assert outcome is not None
        if event == "measured":
            candidate = self._unmeasured.pop(genome_hash)
            assert candidate.trained is not None
            candidate.climber.reach(candidate.trained, outcome)
        else:
            candidate = self._training.pop(genome_hash)
            measured = candidate.climber.measured
            if outcome.status is Status.OK and self._settings.timed and measured is None:
                candidate.trained = outcome
                self._unmeasured[genome_hash] = candidate
                return
            candidate.climber.reach(outcome, measured)
        self._settle(candidate)

    def _settle(self, candidate: _Candidate) -> None:
        """Tell the optimizer what a candidate is worth now; log it if it is done, or let it wait at its rung."""
        evaluation = self._evaluation(candidate)
        self._tell(candidate, evaluation)
        if evaluation.status is not Status.OK or candidate.rung == len(self._rungs) - 1:
            self._log(candidate, succeeded=evaluation.status is Status.OK and not self._violation(evaluation))
            return
        self._waiting[candidate.genome_hash] = candidate
        rung = self._rungs[candidate.rung]
        rung.results += 1
        rung.reached[candidate.genome_hash] = evaluation.metrics
        if rung.results % self._settings.population == 0:
            kept = rung.best(math.ceil(rung.results * KEPT_THIRDS / RUNG_FACTOR), self._settings.ranking)
            for genome_hash in [one for one in rung.reached if one not in kept | rung.gone_on]:
                del rung.reached[genome_hash]
                self._log(self._waiting[genome_hash], succeeded=False)

    def _evaluation(self, candidate: _Candidate) -> Evaluation:
        climber, settings = candidate.climber, self._settings
        return climber.request.evaluation(climber.outcome, settings, climber.rungs if settings.rungs > 1 else ())

    def _violation(self, evaluation: Evaluation) -> float:
        return self._settings.ranking.violation(evaluation.metrics)

    def _tell(self, candidate: _Candidate, evaluation: Evaluation) -> None:
        ranking, optimizer, parameter = self._settings.ranking, self._optimizer, candidate.parameter
        if evaluation.status is not Status.OK:
            if candidate.told:
                optimizer.revise(parameter, None)
            else:
                optimizer.discard(parameter)
            return
        tell = optimizer.revise if candidate.told else optimizer.tell
        violation, tier = self._violation(evaluation), ranking.tier(len(evaluation.rungs))
        tell(parameter, ranking.losses(evaluation.metrics), violation, tier=tier)
        candidate.told = True

    def _log(self, candidate: _Candidate, *, succeeded: bool) -> None:
        """Append a candidate that will not go on to the log, and forget it."""
        stages, request = self._stages, candidate.climber.request
        self._waiting.pop(request.genome_hash, None)
        candidate.parameter.learn_outcome(succeeded)
        evaluation = self._evaluation(candidate)
        fresh = stages.store.find(request.genome_hash) is None
        if fresh:
            stages.store.add(evaluation)
        stages.forget(request)
        stages.view.done(evaluation, fresh)
        self._logged += 1
        if not self._replaying and self._logged % self._settings.population == 0:
            self._on_generation()
