"""The search itself: ask for a generation, evaluate it, tell the results, keep the front.

Generational, and so deterministic: what is asked depends on the seed and on the results alone, and results are logged
and told in the order of the asking. A search that goes on after a kill runs the same loop from its beginning; results
that are in the log are not computed again, and so it ends where it would have ended. `search.asynchronous` is the loop
of a search without generations.
"""

from __future__ import annotations

from collections.abc import Callable

from search.asynchronous import Asynchronous
from search.evaluation import Status
from search.front import front_of
from search.optimizers import make_optimizer
from search.proposals import Proposals
from search.settings import Settings
from search.stages import Request, Stages
from search.store import Store
from search.view import View
from search.workers import Workers
from star_core import Genome
from star_core.genome.baselines import BASELINES


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
    baselines = [Request(make(settings.depth), -1, "baseline", name) for name, make in BASELINES.items()]
    stages.evaluate(baselines)
    on_generation()
    proposals = _begin(settings, stages, baselines)
    if settings.asynchronous:
        Asynchronous(settings, stages, proposals, on_generation).run()
    else:
        _evolve(settings, stages, proposals, on_generation)
    if settings.cache is not None or settings.final_seeds:
        front = front_of(stages.store.evaluations(), settings.ranking)
        if settings.cache is not None:
            stages.give_weights(front)
        stages.repeat(front)
        on_generation()


def _begin(settings: Settings, stages: Stages, baselines: list[Request]) -> Proposals:
    """Return the optimizer, with the baselines excluded and the genomes to start from in line."""
    optimizer = make_optimizer(settings)
    starts = [Genome.parse(text) for text in settings.start]
    names = {genome.hash: f"start {number}" for number, genome in enumerate(starts, start=1)}
    optimizer.exclude(request.genome for request in baselines if request.genome.hash not in names)
    for genome in reversed(starts):  # the last suggested is the first asked for
        optimizer.suggest(genome)
    return Proposals(settings, stages, optimizer, names)


def _evolve(settings: Settings, stages: Stages, proposals: Proposals, on_generation: Callable[[], None]) -> None:
    ranking, optimizer = settings.ranking, proposals.optimizer
    for generation in range(settings.generations):
        candidates = proposals.ask(generation, settings.population)
        requests = [proposals.request(candidate, generation) for candidate in candidates]
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
