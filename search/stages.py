"""From genomes to evaluations in the log: the trainings beside one another, the measurements one by one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from search import nsga2
from search.data import Corpus
from search.evaluate import Outcome, Task, candidate_seed
from search.evaluation import FINAL, Evaluation, Status
from search.ranking import Ranking
from search.result_cache import ResultCache
from search.settings import RUNG_FACTOR, Settings
from search.store import Store
from search.view import View
from search.workers import Workers
from star_core import Genome

LOG_SECONDS = 1.0
"""Results are logged one by one, or so many seconds' results at once: a commit waits for the disk, 0.3 to 10 ms. Until
then each has a file of its own, so that a kill in between loses nothing."""


@dataclass(frozen=True)
class Request:
    """A genome to evaluate, and where it came from."""

    genome: Genome
    generation: int
    kind: str = "candidate"
    name: str | None = None
    parents: tuple[str, ...] = ()
    repaired: bool = False
    mutations: tuple[str, ...] = ()
    replica: int = 0

    @cached_property
    def text(self) -> str:
        """The genome's canonical text."""
        return str(self.genome.canonical())

    @cached_property
    def genome_hash(self) -> str:
        """The genome's hash."""
        return self.genome.hash

    def evaluation(self, outcome: Outcome, settings: Settings, rungs: Sequence[Mapping[str, float]] = ()) -> Evaluation:
        """Return the row of the log for an outcome."""
        return Evaluation(
            genome=self.text,
            genome_hash=self.genome_hash,
            status=outcome.status,
            seed=candidate_seed(settings.seed, self.genome_hash, self.replica),
            generation=self.generation,
            metrics=outcome.metrics,
            seconds=outcome.seconds,
            error=outcome.error,
            kind=self.kind,
            name=self.name,
            parents=self.parents,
            repaired=self.repaired,
            curve=outcome.curve,
            cached=outcome.cached,
            rungs=tuple(rungs),
            mutations=self.mutations,
            inherited=outcome.inherited,
        )


@dataclass(eq=False)
class Climber:
    """A request on its way up the rungs: its outcome so far, and what training gave at each rung."""

    request: Request
    outcome: Outcome = field(default_factory=lambda: Outcome(Status.OK, {}, 0.0))
    measured: Outcome | None = None
    rungs: list[Mapping[str, float]] = field(default_factory=list)

    def reach(self, trained: Outcome, measured: Outcome | None) -> None:
        """Take in what the training up to the next rung gave, and what was measured, the first time or again."""
        seconds = self.outcome.seconds + trained.seconds
        self.outcome = replace(trained, seconds=seconds)
        if trained.status is not Status.OK:
            return
        if measured is not None:
            self.outcome = _joined(self.outcome, measured if self.measured is None else replace(measured, seconds=0.0))
            self.measured = measured
        self.rungs.append({name: trained.metrics[name] for name in ("perplexity", "bits_per_byte")})


class Stages:
    """Evaluates requests for one run.

    Args:
        settings: Of the run.
        store: The open run folder, with the corpus saved in `store.work`.
        workers: Who does the work.
        view: What shows it.
    Raises:
        SettingsError: The cache can't be used.
    """

    def __init__(self, settings: Settings, store: Store, workers: Workers, view: View) -> None:
        self.settings, self.store, self.workers, self.view = settings, store, workers, view
        self.cache: ResultCache | None = None
        if settings.cache is not None:
            self.cache = ResultCache(Path(settings.cache), Corpus.load(store.work).fingerprint)

    def close(self) -> None:
        """Close the cache."""
        if self.cache is not None:
            self.cache.close()

    def evaluate(self, requests: Sequence[Request]) -> list[Evaluation]:
        """Return the evaluations of `requests`, in order: those in the log from there, the others trained together and
        measured one by one. With rungs, candidates climb them; the baselines are trained in one go."""
        known = {request.genome_hash: self.store.find(request.genome_hash) for request in requests}
        new = [request for request in requests if known[request.genome_hash] is None]
        fresh = {request.genome_hash for request in new}
        if self.settings.rungs > 1:
            climbing = [request for request in new if request.kind == "candidate"]
            climbed = self._climb(climbing)
            self._log(list(zip(climbing, climbed, strict=True)))
            known |= {evaluation.genome_hash: evaluation for evaluation in climbed}
            new = [request for request in new if request.kind != "candidate"]
        trained = self._run([self.task(request, "train") for request in new])
        evaluations = []
        waiting: list[tuple[Request, Evaluation]] = []
        last = time.monotonic()
        for request in requests:
            evaluation = known[request.genome_hash]
            if evaluation is None:
                outcome = trained[request.genome_hash]
                if outcome.status is Status.OK and self.settings.timed:
                    outcome = _joined(outcome, self.measure(request))
                evaluation = request.evaluation(outcome, self.settings)
                waiting.append((request, evaluation))
                if time.monotonic() - last >= LOG_SECONDS:
                    self._log(waiting)
                    waiting, last = [], time.monotonic()
            self.view.done(evaluation, request.genome_hash in fresh)
            evaluations.append(evaluation)
        self._log(waiting)
        return evaluations

    def _log(self, results: Sequence[tuple[Request, Evaluation]]) -> None:
        """Append results to the log, and then delete the files that held them until now."""
        self.store.add(*(evaluation for _, evaluation in results))
        for request, _ in results:
            self.forget(request)

    def _climb(self, requests: Sequence[Request]) -> list[Evaluation]:
        """Train `requests` rung by rung, synchronous successive halving with a Pareto front instead of a best.

        At each rung the best third goes on, by front and crowding among those that came so far (Schmucker et al.,
        "Multi-objective asynchronous successive halving", 2021, arXiv:2106.12639), from their checkpoints; the schedule
        of the learning rate is that of the whole training, so that who reaches the last rung has trained as in one go.
        Times and memory do not depend on training, and are measured once, after the lowest rung. Who goes on is decided
        from result files that stay until all are logged together: a search that is killed in between decides the same.

        Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", 2016,
        arXiv:1502.07943. Differs from it in: rounds are generations, so that nothing depends on which training ends
        first; `search.asynchronous` promotes as soon as it can.
        """
        settings, steps = self.settings, self.settings.rung_steps
        climbers = [Climber(request) for request in requests]
        going = climbers
        for rung, stop in enumerate(steps):
            last = rung == len(steps) - 1
            start = steps[rung - 1] if rung else None
            tasks = [replace(self.task(c.request, "train"), start=start, stop=None if last else stop) for c in going]
            trained = self._run(tasks)
            for climber in going:
                outcome, measured = trained[climber.request.genome_hash], climber.measured
                if outcome.status is Status.OK and settings.timed and measured is None:
                    measured = self.measure(climber.request)
                climber.reach(outcome, measured)
            going = [climber for climber in going if climber.outcome.status is Status.OK]
            if not last and going:
                places = math.ceil(settings.population / RUNG_FACTOR ** (rung + 1))
                best = best_of([climber.outcome.metrics for climber in going], places, settings.ranking)
                promoted = [going[i] for i in best]
                for climber in going:
                    if climber not in promoted:
                        self.task(climber.request, "train").checkpoint_path(stop).unlink(missing_ok=True)
                going = promoted
        return [c.request.evaluation(c.outcome, settings, c.rungs) for c in climbers]

    def forget(self, request: Request) -> None:
        """Delete what the trainings of a genome that is in the log have left."""
        train, measure = self.task(request, "train"), self.task(request, "measure")
        left = [train.result_path, measure.result_path]
        for step in self.settings.rung_steps[:-1]:
            left += [replace(train, stop=step).result_path, train.checkpoint_path(step)]
        for path in left:
            path.unlink(missing_ok=True)

    def repeat(self, front: Sequence[Evaluation]) -> None:
        """Train and measure the front again with `settings.final_seeds` other seeds each, and log it.

        The search's own results are the best of many, and so better than they are likely to be again; these are not.

        Raises:
            OSError: The disk is full.
        """
        requests = [
            Request(Genome.parse(e.genome), e.generation, f"{FINAL} {replica}", e.name, e.parents, replica=replica)
            for replica in range(1, self.settings.final_seeds + 1)
            for e in front
        ]
        missing = [r for r in requests if self.store.find(r.genome_hash, r.kind) is None]
        trained = self._run([self.task(r, "train") for r in missing])
        for request in missing:
            outcome = trained[self.task(request, "train").name]
            if outcome.status is Status.OK and self.settings.timed:
                outcome = _joined(outcome, self.measure(request))
            evaluation = request.evaluation(outcome, self.settings)
            self.store.add(evaluation)
            self.forget(request)
            self.view.repeated(evaluation)

    def give_weights(self, front: Sequence[Evaluation]) -> None:
        """Train those of the front again whose results came from the cache, since no weights came with them.

        Raises:
            OSError: The disk is full.
        """
        missing = [e for e in front if not self.store.has_weights(e)]
        tasks = [self.task(Request(Genome.parse(e.genome), e.generation), "train") for e in missing]
        logged = {e.genome_hash: e for e in front}
        for task, outcome in self.workers.run(tasks, self.jobs, self.view.training):
            self.view.retrained(logged[task.genome_hash], outcome)
            task.result_path.unlink(missing_ok=True)

    def do(self, tasks: Iterable[Task | None], jobs: int) -> Iterator[tuple[Task, Outcome]]:
        """Yield each task with its outcome once it is done, in any order; arguments as `Workers.run` has them."""
        for task, outcome in self.workers.run(tasks, jobs, self.view.training):
            self.view.trained(task)
            if self.cache is not None:
                self.cache.add(task, outcome)
            yield task, outcome

    def cached(self, task: Task) -> Outcome | None:
        """Return the outcome of the same task in an earlier run that shares its cache."""
        return None if self.cache is None else self.cache.find(task)

    def task(self, request: Request, stage: str) -> Task:
        """Return one half of an evaluation."""
        seed = candidate_seed(self.settings.seed, request.genome_hash, request.replica)
        work = self.store.work
        # A repetition is the unbiased one: it begins afresh.
        parents = request.parents if self.settings.inherit and not request.replica else ()
        return Task(
            request.text,
            request.genome_hash,
            seed,
            self.settings,
            work,
            stage,
            replica=request.replica,
            parents=parents,
        )

    def measure(self, request: Request) -> Outcome:
        """Return what was measured of a genome, while nothing else runs."""
        task = self.task(request, "measure")
        self.view.measuring(task)
        return self._run([task], jobs=1)[task.name]

    def _run(self, tasks: Sequence[Task], jobs: int | None = None) -> Mapping[str, Outcome]:
        """Do the tasks that no earlier run has done, the longest first; return all outcomes by their tasks' names."""
        outcomes: dict[str, Outcome] = {}
        left = []
        for task in sorted(tasks, key=_work, reverse=True):
            if (found := self.cached(task)) is not None:
                outcomes[task.name] = found
            else:
                left.append(task)
        outcomes |= {task.name: outcome for task, outcome in self.do(left, jobs or self.jobs)}
        return outcomes

    @property
    def jobs(self) -> int:
        """Candidates that are trained at once on this machine."""
        return self.settings.jobs or torch.get_num_threads()


def _work(task: Task) -> int:
    """Guess how long a genome trains, in channels of LIVs: a differential one is two, and a recurrence takes twice as
    long.

    With the longest first, no core waits long for the last. Tried on 36 candidates of width 64: the guess correlates
    with the seconds at 0.92, and 12 candidates on two cores take 1 % longer than half their sum, where in the order of
    the asking they take 4 %.
    """
    genome = Genome.parse(task.genome)
    width = genome.sizes.width or task.settings.width
    livs = sum((2 if liv.differential else 1) * (2 if liv.family == "recurrence" else 1) for liv in genome.classes)
    return width * livs


def best_of(metrics: Sequence[Mapping[str, float]], places: int, ranking: Ranking) -> list[int]:
    """Return the indices of so many of the best, by front and crowding."""
    losses, violations = [ranking.losses(m) for m in metrics], [ranking.violation(m) for m in metrics]
    return [int(i) for i in nsga2.survive(losses, places, violations).indices]


def _joined(trained: Outcome, measured: Outcome) -> Outcome:
    """Return the result of both stages; a candidate that could not be measured has failed."""
    seconds = trained.seconds + measured.seconds
    metrics = {**trained.metrics, **measured.metrics} if measured.status is Status.OK else {}
    return replace(trained, status=measured.status, metrics=metrics, seconds=seconds, error=measured.error)
