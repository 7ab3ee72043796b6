"""The search itself: ask for a generation, evaluate it, tell the results, keep the front.

Generational, and so deterministic: what is asked depends on the seed and on the results alone, and results are logged
and told in the order of the asking. A search that goes on after a kill runs the same loop from its beginning; results
that are in the log are not computed again, and so it ends where it would have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import nevergrad as ng
import torch

from search.ask_tell import AskTell
from search.data import Corpus
from search.evaluate import Outcome, Task, candidate_seed, count_metrics
from search.optimizers import make_optimizer
from search.settings import Settings
from search.space import GenomeParameter
from search.store import Evaluation, Status, Store
from search.view import View
from search.workers import Workers
from star_core import Genome
from star_core.genome import POOL
from star_core.genome.baselines import BASELINES

REJECTIONS_PER_PLACE = 50
"""Genomes over the budget that are looked at in a generation, for each of its places; then it stays smaller. At 3 ms
each, a generation of 12 looks for 2 s at most."""


@dataclass(frozen=True)
class Request:
    """A genome to evaluate, and where it came from."""

    genome: Genome
    generation: int
    kind: str = "candidate"
    name: str | None = None
    parents: tuple[str, ...] = ()
    repaired: bool = False


def search(settings: Settings, store: Store, workers: Workers, view: View, on_generation: Callable[[], None]) -> None:
    """Evaluate the baselines, then evolve; everything is in the run folder when this returns.

    The initial population begins with the genomes of `settings.start`. One that is a baseline is not evaluated again,
    and logged as the baseline alone.

    Args:
        settings: What to search.
        store: The open run folder, with the corpus saved in `store.work`.
        workers: Who evaluates.
        view: What shows it.
        on_generation: Called after the baselines and after each generation, with everything logged.
    Raises:
        OSError: The disk is full.
    """
    ranking = settings.ranking
    baselines = [Request(make(settings.depth), -1, "baseline", name) for name, make in BASELINES.items()]
    _evaluate(baselines, settings, store, workers, view)
    on_generation()
    optimizer = make_optimizer(settings)
    starts = [Genome.parse(text) for text in settings.start]
    names = {genome.hash: f"start {number}" for number, genome in enumerate(starts, start=1)}
    optimizer.exclude(request.genome for request in baselines if request.genome.hash not in names)
    for genome in reversed(starts):  # the last suggested is the first asked for
        optimizer.suggest(genome)
    for generation in range(settings.generations):
        candidates = _propose(optimizer, generation, names, settings, store, view)
        requests = [_request(candidate, generation, names) for candidate in candidates]
        for candidate, evaluation in zip(candidates, _evaluate(requests, settings, store, workers, view), strict=True):
            if evaluation.status is Status.OK:
                metrics = evaluation.metrics
                optimizer.tell(candidate, ranking.losses(metrics), ranking.violation(metrics))
            else:
                optimizer.discard(candidate)
        on_generation()


def _request(candidate: GenomeParameter, generation: int, names: Mapping[str, str]) -> Request:
    genome = candidate.value
    return Request(
        genome, generation, name=names.get(genome.hash), parents=candidate.parent_hashes, repaired=candidate.repaired
    )


def _propose(
    optimizer: AskTell, generation: int, names: Mapping[str, str], settings: Settings, store: Store, view: View
) -> list[GenomeParameter]:
    """Ask for a generation to train; a space that is used up gives a smaller one, or none.

    What breaks the budget by its sizes is logged, told by how much, and not part of the generation: it costs nothing,
    and evolution finds its way into the budget by it.
    """
    candidates: list[GenomeParameter] = []
    rejections: list[Evaluation] = []
    vocab_size = Corpus.load(store.work).vocab_size if settings.counted else 0
    tries = settings.population * (1 + (REJECTIONS_PER_PLACE if settings.counted else 0))
    with suppress(ng.errors.NevergradEarlyStopping):
        while len(candidates) < settings.population and len(candidates) + len(rejections) < tries:
            candidate = optimizer.ask()
            request = _request(candidate, generation, names)
            rejection = _rejected(request, settings, store, vocab_size) if settings.counted else None
            if rejection is None:
                candidates.append(candidate)
            else:
                optimizer.tell(candidate, None, settings.ranking.violation(rejection.metrics))
                rejections.append(rejection)
                view.rejected(rejection)
    store.add(*(rejection for rejection in rejections if store.find(rejection.genome_hash) is None))
    return candidates


def _rejected(request: Request, settings: Settings, store: Store, vocab_size: int) -> Evaluation | None:
    """Return the evaluation of a genome whose sizes break the budget; None for one that is to be trained, or was."""
    known = store.find(request.genome.hash)
    if known is not None:
        return known if known.status is Status.OVER_BUDGET else None
    try:
        metrics = count_metrics(request.genome, settings, vocab_size)
    except ValueError:
        return None  # no model has these genes: training says so, with the reason
    reason = settings.ranking.reason(metrics)
    return _evaluation(request, Outcome(Status.OVER_BUDGET, metrics, 0.0, reason), settings) if reason else None


def _evaluate(
    requests: Sequence[Request], settings: Settings, store: Store, workers: Workers, view: View
) -> list[Evaluation]:
    """Return the evaluations of `requests`, in order: those in the log from there, the others trained together and
    measured one by one."""
    known = {request.genome.hash: store.find(request.genome.hash) for request in requests}
    missing = [request.genome for request in requests if known[request.genome.hash] is None]
    trained = _run(missing, "train", settings, store, workers, view)
    evaluations = []
    for request in requests:
        evaluation = known[request.genome.hash]
        fresh = evaluation is None
        if evaluation is None:
            outcome = trained[request.genome.hash]
            if outcome.status is Status.OK and settings.timed:
                measured = _run([request.genome], "measure", settings, store, workers, view)
                outcome = _joined(outcome, measured[request.genome.hash])
            evaluation = _evaluation(request, outcome, settings)
            store.add(evaluation)
            for stage in ("train", "measure"):
                _task(request.genome, stage, settings, store).result_path.unlink(missing_ok=True)
        view.done(evaluation, fresh)
        evaluations.append(evaluation)
    return evaluations


def _run(
    genomes: Sequence[Genome], stage: str, settings: Settings, store: Store, workers: Workers, view: View
) -> Mapping[str, Outcome]:
    """Do one stage for every genome: trainings beside one another, a measurement alone."""
    outcomes = {}
    jobs = 1 if stage == "measure" else settings.jobs or torch.get_num_threads()
    tasks = [_task(genome, stage, settings, store) for genome in sorted(genomes, key=_work, reverse=True)]
    if stage == "measure":
        view.measuring(tasks[0])
    for task, outcome in workers.run(tasks, jobs, view.training):
        outcomes[task.genome_hash] = outcome
        view.trained(task)
    return outcomes


def _work(genome: Genome) -> int:
    """Guess how long a genome trains, in LIVs: a differential one is two, and a recurrence takes twice as long.

    With the longest first, no core waits long for the last. Tried on 36 candidates of width 64: the guess correlates
    with the seconds at 0.92, and 12 candidates on two cores take 1 % longer than half their sum, where in the order of
    the asking they take 4 %.
    """
    classes = [POOL[genes.liv_class] for genes in genome.livs]
    return sum((2 if liv.differential else 1) * (2 if liv.family == "recurrence" else 1) for liv in classes)


def _task(genome: Genome, stage: str, settings: Settings, store: Store) -> Task:
    genome_hash = genome.hash
    seed = candidate_seed(settings.seed, genome_hash)
    return Task(str(genome.canonical()), genome_hash, seed, settings, store.work, stage)


def _joined(trained: Outcome, measured: Outcome) -> Outcome:
    """Return the result of both stages; a candidate that could not be measured has failed."""
    seconds = trained.seconds + measured.seconds
    metrics = {**trained.metrics, **measured.metrics} if measured.status is Status.OK else {}
    return Outcome(measured.status, metrics, seconds, measured.error, trained.curve)


def _evaluation(request: Request, outcome: Outcome, settings: Settings) -> Evaluation:
    genome_hash = request.genome.hash
    return Evaluation(
        genome=str(request.genome.canonical()),
        genome_hash=genome_hash,
        status=outcome.status,
        seed=candidate_seed(settings.seed, genome_hash),
        generation=request.generation,
        metrics=outcome.metrics,
        seconds=outcome.seconds,
        error=outcome.error,
        kind=request.kind,
        name=request.name,
        parents=request.parents,
        repaired=request.repaired,
        curve=outcome.curve,
    )
