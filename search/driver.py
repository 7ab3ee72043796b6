"""The search itself: ask for a generation, evaluate it, tell the results, keep the front.

Generational, and so deterministic: what is asked depends on the seed and on the results alone, and results are logged
and told in the order of the asking. A search that goes on after a kill runs the same loop from its beginning; results
that are in the log are not computed again, and so it ends where it would have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

import nevergrad as ng

from search.ask_tell import AskTell
from search.data import Corpus
from search.evaluate import Outcome, count_metrics
from search.evaluation import Evaluation, Status
from search.front import front_of
from search.optimizers import make_optimizer
from search.settings import Settings
from search.space import GenomeParameter
from search.stages import Request, Stages
from search.store import Store
from search.view import View
from search.workers import Workers
from star_core import Genome
from star_core.genome.baselines import BASELINES

REJECTIONS_PER_PLACE = 50
"""Genomes over the budget that are looked at in a generation, for each of its places; then it stays smaller. Counting a
genome of 8 LIVs takes 16 ms, so that a generation of 12 looks for 10 s at most."""


def search(settings: Settings, store: Store, workers: Workers, view: View, on_generation: Callable[[], None]) -> None:
    """Evaluate the baselines, then evolve; everything is in the run folder when this returns.

    The initial population begins with the genomes of `settings.start`. One that is a baseline is not evaluated again,
    and logged as the baseline alone.

    Args:
        settings: What to search.
        store: The open run folder, with the corpus saved in `store.work`.
        workers: Who evaluates.
        view: What shows it.
        on_generation: Called after the baselines, after each generation and at the end, with everything logged.
    Raises:
        OSError: The disk is full.
        SettingsError: The optimizer or the cache can't be used.
    """
    stages = Stages(settings, store, workers, view)
    try:
        _search(settings, stages, on_generation)
    finally:
        stages.close()


def _search(settings: Settings, stages: Stages, on_generation: Callable[[], None]) -> None:
    ranking = settings.ranking
    baselines = [Request(make(settings.depth), -1, "baseline", name) for name, make in BASELINES.items()]
    stages.evaluate(baselines)
    on_generation()
    optimizer = make_optimizer(settings)
    starts = [Genome.parse(text) for text in settings.start]
    names = {genome.hash: f"start {number}" for number, genome in enumerate(starts, start=1)}
    optimizer.exclude(request.genome for request in baselines if request.genome.hash not in names)
    for genome in reversed(starts):  # the last suggested is the first asked for
        optimizer.suggest(genome)
    for generation in range(settings.generations):
        candidates = _propose(optimizer, generation, names, settings, stages)
        requests = [_request(candidate, generation, names) for candidate in candidates]
        for candidate, evaluation in zip(candidates, stages.evaluate(requests), strict=True):
            if evaluation.status is Status.OK:
                metrics = evaluation.metrics
                tier, violation = ranking.tier(len(evaluation.rungs)), ranking.violation(metrics)
                optimizer.tell(candidate, ranking.losses(metrics), violation, tier=tier)
                succeeded = not (tier or violation)
            else:
                optimizer.discard(candidate)
                succeeded = False
            candidate.learn_outcome(succeeded)
        on_generation()
    if settings.cache is not None or settings.final_seeds:
        front = front_of(stages.store.evaluations(), ranking)
        if settings.cache is not None:
            stages.give_weights(front)
        stages.repeat(front)
        on_generation()


def _request(candidate: GenomeParameter, generation: int, names: Mapping[str, str]) -> Request:
    genome = candidate.value
    return Request(
        genome,
        generation,
        name=names.get(genome.hash),
        parents=candidate.parent_hashes,
        repaired=candidate.repaired,
        mutations=candidate.mutations,
    )


def _propose(
    optimizer: AskTell, generation: int, names: Mapping[str, str], settings: Settings, stages: Stages
) -> list[GenomeParameter]:
    """Ask for a generation to train; a space that is used up gives a smaller one, or none.

    What breaks the budget by its sizes is logged, told by how much, and not part of the generation: it costs nothing,
    and evolution finds its way into the budget by it.
    """
    candidates: list[GenomeParameter] = []
    rejections: list[Evaluation] = []
    store, ranking = stages.store, settings.ranking
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
                optimizer.tell(candidate, None, ranking.violation(rejection.metrics), tier=settings.rungs - 1)
                candidate.learn_outcome(False)
                rejections.append(rejection)
                stages.view.rejected(rejection)
    store.add(*(rejection for rejection in rejections if store.find(rejection.genome_hash) is None))
    return candidates


def _rejected(request: Request, settings: Settings, store: Store, vocab_size: int) -> Evaluation | None:
    """Return the evaluation of a genome whose sizes break the budget; None for one that is to be trained, or was."""
    known = store.find(request.genome_hash)
    if known is not None:
        return known if known.status is Status.OVER_BUDGET else None
    try:
        metrics = count_metrics(request.genome, settings, vocab_size)
    except ValueError:
        return None  # no model has these genes: training says so, with the reason
    reason = settings.ranking.reason(metrics)
    return request.evaluation(Outcome(Status.OVER_BUDGET, metrics, 0.0, reason), settings) if reason else None
