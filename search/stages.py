"""From genomes to evaluations in the log: the trainings beside one another, the measurements one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from search.data import Corpus
from search.evaluate import Outcome, Task, candidate_seed
from search.result_cache import ResultCache
from search.settings import Settings
from search.store import Evaluation, Status, Store
from search.view import View
from search.workers import Workers
from star_core import Genome
from star_core.genome import POOL


@dataclass(frozen=True)
class Request:
    """A genome to evaluate, and where it came from."""

    genome: Genome
    generation: int
    kind: str = "candidate"
    name: str | None = None
    parents: tuple[str, ...] = ()
    repaired: bool = False

    def evaluation(self, outcome: Outcome, settings: Settings) -> Evaluation:
        """Return the row of the log for an outcome."""
        genome_hash = self.genome.hash
        return Evaluation(
            genome=str(self.genome.canonical()),
            genome_hash=genome_hash,
            status=outcome.status,
            seed=candidate_seed(settings.seed, genome_hash),
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
        )


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
        measured one by one."""
        known = {request.genome.hash: self.store.find(request.genome.hash) for request in requests}
        missing = [request.genome for request in requests if known[request.genome.hash] is None]
        trained = self._run([self.task(genome, "train") for genome in missing])
        evaluations = []
        for request in requests:
            evaluation = known[request.genome.hash]
            fresh = evaluation is None
            if evaluation is None:
                outcome = trained[request.genome.hash]
                if outcome.status is Status.OK and self.settings.timed:
                    outcome = _joined(outcome, self._measure(request.genome))
                evaluation = request.evaluation(outcome, self.settings)
                self.store.add(evaluation)
                for stage in ("train", "measure"):
                    self.task(request.genome, stage).result_path.unlink(missing_ok=True)
            self.view.done(evaluation, fresh)
            evaluations.append(evaluation)
        return evaluations

    def give_weights(self, front: Sequence[Evaluation]) -> None:
        """Train those of the front again whose results came from the cache, since no weights came with them.

        Raises:
            OSError: The disk is full.
        """
        tasks = [self.task(Genome.parse(e.genome), "train") for e in front if not self.store.has_weights(e)]
        logged = {e.genome_hash: e for e in front}
        for task, outcome in self.workers.run(tasks, self._jobs(), self.view.training):
            self.view.retrained(logged[task.genome_hash], outcome)
            task.result_path.unlink(missing_ok=True)

    def task(self, genome: Genome, stage: str) -> Task:
        """Return one half of a genome's evaluation."""
        genome_hash = genome.hash
        seed = candidate_seed(self.settings.seed, genome_hash)
        return Task(str(genome.canonical()), genome_hash, seed, self.settings, self.store.work, stage)

    def _measure(self, genome: Genome) -> Outcome:
        task = self.task(genome, "measure")
        self.view.measuring(task)
        return self._run([task], jobs=1)[task.genome_hash]

    def _run(self, tasks: Sequence[Task], jobs: int | None = None) -> Mapping[str, Outcome]:
        """Do the tasks that no earlier run has done, the longest first; return all outcomes by the genome's hash."""
        outcomes: dict[str, Outcome] = {}
        left = []
        for task in sorted(tasks, key=_work, reverse=True):
            if self.cache is not None and (found := self.cache.find(task)) is not None:
                outcomes[task.genome_hash] = found
            else:
                left.append(task)
        for task, outcome in self.workers.run(left, jobs or self._jobs(), self.view.training):
            outcomes[task.genome_hash] = outcome
            self.view.trained(task)
            if self.cache is not None:
                self.cache.add(task, outcome)
        return outcomes

    def _jobs(self) -> int:
        return self.settings.jobs or torch.get_num_threads()


def _work(task: Task) -> int:
    """Guess how long a genome trains, in LIVs: a differential one is two, and a recurrence takes twice as long.

    With the longest first, no core waits long for the last. Tried on 36 candidates of width 64: the guess correlates
    with the seconds at 0.92, and 12 candidates on two cores take 1 % longer than half their sum, where in the order of
    the asking they take 4 %.
    """
    classes = [POOL[genes.liv_class] for genes in Genome.parse(task.genome).livs]
    return sum((2 if liv.differential else 1) * (2 if liv.family == "recurrence" else 1) for liv in classes)


def _joined(trained: Outcome, measured: Outcome) -> Outcome:
    """Return the result of both stages; a candidate that could not be measured has failed."""
    seconds = trained.seconds + measured.seconds
    metrics = {**trained.metrics, **measured.metrics} if measured.status is Status.OK else {}
    return Outcome(measured.status, metrics, seconds, measured.error, trained.curve, trained.cached)
